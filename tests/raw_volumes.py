"""Raw volumes as users have them, and what comes of preparing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from mpscl_ray.data.dataset import Manifest, load_manifest
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import DataError
from mpscl_ray.prepare.options import PrepareOptions
from mpscl_ray.prepare.run import prepare

RAW_IDS = (205, 420, 500, 820)
SMALL = Recipe(crop=(16, 16), size=(12, 12))


def volume(seed: int, low: float = 0.0, shape: tuple[int, int, int] = (20, 24, 18)) -> tuple[Any, Any]:
    """An image with four bright boxes, and their raw MM-WHS ids."""
    random = np.random.default_rng(seed)
    image = random.normal(300.0, 30.0, size=shape).astype(np.float32)
    label = np.zeros(shape, dtype=np.int16)
    for number, raw in enumerate(RAW_IDS):
        box = (slice(5 + 2 * number, 9 + 2 * number), slice(8, 14), slice(4 + 2 * number, 8 + 2 * number))
        image[box] += 200.0 * (number + 1)
        label[box] = raw
    return image + np.float32(low), label


def write(path: Path, array: NDArray[Any], affine: NDArray[Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.5, 1.5, 2.0, 1.0]) if affine is None else affine), path)


def mmwhs(
    folder: Path,
    modality: str = "ct",
    numbers: range = range(1001, 1007),
    affine: NDArray[Any] | None = None,
) -> Path:
    for number in numbers:
        image, label = volume(number, low=-1000.0 if modality == "ct" else 0.0)
        write(folder / f"{modality}_train_{number}_image.nii.gz", image, affine)
        write(folder / f"{modality}_train_{number}_label.nii.gz", label, affine)
    return folder


def options(folder: Path, **changes: Any) -> PrepareOptions:
    values = {"layout": "mmwhs", "split": "0.5,0.25,0.25", "recipe": SMALL, "workers": 0, "out": folder.parent / "out"}
    return PrepareOptions(input=folder, **{**values, **changes})


def made(folder: Path, name: str = "ct", /, **changes: Any) -> tuple[Path, Manifest]:
    folders = prepare(options(folder, **changes), progress=False)
    return folders[name], load_manifest(folders[name])


def refusal(folder: Path, **changes: Any) -> list[str]:
    """Problems that a refused run lists; makes sure that nothing was left behind."""
    wanted = options(folder, **changes)
    before = set(wanted.out.iterdir()) if wanted.out.exists() else set()
    with pytest.raises(DataError) as caught:
        prepare(wanted, progress=False)
    assert (set(wanted.out.iterdir()) if wanted.out.exists() else set()) == before
    head, *lines = str(caught.value).split("\n")
    assert "nothing was written" in head
    return [line.removeprefix("  - ") for line in lines]
