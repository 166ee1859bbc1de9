"""From raw files to a dataset: layouts, checks, splits, and the prepare command."""
