"""Choosing the postprocessing of a run's weights on validation volumes, structure by structure.

``label_free``: without labels of the target. The labels of the source say what a structure is like: in one part or in
several, with holes or without, how large. Predictions for the target say where that would change anything.
``supervised`` and ``oracle``: by Dice on the target's validation volumes; where the target's labels train the run, and
where the run selects its checkpoints with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from mpscl_ray import __version__
from mpscl_ray.data import NOT_ANNOTATED, SOURCE_DOMAIN, TARGET_DOMAIN
from mpscl_ray.data.dataset import Case
from mpscl_ray.distributed.places import TaskPlace
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.evaluate.case_scores import SegmentedCase, read_truth, segment_case
from mpscl_ray.evaluate.evaluation import Protocol
from mpscl_ray.evaluate.metrics import dice, left_out_where
from mpscl_ray.evaluate.over_cases import CaseOptions, map_cases
from mpscl_ray.evaluate.subject import Subject, choose_protocol, load_subject, validation_cases
from mpscl_ray.predict.model import Model, read_model
from mpscl_ray.predict.postprocessing import Labels, Mask, Postprocessing, Rule
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.runs import safe_yaml
from mpscl_ray.runs.model_store import ModelStore, open_model
from mpscl_ray.runs.run_directory import RunDirectory

Criterion = Literal["label_free", "supervised", "oracle"]

ONE_PART = 0.99
"""Least share of its largest part in every label of a structure that is in one part."""
DOMINANT = 0.75
"""Least share of the largest part in every prediction; where another is about as large, nobody knows which is right."""
SMALLEST_SHARE = 0.05
"""Parts below this share of the structure's smallest label are no organ."""
_PARTS = (Rule(), Rule(largest_component=True), *(Rule(min_ml=ml) for ml in (0.1, 0.5, 2.0, 5.0)))
CANDIDATES = (*_PARTS, *(replace(rule, fill_holes=True) for rule in _PARTS))
"""Rules that Dice chooses from; of equally good ones the first."""
LEAST_GAIN = 0.001
"""By which a rule has to raise the mean Dice."""


@dataclass(frozen=True)
class Chosen:
    """The rules for some weights, and what they were chosen on."""

    weights: str
    """Name of the checkpoint."""
    postprocessing: Postprocessing
    volumes: dict[str, int]
    """Validation volumes by domain."""
    dice: dict[str, tuple[float, float]]
    """By structure, mean over these volumes without and with its rule; empty without labels of the target."""

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {domain}" for domain, count in self.volumes.items())
        return f"{self.weights} ({self.postprocessing.chosen_by}, validation volumes: {counts}): {self.postprocessing}"


def choose_postprocessing(
    run: RunDirectory | str,
    checkpoint: str = "last",
    *,
    device: str | None = None,
    workers: int | None = None,
    progress: bool = True,
    place: TaskPlace | None = None,
) -> Chosen:
    """Choose the rules for the weights of a checkpoint, and keep them in the run's ``postprocessing.json``.

    Args:
        run: folder of the run, or its URL.
        checkpoint: see :func:`mpscl_ray.predict.model.find_checkpoint`.
        device: see :func:`mpscl_ray.evaluate.scoring.evaluate_checkpoint`, as ``workers``, ``progress`` and ``place``.
        workers: volumes at a time.
        progress: whether to show a progress line.
        place: of each volume on a cluster.

    Raises:
        ConfigError: a model file, or no such run or checkpoint.
        DataError: a dataset or the checkpoint is damaged, or there is no labelled validation volume to choose on.
    """
    home = open_model(run)
    if isinstance(home.store, ModelStore):
        raise ConfigError(
            f"{home.display_path} is a model file, which stays as it is; choose the postprocessing of the run, and "
            "export it again"
        )
    model = read_model(home)
    how: dict[str, Any] = {"label": "postprocessing of", "workers": workers, "progress": progress, "place": place}
    device = place.device if place else device
    on = "cpu" if place else device
    criterion = criterion_of(home)
    if criterion == "label_free":
        labels = list(_label_parts(home, model))
        domain = TARGET_DOMAIN if validation_cases(model, TARGET_DOMAIN) else SOURCE_DOMAIN
        subject = load_subject(home, checkpoint, model.domains[domain].dataset, "val", on, labelled=False)
        protocol: Protocol = "file" if all(case.geometry for case in subject.cases) else "prepared"
        found = map_cases(_predicted_parts, subject, CaseOptions.of(home, subject, protocol, device), **how)
        rules = _by_anatomy(model.classes[1:], labels, list(found.values()))
        scores: dict[str, tuple[float, float]] = {}
        volumes = {SOURCE_DOMAIN: len(labels), f"{domain} (without labels)": len(found)}
    else:
        subject = load_subject(home, checkpoint, None, "val", on)
        protocol, _ = choose_protocol(None, subject)
        tables = map_cases(_dice_table, subject, CaseOptions.of(home, subject, protocol, device), **how)
        rules, scores = _by_dice(model.classes[1:], np.array(list(tables.values())))
        volumes = {TARGET_DOMAIN: len(tables)}
    chosen = Chosen(subject.weights.name, Postprocessing(rules, criterion), volumes, scores)
    _keep(home, subject, chosen)
    return chosen


def criterion_of(home: RunDirectory) -> Criterion:
    """What may choose: Dice on the target only where the run already uses labels of the target."""
    if home.read_model().get("labelled", SOURCE_DOMAIN) == TARGET_DOMAIN:
        return "supervised"
    select = safe_yaml.load(home.read_config()).get("run", {}).get("select")
    return "oracle" if select == "oracle" else "label_free"


def _keep(home: RunDirectory, subject: Subject, chosen: Chosen) -> None:
    weights = subject.weights
    home.add_of_weights(
        home.postprocessing_file,
        subject.predictor.weights_digest,
        {
            "checkpoint": weights.name,
            "phase": weights.phase,
            "step": weights.step,
            "chosen_by": chosen.postprocessing.chosen_by,
            "rules": chosen.postprocessing.to_json(),
            "validation_volumes": chosen.volumes,
            "validation_dice": {name: list(values) for name, values in chosen.dice.items()},
            "product_version": __version__,
        },
    )


# ------------------------------------------------------------------------------------- without labels of the target


@dataclass(frozen=True)
class _Parts:
    """A structure in one volume."""

    share: float
    """Of its largest part; NaN where it is not there."""
    parts: int
    ml: float
    """Volume of all parts; NaN if voxels are of unknown size."""
    smallest_ml: float
    """Of the smallest part."""
    holes: bool
    """Whether it encloses background."""


def _parts_of(labels: Labels, classes: Sequence[str], voxel_ml: float | None) -> list[_Parts]:
    """Of each structure."""
    found = []
    boxes = scipy.ndimage.find_objects(labels, max_label=len(classes) - 1)
    for index, box in enumerate(boxes, start=1):
        if box is None:
            found.append(_Parts(math.nan, 0, math.nan, math.nan, False))
            continue
        mask: Mask = labels[box] == index
        numbered, count = scipy.ndimage.label(mask)
        sizes = np.bincount(numbered.ravel())[1:]
        unit = math.nan if voxel_ml is None else voxel_ml
        holes = bool((scipy.ndimage.binary_fill_holes(mask) & (labels[box] == 0)).any())
        total = int(sizes.sum())
        found.append(_Parts(float(sizes.max() / total), count, total * unit, float(sizes.min()) * unit, holes))
    return found


def _label_parts(home: RunDirectory, model: Model) -> Iterator[list[_Parts]]:
    """Of the labels of the source's validation volumes."""
    cases = [case for case in validation_cases(model, SOURCE_DOMAIN) if case.labelled]
    dataset = model.domains[SOURCE_DOMAIN].dataset
    assert dataset is not None
    if not cases:
        raise DataError(
            f"no validation case of {dataset}, the source of the run {home.display_path}, is labelled, so there is "
            "nothing to choose the postprocessing by; prepare the source with labelled validation cases"
        )
    for case in cases:
        truth, voxel_ml = read_truth(dataset, case)
        yield _parts_of(left_out_where(truth == NOT_ANNOTATED, truth, truth)[0], model.classes, voxel_ml)


def _predicted_parts(predictor: Predictor, options: CaseOptions, case: Case) -> list[_Parts]:
    found = segment_case(predictor, options.case(case), options.protocol)
    return _parts_of(found.labels, predictor.classes, found.voxel_ml)


def _by_anatomy(
    structures: Sequence[str], labels: Sequence[Sequence[_Parts]], predictions: Sequence[Sequence[_Parts]]
) -> dict[str, Rule]:
    """The rules that the labels allow and that change a prediction."""
    rules = {}
    for index, name in enumerate(structures):
        real = [parts[index] for parts in labels if parts[index].parts]
        seen = [parts[index] for parts in predictions if parts[index].parts]
        if not real or not seen:
            continue
        rule = Rule(fill_holes=not any(one.holes for one in real) and any(one.holes for one in seen))
        if min(one.share for one in real) >= ONE_PART and max(one.parts for one in seen) > 1:
            if min(one.share for one in seen) >= DOMINANT:
                rule = replace(rule, largest_component=True)
            else:
                limit = SMALLEST_SHARE * min(one.ml for one in real)
                if min(one.smallest_ml for one in seen) < limit:  # never where sizes are unknown
                    rule = replace(rule, min_ml=float(f"{limit:.2g}"))
        rules[name] = rule
    return rules


# ---------------------------------------------------------------------------------------- with labels of the target


def _dice_table(predictor: Predictor, options: CaseOptions, case: Case) -> npt.NDArray[np.float64]:
    """Dice (S, K) of each structure with each candidate; NaN where label and prediction lack it."""
    found = segment_case(predictor, options.case(case), options.protocol)
    return dice_of_candidates(found, predictor.classes)


def dice_of_candidates(found: SegmentedCase, classes: Sequence[str]) -> npt.NDArray[np.float64]:
    """Dice (S, K) of each structure with each of the candidates, all other structures as they are."""
    assert found.truth is not None
    table = np.empty((len(classes) - 1, len(CANDIDATES)))
    for index, name in enumerate(classes[1:], start=1):
        for number, rule in enumerate(CANDIDATES):
            if rule.min_ml and found.voxel_ml is None:
                table[index - 1, number] = math.nan
                continue
            labels = Postprocessing({name: rule})(found.labels, classes, found.voxel_ml)
            labels, truth = left_out_where(found.truth == NOT_ANNOTATED, labels, found.truth)
            table[index - 1, number] = dice(labels, truth, index)
    return table


def _by_dice(
    structures: Sequence[str], tables: npt.NDArray[np.float64]
) -> tuple[dict[str, Rule], dict[str, tuple[float, float]]]:
    """The best candidate of each structure, and its mean Dice without and with it, from tables (N, S, K)."""
    rules, scores = {}, {}
    for name, table in zip(structures, tables.swapaxes(0, 1), strict=True):
        if np.isnan(table[:, 0]).all():
            continue
        # As in the tables of evaluate: a volume counts unless the structure is neither in it nor predicted.
        means = np.array([values[~np.isnan(values)].mean() if (values == values).any() else -1 for values in table.T])
        best = int(means.argmax())
        if means[best] < means[0] + LEAST_GAIN:
            best = 0
        rules[name] = CANDIDATES[best]
        scores[name] = (float(means[0]), float(means[best]))
    return rules, scores
