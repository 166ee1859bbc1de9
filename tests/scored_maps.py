"""Label maps to score, and the score command on them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from mpscl_ray.evaluate.score_command import main

SHAPE = (22, 18, 12)
AFFINE = np.array([[-1.25, 0, 0, 30], [0, 1.5, 0, -20], [0, 0, 4.0, 10], [0, 0, 0, 1]])
NAMES = ("--labels", "1=MYO,2=LV")
MAP = NDArray[np.uint8]


def save(path: Path, array: NDArray[Any], affine: NDArray[np.float64] = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def hearts(seed: int, shape: tuple[int, ...] = SHAPE) -> tuple[MAP, MAP]:
    """A prediction and a label: ragged shells (1) around cores (2)."""
    random = np.random.default_rng(seed)
    maps = []
    for _ in range(2):
        centre = np.array(shape) / 2 + random.normal(0, 1, 3)
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        radius = np.linalg.norm((grid - centre) / np.array([1, 1, 0.7]), axis=-1) + random.normal(0, 0.3, shape)
        maps.append(((radius < 6).astype(np.uint8) + (radius < 3.5)).astype(np.uint8))
    return maps[0], maps[1]


def swap(array: MAP) -> MAP:
    return np.array([0, 2, 1], np.uint8)[array]


def run(folder: Path, *words: str) -> int:
    return main([str(folder / "pred"), str(folder / "truth"), "--workers", "0", *words])


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    rows = csv.DictReader((folder / "scores.csv").read_text(encoding="utf-8").splitlines())
    return {(row["case"], row["structure"]): row for row in rows}


def scored(folder: Path, *words: str) -> dict[tuple[str, str], dict[str, str]]:
    assert run(folder, *words, "--out", str(folder / "out")) == 0
    return rows_of(folder / "out")
