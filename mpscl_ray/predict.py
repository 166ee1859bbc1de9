"""``python -m mpscl_ray.predict RUN INPUT... --out DIR``: label maps for images, in the geometry of the images."""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mpscl_ray import __version__, cli
from mpscl_ray.bucket_run import open_run
from mpscl_ray.cluster_session import connect
from mpscl_ray.data.file_listing import is_dicom
from mpscl_ray.durable_files import write_atomically
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.inference import choose_device, find_checkpoint, load_weights, read_model, volumes_at_a_time
from mpscl_ray.parallel import map_volumes
from mpscl_ray.prediction import (
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
from mpscl_ray.progress import ProgressLine
from mpscl_ray.storage import Remote, is_url, locate, written_to

VOLUMES = "volumes.json"
"""File in the output folder with the volume of each structure in ml, by label map."""

_NO_IMAGES = ("_label", "_labels", "_manual", "_seg", "_mask", "_gt", SUFFIX.removesuffix(".nii.gz"))
"""Ends of names in a folder that are label maps, not images."""

_EXAMPLES = """\
examples:
  python -m mpscl_ray.predict runs/mpscl patient7.nii.gz --out predictions
  python -m mpscl_ray.predict runs/mpscl SCANS --pattern '*_LGE.nii.gz' --out predictions --preview --workers 4
  python -m mpscl_ray.predict runs/mpscl mr_1001.nii.gz --modality source --checkpoint source_only --out predictions
  python -m mpscl_ray.predict s3://hearts/runs/mpscl patient7.nii.gz --out s3://hearts/predictions

For patient7.nii.gz the folder gets patient7_prediction.nii.gz (same grid, affine and orientation), volumes.json,
itksnap_labels.txt and slicer_labels.ctbl. A file that cannot be read is reported and does not stop the others.
"""


def main(arguments: Sequence[str]) -> int:
    """Segment images; returns the exit code, 3 if some of them could not be."""
    options = _parser().parse_args(list(arguments))
    if options.workers is not None and options.workers < 0:
        raise ConfigError(f"--workers is {options.workers}; expected 0 or more")
    out = _place(options.inputs, options.out)
    device = choose_device(options.device)
    home = open_run(options.run)
    model = read_model(home)
    domain = model.domain(options.modality)
    weights, warnings = find_checkpoint(home, options.checkpoint)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    job = Job(
        run=home.address,
        weights=replace(weights, path=home.relative(weights.path)),
        stamp=weights.stamp(),
        domain=options.modality,
        out=out,
        raw_ids=output_ids(model, domain) if options.label_values == "raw" else None,
        device=options.device,
        largest_component=options.largest_component,
        probabilities=options.probabilities,
        preview=options.preview,
        assume_spacing_mm=options.assume_spacing,
    )
    images, failed = find_images(options.inputs, options.pattern)
    previous = _check_outputs(images, job, model.classes, options.overwrite)
    workers = volumes_at_a_time(len(images), device) if options.workers is None else options.workers
    predictor = load_weights(model, weights, options.device)  # also in front of workers: its errors come at once
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
    _report(good, failed, options.out)
    return DataError.exit_code if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mpscl_ray.predict",
        description="Segment NIfTI images with a trained run; label maps come in the geometry of the images. For "
        "research, not a medical device.",
        epilog=f"{_EXAMPLES}\n{cli.EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of the run, or its URL")
    add("inputs", type=Path, nargs="+", metavar="INPUT", help="NIfTI files, or folders of them")
    add("--out", required=True, metavar="DIR", help="folder for the label maps, or its URL")
    add("--pattern", metavar="GLOB", help="which files of a folder (default: all NIfTI files that are no label maps)")
    add("--modality", default="target", help="target (default), source, or the name of one of the run's modalities")
    add("--checkpoint", default="last", help="last (default), best, a phase, a name in RUN/checkpoints, or a path")
    add(
        "--label-values",
        choices=("index", "raw"),
        default="index",
        help="class indices, or the ids of the data's files",
    )
    add("--largest-component", action="store_true", help="keep only the largest connected part of each structure")
    add("--probabilities", action="store_true", help="a map of the probability of each structure too")
    add("--preview", action="store_true", help="a picture of some slices with their labels too")
    add("--assume-spacing", type=_spacing, metavar="X,Y,Z", help="voxel size in mm for files that do not tell")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="volumes at a time, on Ray; 0 in this process (default: by their number)",
    )
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    add("--overwrite", action="store_true", help="replace files of an earlier prediction")
    return parser


def _spacing(text: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError:
        x = y = z = math.nan
    if not all(0 < size < math.inf for size in (x, y, z)):
        raise argparse.ArgumentTypeError(f"{text!r} is not three sizes in mm above 0, such as 1,1,5")
    return x, y, z


def _place(inputs: Sequence[Path], out: str) -> Path | Remote:
    """Where label maps go.

    Raises:
        ConfigError: an input is in a bucket, or the URL cannot be used.
        StorageError: there is no such bucket.
    """
    for given in inputs:
        if is_url(given):
            raise ConfigError(
                f"{locate(given)} is in a bucket, and images are read from files; copy it to this machine"
            )
    place = locate(out)
    if isinstance(place, Remote):
        place.require_bucket()
        return place
    return place.absolute()


def find_images(inputs: Sequence[Path], pattern: str | None) -> tuple[list[Path], list[Prediction]]:
    """The files to segment, and a failure for each input that holds none.

    Args:
        inputs: files, which are taken as they are, and folders.
        pattern: which files of a folder; None for NIfTI files that are not named like label maps.

    Raises:
        ConfigError: two files would give label maps of the same name.
    """
    images: list[Path] = []
    failed: list[Prediction] = []
    for given in inputs:
        if not given.is_dir():
            images.append(given)
            continue
        try:
            files = sorted(path for path in given.iterdir() if path.is_file() and not path.name.startswith("."))
        except OSError as refusal:
            failed.append(
                Prediction(given, error=f"{given} cannot be read ({refusal.strerror}); check its permissions")
            )
            continue
        found = [path for path in files if _is_image(path.name, pattern)]
        images += found
        if not found and any(is_dicom(path) for path in files):
            error = f"{given} holds DICOM files, expected NIfTI; convert them with: dcm2niix -z y -ba y {given}"
            failed.append(Prediction(given, error=error))
        elif not found:
            wanted = f"that matches {pattern}" if pattern else "ending in .nii or .nii.gz that is no label map"
            failed.append(Prediction(given, error=f"{given} holds no file {wanted} ({len(files)} files); give images"))
    images = list({path.absolute(): path for path in images}.values())
    counts = Counter(stem(path) for path in images)
    double = [str(path) for path in images if counts[stem(path)] > 1]
    if double:
        raise ConfigError(f"{', '.join(double[:6])} would give label maps of the same name; segment them apart")
    return images, failed


def _is_image(name: str, pattern: str | None) -> bool:
    if pattern is not None:
        return fnmatch.fnmatch(name, pattern)
    lower = name.lower()
    base = lower.removesuffix(".gz").removesuffix(".nii")
    return lower.endswith((".nii", ".nii.gz")) and not base.endswith(_NO_IMAGES)


def _check_outputs(images: Sequence[Path], job: Job, classes: Sequence[str], overwrite: bool) -> dict[str, Any]:
    """Entries that volumes.json has already.

    Raises:
        ConfigError: files of an earlier prediction are in the way, or label maps with other labels are in the folder.
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
    raise ConfigError(f"{job.out / VOLUMES} is not what predict writes; move it away, or give --overwrite")


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
    with written_to(job.out) as folder:
        write_atomically(folder / VOLUMES, (text + "\n").encode())


def _report(good: Sequence[Prediction], failed: Sequence[Prediction], out: str) -> None:
    for prediction in good:
        volumes = ", ".join(f"{name} {volume:.1f}" for name, volume in (prediction.volumes_ml or {}).items())
        print(f"{prediction.files[0]}: {volumes} ml")
        for notice in prediction.notices:
            print(f"  note: {notice}")
    if good:
        print(f"{len(good)} label maps, {VOLUMES} and the label tables are in {out}")
    if failed:
        print(f"error: {len(failed)} of {len(failed) + len(good)} inputs were not segmented:", file=sys.stderr)
        for prediction in failed:
            print(f"  {prediction.error}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
