"""Scores: metrics of a volume, their tables, and the evaluate command."""
