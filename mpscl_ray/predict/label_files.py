"""Label maps in the formats of viewers, and the tables of their names and colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpscl_ray.data.volumes.file_names import SEGMENTATION_ENDING, has_ending
from mpscl_ray.data.volumes.nifti import Volume
from mpscl_ray.data.volumes.nifti_output import write_label_map, write_values
from mpscl_ray.data.volumes.slicer_output import write_segmentation
from mpscl_ray.predict.output_names import ITKSNAP_LABELS, SLICER_LABELS, plain
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.palette import colour

_ITKSNAP_LARGEST = 2**16 - 1
"""Largest value of a label map that ITK-SNAP shows."""


def write_labels(
    path: Path,
    labels: npt.NDArray[np.uint8],
    like: Volume,
    classes: Sequence[str],
    raw_ids: Mapping[str, int] | None = None,
) -> None:
    """Write a label map in the geometry of its image, in the format that its name ends in.

    Args:
        path: ``.nii.gz``, ``.nii`` or ``.seg.nrrd``.
        labels: (X, Y, Z) class indices in the shape of the image's array.
        like: the image.
        classes: names, background first.
        raw_ids: value of each structure in the file; None for class indices.

    Raises:
        DataError: the labels do not fit the image.
        StorageError: the file cannot be written; it appears whole or not at all.
    """
    values: npt.NDArray[np.integer[Any]] = labels
    if raw_ids is not None:
        table = np.array([0, *(raw_ids[name] for name in classes[1:])])
        kind: type[np.integer[Any]] = np.int16 if np.abs(table).max() < 2**15 else np.int32
        values = table.astype(kind)[labels]
    if has_ending(path.name, (SEGMENTATION_ENDING,)):
        write_segmentation(path, values, like, dict(label_values(classes, raw_ids)[1:]))
    elif raw_ids is None:
        write_label_map(path, labels, like, classes)
    else:
        write_values(path, values, like)


def label_values(classes: Sequence[str], raw_ids: Mapping[str, int] | None) -> list[tuple[str, int]]:
    """Name and value of each class in a label map, background first."""
    return [(name, index if raw_ids is None else raw_ids.get(name, 0)) for index, name in enumerate(classes)]


def write_label_tables(folder: Path, classes: Sequence[str], raw_ids: Mapping[str, int] | None) -> None:
    """Write names and colours of label maps for 3D Slicer and, unless values are beyond its limits, for ITK-SNAP."""
    values = label_values(classes, raw_ids)
    if all(0 <= value <= _ITKSNAP_LARGEST for _, value in values):
        write_atomically(folder / ITKSNAP_LABELS, itksnap_table(values).encode())
    write_atomically(folder / SLICER_LABELS, slicer_table(values).encode())


def itksnap_table(values: Sequence[tuple[str, int]]) -> str:
    """Label description file of ITK-SNAP for names and values, background first."""
    rule = "#" * 48
    lines = [rule, "# ITK-SnAP Label Description File", "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL", rule]
    for index, (name, value) in enumerate(values):
        red, green, blue = colour(index)
        shown = int(index > 0)
        text = name.replace('"', "'") if index else "Clear Label"
        lines.append(f'{value:5d}  {red:4d} {green:4d} {blue:4d}  {shown:7.2g}  {shown:2d} {shown:2d}    "{text}"')
    return "\n".join(lines) + "\n"


def slicer_table(values: Sequence[tuple[str, int]]) -> str:
    """Colour table of 3D Slicer for names and values: value, name, red, green, blue and opacity on each line."""
    lines = ["# label names and colours for 3D Slicer"]
    for index, (name, value) in enumerate(values):
        red, green, blue = colour(index)
        lines.append(f"{value} {plain(name)} {red} {green} {blue} {255 if index else 0}")
    return "\n".join(lines) + "\n"
