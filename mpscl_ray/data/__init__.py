"""Volumes, slices, datasets and streams of batches."""

SOURCE_DOMAIN = "source"
"""The labelled domain."""

TARGET_DOMAIN = "target"
"""The unlabelled domain that the segmenter is adapted to."""

SPLITS = ("train", "val", "test")
"""Parts of a dataset. Each patient is in one of them."""
