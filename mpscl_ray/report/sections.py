"""The sections of a report: the figures that the runs allow, their captions, and what is missing and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mpscl_ray.data.label_values import is_structure
from mpscl_ray.data.slice_selection import evenly_spaced, labelled_slices
from mpscl_ray.errors import DataError
from mpscl_ray.evaluate.evaluation import PROTOCOLS
from mpscl_ray.report.figures import angles, losses, pseudo_labels, surfaces
from mpscl_ray.report.figures.feature_space import PER_CLASS, feature_space
from mpscl_ray.report.figures.segmentations import confident_share, overconfident, side_by_side
from mpscl_ray.report.figures.style import house_style, save
from mpscl_ray.report.groups import Group
from mpscl_ray.report.html import Section, Table
from mpscl_ray.report.runs import ReportedRun
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.structures import display_indices
from mpscl_ray.runs.wording import counted
from mpscl_ray.train.feature_log import FeatureRecord

_ROWS = 4
"""Slices of the side-by-side figure."""


def sections(groups: Sequence[Group], folder: Path, dpi: float, pdf: bool) -> Iterator[Section]:
    """All sections, each figure written into ``folder`` as PNG and, if wanted, PDF."""
    makers = (_segmentations, _surfaces, _overconfident, _losses, _pseudo_labels, _angles, _margin, _features)
    for maker in makers:
        section: Section | None = None
        for group in groups:
            with house_style():
                own = maker(group)
            if own is None:
                continue
            section = section or Section(own.title, own.lead)
            heading = f"Target {group.name}. " if group.suffix else ""
            for picture in own.figures:
                image = save(picture, folder, dpi, pdf)
                caption, alt_text = heading + picture.caption, heading + picture.alt_text
                section.figures.append(replace(picture, caption=caption, alt_text=alt_text, image=image))
            section.tables += own.tables
            section.notes += [heading + note for note in own.notes]
        if section is not None and (section.figures or section.tables or section.notes):
            yield section


def overview(groups: Sequence[Group]) -> Section:
    """A row for each run: its system, its state, and its scores where it was evaluated."""
    section = Section("Runs", "Dice and surface distance are means over the evaluated volumes.")
    for group in groups:
        scores = [_scores(run) for run in group.runs]
        structures, caption = ["mean"], ""
        scored = next((found for found in scores if found), None)
        if scored is not None:
            first = next(iter(scored["rows"].values()))
            structures = list(first["structures"])
            caption = (
                f"Target {group.name}, {counted(first['volumes'], 'labelled volume')} of the split {scored['split']}: "
                f"{PROTOCOLS[scored.get('protocol', 'prepared')]}; a row for each phase. "
                "There is no ASD where a structure is missed in all volumes."
            )
        rows = []
        for run, found in zip(group.runs, scores, strict=True):
            about = [run.folder.name, run.title, run.direction, str(run.config["run"]["seed"]), run.state]
            if not found:
                rows.append(about + [""] * (len(structures) + 2))
            for row, (label, values) in enumerate(found.get("rows", {}).items()):
                dice = [_number(values["structures"].get(name, {}).get("dice"), 100, 1) for name in structures]
                asd = _number(values["structures"]["mean"].get("asd_mm"), 1, 2)
                rows.append([*(about if row == 0 else [""] * len(about)), label, *dice, asd])
        header = ["run", "system", "domains", "seed", "state", "phase", *structures, "mean"]
        above = [("", 6), ("Dice %", len(structures)), ("ASD mm", 1)]
        section.tables.append(Table(header, rows, above, caption, frozenset({0, 1, 2, 4, 5})))
        missing = [run.folder.name for run, found in zip(group.runs, scores, strict=True) if not found]
        if missing:
            section.notes.append(
                f"No scores yet for {', '.join(missing)}: they are computed at the end of training, or with "
                "python -m mpscl_ray.evaluate RUN, and need labelled test or validation volumes."
            )
        section.notes += group.notes
    return section


def _scores(run: ReportedRun) -> dict[str, Any]:
    """Content of the run's ``results/phases.json``; {} where it was not evaluated."""
    file = run.folder.results / "phases.json"
    try:
        content: dict[str, Any] = safe_json.read(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged: {error}; evaluate the run again") from error
    return content


def _number(statistic: dict[str, Any] | None, scale: float, digits: int) -> str:
    mean = statistic["mean"] if statistic else None
    return "–" if mean is None else f"{scale * mean:.{digits}f}"


# ------------------------------------------------------------------------------------------------------- figures


def _segmentations(group: Group) -> Section | None:
    if group.shown is None:
        return None
    section = Section(
        "Segmentations side by side", "Slices of one target volume under the label map of each segmenter."
    )
    truth = group.shown.label
    maps = truth if truth is not None else group.predictions[-1].labels
    chosen = evenly_spaced(labelled_slices(maps), _ROWS)
    figure = side_by_side(group.shown.image, group.predictions, truth, group.classes, chosen)
    titles = ", ".join(prediction.title for prediction in group.predictions)
    caption = (
        f"Case {group.shown.case.id} ({group.shown.case.split}), slices {', '.join(map(str, chosen))}; from left to "
        f"right: image, {titles}{', ground truth' if truth is not None else ''}. After Fig. 6 of Liu et al. 2022."
    )
    section.add_figure(f"segmentations{group.suffix}", figure, caption, f"Label maps side by side: {titles}")
    return section


def _surfaces(group: Group) -> Section | None:
    if group.shown is None:
        return None
    section = Section(
        "Surfaces in 3D",
        "The whole volume. Slices are predicted one by one, so surfaces can be ragged from slice to slice.",
    )
    volumes = {prediction.title: prediction.labels for prediction in group.predictions}
    if group.shown.label is not None:
        volumes["ground truth"] = np.where(is_structure(group.shown.label), group.shown.label, 0)
    if not any((volume > 0).any() for volume in volumes.values()):
        section.notes.append("No surfaces are drawn: no segmenter predicts a structure in this volume.")
        return section
    figure = surfaces.surfaces(volumes, group.classes, group.shown.case.spacing_mm or (1.0, 1.0, 1.0))
    known = group.shown.case.spacing_mm is not None
    caption = (
        f"Case {group.shown.case.id}, all at the same scale, from two sides"
        f"{'' if known else '; the voxel size is not known and assumed equal in all directions'}. Surfaces are "
        "smoothed by about a voxel. After Fig. 7 of Liu et al. 2022."
    )
    section.add_figure(f"surfaces{group.suffix}", figure, caption, "Shaded surfaces of the structures")
    return section


def _overconfident(group: Group) -> Section | None:
    if group.shown is None:
        return None
    section = Section(
        "Overconfident errors",
        "Where the entropy of a prediction is low, the segmenter is confident. Confident errors pass any selection of "
        "pseudo-labels by confidence, which is why the paper selects them by their distance to prototypes.",
    )
    compared = [group.predictions[at] for at in group.contrast]
    truth = group.shown.label
    figure = overconfident(group.shown.image, compared, truth, group.classes)
    caption = "Dark is confident, bright is uncertain. "
    if truth is None:
        section.notes.append("The case has no ground truth, so errors are not marked.")
    else:
        shares = [(column.title, confident_share(column, truth)) for column in compared]
        percentages = " and ".join(f"{100 * share:.0f} % ({title})" for title, share in shares if not math.isnan(share))
        caption += (
            "Red boxes: connected errors whose entropy is below a tenth of its maximum, the largest of a slice. Of all "
            f"wrong pixels of this volume {percentages or 'none'} are of this kind. "
        )
    caption += "After Fig. 2 of Liu et al. 2022."
    section.add_figure(f"overconfident{group.suffix}", figure, caption, "Predictions and their entropy maps")
    return section


def _losses(group: Group) -> Section | None:
    section = Section(
        "Loss curves",
        "Weighted cross-entropy of the segmenter. Target labels are used for these curves only, and read on validation "
        "and test volumes, never on training volumes: the paper's curve on target training data has no counterpart.",
    )
    with_curves = [run for run in group.runs if losses.has_losses(run.records)]
    for run in group.runs:
        if run not in with_curves:
            section.notes.append(f"{run.title} has recorded no cross-entropy.")
        elif not any("val/loss_cross_entropy" in record for record in run.records):
            section.notes.append(
                f"{run.title} has no curve on the target: its validation volumes have no labels, or it was trained by "
                "a version that did not record one."
            )
    if not with_curves:
        return section
    trainings = [losses.Training(run.title, run.records, _test_points(group, run)) for run in with_curves]
    caption = (
        "Thin: each recorded training batch; thick: running median of nine. Classes are weighted by the pixels of "
        "the batch in training, and by those of all volumes in validation. "
    )
    if any(training.test for training in trainings):
        assert group.shown is not None
        caption += f"Stars: the whole test case {group.shown.case.id} at the ends of phases. "
    caption += "After Fig. 8 of Liu et al. 2022."
    figure = losses.loss_curves(trainings)
    section.add_figure(f"losses{group.suffix}", figure, caption, "Cross-entropy over iterations")
    return section


def _test_points(group: Group, run: ReportedRun) -> dict[int, float]:
    if group.shown is None or group.shown.case.split != "test":
        return {}
    return {
        prediction.step: prediction.cross_entropy
        for (_, owner, _), prediction in zip(group.columns, group.predictions, strict=True)
        if owner is run and prediction.step is not None and not math.isnan(prediction.cross_entropy)
    }


def _pseudo_labels(group: Group) -> Section | None:
    section = Section(
        "Self-paced pseudo-labels",
        "A target pixel gets the class of the prototype nearest to its feature, and is selected for training if the "
        "second nearest is sufficiently farther (Eq. 7).",
    )
    recorded = {}
    for run in group.runs:
        record = FeatureRecord(run.folder.path)
        panels, shown = record.read_panels(), record.read_slices()
        if not run.feature_records:
            continue
        recorded[run.title] = run.feature_records
        if not group.images or not panels or shown is None:
            continue
        iterations = {entry["global_step"]: entry["iteration"] for entry in run.feature_records}
        delta_th = float(run.feature_records[-1]["delta_th"])
        figure = pseudo_labels.refinement(panels, shown, iterations, group.classes, delta_th)
        caption = (
            f"{run.title}, validation case {shown['case']}, two slices; the adaptation runs from top to bottom. "
            f"White pixels of the last column are not selected: the difference of cosines is not above {delta_th:g}, "
            "the white line on the scale. At the resolution of the features. After Fig. 10 of Liu et al. 2022."
        )
        name = f"pseudo-labels-{run.folder.name}"
        section.add_figure(name, figure, caption, "Pseudo-labels of two slices over training")
    if recorded:
        figure = pseudo_labels.selection_curves(recorded)
        caption = (
            "Pixels of all validation volumes of the target at feature resolution. Labels of these volumes are used "
            "for the last curve only."
        )
        section.add_figure(f"selection{group.suffix}", figure, caption, "Shares of selected and right pixels")
    section.notes += _without(group, "pseudo-labels")
    return section


def _angles(group: Group) -> Section | None:
    section = Section(
        "Angles to the prototypes over training",
        "The smaller the angle between target features and the prototype of their class, the closer the domains are.",
    )
    for run in group.runs:
        if run.feature_records:
            figure = angles.over_training(run.feature_records, group.classes)
            caption = (
                f"{run.title}: validation volumes of the target, densities smoothed over five degrees; from pale "
                "(start of the adaptation) to dark. Vertical lines: means at the start (dotted) and at the end. After "
                "Fig. 9 of Liu et al. 2022."
            )
            section.add_figure(f"angles-{run.folder.name}", figure, caption, "Angle distributions over training")
    section.notes += _without(group, "angles")
    return section


def _without(group: Group, what: str) -> list[str]:
    """A sentence for the runs that recorded no features."""
    names = [run.title for run in group.runs if not run.feature_records]
    if not names:
        return []
    return [
        f"No {what} from {', '.join(names)}: they are recorded at validations of an adaptation with prototypes, on the "
        "target's validation volumes, and there was no such validation yet."
    ]


def _margin(group: Group) -> Section | None:
    last = {run.title: run.feature_records[-1] for run in group.runs if run.feature_records}
    section = Section(
        "Angles at the end, by run",
        "With and without margin: the margin should draw features closer to their prototypes.",
    )
    if len(last) < 2:
        section.notes.append(
            "This figure needs two runs with prototypes and the same target, such as one with and one without margin "
            "(method.margin_source=0 method.margin_target=0)."
        )
        return section
    figure = angles.between_runs(last, group.classes)
    ends = ", ".join(f"{title} at iteration {record['iteration']}" for title, record in last.items())
    caption = f"{ends}. Dotted verticals: means. After Fig. 11 of Liu et al. 2022."
    structures, keys = display_indices(group.classes), ("nearest", "label")
    rows = [
        [title, *(_degrees(record[key][index]) if key in record else "" for key in keys for index in structures)]
        for title, record in last.items()
    ]
    header = ["mean angle, degrees", *(group.classes[index] for index in structures * 2)]
    above = [("", 1), ("by pseudo-label", len(structures)), ("by label (for this table only)", len(structures))]
    section.tables.append(Table(header, rows, above, f"Target {group.name}."))
    section.add_figure(f"margin{group.suffix}", figure, caption, "Angle distributions of several runs")
    return section


def _degrees(histogram: Sequence[int]) -> str:
    mean = angles.mean_angle(histogram)
    return "–" if math.isnan(mean) else f"{mean:.1f}"


def _features(group: Group) -> Section | None:
    if group.shown is None:
        return None
    section = Section(
        "Feature space",
        "Where source and target pixels of a class lie together, a classifier of the source fits the target too.",
    )
    unsampled = [title for at in group.contrast if (title := group.columns[at][0]) not in group.samples]
    if unsampled:
        section.notes.append(
            f"No features of {', '.join(unsampled)}: the network is not a DeepLabV2, whose last stage is shown, "
            "or the source has no labelled case."
        )
    if not group.samples:
        return section
    origins = "; ".join(f"{title}: {sample.prototypes_from}" for title, sample in group.samples.items())
    by = "ground truth" if group.shown.label is not None else "prediction, as the case has no ground truth"
    caption = (
        f"Unit features in their first two principal components, up to {PER_CLASS} pixels of each class and domain; "
        f"target pixels (case {group.shown.case.id}) by {by}. Prototypes: {origins}."
    )
    figure = feature_space(group.samples, group.classes)
    section.add_figure(f"features{group.suffix}", figure, caption, "Features of source and target in a plane")
    return section
