"""From a run folder to labels: weights found and checked, every slice predicted, label maps on the image's grid."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from mpscl_ray.data.volumes.preprocess import prepare_volume
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.networks import DeepLabV2
from mpscl_ray.networks.deeplab import network_input, upsample_logits
from mpscl_ray.predict.ensemble import Member, cached_predictor
from mpscl_ray.predict.image import Job, Prediction, outputs, predict_image
from mpscl_ray.predict.model import Domain, Model, find_checkpoint, read_model
from mpscl_ray.predict.predictor import (
    Predictor,
    choose_device,
    load_segmenter,
    num_inference_workers,
)
from mpscl_ray.predict.run import print_outcome
from mpscl_ray.runs import checkpoint
from tests.untrained_run import CLASSES, domain, save, segmenter, write_run


def some_slices(depth: int = 11) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (depth, 32, 40)).astype(np.float32)


def test_every_slice_is_predicted_whatever_the_batch() -> None:
    network, slices = segmenter(), some_slices()
    with torch.no_grad():
        logits = network(network_input(torch.from_numpy(slices)[:, None], 1)).main
        expected = torch.softmax(upsample_logits(logits, (32, 40)), dim=1)
    highest = expected.topk(2, dim=1).values.numpy()
    clear = highest[:, 0] - highest[:, 1] > 1e-4  # rounding differs between batch sizes
    assert clear.mean() > 0.99
    for batch_slices in (1, 4, 11, 64):
        predictor = Predictor(network, CLASSES, device="cpu", batch_slices=batch_slices)
        labels = predictor.predict_slices(slices)
        assert labels.shape == slices.shape
        assert labels.dtype == np.uint8
        assert np.array_equal(labels[clear], expected.argmax(1).numpy()[clear])
        probabilities = predictor.predict_probabilities(slices)
        assert probabilities.shape == (3, *slices.shape)
        np.testing.assert_allclose(probabilities, expected.transpose(0, 1).numpy(), atol=1e-5)
    assert len(np.unique(labels)) > 1, "a constant prediction would prove nothing"
    assert np.array_equal(predictor.predict_slices(slices), labels)


def test_a_network_in_training_mode_is_set_to_evaluation_mode() -> None:
    network = segmenter().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    labels = Predictor(network, CLASSES, device="cpu").predict_slices(some_slices())
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert np.array_equal(labels, Predictor(segmenter(), CLASSES, device="cpu").predict_slices(some_slices()))


def test_weights_that_give_no_finite_value_are_refused() -> None:
    network = segmenter()
    with torch.no_grad():
        network.layer6.conv2d_list[0].bias[0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        Predictor(network, CLASSES, device="cpu").predict_slices(some_slices())


def test_the_network_must_have_the_named_classes() -> None:
    with pytest.raises(ValueError, match="3 classes"):
        Predictor(segmenter(), ("background", "LV"), device="cpu")


def test_a_run_is_loaded_by_the_name_of_a_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    early, late, phase, best = (segmenter(seed) for seed in range(4))
    save(folder.checkpoints / "step-0000100", early)
    save(folder.checkpoints / "step-0000300", late)
    save(folder.phases / "source_only", phase, phase="source_only")
    save(folder.best, best, selected_by="oracle")
    for name, network, oracle in (
        ("last", late, False),
        ("best", best, True),
        ("source_only", phase, False),
        ("step-0000100", early, False),
        (str(folder.checkpoints / "step-0000100"), early, False),
    ):
        predictor = load_segmenter(folder.path, name, device="cpu")
        weights = predictor.network.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items()), name
        assert predictor.weights is not None
        assert predictor.weights.oracle is oracle
        assert predictor.weights.step == 300
    assert predictor.classes == CLASSES
    assert predictor.model is not None
    assert predictor.model.domain("source").modality == predictor.model.domain("mr").modality == "mr"
    assert predictor.model.domain("target").raw_ids == {}
    assert predictor.model.domain("source").raw_ids == {"background": 0, "LV": 200, "RV": 600}
    with pytest.raises(ConfigError, match=r"source \(mr\)"):
        predictor.model.domain("pet")


def test_relative_paths_lead_to_the_same_weights_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_run(Path("runs") / "run")
    save(folder.checkpoints / "step-0000100", segmenter(0))
    save(folder.phases / "source_only", segmenter(1), phase="source_only")
    torch.save(segmenter(2).state_dict(), "released.pth")
    for number, name in enumerate(("last", "source_only", "released.pth")):
        expected = segmenter(number).conv1.weight
        predictor = load_segmenter(Path("runs") / "run", name, device="cpu")
        assert torch.equal(predictor.network.conv1.weight, expected), name
        assert predictor.weights is not None
        given = dataclasses.replace(predictor.weights, path=folder.relative_to_run(predictor.weights.path))
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir("/")
            worker = cached_predictor((Member(str(tmp_path / "runs" / "run"), given, number),), "cpu")
        assert torch.equal(worker.network.conv1.weight, expected), name


def test_a_damaged_last_checkpoint_is_skipped_and_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    save(folder.checkpoints / "step-0000100", segmenter(0))
    save(folder.checkpoints / "step-0000200", segmenter(1))
    damaged = folder.checkpoints / "step-0000200" / "tensors.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    found, notices = find_checkpoint(folder.path)
    assert found.path.name == "step-0000100"
    assert "step-0000200" in notices[0]
    with pytest.raises(DataError, match="step-0000200"):
        load_segmenter(folder.path, "step-0000200", device="cpu")


def test_released_weights_are_loaded_from_a_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    network = segmenter(5)
    torch.save(network.state_dict(), tmp_path / "released.pth")
    predictor = load_segmenter(folder.path, str(tmp_path / "released.pth"), device="cpu")
    assert torch.equal(predictor.network.conv1.weight, network.conv1.weight)
    part = {key: value for key, value in network.state_dict().items() if not key.startswith("layer6")}
    torch.save(part, tmp_path / "part.pth")
    with pytest.raises(DataError, match="layer6"):
        load_segmenter(folder.path, str(tmp_path / "part.pth"), device="cpu")


def test_errors_of_loading_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder, expected that of a run"):
        load_segmenter(tmp_path / "nowhere")
    folder = write_run(tmp_path / "run")
    with pytest.raises(DataError, match="no intact checkpoint"):
        load_segmenter(folder.path)
    with pytest.raises(ConfigError, match="has none yet"):
        load_segmenter(folder.path, "best")
    save(folder.checkpoints / "step-0000100", segmenter())
    with pytest.raises(ConfigError, match="it has last, step-0000100"):
        load_segmenter(folder.path, "sourceonly")
    other = DeepLabV2(num_classes=3, layers=(1, 1, 1, 1), base_channels=8, output_stride=4, in_channels=1)
    save(folder.checkpoints / "step-0000200", other)
    with pytest.raises(
        DataError, match=r"does not fit .*: of \d+ tensors \d+ of another shape \(such as conv1.weight, \(8, "
    ):
        load_segmenter(folder.path)
    save(folder.checkpoints / "step-0000300", segmenter(), classes=["background", "RV", "LV"])
    with pytest.raises(DataError, match="trained on the classes background, RV, LV"):
        load_segmenter(folder.path)
    checkpoint.save(folder.checkpoints / "step-0000400", {"something": 1})
    with pytest.raises(DataError, match="no checkpoint of a training"):
        load_segmenter(folder.path)


def test_a_wrong_entry_of_the_description_is_named(tmp_path: Path) -> None:
    good = domain("ct", Recipe(crop=(32, 32)))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"classes": ["background", "LV"]}, "names 2 classes"),
        ({"size": 3}, "TypeError"),
        ({"source": {"modality": "mr"}}, "source.scaling is missing"),
        ({"target": {**good, "scaling": {"low": 2, "high": -1}}}, "target.scaling is .*: expected a low below a high"),
        ({"target": {**good, "scaling": {"low": 2}}}, "target.scaling is .*: it has no 'high'"),
        ({"target": {**good, "scaling": None}}, "target.scaling is None"),
        ({"target": {**good, "recipe": {**good["recipe"], "crop": "x"}}}, "target.recipe is .*: crop is x; expected"),
        ({"target": {**good, "labels": {"values": {"a": "LV"}}}}, "target.labels is .*'a'"),
        ({"target": None}, "target is None"),
    ]
    for entry, said in wrong:
        write_run(tmp_path / "run", **entry)
        with pytest.raises(DataError, match=rf"model\.json .*{said}"):
            read_model(tmp_path / "run")


def test_the_device_is_checked() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="usable GPUs"):
        choose_device("cuda:99")
    with pytest.raises(ConfigError, match="no device"):
        choose_device("gpu")
    assert num_inference_workers(3, torch.device("cpu")) == 0
    assert num_inference_workers(1000, torch.device("cuda")) == 0


class Levels(nn.Module):
    """A segmenter that separates three intensities, so that its result is known beforehand."""

    num_classes = 3

    def __init__(self, levels: np.ndarray) -> None:
        super().__init__()
        self.levels = torch.tensor(levels, dtype=torch.float32)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return -30 * (images - self.levels[:, None, None]).abs()


def landmarks(shape: tuple[int, int, int]) -> np.ndarray:
    """A picture of three intensities without any symmetry."""
    image = np.zeros(shape, np.float32)
    image[3:15, 5:9, 4:20] = 100
    image[3:6, 5:16, 4:8] = 100
    image[9:12, 11:17, 14:22] = 200
    return image


def stub(image: np.ndarray, affine: np.ndarray, recipe: Recipe) -> Predictor:
    own = Domain("ct", -2.0, 5.0, recipe, None, None, {"LV": 500, "RV": 40000})
    geometry = prepare_volume(image, affine, None, recipe).geometry
    levels = own.scale((np.array([0, 100, 200], np.float32) - geometry.mean) / geometry.standard_deviation)
    model = Model(CLASSES, (32, 32), {}, {"source": own, "target": own}, ())
    return Predictor(Levels(levels), CLASSES, device="cpu", batch_slices=3, model=model)


def job(out: Path, **options: Any) -> Job:
    # The landmarks have three intensities, as a label map has.
    return Job((), "target", out, **{"any_modality": True, **options})


def affine_of(
    axes: tuple[int, ...], signs: tuple[int, ...], spacing: tuple[float, ...] = (2.0, 1.5, 1.0)
) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for array_axis, (world, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[world, array_axis] = sign * spacing[array_axis]
    affine[:3, 3] = (-20, 15, 40)
    return affine


ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_labels_are_on_the_right_voxels_in_every_orientation(
    tmp_path: Path, axes: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    image, affine = landmarks((18, 20, 24)), affine_of(axes, signs)
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "image.nii.gz")
    predictor = stub(image, affine, Recipe(crop=None, clip_percentile=100))
    done = predict_image(predictor, job(tmp_path), tmp_path / "image.nii.gz")
    assert done.error is None
    written = nib.load(tmp_path / "image_prediction.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), (image / 100).astype(np.uint8))
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)


def test_an_image_larger_than_the_crop_comes_back_in_its_own_shape(tmp_path: Path) -> None:
    image = np.zeros((60, 40, 70), np.float32)
    image[20:38, 10:30, 22:46] = landmarks((18, 20, 24))
    affine = affine_of((0, 1, 2), (-1, -1, 1), (1.0, 1.0, 1.0))
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "image.nii.gz")
    recipe = Recipe(crop=(40, 40), clip_percentile=100)
    done = predict_image(stub(image, affine, recipe), job(tmp_path), tmp_path / "image.nii.gz")
    written = np.asarray(nib.load(tmp_path / "image_prediction.nii.gz").dataobj)
    assert np.array_equal(written, (image / 100).astype(np.uint8))
    found = {"LV": np.count_nonzero(image == 100), "RV": np.count_nonzero(image == 200)}
    assert done.volumes_ml == pytest.approx({name: count / 1000 for name, count in found.items()})
    assert not any("edge of the crop" in notice for notice in done.notices)
    tight = dataclasses.replace(recipe, crop=(14, 14))
    done = predict_image(stub(image, affine, tight), job(tmp_path), tmp_path / "image.nii.gz")
    assert any("edge of the crop" in notice for notice in done.notices)


def test_a_resampled_image_comes_back_on_its_own_grid(tmp_path: Path) -> None:
    image = np.kron(landmarks((18, 20, 24)), np.ones((3, 3, 3), np.float32))
    affine = affine_of((0, 1, 2), (1, 1, 1), (1.0, 1.0, 1.0))
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "image.nii.gz")
    recipe = Recipe(crop=None, spacing_mm=(3.0, 3.0, 3.0), clip_percentile=100)
    done = predict_image(stub(image, affine, recipe), job(tmp_path), tmp_path / "image.nii.gz")
    assert done.error is None
    written = np.asarray(nib.load(tmp_path / "image_prediction.nii.gz").dataobj)
    truth = (image / 100).astype(np.uint8)
    assert written.shape == truth.shape
    for index in (1, 2):
        overlap = 2 * np.count_nonzero((written == index) & (truth == index))
        assert overlap / (np.count_nonzero(written == index) + np.count_nonzero(truth == index)) > 0.85


def test_further_outputs_have_the_geometry_and_none_of_the_texts(tmp_path: Path) -> None:
    image, affine = landmarks((18, 20, 24)), affine_of((1, 0, 2), (1, -1, 1))
    stored = nib.Nifti1Image(image, affine)
    stored.header["descrip"] = b"Jane Doe"
    stored.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    stored.set_qform(affine, code=3)
    stored.set_sform(affine, code=2)
    nib.save(stored, tmp_path / "image.nii.gz")
    predictor = stub(image, affine, Recipe(crop=None, clip_percentile=100))
    options = job(tmp_path, probabilities=True, preview=True, raw_ids={"LV": 500, "RV": 40000})
    done = predict_image(predictor, options, tmp_path / "image.nii.gz")
    assert done.files == outputs(tmp_path / "image.nii.gz", options, CLASSES)
    labels, left, right = (nib.load(tmp_path / name) for name in done.files[:3])
    assert np.array_equal(np.asarray(labels.dataobj), np.array([0, 500, 40000])[(image / 100).astype(int)])
    np.testing.assert_allclose(np.asarray(left.dataobj), image == 100, atol=0.02)
    np.testing.assert_allclose(np.asarray(right.dataobj), image == 200, atol=0.02)
    for written in (labels, left, right):
        np.testing.assert_allclose(written.affine, affine, atol=1e-5)
        assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (3, 2)
        assert b"Jane" not in written.header.binaryblock
        assert not written.header.extensions
    assert (tmp_path / done.files[3]).read_bytes().startswith(b"\x89PNG")


def test_an_image_that_cannot_be_used_is_a_failure_with_a_message(tmp_path: Path) -> None:
    image, affine = landmarks((18, 20, 24)), affine_of((0, 1, 2), (1, 1, 1))
    predictor = stub(image, affine, Recipe(crop=None, clip_percentile=100))
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "image.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "image.nii.gz").read_bytes()[:-100])
    for name in ("cut.nii.gz", "missing.nii.gz"):
        done = predict_image(predictor, job(tmp_path), tmp_path / name)
        assert done.error is not None
        assert name in done.error
        assert not (tmp_path / outputs(tmp_path / name, job(tmp_path), CLASSES)[0]).exists()


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        (0, 1, "error: 1 of 1 input was not segmented:"),
        (1, 1, "error: 1 of 2 inputs were not segmented:"),
        (1, 0, "1 label map, volumes.json and the label tables are in out"),
        (2, 0, "2 label maps, volumes.json and the label tables are in out"),
    ],
)
def test_what_is_said_at_the_end_counts(good: int, bad: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = [Prediction(Path("p.nii"), files=("p_prediction.nii.gz",), volumes_ml={"MYO": 1.0})] * good
    print_outcome(done, [Prediction(Path("q.nii"), error="q.nii is broken")] * bad, "out")
    shown = capsys.readouterr()
    assert said in (shown.out + shown.err).splitlines()
