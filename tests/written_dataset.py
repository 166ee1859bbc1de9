"""A prepared dataset of any images and labels, with nothing else in its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.dataset import FORMAT_VERSION, Case, Manifest, Scaling, save_manifest
from mpscl_ray.data.parquet_writer import write_case

_PLAIN = Scaling(-1.0, 1.0, "given")


def write_plain_case(
    folder: Path,
    name: str,
    split: str,
    image: NDArray[np.float32],
    label: NDArray[np.uint8] | None,
    classes: tuple[str, ...],
    *,
    content_sha256: str = "0" * 64,
    spacing_mm: tuple[float, float, float] | None = None,
) -> Case:
    """The Parquet file of a case (D, H, W) of its own patient."""
    return write_case(
        folder,
        id=name,
        patient=name,
        split=split,
        image=image,
        label=label,
        classes=classes,
        content_sha256=content_sha256,
        geometry={},
        spacing_mm=spacing_mm,
        cropped_around_labels=False,
        sources={},
    )


def save_plain_manifest(
    folder: Path,
    modality: str,
    classes: tuple[str, ...],
    size: tuple[int, int],
    cases: list[Case],
    scaling: Scaling = _PLAIN,
    splitting: dict[str, Any] | None = None,
) -> None:
    """The manifest of these cases, scaled from -1 to 1."""
    manifest = Manifest(
        version=FORMAT_VERSION,
        modality=modality,
        classes=classes,
        size=size,
        scaling=scaling,
        recipe={},
        splitting=splitting or {},
        labels={},
        steps=(),
        notices=(),
        command="",
        product_version="0",
        cases=tuple(cases),
    )
    save_manifest(folder, manifest)
