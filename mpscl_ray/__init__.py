"""Unsupervised domain adaptation of medical image segmentation (MPSCL), trained data-parallel on Ray."""

__version__ = "0.1.0"
