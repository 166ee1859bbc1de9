"""The predict command: label maps for images."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mpscl_ray import __version__
from mpscl_ray.data.volumes.dicom_paths import is_dicom
from mpscl_ray.data.volumes.itk_file import ITK_ENDINGS
from mpscl_ray.distributed.parallel_map import map_volumes
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.predict.dicom_inputs import both_kinds, series_below, single_slices
from mpscl_ray.predict.image import (
    ITKSNAP_LABELS,
    SLICER_LABELS,
    SUFFIX,
    Job,
    Prediction,
    output_ids,
    outputs,
    predict_image,
    predict_in_worker,
    slicer_table,
    stem,
    write_label_tables,
)
from mpscl_ray.predict.model import find_checkpoint, read_model
from mpscl_ray.predict.predictor import choose_device, load_weights, num_inference_workers
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.progress import ProgressLine
from mpscl_ray.runs.run_directory import open_run
from mpscl_ray.runs.storage import S3Path, output_directory
from mpscl_ray.runs.structures import display_order
from mpscl_ray.runs.wording import counted

VOLUMES = "volumes.json"
"""File in the output folder with the volume of each structure in ml, by label map."""

_NO_IMAGES = ("_label", "_labels", "_manual", "_seg", "_segmentation", "_mask", "_gt", SUFFIX.removesuffix(".nii.gz"))
"""Suffixes of names that are label maps, not images."""
_OWN_OUTPUT = "_probability_"
_LONGEST_NAME = 255


def predict(options: argparse.Namespace, out: Path | S3Path) -> int:
    """Segment images by the options of the command; returns the exit code, 3 if some of them could not be.

    Args:
        options: of the command.
        out: folder for the label maps.
    """
    device = choose_device(options.device)
    home = open_run(options.run)
    model = read_model(home)
    domain = model.domain(options.modality)
    weights, warnings = find_checkpoint(home, options.checkpoint)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    job = Job(
        run=home.uri,
        weights=replace(weights, path=home.relative_to_run(weights.path)),
        stamp=weights.stamp(),
        domain=options.modality,
        out=out,
        raw_ids=output_ids(model, domain) if options.label_values == "raw" else None,
        device=options.device,
        largest_component=options.largest_component,
        probabilities=options.probabilities,
        preview=options.preview,
        assume_spacing_mm=options.assume_spacing,
        geometry=options.geometry,
        nan_policy=options.nan_policy,
        any_modality=options.any_modality,
    )
    images, failed = find_images(options.inputs, options.pattern)
    images = _without_long_names(images, job, model.classes, failed)
    previous = _check_outputs(images, job, model.classes, options.overwrite)
    workers = num_inference_workers(len(images), device) if options.workers is None else options.workers
    predictor = load_weights(model, weights, options.device)  # also before workers start: errors are reported at once
    if images:
        write_label_tables(job.out, model.classes, job.raw_ids)
    line = ProgressLine(len(images), "segmenting, volume")
    with line, connect(workers) if workers else nullcontext():
        done = map_volumes(
            partial(predict_in_worker, job) if workers else partial(predict_image, predictor, job),
            images,
            workers=workers,
            name=str,
            done=line.update,
        )
    failed += [prediction for prediction in done if prediction.error]
    good = [prediction for prediction in done if not prediction.error]
    _write_volumes(job, previous, good)
    print_outcome(good, failed, options.out)
    return DataError.exit_code if failed else 0


def find_images(inputs: Sequence[Path], pattern: str | None) -> tuple[list[Path], list[Prediction]]:
    """The files to segment, and a failure for each input that holds none.

    Args:
        inputs: files of any name, and folders: of files, of a DICOM series, or of folders with DICOM series.
        pattern: which files of a folder; None for NIfTI files that are not named like label maps.

    Raises:
        ConfigError: two files would give label maps of the same name.
    """
    images: list[Path] = []
    slices = single_slices(inputs)
    failed = [Prediction(folder, error=error) for folder, error in slices.items()]
    for given in inputs:
        if not given.is_dir():
            if given.parent not in slices or not is_dicom(given):
                images.append(given)
            continue
        try:
            files = sorted(path for path in given.iterdir() if path.is_file() and not path.name.startswith("."))
        except OSError as refusal:
            failed.append(
                Prediction(given, error=f"{given} cannot be read ({refusal.strerror}); check its permissions")
            )
            continue
        siblings = {path.name for path in files}
        found = [path for path in files if _is_image(path.name, pattern, siblings) and not is_dicom(path)]
        if found and pattern is None and (error := both_kinds(given, files)):
            failed.append(Prediction(given, error=error))
            continue
        images += found
        if found:
            _say_skipped(given, found)
            continue
        series, wrong = series_below(given)
        images += series
        failed += [Prediction(given, error=error) for error in wrong]
        if not series and not wrong:
            wanted = (
                f"that matches {pattern}" if pattern else "ending in .nii, .nii.gz, .nrrd or .mha that is no label map"
            )
            failed.append(
                Prediction(given, error=f"{given} holds no file {wanted} ({counted(len(files), 'file')}); give images")
            )
    images = list({path.absolute(): path for path in images}.values())
    counts = Counter(stem(path) for path in images)
    double = [str(path) for path in images if counts[stem(path)] > 1]
    if double:
        raise ConfigError(f"{', '.join(double[:6])} would give label maps of the same name; segment them separately")
    return images, failed


def _say_skipped(folder: Path, found: Sequence[Path]) -> None:
    """Warn of what a folder holds besides its images: label maps by their names, other formats, folders."""
    ours = (SUFFIX, ITKSNAP_LABELS, SLICER_LABELS, VOLUMES, "_preview.png")
    skipped = sorted(
        path.name + ("/" if path.is_dir() else "")
        for path in folder.iterdir()
        if path not in set(found) and not path.name.startswith(".") and not path.name.endswith(ours)
    )
    if skipped:
        more = f" and {len(skipped) - 6} more" if len(skipped) > 6 else ""
        print(
            f"note: {folder}: not segmented, {len(skipped)}: {', '.join(skipped[:6])}{more}; name other images",
            file=sys.stderr,
        )


def _is_image(name: str, pattern: str | None, siblings: Collection[str]) -> bool:
    if pattern is not None:
        return fnmatch.fnmatch(name, pattern)
    lower = name.lower()
    base = stem(Path(lower))
    own = base.rpartition(_OWN_OUTPUT)[1] and SLICER_LABELS in siblings
    return lower.endswith((".nii", ".nii.gz", *ITK_ENDINGS)) and not base.endswith(_NO_IMAGES) and not own


def _without_long_names(
    images: Sequence[Path], job: Job, classes: Sequence[str], failed: list[Prediction]
) -> list[Path]:
    """The images whose files can be written; the others are failures, and do not stop the batch."""
    good = []
    for image in images:
        longest = max((len(os.fsencode(name)) for name in outputs(image, job, classes)), default=0)
        if longest <= _LONGEST_NAME - len(".partial-00000000"):
            good.append(image)
        else:
            error = f"{image} has too long a name: that of a file made from it would have {longest} bytes; rename it"
            failed.append(Prediction(image, error=error))
    return good


def _check_outputs(images: Sequence[Path], job: Job, classes: Sequence[str], overwrite: bool) -> dict[str, Any]:
    """Existing entries of volumes.json.

    Raises:
        ConfigError: files of an earlier prediction exist, or the folder has label maps with other labels.
    """
    names = [name for image in images for name in outputs(image, job, classes)]
    there = [name for name in names if (job.out / name).exists()]
    if there and not overwrite:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        raise ConfigError(
            f"{job.out} has {', '.join(there[:3])}{more} already; give another --out, or --overwrite to replace them"
        )
    table = job.out / SLICER_LABELS
    if (
        table.exists()
        and not overwrite
        and table.read_bytes().decode(errors="replace") != slicer_table(classes, job.raw_ids)
    ):
        raise ConfigError(f"{table} names other labels than this run; give another --out, or --overwrite to replace it")
    try:
        previous = json.loads((job.out / VOLUMES).read_bytes())["predictions"]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        previous = None
    if isinstance(previous, dict):
        return previous
    if overwrite:
        return {}
    raise ConfigError(f"{job.out / VOLUMES} was not written by predict; move it away, or give --overwrite")


def _write_volumes(job: Job, previous: dict[str, Any], good: Sequence[Prediction]) -> None:
    """Add the new predictions to volumes.json."""
    if not good:
        return
    weights = job.weights
    entries = {
        prediction.files[0]: {
            "image": prediction.image.name,
            "files": list(prediction.files),
            "volumes_ml": dict(prediction.volumes_ml or {}),
            "run": job.run,
            "checkpoint": {"name": weights.name, "path": str(weights.path)},
            "prepared_as": job.domain,
            "notices": list(prediction.notices),
            "product_version": __version__,
        }
        for prediction in good
    }
    text = json.dumps({"predictions": {**previous, **entries}}, indent=1, ensure_ascii=False, allow_nan=False)
    with output_directory(job.out) as folder:
        write_atomically(folder / VOLUMES, (text + "\n").encode())


def print_outcome(good: Sequence[Prediction], failed: Sequence[Prediction], out: str) -> None:
    """Say which images were segmented, with the volumes of their structures, and which were not."""
    for prediction in good:
        volumes_ml = prediction.volumes_ml or {}
        volumes = ", ".join(f"{name} {volumes_ml[name]:.1f}" for name in display_order(list(volumes_ml)))
        print(f"{prediction.files[0]}: {volumes} ml")
        for notice in prediction.notices:
            print(f"  note: {notice}")
    if good:
        print(f"{counted(len(good), 'label map')}, {VOLUMES} and the label tables are in {out}")
    if failed:
        total = len(failed) + len(good)
        inputs = "input was" if total == 1 else "inputs were"
        print(f"error: {len(failed)} of {total} {inputs} not segmented:", file=sys.stderr)
        for prediction in failed:
            print(f"  {prediction.error}", file=sys.stderr)
