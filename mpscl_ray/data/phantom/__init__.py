"""Phantom hearts in two modalities: anatomy, imaging, and NIfTI files of them."""
