"""The public Python API from a training to its predictions and scores."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from mpscl_ray import (
    Config,
    ConfigError,
    DataError,
    MpsclError,
    TrainedSegmenter,
    TrainingError,
    TrainingResult,
    load_config,
    load_segmenter,
    prepare_dataset,
    score,
    train_segmenter,
)
from mpscl_ray.config import differences
from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.evaluate.metrics import volume_scores
from mpscl_ray.predict import predictor as predictors
from mpscl_ray.predict.image import Job, predict_image
from tests.raw_volumes import RAW_IDS, mmwhs, volume
from tests.tiny import tiny_config, tiny_settings
from tests.tiny_runs import train as train_locally

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "python-api.md"
AFFINE = np.diag([1.5, 1.5, 2.0, 1.0])

TINY = [*tiny_settings("phantom"), "scaling.num_workers=2"]
"""Settings that make the preset phantom tiny."""


@pytest.fixture(scope="module")
def hearts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw volumes of CT and MR in ``scans``, and their datasets in ``data``."""
    folder = tmp_path_factory.mktemp("hearts")
    for modality in ("ct", "mr"):
        mmwhs(folder / "scans", modality)
    data = prepare_dataset(folder / "scans", folder / "data", "mmwhs", split="0.5,0.25,0.25", crop=(32, 32), workers=0)
    assert data == {"ct": folder / "data" / "ct", "mr": folder / "data" / "mr"}
    return folder


@pytest.fixture(scope="module")
def tiny(hearts: Path) -> Config:
    """The preset phantom made tiny, on those datasets."""
    places = [f"data.source={hearts / 'data' / 'ct'}", f"data.target={hearts / 'data' / 'mr'}"]
    return load_config("phantom", [*TINY, *places, f"run.storage={hearts / 'runs'}"])


@pytest.fixture(scope="module")
def result(tiny: Config) -> TrainingResult:
    return train_segmenter(tiny, device="cpu")


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


@pytest.mark.filterwarnings("ignore:.*no structure was found")  # after a few steps of training
def test_the_document_runs(hearts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block in an empty folder. The preset phantom is replaced by a tiny one on tiny volumes, which lie
    where a run leaves the phantom hearts."""
    monkeypatch.chdir(tmp_path)
    for folder in ("scans", "runs/phantom-tiny/nifti"):
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        Path(folder).symlink_to(hearts / "scans")
    settings: dict[str, Any] = {"preset": "phantom", "data": {"global_batch_size": 4}}
    for line in TINY:
        key, _, value = line.partition("=")
        *sections, last = key.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = yaml.safe_load(value)
    settings["data"] |= {"source": str(hearts / "data" / "ct"), "target": str(hearts / "data" / "mr")}
    Path("tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    text = DOCUMENT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    assert len([line for line in blocks[0].splitlines() if line]) <= 8
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(
            compile(block.replace('"phantom"', '"tiny.yaml"'), f"block {number + 1} of {DOCUMENT.name}", "exec"), names
        )
    assert set(names["scores"]) == {"MYO", "LAC", "LVC", "AA"}
    assert names["out"].exists()
    assert math.isfinite(names["loss"].item())


# ----------------------------------------------------------------------------------------------------- training


def test_training_leaves_what_the_command_leaves(
    result: TrainingResult, tiny: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert result.run == Path(tiny.run.storage) / "phantom"
    assert (result.run / "status.json").exists()
    status = json.loads((result.run / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["exit_code"], status["phase"]) == ("finished", 0, "adaptation")
    assert differences(load_config(result.run / "config.yaml"), tiny).keys() == {"scaling.num_workers"}
    assert list(result.scores) == ["source_only", "warm_up", "adaptation"]
    assert set(result.scores["adaptation"]) == {"mean", "MYO", "LAC", "LVC", "AA"}
    assert 0 <= result.scores["adaptation"]["MYO"]["dice"] <= 1
    assert result.last_checkpoint == result.run / "checkpoints" / "step-0000012"
    assert result.best_checkpoint == result.run / "best"
    assert {path.name for path in result.run.iterdir()} >= {"progress.png", "tensorboard", "results", "metrics.jsonl"}
    assert (result.run / "results" / "phases.png").exists()

    # The loop as tests run it on data that they open themselves.
    _, folder = train_locally(tiny, tmp_path / "run")
    without_speed = [
        [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in records]
        for records in (result.history, folder.read_metrics())
    ]
    assert without_speed[0] == without_speed[1]

    # Once more: the result of the finished run.
    checkpoint = result.last_checkpoint.stat().st_mtime_ns
    again = train_segmenter(tiny, device="cpu")
    assert repr(again) == repr(result)  # NaN is not NaN
    assert again.last_checkpoint.stat().st_mtime_ns == checkpoint
    assert capfd.readouterr() == ("", "")


def test_the_random_state_of_the_caller_stays(tiny: Config, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    changes = {"run.storage": tmp_path, "phases.warm_up": 0, "phases.adaptation": 0}
    load_segmenter(train_segmenter(tiny, changes, device="cpu").run, device="cpu")
    assert torch.rand(1) == expected


def test_a_run_that_ctrl_c_ends_is_resumed(tiny: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    every = {"run.log_every": 10, "run.checkpoint_every": 10, "run.validate_every": 1000}
    phases = {"phases.source_only": 100, "phases.warm_up": 0, "phases.adaptation": 0}
    changes = {"run.storage": tmp_path, **phases, **every}
    run = tmp_path / "phantom"

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), 2)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train_segmenter(tiny, changes, device="cpu")
    thread.join()
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["exit_code"]) == ("interrupted", 130)
    assert status["resume_command"].endswith("config.yaml")
    assert status["global_step"] < 100
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ConfigError, match=r"started with another config: optim\.lr"):
        train_segmenter(tiny, {**changes, "optim.lr": 0.5}, device="cpu")

    result = train_segmenter(tiny, changes, device="cpu", progress=True)
    assert [record["global_step"] for record in result.history] == list(range(10, 101, 10))
    assert "resuming from the checkpoint" in (run / "logs" / "warnings.log").read_text(encoding="utf-8")
    assert "source-only" in capfd.readouterr().err


def test_errors_of_training_are_exceptions(tiny: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainingError, match="not finite, seen at iteration 2 of the phase source_only"):
        train_segmenter(tiny, {"run.storage": tmp_path, "optim.lr": 1e30, "run.log_every": 1}, device="cpu")
    status = json.loads((tmp_path / "phantom" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["exit_code"]) == ("failed", TrainingError.exit_code)
    with pytest.raises(DataError, match="nowhere"):
        train_segmenter(tiny, {"run.storage": tmp_path, "run.name": "b", "data.source": "nowhere"}, device="cpu")
    with pytest.raises(ConfigError, match=r"run\.storage=s3://bucket is a URL"):
        train_segmenter(tiny, {"run.storage": "s3://bucket"})
    with pytest.raises(ConfigError, match="there is no device 'gpu'"):
        train_segmenter(tiny, {"run.storage": tmp_path}, device="gpu")
    assert capfd.readouterr() == ("", "")


def test_what_is_odd_about_the_data_is_a_warning(tmp_path: Path) -> None:
    from tests.tiny import make_dataset

    make_dataset(tmp_path / "mr", "mr", labelled=("train",))
    make_dataset(tmp_path / "ct", "ct", seed=1)
    config = tiny_config(tmp_path / "mr", tmp_path / "ct", [f"run.storage={tmp_path}", "phases.adaptation=0"])
    with pytest.warns(UserWarning, match="no labelled validation cases") as caught:
        result = train_segmenter(config, {"phases.warm_up": 0}, device="cpu")
    assert caught[0].filename == __file__
    assert result.best_checkpoint is None


# --------------------------------------------------------------------------------------------------- prediction


def test_a_segmenter_says_what_it_is(segmenter: TrainedSegmenter, result: TrainingResult) -> None:
    assert segmenter.class_names[0] == "background"
    assert segmenter.class_names[1:] == tuple(segmenter.label_values)
    assert sorted(segmenter.label_values.values()) == sorted(RAW_IDS)
    assert segmenter.modalities == {"source": "ct", "target": "mr"}
    assert (segmenter.checkpoint.name, segmenter.checkpoint.path) == ("last", result.last_checkpoint)
    assert load_segmenter(result.run, "best", device="cpu").checkpoint.path == result.best_checkpoint
    assert segmenter.device == torch.device("cpu")


@pytest.mark.parametrize("kind", ["index", "raw"])
@pytest.mark.parametrize("largest_component", [False, True])
def test_arrays_and_files_get_the_label_map_of_the_command(
    speckled: TrainedSegmenter, hearts: Path, tmp_path: Path, kind: Any, largest_component: bool
) -> None:
    image = hearts / "scans" / "mr_train_1001_image.nii.gz"
    raw = speckled.label_values if kind == "raw" else None
    job = Job("", speckled.checkpoint, 0, "target", tmp_path, raw, largest_component=largest_component)
    assert predict_image(speckled._predictor, job, image).error is None
    written = nib.load(tmp_path / "mr_train_1001_image_prediction.nii.gz")
    expected = np.asarray(written.dataobj)
    found = set(np.unique(expected)) - {0}
    assert len(found) > 1
    assert found <= set(speckled.label_values.values() if raw else range(1, 5))
    loaded = nib.load(image)
    options: Any = {"label_values": kind, "largest_component": largest_component}
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


# ------------------------------------------------------------------------------------------------------- scores


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


def messages(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught]


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
