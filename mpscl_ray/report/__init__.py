"""The figures of the paper from any runs, on one page: the report command."""
