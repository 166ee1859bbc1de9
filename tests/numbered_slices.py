"""A small prepared dataset whose slices carry the number of their row."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpscl_ray.data.dataset import FORMAT_VERSION, Manifest, Scaling, save_manifest
from mpscl_ray.data.parquet_writer import write_case

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
        cases.append(
            write_case(
                folder,
                id=f"case-{number}",
                patient=f"patient-{number}",
                split="train",
                image=image,
                label=rng.integers(0, 3, image.shape).astype(np.uint8) if labelled else None,
                classes=CLASSES,
                content_sha256="0" * 64,
                geometry={},
                spacing_mm=None,
                cropped_around_labels=False,
                sources={},
            )
        )
    manifest = Manifest(
        version=FORMAT_VERSION,
        modality="mr",
        classes=CLASSES,
        size=SIZE,
        scaling=Scaling(-1.0, 1.0, "given"),
        recipe={},
        splitting={},
        labels={},
        steps=(),
        notices=(),
        command="",
        product_version="0",
        cases=tuple(cases),
    )
    save_manifest(folder, manifest)
    return np.concatenate(images)
