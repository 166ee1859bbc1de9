"""Volumes, slices, datasets and the stream of batches."""

SOURCE_DOMAIN = "source"
"""The labelled domain."""

TARGET_DOMAIN = "target"
"""The unlabelled domain that the segmenter is adapted to."""

SPLITS = ("train", "val", "test")
"""Parts of a dataset, by patient."""

__all__ = ["SOURCE_DOMAIN", "SPLITS", "TARGET_DOMAIN"]
