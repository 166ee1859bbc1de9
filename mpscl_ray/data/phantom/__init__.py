"""Phantom hearts in two modalities: anatomy, imaging, and their NIfTI files."""
