"""From options and found cases to what is done: label table, recipe, splits, intensity range, manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mpscl_ray
from mpscl_ray.data import NOT_ANNOTATED, SPLITS
from mpscl_ray.data.dataset import FORMAT_VERSION, Case, Manifest, Scaling
from mpscl_ray.data.volumes.recipe import AIR_HU, LOWEST_HU, Recipe
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.prepare.label_table import (
    LabelTable,
    label_ids,
    mask_names,
    parse_label_table,
    with_corrections,
    with_ignored,
    with_not_annotated,
)
from mpscl_ray.prepare.options import SLICE_LAYOUTS, PrepareOptions, numbers
from mpscl_ray.prepare.source_cases import LayoutOptions, SourceCase
from mpscl_ray.prepare.splits import (
    Member,
    Splitting,
    read_split_file,
    split_folds,
    split_fractions,
    split_listed,
    split_published,
)
from mpscl_ray.prepare.staged_case import Request, Settings, StagedCase
from mpscl_ray.runs.wording import counted

_DEFAULT_FRACTIONS = "0.7,0.1,0.2"
_DEFAULT_OF_FOLDS = "0.875,0.125,0"
_LEAK_OF_THE_RELEASE = (
    "in the public release the MR validation slices come from the MR test patients: never select a model for MR on them"
)


def layout_options(options: PrepareOptions) -> LayoutOptions:
    """The options of the layout."""
    return LayoutOptions(
        modality=options.modality,
        image_pattern=options.image_pattern,
        label_pattern=options.label_pattern,
        patient_pattern=options.patient_pattern,
        group_slices=options.group_slices,
        channel=options.channel,
        masks=mask_names(options.labels),
    )


def label_table(options: PrepareOptions, implied: LabelTable | None) -> LabelTable | None:
    """The user's table, else that of the layout, if any.

    Raises:
        ConfigError: it is malformed, or there is none to correct.
    """
    table = implied
    if options.labels:
        given = parse_label_table(options.labels)
        if implied is None:
            table = given
        else:
            not_annotated = given.not_annotated | (implied.not_annotated - given.values.keys())
            table = replace(given, unknown=implied.unknown, not_annotated=not_annotated)
    if table is None:
        if options.ignore_labels or options.not_annotated_labels or options.fix_label or options.unknown_labels:
            raise ConfigError(
                "--ignore-labels, --not-annotated-labels, --fix-label and --unknown-labels need a label table: give "
                "--labels"
            )
        return None
    if options.not_annotated_labels:
        both = label_ids("--not-annotated-labels", options.not_annotated_labels)
        both &= label_ids("--ignore-labels", options.ignore_labels or "")
        if both:
            raise ConfigError(
                f"{min(both)} is in --ignore-labels, by which it is background, and in --not-annotated-labels, by "
                "which it counts nowhere; give it in one of the two"
            )
        table = with_not_annotated(table, options.not_annotated_labels)
    if options.ignore_labels:
        table = with_ignored(table, options.ignore_labels)
    if options.fix_label:
        table = with_corrections(table, options.fix_label)
    if options.unknown_labels:
        table = replace(table, unknown=options.unknown_labels)
    return table


def settings(options: PrepareOptions, table: LabelTable | None) -> Settings:
    """Settings of every case.

    If some splits have no labels, no crop is placed by labels: all cases are treated the same.
    """
    recipe = options.recipe
    if recipe.centre == "auto" and options.splits_without_labels:
        recipe = replace(recipe, centre="image")
    spacing = options.assume_spacing
    return Settings(
        recipe=recipe,
        table=table,
        assume_spacing_mm=None if spacing is None else (spacing[0], spacing[1], spacing[2]),
        copy_geometry_from_image=options.fix_geometry is not None,
        geometry=options.geometry,
        nan_policy=options.nan_policy,
        any_modality=options.any_modality,
        flip=options.flip,
        pictures=options.pictures,
    )


# ------------------------------------------------------------------------------------------------------- splits


def split_cases(options: PrepareOptions, modality: str, cases: Sequence[SourceCase]) -> Splitting:
    """Assign cases to splits.

    Raises:
        ConfigError: ``--split`` is not understood.
        DataError: the cases cannot be split that way.
    """
    how = options.split or _default_split(options.layout)
    members = [Member(case.id, case.patient) for case in cases]
    if how == "mmwhs":
        return split_published(members, modality)
    if how == "released":
        unknown = [case.id for case in cases if case.split is None]
        if unknown:
            raise DataError(
                f"--split released: neither train, val nor test in the names of {counted(len(unknown), 'file')}, e.g. "
                f"{unknown[0]}; rename them, or give --split as fractions or a JSON file"
            )
        listed = {split: [case.id for case in cases if case.split == split] for split in SPLITS}
        splitting = split_listed(members, listed, "released")
        if modality == "mr" and listed["val"]:
            splitting = replace(splitting, notices=(*splitting.notices, _LEAK_OF_THE_RELEASE))
        return splitting
    fixed = [case for case in cases if case.split == "test" and options.layout not in SLICE_LAYOUTS]
    fractions = numbers(how)
    if options.fold is not None and fractions is not None:
        raise ConfigError(f"--fold {options.fold} needs --split FILE with a list of folds, such as splits_final.json")
    if fractions is None:
        path = Path(how)
        notices: list[str] = []
        listed = read_split_file(path, modality, options.fold, notices)
        if not listed["test"]:
            # splits_final.json names training and validation; imagesTs holds the test cases.
            listed["test"] = [case.id for case in fixed]
        origin = f"--split {path}" if options.fold is None else f"--split {path} --fold {options.fold}"
        splitting = split_listed(members, listed, origin)
        return replace(splitting, notices=(*notices, *splitting.notices))
    if not fixed:
        return split_fractions(members, fractions, options.seed)
    # The folder itself names the test cases (imagesTs): only the others are drawn.
    drawn = [Member(case.id, case.patient) for case in cases if case.split is None]
    kept = sum(fractions[:2])
    if not drawn or kept == 0:
        raise DataError(f"{modality}: imagesTs holds the test cases, and nothing is left to train on; give a JSON file")
    rest = split_fractions(drawn, [fractions[0] / kept, fractions[1] / kept, 0.0], options.seed)
    test = tuple(sorted(case.id for case in fixed))
    return Splitting({**rest.cases, "test": test}, {**rest.record, "test": "as in the folder"}, rest.notices)


def fold_cases(options: PrepareOptions, modality: str, cases: Sequence[SourceCase]) -> list[Splitting]:
    """Assign cases to the splits of each fold.

    Raises:
        DataError: there are too few patients.
    """
    assert options.folds is not None
    # The own test cases of a folder (imagesTs) stay out of cross-validation, as in nnU-Net.
    apart = sorted(case.id for case in cases if case.split == "test" and options.layout not in SLICE_LAYOUTS)
    members = [Member(case.id, case.patient) for case in cases if case.id not in apart]
    fractions = numbers(options.split or _DEFAULT_OF_FOLDS)
    assert fractions is not None
    try:
        found = split_folds(members, options.folds, fractions, options.seed)
    except DataError as error:
        raise DataError(f"{modality}: {error}") from None
    notices = (f"test cases of imagesTs, in no fold, {len(apart)}: {', '.join(apart[:8])}",) if apart else ()
    return [replace(splitting, notices=notices) for splitting in found]


def _default_split(layout: str) -> str:
    if layout == "mmwhs":
        return "mmwhs"
    return "released" if layout in SLICE_LAYOUTS else _DEFAULT_FRACTIONS


def requests(
    options: PrepareOptions,
    modality: str,
    cases: Sequence[SourceCase],
    splits: Mapping[str, Sequence[str]],
    folder: Path | None,
    table: LabelTable | None,
    problems: list[str],
) -> list[Request]:
    """One request for each case and split; missing labels that are needed become problems."""
    by_id = {case.id: case for case in cases}
    found: list[Request] = []
    missing: list[str] = []
    without = options.splits_without_labels
    for split, names in splits.items():
        keep = split not in without if split in SPLITS else not without
        for name in names:
            source = by_id[name]
            if keep and source.lacks_labels:
                looked_for = f" ({source.label_hint})" if source.label_hint else ""
                where = f" ({split})" if split in SPLITS else ""
                missing.append(f"{modality}: case {name}{where} has no label{looked_for}")
            found.append(Request(source, split, keep, folder, len(found)))
    if missing:
        problems += missing
        problems.append(
            "cases without labels are fine in splits that are named with --unlabelled, e.g. --unlabelled train"
            if options.folds is None
            else "with --folds each case is tested on: leave out cases without a label, or all labels with --unlabelled"
        )
    else:
        check_meaning(table, found)
    return found


def check_meaning(table: LabelTable | None, requests: Sequence[Request]) -> None:
    """Refuse labels that are to be read without a label table.

    Raises:
        ConfigError: there are such labels.
    """
    if table is None and any(request.keep_labels and request.source.labels for request in requests):
        raise ConfigError("the meaning of the label values is not known: give --labels, e.g. --labels 1=MYO,2=LV")


# --------------------------------------------------------------------------------------------------------- range


def scaling(options: PrepareOptions, modality: str, staged: Sequence[StagedCase]) -> Scaling:
    """The given range, else one that covers the training cases: the lowest and the highest of their robust ranges.

    Raises:
        DataError: there is no training case to estimate it from.
    """
    given = options.given_range(modality)
    if given is not None:
        return Scaling(*given)
    training = [case.intensity_range for case in staged if case.request.split == "train"]
    if not training:
        raise DataError(f"{modality}: no training case to estimate the intensity range from; give --range LO,HI")
    low, high = min(low for low, _ in training), max(high for _, high in training)
    return Scaling(round(low, 4), round(high, 4), f"estimated from {counted(len(training), 'training case')}")


# ------------------------------------------------------------------------------------------------------ manifest


def manifest(
    options: PrepareOptions,
    prepared: Settings,
    modality: str,
    splitting: Splitting,
    scaling: Scaling,
    staged: Sequence[StagedCase],
    cases: Sequence[Case],
    notices: Sequence[str],
) -> Manifest:
    """The manifest of a dataset: how it was made, and its cases."""
    table, recipe = prepared.table, prepared.recipe_of(modality)
    size = (staged[0].shape[1], staged[0].shape[2])
    steps = [f"files of layout {options.layout}"]
    if table is not None:
        names = dict(enumerate(table.classes)) | {NOT_ANNOTATED: "not annotated"}
        meaning = ", ".join(f"{raw} {names[value]}" for raw, value in sorted(table.effective().items()))
        steps.append(f"raw labels: {meaning}; background on purpose: {sorted(table.ignored) or 'none'}")
        if table.not_annotated:
            steps.append(f"not annotated: label value {NOT_ANNOTATED}, which counts in no loss and no score")
    if options.splits_without_labels:
        steps.append(f"labels left out of {', '.join(options.splits_without_labels)}")
    how = splitting.record["method"] if options.folds is None else f"fold {splitting.record['fold']} of {options.folds}"
    steps.append(f"split by patient: {how}{', transductive' if options.transductive else ''}")
    released = list(dict.fromkeys(step for case in staged for step in case.steps))
    steps += released or _recipe_steps(recipe)
    steps.append(f"{scaling.low:g} to {scaling.high:g} mapped to [-1, 1], not clipped; range {scaling.origin}")
    all_notices = [*splitting.notices, *notices]
    if released:
        recipe = replace(recipe, size=size, hounsfield=False)
        all_notices.append(
            "the slices were prepared by their publisher, whose steps are known only in part; a new volume is prepared "
            "by the recipe given here, which is the nearest known"
        )
    return Manifest(
        version=FORMAT_VERSION,
        modality=modality,
        classes=table.classes if table is not None else (),
        size=size,
        scaling=scaling,
        recipe=recipe.to_json(),
        splitting={**splitting.record, "transductive": options.transductive},
        labels={} if table is None else table.record(),
        steps=tuple(steps),
        notices=tuple(all_notices),
        command=options.command(),
        product_version=mpscl_ray.__version__,
        cases=tuple(sorted(cases, key=lambda case: (SPLITS.index(case.split), case.id))),
    )


def _recipe_steps(recipe: Recipe) -> list[str]:
    if recipe.orientation == "canonical":
        steps = [f"turned by the affine to {recipe.slice_axis} slices"]
    else:
        steps = [f"not turned; slices along array axis {recipe.slice_axis}"]
    if recipe.spacing_mm is not None:
        sizes = ", ".join("kept" if size is None else f"{size:g} mm" for size in recipe.spacing_mm)
        steps.append(f"resampled to (slice, row, column) {sizes}")
    if recipe.crop is not None or recipe.crop_depth is not None:
        rows = "all rows and columns" if recipe.crop is None else f"{recipe.crop[0]} x {recipe.crop[1]}"
        depth = "all" if recipe.crop_depth is None else f"at most {recipe.crop_depth}"
        where = {
            "labels": "the labels' mean coordinate",
            "image": "a centre found without labels",
            "auto": "the labels' mean coordinate where there are labels",
        }[recipe.centre]
        steps.append(f"cropped to {rows}, {depth} slices, around {where}")
    if recipe.size is not None:
        steps.append(f"resized to {recipe.size[0]} x {recipe.size[1]}")
    if recipe.hounsfield:
        steps.append(f"padding below {LOWEST_HU:g} set to {AIR_HU:g}")
    steps.append(f"clipped at percentile {recipe.clip_percentile:g} of the crop")
    steps.append("z-score of the crop")
    return steps
