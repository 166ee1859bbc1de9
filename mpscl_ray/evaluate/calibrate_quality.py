"""Calibrating the quality estimate of a run's weights on the validation volumes of the domain whose labels train it.

There are few such volumes, and the segmenter is good on them. So each is segmented several times, with its appearance
changed more or less, as training does, and a linear function that grows with each feature is fitted to the Dice. No
label of the other domain is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.stats
import torch

from mpscl_ray import __version__
from mpscl_ray.config import AugmentConfig
from mpscl_ray.data import NOT_ANNOTATED, SOURCE_DOMAIN
from mpscl_ray.data.appearance import change_appearance
from mpscl_ray.data.dataset import Case
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.distributed.places import TaskPlace
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.evaluate.case_scores import read_slices
from mpscl_ray.evaluate.metrics import dice, left_out_where
from mpscl_ray.evaluate.over_cases import CaseOptions, map_cases
from mpscl_ray.evaluate.subject import load_subject, validation_cases
from mpscl_ray.predict.model import Slices, read_model
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.predict.quality import FITTED, Calibration, Reference, assess
from mpscl_ray.predict.segmentation import millilitres
from mpscl_ray.runs.model_store import ModelStore, open_model
from mpscl_ray.runs.run_directory import RunDirectory

STRENGTHS = (0.0, 0.3, 0.6, 1.0, 0.8, 0.3, 0.6, 1.0, 0.8, 0.3, 0.6, 1.0)
"""Weight of the changed appearance against the slices as they are, a draw for each."""
_CHANGES = AugmentConfig(mapping_probability=1.0, degradation_probability=0.5)
_RIDGE = 1e-3
"""Penalty of squared weights against the mean squared error of Dice: a feature that hardly varies here gets none."""

Pairs = list[tuple[list[float], float]]
"""Values of the fitted features, and the mean Dice."""


@dataclass(frozen=True)
class Calibrated:
    """The calibration of some weights, and what it was made from."""

    weights: str
    """Name of the checkpoint."""
    calibration: Calibration
    domain: str
    """Whose validation volumes: ``source``, or ``target`` where its labels train the run."""
    volumes: int
    segmentations: int
    dice: tuple[float, float]
    """Lowest and highest."""
    held_out: Mapping[str, float] | None
    """Mean absolute ``error``, and ``spearman`` correlation, of each volume by the others; None for one volume."""

    def __str__(self) -> str:
        text = (
            f"{self.weights}: {self.segmentations} segmentations of {self.volumes} {self.domain} validation volumes, "
            f"mean Dice {self.dice[0]:.2f} to {self.dice[1]:.2f}"
        )
        if self.held_out is None:
            return text + "; one volume, so nothing checks the estimate"
        return text + (
            f"; each volume estimated by the others: mean error {self.held_out['error']:.3f}, Spearman correlation "
            f"{self.held_out['spearman']:.2f}"
        )


def calibrate_quality(
    run: RunDirectory | str,
    checkpoint: str = "last",
    *,
    device: str | None = None,
    workers: int | None = None,
    progress: bool = True,
    place: TaskPlace | None = None,
) -> Calibrated:
    """Calibrate the estimate for the weights of a checkpoint, and keep it in the run's ``quality.json``.

    Args:
        run: folder of the run, or its URL.
        checkpoint: see :func:`mpscl_ray.predict.model.find_checkpoint`.
        device: see :func:`mpscl_ray.evaluate.scoring.evaluate_checkpoint`, as ``workers``, ``progress`` and ``place``.
        workers: volumes at a time.
        progress: whether to show a progress line.
        place: of each volume on a cluster.

    Raises:
        ConfigError: a model file, or no such run or checkpoint.
        DataError: a dataset or the checkpoint is damaged, no validation volume is labelled, or all have the same Dice.
    """
    home = open_model(run)
    if isinstance(home.store, ModelStore):
        raise ConfigError(
            f"{home.display_path} is a model file, which stays as it is; calibrate the quality of the run, and export "
            "it again"
        )
    model = read_model(home)
    domain = str(home.read_model().get("labelled", SOURCE_DOMAIN))
    dataset = model.domains[domain].dataset
    if not any(case.labelled for case in validation_cases(model, domain)):
        raise DataError(
            f"no validation case of {dataset}, the {domain} of the run {home.display_path}, is labelled, so there is "
            f"nothing to calibrate the quality on; prepare the {domain} with labelled validation cases"
        )
    device = place.device if place else device
    subject = load_subject(home, checkpoint, dataset, "val", "cpu" if place else device)
    train = [case for case in subject.manifest.split("train") if case.labelled]
    labels = (read_case(subject.dataset, case, ("label",))["label"] for case in train or subject.cases)
    reference = Reference.of(list(labels), len(model.classes))
    how: dict[str, Any] = {"label": "quality of", "workers": workers, "progress": progress, "place": place}
    options = CaseOptions.of(home, subject, "prepared", device)
    pairs = list(map_cases(segmentations, subject, options, **how).values())
    everything = [pair for one in pairs for pair in one]
    scores = np.array([score for _, score in everything])
    if scores.min() == scores.max():
        raise DataError(
            f"the mean Dice of {subject.weights.name} in {home.display_path} is {scores.mean():.2f} for all changed "
            f"validation volumes of the {domain}, so there is nothing to calibrate the quality by; train it longer"
        )
    intercept, weights = fit(everything)
    found = Calibrated(
        subject.weights.name,
        Calibration(intercept, weights, reference),
        domain,
        len(pairs),
        len(everything),
        (float(scores.min()), float(scores.max())),
        _held_out(pairs, reference) if len(pairs) > 1 else None,
    )
    _keep(home, subject.predictor, found)
    return found


def _keep(home: RunDirectory, predictor: Predictor, found: Calibrated) -> None:
    assert predictor.weights is not None
    home.add_of_weights(
        home.quality_file,
        predictor.weights_digest,
        {
            "checkpoint": found.weights,
            "phase": predictor.weights.phase,
            "step": predictor.weights.step,
            "calibrated_on": found.domain,
            "validation_volumes": found.volumes,
            "segmentations": found.segmentations,
            "dice": list(found.dice),
            "held_out": found.held_out,
            **found.calibration.to_json(),
            "product_version": __version__,
        },
    )


def segmentations(predictor: Predictor, options: CaseOptions, case: Case) -> Pairs:
    """Features and mean Dice of a labelled case, as it is and with its appearance changed; prepared slices."""
    slices, truth = read_slices(options.case(case), label=True)
    assert truth is not None
    rules = predictor.postprocessing("chosen")
    voxel_ml = None if case.spacing_mm is None else millilitres(case.spacing_mm)
    found: Pairs = []
    for number, strength in enumerate(STRENGTHS):
        maps = predictor.predict_maps(changed(slices, number, strength))
        features = assess(maps, predictor.classes, ()).features
        labels = rules(maps.labels, predictor.classes, voxel_ml)
        labels, known = left_out_where(truth == NOT_ANNOTATED, labels, truth)
        scores = np.array([dice(labels, known, index) for index in range(1, len(predictor.classes))])
        if (scores == scores).any():
            found.append(([features[name] for name in FITTED], float(np.nanmean(scores))))
    return found


def changed(slices: Slices, number: int, strength: float) -> Slices:
    """Slices (D, H, W) blended with those of another appearance, the same change for all; ``number`` draws it."""
    if strength == 0:
        return slices
    keys = np.full(len(slices), number, np.uint64)
    other: Slices = change_appearance(torch.from_numpy(slices.copy())[:, None], None, keys, _CHANGES).numpy()[:, 0]
    blend: Slices = (slices + strength * (other - slices)).astype(np.float32)
    return blend


def fit(pairs: Pairs) -> tuple[float, dict[str, float]]:
    """Intercept and non-negative weight of each of :data:`~mpscl_ray.predict.quality.FITTED`: ridge regression."""
    features, scores = (np.array(values) for values in zip(*pairs, strict=True))
    means, level = features.mean(axis=0), float(scores.mean())
    penalty = np.sqrt(_RIDGE * len(scores)) * np.eye(len(FITTED))
    rows, wanted = np.vstack([features - means, penalty]), np.concatenate([scores - level, np.zeros(len(FITTED))])
    weights: npt.NDArray[np.float64] = scipy.optimize.nnls(rows, wanted)[0]
    return level - float(means @ weights), dict(zip(FITTED, weights.tolist(), strict=True))


def _held_out(pairs: Sequence[Pairs], reference: Reference) -> dict[str, float]:
    """How well the segmentations of each volume are estimated by the other volumes."""
    estimates, scores = [], []
    for left_out, own in enumerate(pairs):
        others = [pair for at, one in enumerate(pairs) if at != left_out for pair in one]
        calibration = Calibration(*fit(others), reference)
        estimates += [calibration.estimate(dict(zip(FITTED, values, strict=True))) for values, _ in own]
        scores += [score for _, score in own]
    error = float(np.abs(np.array(estimates) - scores).mean())
    return {"error": error, "spearman": spearman(estimates, scores)}


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; 0 where either is constant."""
    if min(np.std(one), np.std(other)) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(one, other).statistic)
