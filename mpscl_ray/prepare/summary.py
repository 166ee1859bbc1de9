"""What prepare says of a dataset that it has made, or of its folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpscl_ray.data import SPLITS
from mpscl_ray.data.dataset import Manifest, fold_folder, fold_numbers, load_manifest
from mpscl_ray.runs.next_steps import command_line
from mpscl_ray.runs.storage import S3Path
from mpscl_ray.runs.structures import display_indices
from mpscl_ray.runs.wording import counted

_SMALL = 128


def datasets_of(folder: Path | S3Path) -> list[Path | S3Path]:
    """The folds in a folder; a dataset without folds is the only one."""
    return [folder / fold_folder(number) for number in fold_numbers(folder)] or [folder]


def summary(folder: Path | S3Path) -> str:
    """Text on a finished dataset, or on folds: splits, classes, range and warnings."""
    manifests = [load_manifest(dataset) for dataset in datasets_of(folder)]
    if len(manifests) > 1:
        return _summary_of_folds(folder, manifests)
    (manifest,) = manifests
    lines = [
        f"{manifest.modality}: {folder}",
        f"  slices of {manifest.size[0]} x {manifest.size[1]}; z-scored intensities {manifest.scaling.low:g} to "
        f"{manifest.scaling.high:g} are [-1, 1] ({manifest.scaling.origin})",
    ]
    order = [0, *display_indices(manifest.classes)] if manifest.classes else []
    rows = [["split", "patients", "cases", "labelled", "slices", *(manifest.classes[index] for index in order)]]
    for split in SPLITS:
        cases = manifest.split(split)
        voxels = [sum(case.class_voxels[index] for case in cases if case.class_voxels) for index in order]
        total = sum(voxels)
        rows.append(
            [
                split,
                str(len({case.patient for case in cases})),
                str(len(cases)),
                str(sum(case.labelled for case in cases)),
                str(sum(case.slices for case in cases)),
                *(f"{100 * count / total:.2f} %" if total else "-" for count in voxels),
            ]
        )
    return "\n".join([*lines, *_table(rows), *(f"  note: {notice}" for notice in manifest.notices)])


def _summary_of_folds(folder: Path | S3Path, manifests: Sequence[Manifest]) -> str:
    size = manifests[0].size
    rows = [["fold", *(f"{split} patients" for split in SPLITS), "is -1", "is 1"]]
    for number, manifest in enumerate(manifests):
        counts = [str(len({case.patient for case in manifest.split(split)})) for split in SPLITS]
        rows.append([str(number), *counts, f"{manifest.scaling.low:g}", f"{manifest.scaling.high:g}"])
    by_fold = len({manifest.scaling for manifest in manifests}) > 1
    origin = "estimated from the training cases of each fold" if by_fold else manifests[0].scaling.origin
    lines = [
        f"{manifests[0].modality}: {folder}, {len(manifests)} folds that share the files of "
        f"{counted(len(manifests[0].cases), 'case')}",
        f"  slices of {size[0]} x {size[1]}; the last columns are z-scored intensities ({origin})",
    ]
    notices = dict.fromkeys(notice for manifest in manifests for notice in manifest.notices)
    return "\n".join([*lines, *_table(rows), *(f"  note: {notice}" for notice in notices)])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def summary_json(folder: Path | S3Path) -> dict[str, Any]:
    """A dataset, or one fold, as plain values."""
    manifest = load_manifest(folder)
    splits = {
        split: {
            "patients": len({case.patient for case in cases}),
            "cases": [case.id for case in cases],
            "labelled": sum(case.labelled for case in cases),
            "slices": sum(case.slices for case in cases),
        }
        for split in SPLITS
        for cases in [manifest.split(split)]
    }
    about = {"modality": manifest.modality, "folder": folder, "classes": manifest.classes, "size": manifest.size}
    return {**about, "splits": splits, "notices": manifest.notices}


def next_command(folders: Mapping[str, Path | S3Path]) -> str:
    """The command to give next, with the small preset for slices that a CPU can train on."""
    first = next(iter(folders.values()))
    source, target = (str(folders["mr"]), str(folders["ct"])) if {"ct", "mr"} <= set(folders) else (str(first), "OTHER")
    small = max(load_manifest(datasets_of(first)[0]).size) <= _SMALL
    if fold_numbers(first):
        return command_line("compare", "--folds", "--data", source, target, *([] if small else ["--presets", "mr2ct"]))
    preset = "small/mpscl" if small else "mr2ct/mpscl"
    return command_line("train", preset, f"data.source={source}", f"data.target={target}")
