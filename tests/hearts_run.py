"""A run on two datasets of tiny hearts whose network was never trained, and images like theirs to predict."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mpscl_ray.data.dataset import Manifest, Scaling, save_manifest
from mpscl_ray.data.parquet_writer import write_case
from mpscl_ray.data.volumes.recipe import Recipe
from tests.dataset_run import write_run

CLASSES = ("background", "MYO", "LAC", "LVC", "AA")
RECIPE = Recipe(crop=(32, 32))
SPACING = (3.0, 1.5, 1.25)
LABELS = {"values": {"0": "background", "205": "MYO", "420": "LAC", "500": "LVC", "820": "AA"}}


def truth(rng: np.random.Generator, depth: int) -> np.ndarray:
    label = np.zeros((depth, 32, 32), np.uint8)
    for index in range(1, 5):
        low = rng.integers(0, 20, 2)
        label[depth // 4 : depth // 2, low[0] : low[0] + 9, low[1] : low[1] + 8] = index
    return label


def write_dataset(folder: Path, modality: str, labelled_at_all: bool = True, **changes: Any) -> Path:
    rng = np.random.default_rng(len(modality))
    cases = []
    for split, depth, labelled in (
        ("test", 40, True),
        ("test", 7, True),
        ("test", 33, True),
        ("test", 9, False),
        ("val", 5, True),
        ("train", 6, False),
    ):
        image = rng.normal(0, 0.4, (depth, 32, 32)).astype(np.float32)
        label = truth(rng, depth)
        if depth == 7:
            label[label == 4] = 0  # a structure that this volume lacks
        name = f"case{depth:02d}"
        cases.append(
            write_case(
                folder,
                id=name,
                patient=name,
                split=split,
                image=image,
                label=label if labelled and labelled_at_all else None,
                classes=CLASSES,
                content_sha256=name,
                geometry={},
                spacing_mm=SPACING,
                cropped_around_labels=False,
                sources={},
            )
        )
    fields: dict[str, Any] = {
        "version": 1,
        "modality": modality,
        "classes": CLASSES,
        "size": (32, 32),
        "scaling": Scaling(-2.0, 3.0, "given"),
        "recipe": RECIPE.to_json(),
        "splitting": {},
        "labels": LABELS,
        "steps": (),
        "notices": (),
        "command": "",
        "product_version": "0",
        "cases": tuple(cases),
    }
    save_manifest(folder, Manifest(**{**fields, **changes}))
    return folder


def write_hearts_run(base: Path) -> Path:
    """Folder of a run with two phases, a last and a best checkpoint."""
    datasets = [write_dataset(base / modality, modality) for modality in ("mr", "ct")]
    weights = {"checkpoints/step-0000020": 2, "phases/source_only": 1, "phases/adaptation": 2, "best": 3}
    return write_run(base / "run", *datasets, weights).path


def write_image(path: Path, seed: int, affine: np.ndarray) -> np.ndarray:
    image = np.random.default_rng(seed).gamma(2.0, 100.0, (36, 20, 40)).astype(np.int16)
    volume = nib.Nifti1Image(image, affine)
    volume.set_qform(affine, code=1)
    volume.set_sform(affine, code=2)
    nib.save(volume, path)
    return image


def oblique() -> np.ndarray:
    angle = math.radians(20)
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.5, 3.0, 1.25])
    affine[:3, 3] = (30, -12, 7)
    return affine
