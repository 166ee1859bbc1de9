"""The sections of a report: which figures runs allow, what they show, and what is missing and why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpscl_ray.data.slice_selection import evenly_spaced, labelled_slices
from mpscl_ray.errors import DataError
from mpscl_ray.report.figures import angles, losses, pseudo_labels, surfaces
from mpscl_ray.report.figures.feature_space import PER_CLASS, feature_space
from mpscl_ray.report.figures.segmentations import confident_share, overconfident, side_by_side
from mpscl_ray.report.figures.style import Picture, house_style, save
from mpscl_ray.report.groups import Group
from mpscl_ray.report.html import Section, Shown, Table
from mpscl_ray.report.runs import ReportedRun
from mpscl_ray.train.feature_log import FeatureRecord

_ROWS = 4
"""Slices of the side-by-side figure."""


def sections(groups: Sequence[Group], folder: Path, dpi: float, pdf: bool) -> Iterator[Section]:
    """All sections, each figure written into ``folder`` as PNG and, if wanted, PDF when its section is made."""
    makers = (_segmentations, _surfaces, _overconfident, _losses, _pseudo_labels, _angles, _margin, _features)
    for maker in makers:
        section: Section | None = None
        for group in groups:
            with house_style():
                made = maker(group)
            if made is None:
                continue
            own, pictures = made
            section = section or Section(own.title, own.lead)
            heading = f"Target {group.name}. " if group.suffix else ""
            for picture in pictures:
                image = save(picture, folder, dpi, pdf)
                caption = heading + picture.caption
                section.shown.append(Shown(picture.name, image, caption, heading + picture.alternative))
            section.tables += own.tables
            section.notes += [heading + note for note in own.notes]
        if section is not None and (section.shown or section.tables or section.notes):
            yield section


def overview(groups: Sequence[Group]) -> Section:
    """A row for each run: what it is, how far it is, and its scores where it was evaluated."""
    section = Section("Runs", "Dice and surface distance are means over the evaluated volumes, all slices counted.")
    for group in groups:
        structures = _score_columns(group)
        header = ["run", "system", "adapts", "seed", "state", "phase", *structures, "mean"]
        above = [("", 6), ("Dice %", len(structures)), ("ASD mm", 1)]
        rows = []
        missing = []
        for run in group.runs:
            about = [run.folder.name, run.title, run.direction, str(run.config["run"]["seed"]), run.state]
            scored = _scores(run)
            if scored is None:
                missing.append(run.folder.name)
                rows.append([*about, "", *("" for _ in structures), ""])
                continue
            for row, (label, values) in enumerate(scored["rows"].items()):
                dice = [_number(values["structures"].get(name, {}).get("dice"), 100, 1) for name in structures]
                asd = _number(values["structures"]["mean"].get("asd_mm"), 1, 2)
                rows.append([*(about if row == 0 else [""] * len(about)), label, *dice, asd])
        section.tables.append(Table(header, rows, frozenset({0, 1, 2, 4, 5}), _scored_on(group), above))
        if missing:
            section.notes.append(
                f"No scores yet for {', '.join(missing)}: they come at the end of training, or with "
                "python -m mpscl_ray.evaluate RUN, and need labelled test or validation volumes."
            )
        section.notes += group.notes
    return section


def _scored_on(group: Group) -> str:
    scored = [scores for run in group.runs if (scores := _scores(run))]
    if not scored:
        return ""
    volumes = next(iter(scored[0]["rows"].values()))["volumes"]
    return (
        f"Target {group.name}, {volumes} labelled volumes of the split {scored[0]['split']}; a row for each phase. "
        "There is no ASD where a structure is missed in all volumes."
    )


def _score_columns(group: Group) -> list[str]:
    for run in group.runs:
        scored = _scores(run)
        if scored is not None:
            return list(next(iter(scored["rows"].values()))["structures"])
    return ["mean"]


def _scores(run: ReportedRun) -> dict[str, Any] | None:
    file = run.folder.results / "phases.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged: {error}; evaluate the run again") from error
    return content


def _number(statistic: dict[str, Any] | None, scale: float, digits: int) -> str:
    mean = statistic["mean"] if statistic else None
    return "–" if mean is None else f"{scale * mean:.{digits}f}"


# ------------------------------------------------------------------------------------------------------- figures

Made = tuple[Section, list[Picture]] | None


def _segmentations(group: Group) -> Made:
    if group.shown is None:
        return None
    section = Section(
        "Segmentations side by side", "Slices of one target volume under the label map of each segmenter."
    )
    truth = group.shown.label
    maps = truth if truth is not None else group.looks[-1].segmented.labels
    chosen = evenly_spaced(labelled_slices(maps), _ROWS)
    figure = side_by_side(group.shown.image, [look.segmented for look in group.looks], truth, group.classes, chosen)
    titles = ", ".join(look.segmented.title for look in group.looks)
    caption = (
        f"Case {group.shown.case.id} ({group.shown.case.split}), slices {', '.join(map(str, chosen))}; from left to "
        f"right: image, {titles}{', ground truth' if truth is not None else ''}. After Fig. 6 of Liu et al. 2022."
    )
    return section, [Picture(f"segmentations{group.suffix}", figure, caption, f"Label maps side by side: {titles}")]


def _surfaces(group: Group) -> Made:
    if group.shown is None:
        return None
    section = Section(
        "Surfaces in 3D",
        "The same volume whole. Slices are predicted one by one: what is ragged here was not smooth there.",
    )
    volumes = {look.segmented.title: look.segmented.labels for look in group.looks}
    if group.shown.label is not None:
        volumes["ground truth"] = group.shown.label
    if not any((volume > 0).any() for volume in volumes.values()):
        section.notes.append("No surfaces are drawn: no segmenter predicts a structure in this volume.")
        return section, []
    figure = surfaces.surfaces(volumes, group.classes, group.shown.spacing)
    known = group.shown.case.spacing_mm is not None
    caption = (
        f"Case {group.shown.case.id}, all at one scale, from two sides"
        f"{'' if known else '; the voxel size is not known and taken to be the same in all directions'}. Surfaces are "
        "smoothed by about a voxel. After Fig. 7 of Liu et al. 2022."
    )
    return section, [Picture(f"surfaces{group.suffix}", figure, caption, "Shaded surfaces of the structures")]


def _overconfident(group: Group) -> Made:
    if group.shown is None:
        return None
    section = Section(
        "Wrong without doubt",
        "Where the entropy of a prediction is low, the segmenter is sure of it. Errors of that kind pass any selection "
        "of pseudo-labels by confidence, which is why the paper selects them by their distance to prototypes.",
    )
    looks = [group.looks[at] for at in group.contrast]
    truth = group.shown.label
    figure = overconfident(group.shown.image, [look.segmented for look in looks], truth, group.classes)
    caption = "Dark is sure, bright is doubtful. "
    if truth is None:
        section.notes.append("The case has no ground truth, so errors are not marked.")
    else:
        shares = [(look.segmented.title, confident_share(look.segmented, truth)) for look in looks]
        told = " and ".join(f"{100 * share:.0f} % ({title})" for title, share in shares if not math.isnan(share))
        caption += (
            "Red boxes: connected errors whose entropy is below a tenth of its maximum, the largest of a slice. Of all "
            f"wrong pixels of this volume {told or 'none'} are of this kind. "
        )
    caption += "After Fig. 2 of Liu et al. 2022."
    return section, [Picture(f"overconfident{group.suffix}", figure, caption, "Predictions and their entropy maps")]


def _losses(group: Group) -> Made:
    section = Section(
        "Loss curves",
        "Weighted cross-entropy of the segmenter. Target labels serve these curves alone: they are read on validation "
        "and test volumes, never on training volumes, so the paper's curve on target training data has no counterpart.",
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
        return section, []
    trainings = [losses.Training(run.title, run.records, _test_points(group, run)) for run in with_curves]
    caption = (
        "Thin: each reading of a training batch; thick: running median of nine. Classes are weighted by the pixels of "
        "the batch in training, and by those of all volumes in validation. "
    )
    if any(training.test for training in trainings):
        assert group.shown is not None
        caption += f"Stars: the whole test case {group.shown.case.id} at the ends of phases. "
    caption += "After Fig. 8 of Liu et al. 2022."
    figure = losses.loss_curves(trainings)
    return section, [Picture(f"losses{group.suffix}", figure, caption, "Cross-entropy over iterations")]


def _test_points(group: Group, run: ReportedRun) -> dict[int, float]:
    if group.shown is None or group.shown.case.split != "test":
        return {}
    pairs = zip(group.columns, group.looks, strict=True)
    return {
        look.step: look.cross_entropy
        for (_, owner, _), look in pairs
        if owner is run and look.step is not None and not math.isnan(look.cross_entropy)
    }


def _pseudo_labels(group: Group) -> Made:
    section = Section(
        "Self-paced pseudo-labels",
        "A target pixel gets the class of the prototype that is nearest to its feature, and trains if the second "
        "nearest is far enough behind (Eq. 7).",
    )
    pictures = []
    recorded = {}
    for run in group.runs:
        record = FeatureRecord(run.folder.path)
        panels, shown = record.read_panels(), record.read_slices()
        if not run.looks or not panels or shown is None:
            continue
        recorded[run.title] = run.looks
        iterations = {look["global_step"]: look["iteration"] for look in run.looks}
        delta_th = float(run.looks[-1]["delta_th"])
        figure = pseudo_labels.refinement(panels, shown, iterations, group.classes, delta_th)
        caption = (
            f"{run.title}, validation case {shown['case']}, two slices; from top to bottom as the adaptation goes on. "
            f"White pixels of the last column are not selected: the difference of cosines is not above {delta_th:g}, "
            "the white line on the scale. At the resolution of the features. After Fig. 10 of Liu et al. 2022."
        )
        name = f"pseudo-labels-{run.folder.name}"
        pictures.append(Picture(name, figure, caption, "Pseudo-labels of two slices over training"))
    if recorded:
        figure = pseudo_labels.selection_curves(recorded)
        caption = (
            "Pixels of all validation volumes of the target at feature resolution. Labels of these volumes tell what "
            "is right; they serve this curve alone."
        )
        pictures.append(Picture(f"selection{group.suffix}", figure, caption, "Shares of selected and right pixels"))
    section.notes += _without(group, "pseudo-labels")
    return section, pictures


def _angles(group: Group) -> Made:
    section = Section(
        "Angles to the prototypes over training",
        "The smaller the angle between target features and the prototype of their class, the closer are the domains.",
    )
    pictures = []
    for run in group.runs:
        if run.looks:
            figure = angles.over_training(run.looks, group.classes)
            caption = (
                f"{run.title}: validation volumes of the target, densities smoothed over five degrees; from pale "
                "(start of the adaptation) to dark. Vertical lines: means at the start (dotted) and at the end. After "
                "Fig. 9 of Liu et al. 2022."
            )
            pictures.append(Picture(f"angles-{run.folder.name}", figure, caption, "Angle distributions over training"))
    section.notes += _without(group, "angles")
    return section, pictures


def _without(group: Group, what: str) -> list[str]:
    """A sentence for the runs that recorded no features."""
    names = [run.title for run in group.runs if not run.looks]
    if not names:
        return []
    return [
        f"No {what} from {', '.join(names)}: they are recorded at validations of an adaptation with prototypes, on the "
        "target's validation volumes, and there was none of that yet."
    ]


def _margin(group: Group) -> Made:
    looked = {run.title: run.looks[-1] for run in group.runs if run.looks}
    section = Section(
        "Angles at the end, run against run",
        "With a margin against without one: the margin should draw features closer to their prototypes.",
    )
    if len(looked) < 2:
        section.notes.append(
            "This figure needs two runs with prototypes and the same target, such as one with and one without margin "
            "(method.margin_source=0 method.margin_target=0)."
        )
        return section, []
    figure = angles.between_runs(looked, group.classes)
    ends = ", ".join(f"{title} at iteration {look['iteration']}" for title, look in looked.items())
    caption = f"{ends}. Dotted verticals: means. After Fig. 11 of Liu et al. 2022."
    structures, keys = range(1, len(group.classes)), ("nearest", "label")
    rows = [
        [title, *(_degrees(look[key][index]) if key in look else "" for key in keys for index in structures)]
        for title, look in looked.items()
    ]
    header = ["mean angle, degrees", *group.classes[1:], *group.classes[1:]]
    above = [("", 1), ("by pseudo-label", len(structures)), ("by label (for this table only)", len(structures))]
    section.tables.append(Table(header, rows, caption=f"Target {group.name}.", groups=above))
    return section, [Picture(f"margin{group.suffix}", figure, caption, "Angle distributions of several runs")]


def _degrees(histogram: Sequence[int]) -> str:
    mean = angles.mean_angle(histogram)
    return "–" if math.isnan(mean) else f"{mean:.1f}"


def _features(group: Group) -> Made:
    if group.shown is None:
        return None
    section = Section(
        "Feature space",
        "Where source and target pixels of the same class lie together, a classifier of the one serves the other.",
    )
    if group.unsampled:
        section.notes.append(
            f"No features of {', '.join(group.unsampled)}: the network is not a DeepLabV2, whose last stage is drawn, "
            "or the source has no labelled case."
        )
    if not group.samples:
        return section, []
    origins = "; ".join(f"{title}: {origin}" for title, origin in group.origins.items())
    by = "ground truth" if group.shown.label is not None else "prediction, as the case has no ground truth"
    caption = (
        f"Unit features in their first two principal components, up to {PER_CLASS} pixels of each class and domain; "
        f"target pixels (case {group.shown.case.id}) by {by}. Prototypes: {origins}."
    )
    figure = feature_space(group.samples, group.classes)
    return section, [Picture(f"features{group.suffix}", figure, caption, "Features of source and target in a plane")]
