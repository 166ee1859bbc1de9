"""Volumes: NIfTI files, their geometry, and how they become slices."""
