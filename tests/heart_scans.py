"""Scans of a heart in a body, as folders that prepare reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.dataset import Manifest
from mpscl_ray.data.volumes.recipe import Recipe
from tests.raw_volumes import made, refusal, write

AIR, TISSUE, WALL, BLOOD = {"ct": (-1000, 40, 120, 330), "mr": (15, 180, 120, 420)}, 0, 1, 2
SHAPE, MM = (28, 26, 12), (2.0, 2.0, 4.0)
FOLDER = {
    "layout": "folder",
    "modality": "mr",
    "labels": "1=MYO,2=LV",
    "image_pattern": "{case}_image.nii.gz",
    "label_pattern": "{case}_label.nii.gz",
    "split": "0.6,0.2,0.2",
    "recipe": Recipe(crop=(12, 16), size=(12, 12)),
}


def scan(seed: int, kind: str = "mr", shape: tuple[int, int, int] = SHAPE) -> tuple[NDArray[Any], NDArray[Any]]:
    """A ball with a shell in a cylinder of tissue, with noise; whole numbers as scanners store them."""
    air, tissue, wall, blood = AIR[kind]
    random = np.random.default_rng(seed)
    x, y, z = (np.arange(length) - length / 2 + random.uniform(-1, 1) for length in shape)
    body = (x[:, None, None] ** 2 + y[None, :, None] ** 2 < (0.45 * shape[0]) ** 2) & np.ones(shape, bool)
    radius = np.sqrt(x[:, None, None] ** 2 + y[None, :, None] ** 2 + (2 * z[None, None, :]) ** 2)
    label = np.where(radius < 4, 2, np.where(radius < 7, 1, 0)).astype(np.uint8)
    image = np.where(body, float(tissue), float(air))
    image[label == 1], image[label == 2] = wall, blood
    image += random.normal(0, 8, shape)
    return (image if kind == "ct" else np.abs(image)).astype(np.int16), label


def cohort(
    folder: Path,
    names: tuple[str, ...] = tuple(f"c{number}" for number in range(5)),
    kind: str = "mr",
    image: str = "{}_image.nii.gz",
    label: str = "{}_label.nii.gz",
    shape: tuple[int, int, int] = SHAPE,
    mm: tuple[float, ...] = MM,
) -> Path:
    for seed, name in enumerate(names):
        intensities, ids = scan(seed, kind, shape)
        write(folder / image.format(name), intensities, np.diag([*mm, 1.0]))
        write(folder / label.format(name), ids, np.diag([*mm, 1.0]))
    return folder


def prepared(folder: Path, name: str = "mr", /, **changes: Any) -> tuple[Path, Manifest]:
    return made(folder, name, **{**FOLDER, "overwrite": True, **changes})


def problems(folder: Path, **changes: Any) -> str:
    return "\n".join(refusal(folder, **{**FOLDER, "overwrite": True, **changes}))


def change(path: Path, edit: Any, affine: NDArray[Any] | None = None) -> None:
    volume = nib.load(path)
    write(path, edit(np.asanyarray(volume.dataobj).copy()), volume.affine if affine is None else affine)
