"""A trained segmenter for Python programs: arrays in, label maps out, on the same grid."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from mpscl_ray.data.volumes.file_names import NIFTI_ENDINGS, SEGMENTATION_ENDING, has_ending
from mpscl_ray.data.volumes.nifti import read_image
from mpscl_ray.data.volumes.recipe import GEOMETRIES, NAN_POLICIES, GeometryFrom, NanPolicy
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.predict.ensemble import load_ensemble
from mpscl_ray.predict.image import output_ids
from mpscl_ray.predict.label_files import write_labels
from mpscl_ray.predict.model import Checkpoint, Model
from mpscl_ray.predict.postprocessing import Labels, PostprocessingChoice
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.predict.quality import Quality
from mpscl_ray.predict.volume import SegmentedVolume, refuse_probability_map, segment_volume, write_unit_map
from mpscl_ray.runs.atomic_files import storage_errors

LabelValues = Literal["index", "raw"]

_SMALLEST_VOLUME = 1e-3
"""Of the cell that the normalised columns of an affine span; the affine is singular where it is smaller."""


class TrainedSegmenter:
    """A network with its weights, and how its run prepares volumes. :func:`load_segmenter` makes it."""

    def __init__(self, predictor: Predictor, model: Model) -> None:
        self._predictor, self._model = predictor, model

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by the values of the label maps, background first."""
        return self._predictor.classes

    @property
    def label_values(self) -> dict[str, int]:
        """Structure -> its value in the label files of the training data, such as 205 for MYO in MM-WHS.

        Raises:
            ConfigError: the run does not know them.
        """
        return output_ids(self._model, self._model.domains["target"])

    @property
    def modalities(self) -> dict[str, str]:
        """``source`` and ``target`` -> the modality, such as ``ct`` or ``mr``."""
        return {role: domain.modality for role, domain in self._model.domains.items()}

    @property
    def checkpoint(self) -> Checkpoint:
        """Which weights these are: ``name``, ``path``, ``phase``, ``step``, ``selected_by``."""
        assert self._predictor.weights is not None
        return self._predictor.weights

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self._predictor.device

    def predict(
        self,
        volume: npt.ArrayLike,
        affine: npt.ArrayLike,
        *,
        modality: str = "target",
        postprocessing: PostprocessingChoice = "chosen",
        label_values: LabelValues = "index",
        any_modality: bool = False,
    ) -> npt.NDArray[np.integer[Any]]:
        """Segment a volume.

        Args:
            volume: (X, Y, Z) intensities, any real type, in the order in which a NIfTI file has them.
            affine: (4, 4), voxel index to RAS+ millimetres, as ``nibabel.load(file).affine``. It says which way the
                patient lies and how large voxels are.
            modality: ``target``, ``source``, or the name of one of :attr:`modalities`.
            postprocessing: ``chosen``: by the rules that were chosen for these weights on validation volumes, if any
                were. ``none``: as the network gives it. ``largest_component``: only the largest connected part of each
                structure is kept.
            label_values: ``index``: indices into :attr:`class_names`, uint8. ``raw``: those of :attr:`label_values`,
                int32.
            any_modality: whether what looks like another modality or a label map is segmented as well.

        Returns:
            (X, Y, Z) label map on the grid of the volume, what the command predict writes.

        Raises:
            ConfigError: the run does not know the modality.
            DataError: shape, affine or intensities cannot be used, the volume looks like another modality or a label
                map, or the weights give values that are not finite.

        Warns:
            UserWarning: each warning that the command predict writes into volumes.json, such as a voxel size that no
                training volume had, or a structure at the edge of the crop.
        """
        raw_ids = self._raw_ids(label_values)
        done = self._predict(_volume(volume), _affine(affine), modality, postprocessing, any_modality, "the volume")
        return self._values(done.found.labels, raw_ids)

    def predict_with_quality(
        self,
        volume: npt.ArrayLike,
        affine: npt.ArrayLike,
        *,
        modality: str = "target",
        postprocessing: PostprocessingChoice = "chosen",
        label_values: LabelValues = "index",
        any_modality: bool = False,
    ) -> tuple[npt.NDArray[np.integer[Any]], Quality]:
        """What :meth:`predict` returns, with the same arguments, errors and warnings, and how good it probably is.

        The :class:`~mpscl_ray.predict.quality.Quality` has an ``estimate`` of the mean Dice, or the ``reason`` why
        there is none, and the ``features`` of the volume and of its ``structures``.
        """
        raw_ids = self._raw_ids(label_values)
        done = self._predict(_volume(volume), _affine(affine), modality, postprocessing, any_modality, "the volume")
        return self._values(done.found.labels, raw_ids), done.quality

    def predict_file(
        self,
        path: Path | str,
        out: Path | str,
        *,
        modality: str = "target",
        postprocessing: PostprocessingChoice = "chosen",
        label_values: LabelValues = "index",
        any_modality: bool = False,
        assume_spacing: tuple[float, float, float] | None = None,
        geometry: GeometryFrom | None = None,
        nan_policy: NanPolicy = "error",
        disagreement: Path | str | None = None,
    ) -> Path:
        """Segment an image file and write the label map in its geometry, in the format that ``out`` ends in.

        Args:
            path: image: ``.nii``, ``.nii.gz``, ``.nrrd``, ``.mha``, or a folder with a DICOM series.
            out: label map: ``.nii``, ``.nii.gz``, or ``.seg.nrrd``, which 3D Slicer opens as a segmentation with names
                and colours; its folder is made, and a file of that name replaced. Returned.
            modality, postprocessing, label_values, any_modality: see :meth:`predict`.
            assume_spacing: voxel size in mm, for a file without a usable geometry.
            geometry: ``sform``, ``qform`` or ``pixdim``: which part of a header is right, if its parts contradict each
                other.
            nan_policy: what becomes of voxels that are NaN or infinite: ``error``, ``lowest`` or ``zero``.
            disagreement: another NIfTI file, for a map in [0, 1] of how much runs and moved slices disagree.

        Raises:
            ConfigError: the run does not know the modality, an option has another value, or an output is the image or
                not the name of a file of these formats.
            DataError: the image is damaged or cannot be used, or looks like another modality, a label map, or a
                probability map of predict.
            StorageError: ``out`` cannot be written.

        Warns:
            UserWarning: as :meth:`predict`, and what is unusual in the file.
        """
        path, out, spread = Path(path), Path(out), None if disagreement is None else Path(disagreement)
        _check_output("out", out, path, (*NIFTI_ENDINGS, SEGMENTATION_ENDING))
        if spread is not None:
            _check_output("disagreement", spread, path, NIFTI_ENDINGS)
        raw_ids = self._raw_ids(label_values)
        _check_reading(assume_spacing, geometry, nan_policy)
        image = read_image(path, assume_spacing_mm=assume_spacing, geometry=geometry, nan_policy=nan_policy)
        refuse_probability_map(image)
        for file in (out, spread or out):
            with storage_errors(file.parent):
                file.parent.mkdir(parents=True, exist_ok=True)
        done = self._predict(
            image.array,
            image.affine,
            modality,
            postprocessing,
            any_modality,
            str(path),
            image.notices_for(self._model.domain(modality).recipe),
            spread is not None,
        )
        if spread is not None and done.found.maps.disagreement is not None:
            write_unit_map(spread, done.found.maps.disagreement, done.geometry, image)
        write_labels(out, done.found.labels, image, self.class_names, raw_ids)
        return out

    def _values(self, labels: Labels, raw_ids: dict[str, int] | None) -> npt.NDArray[np.integer[Any]]:
        """A label map with the values that were asked for."""
        if raw_ids is None:
            return labels
        return np.array([0, *(raw_ids[name] for name in self.class_names[1:])], dtype=np.int32)[labels]

    def _raw_ids(self, label_values: str) -> dict[str, int] | None:
        """Value of each structure; None where it is the class index."""
        _check_choice("label_values", label_values, ("index", "raw"))
        return None if label_values == "index" else self.label_values

    def _predict(
        self,
        volume: npt.NDArray[np.float32],
        affine: npt.NDArray[np.float64],
        modality: str,
        postprocessing: PostprocessingChoice,
        any_modality: bool,
        name: str,
        notices: tuple[str, ...] = (),
        disagreement: bool = False,
    ) -> SegmentedVolume:
        done = segment_volume(
            self._predictor,
            self._model.domain(modality),
            volume,
            affine,
            name,
            any_modality=any_modality,
            option="any_modality=True",
            postprocessing=self._predictor.postprocessing(postprocessing),
            disagreement=disagreement,
        )
        for notice in (*notices, *done.notices):
            warnings.warn(f"{name}: {notice}", stacklevel=3)  # the line that called predict or predict_file
        return done


def load_segmenter(
    run: Path | str | Sequence[Path | str],
    checkpoint: str = "last",
    *,
    device: torch.device | str | None = None,
    tta: bool = False,
) -> TrainedSegmenter:
    """The segmenter of a run, ready to predict; of several runs the mean of their probabilities.

    Args:
        run: folder of the run, a model file that ``export`` wrote, or the URL of either; or a list of these.
        checkpoint: ``last``, ``best``, the name of a phase (``source_only``, ``warm_up``, ``adaptation``) for its end,
            the name of one in the run's ``checkpoints``, or a path.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None takes a GPU where there is one.
        tta: whether probabilities are averaged over slices that are moved a little, which takes five times as long.

    Raises:
        ConfigError: there is no such run, checkpoint or device, which says which there are; or runs that differ in
            classes, label ids, target modality or preparation.
        DataError: the run has no checkpoint yet, or one that is damaged or does not fit the network.
    """
    with torch.random.fork_rng([]):  # a network draws initial weights before it gets its own
        runs = [run] if isinstance(run, str | Path) or not isinstance(run, Sequence) else run
        predictor = load_ensemble(runs, checkpoint, device, tta=tta)
    assert predictor.model is not None
    return TrainedSegmenter(predictor, predictor.model)


def _check_output(name: str, file: Path, image: Path, endings: Sequence[str]) -> None:
    """Check where a file is to be written, by the name of the argument. Raises ConfigError."""
    if not has_ending(file.name, tuple(endings)):
        listed = f"{', '.join(endings[:-1])} or {endings[-1]}"
        raise ConfigError(f"{name} is {file}; expected the name of a file that ends in {listed}")
    if file.resolve() == image.resolve():
        raise ConfigError(f"{name} is the image {image} itself; give it another name")


def _check_reading(assume_spacing: tuple[float, float, float] | None, geometry: str | None, nan_policy: str) -> None:
    """Check how a file is to be read. Raises ConfigError."""
    _check_choice("geometry", geometry, (None, *GEOMETRIES))
    _check_choice("nan_policy", nan_policy, NAN_POLICIES)
    if assume_spacing is not None and not (len(assume_spacing) == 3 and all(0 < mm < np.inf for mm in assume_spacing)):
        raise ConfigError(
            f"assume_spacing is {assume_spacing!r}; expected three sizes in mm above 0, such as (1, 1, 5)"
        )


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; expected {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}")


def _volume(volume: npt.ArrayLike) -> npt.NDArray[np.float32]:
    array = np.asarray(volume)
    if array.ndim != 3 or not array.size:
        raise DataError(f"the volume has shape {array.shape}; expected three axes (X, Y, Z), none of them empty")
    if array.dtype.kind not in "iufb":
        raise DataError(f"the volume holds {array.dtype}; expected real numbers")
    with np.errstate(over="ignore"):
        converted = array.astype(np.float32)
    broken = int(array.size - np.count_nonzero(np.isfinite(converted)))
    if broken:
        raise DataError(
            f"the volume has {broken} voxels that are NaN, infinite or beyond single precision; expected finite "
            "intensities"
        )
    if converted.min() == converted.max():
        raise DataError(f"the volume has the intensity {converted.flat[0]:g} in every voxel, so it shows nothing")
    return converted


def _affine(affine: npt.ArrayLike) -> npt.NDArray[np.float64]:
    try:
        matrix = np.asarray(affine, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError("the affine is not a matrix of numbers; expected (4, 4), voxel index to RAS+ mm") from error
    if matrix.shape != (4, 4):
        raise DataError(f"the affine has shape {matrix.shape}; expected (4, 4), voxel index to RAS+ mm")
    if not np.isfinite(matrix).all():
        raise DataError("the affine has numbers that are not finite; expected (4, 4), voxel index to RAS+ mm")
    if not np.array_equal(matrix[3], [0, 0, 0, 1]):
        raise DataError(f"the last row of the affine is {matrix[3].tolist()}; expected [0, 0, 0, 1]")
    sizes = np.sqrt((matrix[:3, :3] ** 2).sum(axis=0))
    if sizes.min() == 0 or abs(np.linalg.det(matrix[:3, :3] / sizes)) < _SMALLEST_VOLUME:
        raise DataError("the affine is singular, so voxels have no volume; expected three independent directions")
    return matrix
