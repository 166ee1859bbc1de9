"""The description of a run's segmenter: ``model.json`` and the checkpoints."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from mpscl_ray.data.scaling import scale
from mpscl_ray.data.training_range import TrainingRange
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.predict.postprocessing import Postprocessing
from mpscl_ray.predict.quality import Calibration
from mpscl_ray.predict.tta import MIRROR_AXES, MirrorAxis
from mpscl_ray.runs.checkpoint_files import SUMS
from mpscl_ray.runs.model_store import ModelStore, open_model
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.storage import S3Path, parse_location

Result = TypeVar("Result")
Slices = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Domain:
    """How volumes of one modality become slices, as stored in ``model.json``."""

    modality: str
    low: float
    high: float
    """Normalised intensities that become -1 and 1."""
    recipe: Recipe
    dataset: Path | S3Path | None
    """Prepared dataset that the run used; it may have moved since."""
    fingerprint: str | None
    raw_ids: Mapping[str, int]
    """Label id of each class in the files that the dataset was made from; empty if unknown."""
    trained_on: TrainingRange | None = None
    """What its training volumes were like; None in runs of earlier versions, or if the dataset was made from slices."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From an entry of ``model.json``; raises ValueError, which names what is wrong, if it is none."""
        low, high = _read(values, "scaling", _scaling)
        return cls(
            modality=str(values["modality"]),
            low=low,
            high=high,
            recipe=_read(values, "recipe", Recipe.from_json),
            dataset=parse_location(values["dataset"]) if values.get("dataset") else None,
            fingerprint=values.get("fingerprint"),
            raw_ids=_read(values, "labels", _raw_ids) if "labels" in values else {},
            trained_on=_read(values, "training_volumes", TrainingRange.from_json)
            if values.get("training_volumes")
            else None,
        )

    def scale(self, image: Slices) -> Slices:
        """Scale normalised slices to the input of the segmenter."""
        return scale(image, self.low, self.high)


@dataclass(frozen=True)
class Model:
    """Content of ``model.json``: everything about the segmenter except its weights."""

    classes: tuple[str, ...]
    """Background first."""
    size: tuple[int, int]
    """Height and width of a slice."""
    network: Mapping[str, Any]
    """Arguments of :func:`mpscl_ray.networks.build`."""
    domains: Mapping[str, Domain]
    """``source`` and ``target``."""
    phases: tuple[str, ...]
    postprocessing: Mapping[str, Postprocessing] = field(default_factory=dict)
    """What was chosen for some weights, by :attr:`mpscl_ray.predict.predictor.Predictor.weights_digest`."""
    quality: Mapping[str, Calibration] = field(default_factory=dict)
    """What estimates the quality of label maps of some weights, by their digest as well."""

    mirror_axes: tuple[MirrorAxis, ...] = ()
    """See :func:`mpscl_ray.predict.tta.augmented`."""

    def domain(self, name: str) -> Domain:
        """The domain called ``source`` or ``target``, or by its modality.

        Raises:
            ConfigError: the run has no such domain.
        """
        for role in ("target", "source"):
            if name in (role, self.domains[role].modality):
                return self.domains[role]
        known = ", ".join(f"{role} ({domain.modality})" for role, domain in self.domains.items())
        raise ConfigError(f"the run knows no modality {name!r}; choose one of {known}")


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a run: their path and origin."""

    name: str
    """Name in results: ``last``, ``best``, the name of a phase, or of the folder or file."""
    path: Path
    phase: str | None = None
    step: int | None = None
    """Iterations of all phases; None for weights from elsewhere."""
    selected_by: str | None = None
    """What selected it among the checkpoints of its run, if anything: a value of ``run.select``."""

    @property
    def oracle(self) -> bool:
        """Whether target labels selected it, which a user without such labels cannot repeat."""
        return self.selected_by == "oracle"

    def stamp(self) -> int:
        """A number that changes when other weights are written to the same path."""
        return self.path.stat().st_mtime_ns

    def sha256(self) -> str:
        """SHA-256 of a file with weights; of a checkpoint that of its ``SHA256SUMS``, which covers its files."""
        with (self.path / SUMS if self.path.is_dir() else self.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class _EntryError(ValueError):
    """What is wrong with an entry of ``model.json``, after its name."""


def _read(values: Mapping[str, Any], name: str, read: Callable[[Any], Result]) -> Result:
    """An entry of ``model.json``; raises _EntryError, which begins with its name."""
    try:
        return read(values[name])
    except _EntryError as error:
        raise _EntryError(f"{name}.{error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        if name not in values:
            raise _EntryError(f"{name} is missing") from error
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise _EntryError(f"{name} is {str(values[name])[:200]}: {reason}") from error


def _scaling(values: Mapping[str, Any]) -> tuple[float, float]:
    low, high = float(values["low"]), float(values["high"])
    if not -math.inf < low < high < math.inf:
        raise ValueError("expected a low below a high")
    return low, high


def _mirror_axes(axes: Sequence[Any]) -> tuple[MirrorAxis, ...]:
    if wrong := [axis for axis in axes if axis not in MIRROR_AXES]:
        raise ValueError(f"{wrong[0]!r} is none of {', '.join(MIRROR_AXES)}")
    return tuple(axis for axis in MIRROR_AXES if axis in axes)


def _raw_ids(labels: Mapping[str, Any]) -> dict[str, int]:
    """The lowest label id of each class."""
    ids: dict[str, int] = {}
    for raw, name in sorted(labels.get("values", {}).items(), key=lambda item: int(item[0])):
        ids.setdefault(name, int(raw))
    return ids


def read_model(run: RunDirectory | Path | str) -> Model:
    """Read ``model.json`` of a run or a model file. Raises ConfigError without one, DataError for a damaged one."""
    folder = open_model(run)
    folder.require()
    where = f"{folder.display_path}: model.json" if isinstance(folder.store, ModelStore) else folder.model_file
    values = folder.read_model()
    try:
        classes = tuple(str(name) for name in values["classes"])
        calibration = partial(Calibration.from_json, classes=classes)
        model = Model(
            classes=classes,
            size=(int(values["size"][0]), int(values["size"][1])),
            network={"num_classes": len(values["classes"]), **values["network"]},
            domains={role: _read(values, role, Domain.from_json) for role in ("source", "target")},
            phases=tuple(values.get("phases", ())),
            postprocessing=_of_weights(folder, values, folder.postprocessing_file, _rules),
            quality=_of_weights(folder, values, folder.quality_file, calibration),
            mirror_axes=_read(values, "mirror_axes", _mirror_axes) if "mirror_axes" in values else (),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, _EntryError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{where} is not what a run writes ({reason}); restore it from a copy, or run the training "
            "command again, which writes it"
        ) from error
    if model.network["num_classes"] != len(model.classes):
        raise DataError(
            f"{where} names {len(model.classes)} classes for a network with "
            f"{model.network['num_classes']}; restore it from a copy"
        )
    return model


def _of_weights(
    folder: RunDirectory, values: Mapping[str, Any], file: Path, read: Callable[[Any], Result]
) -> dict[str, Result]:
    """What was found for weights of a run: in a file of its own, of a model file under its name in ``model.json``."""

    def each(entries: Mapping[str, Any]) -> dict[str, Result]:
        return {digest: read(entry) for digest, entry in entries.items()}

    if isinstance(folder.store, ModelStore):
        return _read(values, file.stem, each) if values.get(file.stem) else {}
    entries = folder.read_of_weights(file)
    try:
        return each(entries)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        option = "--choose-postprocessing" if file == folder.postprocessing_file else "--calibrate-quality"
        raise DataError(
            f"{file} is not what evaluate {option} writes ({error}); give that command again, or delete the file to "
            "do without"
        ) from error


def _rules(entry: Mapping[str, Any]) -> Postprocessing:
    return Postprocessing.from_json(entry["rules"], entry["chosen_by"])


def find_checkpoint(run: RunDirectory | Path | str, checkpoint: str = "last") -> tuple[Checkpoint, list[str]]:
    """Find a checkpoint of a run.

    Args:
        run: folder of the run, a model file, or the URL of either.
        checkpoint: ``last``, the newest that is intact, or what a model file has; ``best``, the one with the best
            validation score; the name of a phase (``source_only``, ``warm_up``, ``adaptation``) for its end; the name
            of one in ``checkpoints/``; or a path: the folder of a checkpoint, or a file with released weights.

    Returns:
        The checkpoint, not read yet, and a warning for each damaged one that was skipped.

    Raises:
        ConfigError: no run, or no checkpoint of that name in it; lists those there are.
        DataError: ``last`` of a run that has none yet.
    """
    folder = open_model(run)
    folder.require()
    if isinstance(folder.store, ModelStore):
        return _only_checkpoint(folder.store, checkpoint), []
    if checkpoint == "last":
        path, notices = folder.store.latest_checkpoint()
        if path is None:
            reason = "; ".join(notices) or "training has not written one yet"
            raise DataError(f"the run {folder.display_path} has no intact checkpoint: {reason}")
        return Checkpoint("last", path), notices
    there = folder.store.checkpoint_names()
    if checkpoint in there:
        parents = {"best": folder.path} | dict.fromkeys(folder.store.step_checkpoints(), folder.checkpoints)
        return Checkpoint(checkpoint, folder.store.localize(parents.get(checkpoint, folder.phases) / checkpoint)), []
    path = Path(checkpoint)
    if checkpoint != "best" and path.exists():
        return Checkpoint(path.name, path.absolute()), []  # workers may have another current folder
    raise ConfigError(
        f"the run {folder.display_path} has no checkpoint {checkpoint!r} and there is no such path; it has "
        f"{', '.join(['last', *there]) if there else 'none yet'}"
    )


def _only_checkpoint(store: ModelStore, checkpoint: str) -> Checkpoint:
    if checkpoint not in ("last", store.weights_name):
        raise ConfigError(
            f"{store.display_path} holds the weights {store.weights_name!r} alone, not {checkpoint!r}; leave out "
            "--checkpoint, or export another model"
        )
    return Checkpoint(store.weights_name, store.weights)
