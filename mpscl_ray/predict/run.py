"""The predict command: label maps for images."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from mpscl_ray.data.volumes.dicom_paths import is_dicom
from mpscl_ray.data.volumes.file_names import SEGMENTATION_ENDING, VOLUME_ENDINGS, has_ending
from mpscl_ray.distributed.parallel_map import map_volumes
from mpscl_ray.distributed.places import inference_place
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.predict.dicom_inputs import both_kinds, series_below, single_slices
from mpscl_ray.predict.ensemble import Member, ensemble_of
from mpscl_ray.predict.image import Job, Prediction, output_ids, outputs, predict_image, predict_in_worker
from mpscl_ray.predict.model import find_checkpoint, read_model
from mpscl_ray.predict.output_names import (
    DISAGREEMENT_SUFFIX,
    ITKSNAP_LABELS,
    PREVIEW_SUFFIX,
    SLICER_LABELS,
    SUFFIXES,
    VOLUMES,
    is_probability_map,
    mirrored_folder,
    stem,
)
from mpscl_ray.predict.predictor import Predictor, choose_device, load_weights, num_inference_workers
from mpscl_ray.predict.record import Record
from mpscl_ray.prepare.file_listing import LABEL_ENDINGS
from mpscl_ray.runs import json_output
from mpscl_ray.runs.model_store import open_model
from mpscl_ray.runs.progress import ProgressLine
from mpscl_ray.runs.storage import S3Path, output_directory
from mpscl_ray.runs.structures import display_order
from mpscl_ray.runs.wording import counted

_LONGEST_NAME = 255
_LOW_DICE = 0.7
"""Label maps with a lower estimate are named."""
_SHOWN = 5
"""Of these the worst."""


def predict(options: argparse.Namespace, out: Path | S3Path) -> int:
    """Segment images by the options of the command; returns the exit code, 3 if some of them could not be.

    Args:
        options: of the command.
        out: folder for the label maps.
    """
    if options.ray is not None:
        options.inputs = [given.absolute() for given in options.inputs]  # tasks have another working directory
    # Elsewhere this process only checks the weights.
    device = choose_device(options.device if options.ray is None else "cpu")
    members, loaded, names = [], [], [options.run, *options.ensemble]
    for run in names:
        home = open_model(run)
        model = read_model(home)
        model.domain(options.modality)  # refused before anything is read
        weights, warnings = find_checkpoint(home, options.checkpoint)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        # Also before workers start: errors are reported at once.
        loaded.append(load_weights(model, weights, device, tta=options.tta))
        members.append(Member(home.uri, replace(weights, path=home.relative_to_run(weights.path)), weights.stamp()))
    predictor = ensemble_of(loaded, names)
    assert predictor.model is not None
    predictor.prepared_as(predictor.model.domain(options.modality))
    job = _job(options, predictor, tuple(members), tuple(one.weights.sha256() for one in loaded if one.weights), out)
    images, failed = find_images(options.inputs, options.pattern)
    images = _without_long_names(images, job, predictor.classes, failed)
    if job.postprocessing and options.postprocessing == "chosen":
        print(f"postprocessing: {job.postprocessing} (--no-postprocessing leaves it out)")
    record = Record(job, predictor.classes, overwrite=options.overwrite)
    left = record.to_do(images, resume=options.resume)
    if len(left) < len(images):
        print(f"{len(images) - len(left)} of {len(images)} images have their label map already")
    done = _segment(options, predictor, job, left, record)
    failed += [prediction for prediction in done if prediction.error]
    good = [prediction for prediction in done if not prediction.error]
    print_outcome(good, failed, options.out)
    print_quality(good)
    json_output.report(
        folder=options.out,
        label_maps=[
            {
                "image": prediction.image,
                "files": prediction.files,
                "volumes_ml": prediction.volumes_ml,
                "quality": prediction.quality,
                "notices": prediction.notices,
            }
            for prediction in good
        ],
        kept=len(images) - len(left),
        failed=[{"image": prediction.image, "error": prediction.error} for prediction in failed],
    )
    return DataError.exit_code if failed else 0


def _segment(
    options: argparse.Namespace, predictor: Predictor, job: Job, images: Sequence[Path], record: Record
) -> list[Prediction]:
    """Segment images in this process, or in tasks on Ray."""
    workers, place = options.workers, None
    if workers is None and options.ray is None:
        workers = num_inference_workers(len(images), predictor.device)
    in_tasks = workers != 0 and bool(images)
    line = ProgressLine(len(images), "segmenting, volume")
    with line, connect(workers, address=options.ray) if in_tasks else nullcontext():
        if in_tasks and options.ray is not None:
            from mpscl_ray.data.preflight import check_nodes  # imports Ray

            with output_directory(job.out):
                check_nodes(str(job.out), {}, next((image for image in images if image.exists()), None))
            place = inference_place(options.device)
            job = replace(job, device=place.device)
        return map_volumes(
            partial(predict_in_worker, job) if in_tasks else partial(predict_image, predictor, job),
            images,
            workers=workers,
            name=str,
            done=line.update,
            keep=record.add,
            lost=_lost,
            place=place,
        )


def _job(
    options: argparse.Namespace,
    predictor: Predictor,
    members: tuple[Member, ...],
    weights_sha256: tuple[str, ...],
    out: Path | S3Path,
) -> Job:
    raw, model = options.label_values == "raw", predictor.model
    assert model is not None
    return Job(
        members=members,
        domain=options.modality,
        out=out,
        raw_ids=output_ids(model, model.domain(options.modality)) if raw else None,
        format=options.format,
        device=options.device,
        postprocessing=predictor.postprocessing(options.postprocessing),
        probabilities=options.probabilities,
        preview=options.preview,
        assume_spacing_mm=options.assume_spacing,
        geometry=options.geometry,
        nan_policy=options.nan_policy,
        any_modality=options.any_modality,
        roots=tuple(given for given in options.inputs if given.is_dir()),
        weights_sha256=weights_sha256,
        tta=options.tta,
        disagreement=options.disagreement,
    )


def _lost(image: Path, reason: str) -> Prediction:
    """The failure of an image whose worker died."""
    return Prediction(image, error=f"{image}: {reason}")


def find_images(inputs: Sequence[Path], pattern: str | None) -> tuple[list[Path], list[Prediction]]:
    """The files to segment, and a failure for each input that holds none.

    Args:
        inputs: files of any name, and folders: of files, of a DICOM series, or of folders with DICOM series.
        pattern: which files of a folder, or below it if the pattern has a slash; None for NIfTI files in the folder
            that are not named like label maps.

    Raises:
        ConfigError: two files would give label maps of the same name.
    """
    images: list[Path] = []
    slices = single_slices(inputs)
    failed = [Prediction(folder, error=error) for folder, error in slices.items()]
    tree = pattern is not None and "/" in pattern
    for given in inputs:
        if not given.is_dir():
            if given.parent not in slices or not is_dicom(given):
                images.append(given)
            continue
        try:
            files = _files(given, tree)
        except OSError as refusal:
            failed.append(
                Prediction(given, error=f"{given} cannot be read ({refusal.strerror}); check its permissions")
            )
            continue
        found = _images_among(files, given, pattern)
        if found and pattern is None and (error := both_kinds(given, files)):
            failed.append(Prediction(given, error=error))
            continue
        images += found
        if found:
            _say_skipped(given, [*files, *([] if tree else _folders(given))], found)
            continue
        series, wrong = series_below(given)
        images += series
        failed += [Prediction(given, error=error) for error in wrong]
        if not series and not wrong:
            failed.append(Prediction(given, error=_no_image(given, pattern, files)))
    images = list({path.absolute(): path for path in images}.values())
    roots = [given for given in inputs if given.is_dir()]
    bases = {path: mirrored_folder(path, roots) + stem(path) for path in images}
    counts = Counter(bases.values())
    double = [str(path) for path, base in bases.items() if counts[base] > 1]
    if double:
        raise ConfigError(f"{', '.join(double[:6])} would give label maps of the same name; segment them separately")
    return images, failed


def _files(folder: Path, tree: bool) -> list[Path]:
    """Files in a folder or, of a tree, in those below it as well; hidden ones are left out.

    Raises:
        OSError: the folder cannot be read.
    """
    inside = list(folder.iterdir())
    return sorted(
        path for path in (folder.rglob("*") if tree else inside) if path.is_file() and not _hidden(path, folder)
    )


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not _hidden(path, folder)]


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _no_image(folder: Path, pattern: str | None, files: Sequence[Path]) -> str:
    """What is wrong with a folder without an image."""
    wanted = f"that matches {pattern}" if pattern else "ending in .nii, .nii.gz, .nrrd or .mha that is no label map"
    advice = "give images"
    if pattern is None and any(has_ending(path.name, VOLUME_ENDINGS) for path in folder.rglob("*")):
        advice = "for those in its folders give --pattern '**/*.nii.gz', or a narrower one"
    return f"{folder} holds no file {wanted} ({counted(len(files), 'file')}); {advice}"


def _say_skipped(folder: Path, there: Sequence[Path], found: Sequence[Path]) -> None:
    """Warn of what a folder holds besides its images: label maps by their names, other formats, folders."""
    ours = (*SUFFIXES, DISAGREEMENT_SUFFIX, ITKSNAP_LABELS, SLICER_LABELS, VOLUMES, PREVIEW_SUFFIX)
    taken = set(found)
    skipped = sorted(
        path.relative_to(folder).as_posix() + "/" * path.is_dir()
        for path in there
        if path not in taken and not path.name.endswith(ours)
    )
    if skipped:
        more = f" and {len(skipped) - 6} more" if len(skipped) > 6 else ""
        print(
            f"note: {folder}: not segmented, {len(skipped)}: {', '.join(skipped[:6])}{more}; name other images",
            file=sys.stderr,
        )


def _images_among(files: Sequence[Path], folder: Path, pattern: str | None) -> list[Path]:
    """Those of the files in or below a folder that are to be segmented; never what predict wrote itself."""
    names = {path.relative_to(folder).as_posix() for path in files}
    inputs = [
        path
        for path in files
        if not path.name.endswith((*SUFFIXES, DISAGREEMENT_SUFFIX))
        and not is_probability_map(path.relative_to(folder).as_posix(), names)
        and not is_dicom(path)
    ]
    if pattern is None:
        return [path for path in inputs if has_ending(path.name, VOLUME_ENDINGS) and not _is_label(path)]
    if "/" not in pattern:
        return [path for path in inputs if fnmatch.fnmatch(path.name, pattern)]
    try:
        chosen = set(folder.glob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"--pattern {pattern!r}: {error}; expected a path below the folder, such as '**/anat/*.nii.gz'"
        ) from error
    return [path for path in inputs if path in chosen]


def _is_label(path: Path) -> bool:
    return has_ending(path.name, (SEGMENTATION_ENDING,)) or has_ending(stem(path), LABEL_ENDINGS)


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
        error = f"{len(failed)} of {total} {inputs} not segmented"
        json_output.report(error=error)
        print(f"error: {error}:", file=sys.stderr)
        for prediction in failed:
            print(f"  {prediction.error}", file=sys.stderr)


def print_quality(predictions: Sequence[Prediction]) -> None:
    """Say which label maps to look at first, by their estimates; without a calibration by what the network expects."""
    judged = [(one.quality, one.files[0]) for one in predictions if one.quality is not None]
    if not judged:
        return
    judged.sort(key=lambda entry: entry[0].rank)
    worst = judged[0][0]
    if worst.estimate is None:
        first = f"; least sure of {', '.join(name for _, name in judged[:3])}" if len(judged) > 1 else ""
        print(f"no estimate of the quality: {worst.reason}{first}")
        return
    low = [(quality, name) for quality, name in judged if quality.rank < _LOW_DICE]
    print(
        f"estimated mean Dice: {worst.rank:.2f} to {judged[-1][0].rank:.2f}, {len(low)} of {len(judged)} below "
        f"{_LOW_DICE:g} (its level may be off: it was calibrated on other images)"
    )
    for quality, name in low[:_SHOWN]:
        missing = f", without {', '.join(quality.missing)}" if quality.missing else ""
        print(f"  {quality.rank:.2f} {name}{missing}")
