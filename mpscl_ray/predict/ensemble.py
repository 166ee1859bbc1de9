"""Several segmenters as one: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from mpscl_ray.errors import ConfigError
from mpscl_ray.predict.model import Checkpoint, Domain, Model, read_model
from mpscl_ray.predict.postprocessing import Postprocessing, PostprocessingChoice, Rule
from mpscl_ray.predict.predictor import Predictor, load_segmenter, load_weights
from mpscl_ray.predict.quality import Calibration
from mpscl_ray.runs.model_store import open_model


class Ensemble(Predictor):
    """The mean of the probabilities of segmenters that prepare volumes alike. One batch of slices is in memory.

    Args:
        members: two or more, on the same device; the first gives its names and how volumes are prepared.
        names: what they are called in errors.

    Raises:
        ConfigError: they differ in classes, label ids, size of the slices, or in the modality or preparation of the
            target.
    """

    several = True

    def __init__(self, members: Sequence[Predictor], names: Sequence[str]) -> None:
        first = members[0]
        super().__init__(
            first.network,
            first.classes,
            device=first.device,
            batch_slices=first.batch_slices,
            model=first.model,
            weights=first.weights,
        )
        self.members, self.names = tuple(members), tuple(names)
        self._rescaled = tuple((1.0, 0.0) for _ in members)
        for member, name in zip(members[1:], names[1:], strict=True):
            if difference := _difference(_model(first), _model(member)):
                raise ConfigError(
                    f"{name} and {names[0]} cannot be an ensemble: {difference}; give runs with the same classes, "
                    "label ids, target modality and preparation"
                )

    def prepared_as(self, domain: Domain) -> Ensemble:
        """The ensemble for slices prepared as a domain of the first member; others may scale intensities differently.

        Raises:
            ConfigError: a member does not know the modality, or prepares it in another way.
        """
        rescaled = []
        for member, name in zip(self.members, self.names, strict=True):
            own = domain if member is self.members[0] else _model(member).domain(domain.modality)
            if _recipe(own) != _recipe(domain):
                raise ConfigError(
                    f"{name} and {self.names[0]} cannot be an ensemble for {domain.modality}: "
                    f"{_recipe_difference(own, domain)}; give runs that prepare it alike"
                )
            # Slices x in [-1, 1] stand for intensities (x + 1) (high - low) / 2 + low.
            factor = (domain.high - domain.low) / (own.high - own.low)
            rescaled.append((factor, factor - 1 + 2 * (domain.low - own.low) / (own.high - own.low)))
        prepared = Ensemble(self.members, self.names)
        prepared._rescaled = tuple(rescaled)
        return prepared

    def postprocessing(self, choice: PostprocessingChoice) -> Postprocessing:
        """Rules that were chosen for all members alike."""
        if choice != "chosen":
            return super().postprocessing(choice)
        chosen = [member.postprocessing(choice) for member in self.members]
        rules = {
            name: rule
            for name, rule in chosen[0].rules.items()
            if all(other.rules.get(name, Rule()) == rule for other in chosen)
        }
        by = sorted({str(other.chosen_by) for other in chosen if other.chosen_by}, key=lambda name: name != "oracle")
        return Postprocessing(rules, by[0] if rules and by else None)

    @property
    def calibrations(self) -> tuple[Calibration, ...]:
        """Of each member; empty where one has none."""
        found = [member.calibrations for member in self.members]
        return tuple(one for (one,) in found) if all(found) else ()

    def _passes(self, images: Tensor) -> Iterator[Tensor]:
        for member, (factor, offset) in zip(self.members, self._rescaled, strict=True):
            yield from member._passes(images if (factor, offset) == (1.0, 0.0) else images * factor + offset)


def load_ensemble(
    runs: Sequence[Path | str],
    checkpoint: str = "last",
    device: torch.device | str | None = None,
    *,
    tta: bool = False,
) -> Predictor:
    """The segmenter of a run, or the ensemble of several.

    Args:
        runs: their folders, model files, or the URLs of either.
        checkpoint: of each, see :func:`mpscl_ray.predict.model.find_checkpoint`.
        device: see :class:`Predictor`.
        tta: whether each member averages over slices that are moved a little (:mod:`mpscl_ray.predict.tta`).

    Raises:
        ConfigError: no run, no such run or checkpoint, a run twice, or runs that cannot be an ensemble.
        DataError: a run has no checkpoint yet, or it is damaged or does not fit the network.
    """
    if not runs:
        raise ConfigError("no run was given; give at least one")
    return ensemble_of([load_segmenter(run, checkpoint, device, tta=tta) for run in runs], [str(run) for run in runs])


def ensemble_of(members: Sequence[Predictor], names: Sequence[str]) -> Predictor:
    """The only member, or the ensemble of several. Raises ConfigError where one is there twice, or they do not fit."""
    digests = [member.weights_digest for member in members] if len(members) > 1 else []
    for number, digest in enumerate(digests):
        if digest in digests[:number]:
            first = names[digests.index(digest)]
            raise ConfigError(f"{names[number]} has the same weights as {first}; give each member of an ensemble once")
    return members[0] if len(members) == 1 else Ensemble(members, names)


def _model(member: Predictor) -> Model:
    assert member.model is not None, "it was loaded from a run"
    return member.model


def _difference(first: Model, other: Model) -> str:
    """What keeps two models from being an ensemble; empty if nothing does."""
    own, target = other.domains["target"], first.domains["target"]
    if other.classes != first.classes:
        return f"its classes are {', '.join(other.classes)}, not {', '.join(first.classes)}"
    if own.modality != target.modality:
        return f"its target is {own.modality}, not {target.modality}"
    if own.raw_ids and target.raw_ids and own.raw_ids != target.raw_ids:
        name = next(name for name in first.classes if own.raw_ids.get(name) != target.raw_ids.get(name))
        return f"{name} has the id {own.raw_ids.get(name)} in its label files, not {target.raw_ids.get(name)}"
    if other.size != first.size:
        return f"its slices are {other.size[0]} x {other.size[1]}, not {first.size[0]} x {first.size[1]}"
    return "" if _recipe(own) == _recipe(target) else _recipe_difference(own, target)


def _recipe(domain: Domain) -> object:
    return replace(domain.recipe, centre="image")  # predict never places the crop by labels


def _recipe_difference(own: Domain, other: Domain) -> str:
    mine, wanted = (replace(domain.recipe, centre="image").to_json() for domain in (own, other))
    key = next(key for key in {**wanted, **mine} if mine.get(key) != wanted.get(key))
    return f"it prepares {own.modality} with {key} {mine.get(key)}, not {wanted.get(key)}"


@dataclass(frozen=True)
class Member:
    """Where a process finds the weights of a segmenter."""

    run: str
    """Address of the run or the model file."""
    weights: Checkpoint
    """Their path may be relative to the run's folder, which may differ between nodes."""
    stamp: int
    """See :meth:`mpscl_ray.predict.model.Checkpoint.stamp`: they are read again when it changes."""


@lru_cache(maxsize=1)
def cached_predictor(members: tuple[Member, ...], device: str | None, *, tta: bool = False) -> Predictor:
    """The segmenter of this worker process, or the ensemble, kept for its next volume.

    Args:
        members: one or more.
        device: see :class:`Predictor`, as ``tta``.
        tta: whether slices are moved as well.
    """
    found = []
    for member in members:
        folder = open_model(member.run)
        weights = replace(member.weights, path=folder.store.localize(member.weights.path))
        found.append(load_weights(read_model(folder), weights, device, tta=tta))
    return ensemble_of(found, [member.run for member in members])
