"""The public Python API: predictions of a trained segmenter, and their scores."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from mpscl_ray import ConfigError, DataError, MpsclError, TrainedSegmenter, TrainingResult, load_segmenter, score
from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.evaluate.metrics import volume_scores
from mpscl_ray.predict import predictor as predictors
from mpscl_ray.predict.image import Job, predict_image
from tests.raw_volumes import RAW_IDS, volume

AFFINE = np.diag([1.5, 1.5, 2.0, 1.0])


def messages(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught]


@pytest.fixture(scope="module")
def segmenter(result: TrainingResult) -> TrainedSegmenter:
    return load_segmenter(result.run, device="cpu")


@pytest.fixture(scope="module")
def speckled(result: TrainingResult) -> TrainedSegmenter:
    """The same with a random head, which sees structures everywhere, and with a small crop for the source."""
    predictor = predictors.load_segmenter(result.run, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in predictor.network.named_parameters():
            if name.startswith("layer6"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * name.endswith("weight"))
    assert predictor.model is not None
    domains = predictor.model.domains
    recipe = dataclasses.replace(domains["source"].recipe, crop=(16, 16))
    other = dataclasses.replace(domains["source"], recipe=recipe)
    return TrainedSegmenter(predictor, dataclasses.replace(predictor.model, domains={**domains, "source": other}))


def test_a_segmenter_says_what_it_is(segmenter: TrainedSegmenter, result: TrainingResult) -> None:
    assert segmenter.class_names[0] == "background"
    assert segmenter.class_names[1:] == tuple(segmenter.label_values)
    assert sorted(segmenter.label_values.values()) == sorted(RAW_IDS)
    assert segmenter.modalities == {"source": "ct", "target": "mr"}
    assert (segmenter.checkpoint.name, segmenter.checkpoint.path) == ("last", result.last_checkpoint)
    assert load_segmenter(result.run, "best", device="cpu").checkpoint.path == result.best_checkpoint
    assert segmenter.device == torch.device("cpu")


@pytest.mark.parametrize("kind", ["index", "raw"])
@pytest.mark.parametrize("postprocessing", ["none", "largest_component"])
def test_arrays_and_files_get_the_label_map_of_the_command(
    speckled: TrainedSegmenter, hearts: Path, tmp_path: Path, kind: Any, postprocessing: Any
) -> None:
    image = hearts / "scans" / "mr_train_1001_image.nii.gz"
    raw = speckled.label_values if kind == "raw" else None
    rules = speckled._predictor.postprocessing(postprocessing)
    job = Job((), "target", tmp_path, raw, postprocessing=rules)
    assert predict_image(speckled._predictor, job, image).error is None
    written = nib.load(tmp_path / "mr_train_1001_image_prediction.nii.gz")
    expected = np.asarray(written.dataobj)
    found = set(np.unique(expected)) - {0}
    assert len(found) > 1
    assert found <= set(speckled.label_values.values() if raw else range(1, 5))
    loaded = nib.load(image)
    options: Any = {"label_values": kind, "postprocessing": postprocessing}
    np.testing.assert_array_equal(speckled.predict(loaded.get_fdata(), loaded.affine, **options), expected)
    out = speckled.predict_file(image, tmp_path / "new" / "label.nii.gz", **options)
    np.testing.assert_array_equal(np.asarray(nib.load(out).dataobj), expected)
    np.testing.assert_array_equal(nib.load(out).affine, loaded.affine)


def test_a_volume_that_is_turned_has_its_label_map_turned(speckled: TrainedSegmenter) -> None:
    array, _ = volume(5)
    turn = np.eye(4)
    turn[0, 0], turn[0, 3] = -1, len(array) - 1
    turned = speckled.predict(array[::-1], AFFINE @ turn)
    np.testing.assert_array_equal(turned[::-1], speckled.predict(array, AFFINE))


def test_a_volume_is_prepared_as_its_modality(speckled: TrainedSegmenter) -> None:
    array, _ = volume(5)
    target = speckled.predict(array, AFFINE)
    with pytest.raises(DataError, match=r"no Hounsfield units.*but the model expects ct.*any_modality"):
        speckled.predict(array, AFFINE, modality="ct")
    with warnings.catch_warnings(record=True, action="always") as caught:
        other = speckled.predict(array, AFFINE, modality="ct", any_modality=True)
    assert any(re.search("the crop has the mean .* HU; training volumes had", said) for said in messages(caught))
    assert (target != other).any()
    np.testing.assert_array_equal(target, speckled.predict(array, AFFINE, modality="mr"))


def spoilt(**changes: float) -> np.ndarray[Any, Any]:
    affine = AFFINE.copy()
    for key, value in changes.items():
        affine[int(key[1]), int(key[2])] = value
    return affine


GOOD = volume(1)[0]
REFUSED: list[tuple[Any, Any, str]] = [
    (GOOD[0], AFFINE, r"the volume has shape \(24, 18\); expected three axes"),
    (GOOD[:0], AFFINE, r"the volume has shape \(0, 24, 18\); expected three axes"),
    (GOOD.astype(complex), AFFINE, "the volume holds complex"),
    (np.where(GOOD > 500, np.nan, GOOD), AFFINE, r"the volume has \d+ voxels that are NaN"),
    (np.full((9, 9, 9), 4), AFFINE, "the volume has the intensity 4 in every voxel"),
    (GOOD, AFFINE[:3, :3], r"the affine has shape \(3, 3\); expected \(4, 4\)"),
    (GOOD, "RAS", "the affine is not a matrix of numbers"),
    (GOOD, spoilt(a03=np.nan), "the affine has numbers that are not finite"),
    (GOOD, spoilt(a30=1), "the last row of the affine is"),
    (GOOD, spoilt(a00=0), "the affine is singular"),
    (GOOD, spoilt(a10=1.5, a00=1e-9, a11=1.5), "the affine is singular"),
]


@pytest.mark.parametrize(("array", "affine", "message"), REFUSED)
def test_arrays_that_cannot_be_used_are_refused(
    segmenter: TrainedSegmenter, array: Any, affine: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        segmenter.predict(array, affine)


def test_wrong_arguments_of_prediction_are_refused(
    segmenter: TrainedSegmenter, result: TrainingResult, hearts: Path, tmp_path: Path
) -> None:
    image, out = hearts / "scans" / "mr_train_1001_image.nii.gz", tmp_path / "out.nii"
    calls: list[tuple[Callable[[], object], type[MpsclError], str]] = [
        (lambda: segmenter.predict(GOOD, AFFINE, modality="pet"), ConfigError, "the run knows no modality 'pet'"),
        (lambda: segmenter.predict(GOOD, AFFINE, label_values="ids"), ConfigError, "label_values is 'ids'"),  # type: ignore[arg-type]
        (lambda: segmenter.predict(GOOD, AFFINE, postprocessing=True), ConfigError, "postprocessing is True"),  # type: ignore[arg-type]
        (lambda: segmenter.predict_file(image, out, geometry="affine"), ConfigError, "expected None, 'sform'"),  # type: ignore[arg-type]
        (lambda: segmenter.predict_file(image, out, nan_policy=0), ConfigError, "nan_policy is 0"),  # type: ignore[arg-type]
        (lambda: segmenter.predict_file(image, out, assume_spacing=(1, 0, 1)), ConfigError, "three sizes in mm"),
        (lambda: segmenter.predict_file(image, tmp_path), ConfigError, "expected the name of a file that ends in .nii"),
        (lambda: segmenter.predict_file(image, image), ConfigError, "out is the image"),
        (lambda: segmenter.predict_file(tmp_path / "no.nii", tmp_path / "out.nii"), DataError, "no.nii"),
        (lambda: load_segmenter(tmp_path), ConfigError, "is not the folder of a run"),
        (lambda: load_segmenter(result.run, "first"), ConfigError, "no checkpoint 'first'.*it has last, "),
        (lambda: load_segmenter(result.run, device="gpu"), ConfigError, "there is no device 'gpu'"),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_scores_are_those_of_the_evaluation(segmenter: TrainedSegmenter, result: TrainingResult, hearts: Path) -> None:
    """Of prepared volumes, which the command evaluate scores."""
    manifest = load_manifest(hearts / "data" / "mr")
    dice = []
    for case in manifest.split("test"):
        arrays = read_case(hearts / "data" / "mr", case)
        predicted = segmenter._predictor.predict_slices(arrays["image"])
        rows = score(predicted, arrays["label"], spacing=case.spacing_mm, class_names=segmenter.class_names)
        wanted = volume_scores(predicted, arrays["label"], segmenter.class_names, case.spacing_mm)
        assert repr(list(rows.values())) == repr(wanted)
        dice.append(rows["MYO"].dice)
    assert np.mean(dice) == pytest.approx(result.scores["adaptation"]["MYO"]["dice"])


def test_what_is_unusual_is_a_python_warning(
    speckled: TrainedSegmenter, result: TrainingResult, hearts: Path, tmp_path: Path
) -> None:
    array, _ = volume(5)
    large = AFFINE @ np.diag([10, 10, 10, 1])
    with warnings.catch_warnings(record=True, action="always") as caught:
        speckled.predict(array, large)
    assert any(re.match("the volume: voxels are .* mm .*; training volumes had", said) for said in messages(caught))
    assert {warning.filename for warning in caught} == {__file__}
    scan = nib.load(hearts / "scans" / "mr_train_1001_image.nii.gz")
    voxels = scan.get_fdata()
    voxels[0, 0, 0] = np.nan
    image = tmp_path / "nan.nii.gz"
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), scan.affine), image)
    with pytest.raises(DataError, match="NaN"):
        speckled.predict_file(image, tmp_path / "out.nii.gz")
    with warnings.catch_warnings(record=True, action="always") as caught:
        speckled.predict_file(image, tmp_path / "out.nii.gz", nan_policy="zero")
    assert any("nan.nii.gz: NaN or infinite intensities were set to 0: 1 voxel" in said for said in messages(caught))
    model = json.loads((result.run / "model.json").read_text(encoding="utf-8"))
    train = [case.id for case in load_manifest(hearts / "data" / "mr").split("train")]
    assert model["target"]["training_volumes"]["cases"] == len(train)
    assert not any(name in json.dumps(model) for name in train), "nothing names a case"


def test_a_file_without_a_geometry_gets_the_one_that_is_given(speckled: TrainedSegmenter, tmp_path: Path) -> None:
    array, _ = volume(5)
    image, out = tmp_path / "bare.nii", tmp_path / "out.nii"
    bare = nib.Nifti1Image(array, None)
    bare.header["pixdim"][1:4] = 0
    image.write_bytes(bare.header.binaryblock + bytes(4) + array.astype(bare.header.get_data_dtype()).tobytes("F"))
    with pytest.raises(DataError, match="--assume-spacing"):
        speckled.predict_file(image, out)
    sizes = tuple(float(size) for size in nib.affines.voxel_sizes(AFFINE))
    with warnings.catch_warnings(record=True, action="always") as caught:
        speckled.predict_file(image, out, assume_spacing=sizes)
    assert any("voxel sizes 0, 0, 0 mm" in said for said in messages(caught))
    expected = speckled.predict(array, np.diag([*sizes, 1]))
    np.testing.assert_array_equal(np.asarray(nib.load(out).dataobj), expected)
