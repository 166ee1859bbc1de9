"""Volumes, slices, datasets and streams of batches."""

from mpscl_ray.runs.structures import NOT_ANNOTATED

SOURCE_DOMAIN = "source"
"""The labelled domain."""

TARGET_DOMAIN = "target"
"""The unlabelled domain that the segmenter is adapted to."""

SPLITS = ("train", "val", "test")
"""Parts of a dataset. Each patient is in one of them."""

__all__ = ["NOT_ANNOTATED", "SOURCE_DOMAIN", "SPLITS", "TARGET_DOMAIN"]
