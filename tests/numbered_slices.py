"""A small prepared dataset whose slices carry the number of their row."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.written_dataset import save_plain_manifest, write_plain_case

CLASSES = ("background", "MYO", "LAC")
DEPTHS = (3, 140, 1, 26)
SIZE = (12, 20)


def write_dataset(folder: Path, depths: tuple[int, ...] = DEPTHS, *, labelled: bool = True) -> np.ndarray:
    """Write a dataset in which the first pixel of every slice is the number of its row; returns all images."""
    rng = np.random.default_rng(0)
    cases, images = [], []
    for number, depth in enumerate(depths):
        image = rng.uniform(-1, 1, (depth, *SIZE)).astype(np.float32)
        image[:, 0, 0] = np.arange(depth) + sum(depths[:number])
        images.append(image)
        label = rng.integers(0, 3, image.shape).astype(np.uint8) if labelled else None
        cases.append(write_plain_case(folder, f"case-{number}", "train", image, label, CLASSES))
    save_plain_manifest(folder, "mr", CLASSES, SIZE, cases)
    return np.concatenate(images)
