"""A table of systems, seeds and directions: the compare command."""
