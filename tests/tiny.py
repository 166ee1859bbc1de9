"""Prepared datasets and settings so small that a training takes seconds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from mpscl_ray.data.schema import Manifest, Scaling, save_manifest, write_case

CLASSES = ("background", "ventricle", "wall")
SIZE = (32, 32)

SETTINGS = (
    "network.blocks=[1,1,1,1]",
    "network.width=4",
    "network.output_stride=4",
    "network.in_channels=1",
    "network.train_norm_affine=true",
    "method.discriminator_width=4",
    "data.batch_size=4",
    "phases.source_only=4",
    "phases.warm_up=4",
    "phases.adaptation=4",
    "optim.lr=0.01",
    "optim.head_lr_factor=1",
    "run.report_every=2",
    "run.validate_every=4",
    "run.checkpoint_every=2",
    "data.augmentation.rotation_deg=10",
)
"""Overrides that make any preset tiny: three phases of four iterations."""


def make_dataset(
    folder: Path,
    modality: str,
    *,
    seed: int = 0,
    slices: int = 6,
    labelled: tuple[str, ...] = ("train", "val", "test"),
    cases: dict[str, int] | None = None,
) -> Path:
    """Write a dataset of discs with rings, whose contrast depends on the modality; labels on the given splits."""
    counts = {"train": 3, "val": 2, "test": 2} if cases is None else cases
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    entries = []
    for split, count in counts.items():
        for number in range(count):
            image = np.empty((slices, *SIZE), np.float32)
            label = np.zeros((slices, *SIZE), np.uint8)
            for index in range(slices):
                centre = rng.uniform(12, 20, 2)
                distance = np.hypot(rows - centre[0], columns - centre[1])
                label[index][distance < 9] = 2
                label[index][distance < 5] = 1
                levels = np.array([-0.5, 0.8, 0.1] if modality == "mr" else [-0.5, 0.5, -0.2])
                image[index] = levels[label[index]] + rng.normal(0, 0.1, SIZE)
            name = f"{modality}_{split}_{number}"
            entries.append(
                write_case(
                    folder,
                    id=name,
                    patient=name,
                    split=split,
                    image=image.clip(-1, 1),
                    label=label if split in labelled else None,
                    classes=CLASSES,
                    content_sha256=hashlib.sha256(f"{name}{seed}".encode()).hexdigest(),
                    geometry={},
                    spacing_mm=(2.0, 1.5, 1.5),
                    cropped_around_labels=False,
                    sources={},
                )
            )
    manifest = Manifest(
        version=1,
        modality=modality,
        classes=CLASSES,
        size=SIZE,
        scaling=Scaling(-1.0, 1.0, "given"),
        recipe={},
        splitting={},
        labels={},
        steps=(),
        notices=(),
        command="",
        product_version="",
        cases=tuple(entries),
    )
    save_manifest(folder, manifest)
    return folder
