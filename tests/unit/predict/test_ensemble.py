"""The mean of several segmenters, and of slices that are moved a little."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpscl_ray import load_segmenter
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.predict.command import main
from mpscl_ray.predict.ensemble import Ensemble, Member, cached_predictor, load_ensemble
from mpscl_ray.predict.model import Checkpoint, read_model
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.predict.tta import MOVES, augmented
from tests.hearts_run import oblique, write_image
from tests.untrained_run import CLASSES, domain, save, segmenter, write_run


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two runs with other weights."""
    for seed in (0, 1):
        folder = write_run(tmp_path / f"seed{seed}", target=domain("pet", Recipe(crop=(32, 32))))
        save(folder.checkpoints / "step-0000300", segmenter(seed))
    return [str(tmp_path / "seed0"), str(tmp_path / "seed1")]


def some_slices(depth: int = 11) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (depth, 32, 32)).astype(np.float32)


def test_an_ensemble_is_the_mean_of_the_probabilities(runs: list[str]) -> None:
    slices = some_slices()
    ensemble = load_ensemble(runs, device="cpu")
    own = [load_ensemble([run], device="cpu").predict_probabilities(slices) for run in runs]
    probabilities, disagreement = ensemble.predict_disagreement(slices)
    np.testing.assert_allclose(probabilities, (own[0] + own[1]) / 2, atol=1e-6)
    np.testing.assert_array_equal(ensemble.predict_slices(slices), probabilities.argmax(0))
    entropies = [-(p * np.log(p)).sum(0) for p in (probabilities, *own)]
    expected = (entropies[0] - (entropies[1] + entropies[2]) / 2) / np.log(len(CLASSES))
    np.testing.assert_allclose(disagreement, expected, atol=1e-5)
    assert disagreement.max() > 0.05
    assert not load_ensemble(runs[:1], device="cpu").predict_disagreement(slices)[1].any()


def test_a_member_that_scales_intensities_in_another_way_sees_what_it_was_trained_on(
    runs: list[str], tmp_path: Path
) -> None:
    described = json.loads((Path(runs[1]) / "model.json").read_text(encoding="utf-8"))
    described["target"]["scaling"] = {"low": -1.0, "high": 5.0}
    (Path(runs[1]) / "model.json").write_text(json.dumps(described), encoding="utf-8")
    first, second = (read_model(run).domains["target"] for run in runs)
    image = np.random.default_rng(1).normal(0, 1, (3, 32, 32)).astype(np.float32)
    ensemble = load_ensemble(runs, device="cpu").prepared_as(first)
    own = [
        load_ensemble([run], device="cpu").predict_probabilities(one.scale(image))
        for run, one in zip(runs, (first, second), strict=True)
    ]
    found = ensemble.predict_probabilities(first.scale(image))
    np.testing.assert_allclose(found, (own[0] + own[1]) / 2, atol=1e-4)


class Threshold(nn.Module):
    """Bright pixels are the structure: what it predicts moves with the image."""

    num_classes = 2

    def logits(self, images: Tensor) -> Tensor:
        return 30 * torch.cat([-images, images], dim=1)


def square() -> Tensor:
    image = torch.full((2, 1, 40, 40), -1.0)
    image[:, :, 12:26, 15:30] = 1
    return image


def test_moved_slices_are_put_back() -> None:
    def predict(images: Tensor) -> Tensor:
        return torch.softmax(Threshold().logits(images), dim=1)

    plain, *others = augmented(predict, square(), ("rows", "columns"))
    assert len(others) == len(MOVES) + 3
    for found in others:
        torch.testing.assert_close(found.sum(dim=1), torch.ones_like(found[:, 0]))
        differing = found.argmax(1) != plain.argmax(1)
        assert differing.sum() < 2 * 60, "only pixels at the outline differ"
    for found in others[len(MOVES) :]:
        assert torch.equal(found, plain)
    seen: list[Tensor] = []

    def look(images: Tensor) -> Tensor:
        seen.append(images)
        return predict(images)

    list(augmented(look, square()))
    areas = [float(images.sum()) for images in seen]
    assert areas[1] < areas[0] < areas[2], "made smaller and larger"
    assert all(not torch.equal(images, seen[0]) for images in seen[1:])


def test_where_a_moved_slice_shows_nothing_the_slice_as_it_is_counts() -> None:
    def edge(images: Tensor) -> Tensor:
        """Certain of class 1 in the outermost pixels of what it is given."""
        probability = torch.zeros(len(images), 1, *images.shape[2:])
        probability[:, :, 0] = 1
        return torch.cat([1 - probability, probability], dim=1)

    plain, smaller, *_ = augmented(edge, torch.zeros(1, 1, 40, 40))
    assert plain[0, 1, 0].eq(1).all()
    assert smaller.min() >= 0
    torch.testing.assert_close(smaller.sum(dim=1), torch.ones(1, 40, 40))


def test_mirroring_is_a_setting_of_the_model(runs: list[str]) -> None:
    """None is mirrored unless the run says so."""
    slices = some_slices(2)
    file = Path(runs[0]) / "model.json"
    plain = load_ensemble(runs[:1], device="cpu", tta=True).predict_probabilities(slices)
    described = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**described, "mirror_axes": ["columns"]}), encoding="utf-8")
    mirrored = load_ensemble(runs[:1], device="cpu", tta=True)
    flipped = load_ensemble(runs[:1], device="cpu").predict_probabilities(slices[:, :, ::-1])[..., ::-1]
    passes = 1 + len(MOVES)
    expected = (passes * plain + flipped) / (passes + 1)
    np.testing.assert_allclose(mirrored.predict_probabilities(slices), expected, atol=1e-5)
    file.write_text(json.dumps({**described, "mirror_axes": ["slices"]}), encoding="utf-8")
    with pytest.raises(DataError, match=r"mirror_axes is .*'slices' is none of rows, columns"):
        read_model(runs[0])


def changed(run: str, change: Callable[[dict[str, Any]], None]) -> None:
    file = Path(run) / "model.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    change(described)
    file.write_text(json.dumps(described), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model["target"].update(modality="mr"), "its target is mr, not pet"),
        (lambda model: model["target"]["recipe"].update(crop=[24, 32]), r"prepares pet with crop \(24, 32\), not \(32"),
        (lambda model: model.update(size=[16, 16]), "its slices are 16 x 16, not 32 x 32"),
        (lambda model: model["target"]["labels"].update(values={"5": "LV", "600": "RV"}), "LV has the id 5 .* not 200"),
    ],
    ids="modality,recipe,size,labels".split(","),
)
def test_runs_that_differ_are_no_ensemble(
    runs: list[str], change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    for run in runs:
        changed(run, lambda model: model["target"]["labels"].update(values={"200": "LV", "600": "RV"}))
    load_ensemble(runs, device="cpu")
    changed(runs[1], change)
    with pytest.raises(ConfigError, match=f"seed1 and .*seed0 cannot be an ensemble: .*{reason}"):
        load_ensemble(runs, device="cpu")


def test_classes_and_weights_are_compared_too(runs: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"seed0 has the same weights as .*seed0; give each member .* once"):
        load_ensemble([runs[0], runs[0]], device="cpu")
    with pytest.raises(ConfigError, match="no run was given"):
        load_segmenter([])
    model = read_model(runs[0])
    first = Predictor(segmenter(0), CLASSES, device="cpu", model=model)
    other = Predictor(
        segmenter(1), CLASSES, device="cpu", model=dataclasses.replace(model, classes=("background", "LV", "AA"))
    )
    with pytest.raises(ConfigError, match="b and a cannot be an ensemble: its classes are background, LV, AA, not"):
        Ensemble([first, other], ["a", "b"])


def test_the_command_the_worker_and_the_api_give_the_same(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "scans" / "a.nii.gz"
    image.parent.mkdir()
    write_image(image, 5, oblique())
    words = [runs[0], str(image.parent), "--any-modality", "--workers", "0", "--device", "cpu"]
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="--disagreement needs --ensemble or --tta"):
        main([*words, "--disagreement", "--out", str(out)])
    more = ["--ensemble", runs[1], "--tta", "--disagreement"]
    assert main([*words, *more, "--out", str(out)]) == 0
    assert "a_disagreement.nii.gz" in {path.name for path in out.iterdir()}
    written, spread = (nib.load(out / f"a_{name}.nii.gz") for name in ("prediction", "disagreement"))
    assert spread.shape == written.shape
    assert 0 < spread.get_fdata().max() <= 1
    entry = json.loads((out / "volumes.json").read_text(encoding="utf-8"))["predictions"]["a_prediction.nii.gz"]
    assert [one["run"] for one in entry["ensemble"]] == [runs[1]]
    assert (entry["settings"]["tta"], entry["settings"]["disagreement"]) == (True, True)
    api = load_segmenter(runs, device="cpu", tta=True)
    file = tmp_path / "api.nii.gz"
    with pytest.warns(UserWarning, match=r"a\.nii\.gz"):
        api.predict_file(image, file, any_modality=True, disagreement=tmp_path / "spread.nii.gz")
    np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), np.asarray(written.dataobj))
    np.testing.assert_array_equal(nib.load(tmp_path / "spread.nii.gz").get_fdata(), spread.get_fdata())
    with pytest.raises(ConfigError, match=r"disagreement is .*map.png; expected the name of a file that ends in .nii"):
        api.predict_file(image, file, disagreement=tmp_path / "map.png")
    members = tuple(Member(run, Checkpoint("last", Path("checkpoints/step-0000300")), 0) for run in runs)
    slices = some_slices(2)
    worker = cached_predictor(members, "cpu", tta=True)
    np.testing.assert_array_equal(
        worker.predict_probabilities(slices), load_ensemble(runs, device="cpu", tta=True).predict_probabilities(slices)
    )
    # Its own maps are never taken for images, and another ensemble is another prediction.
    capsys.readouterr()
    assert main([*words, *more, "--out", str(out), "--resume"]) == 0
    assert "1 of 1 images have their label map already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="another --ensemble"):
        main([*words, "--tta", "--disagreement", "--out", str(out), "--resume"])


def test_rules_that_all_members_share_are_followed(runs: list[str]) -> None:
    for run, rule in zip(runs, ({"min_ml": 2.0}, {"min_ml": 3.0}), strict=True):
        digest = load_ensemble([run], device="cpu").weights_digest
        entry = {"rules": {"LV": {"largest_component": True}, "RV": rule}, "chosen_by": "label_free"}
        (Path(run) / "postprocessing.json").write_text(json.dumps({digest: entry}), encoding="utf-8")
    rules = load_ensemble(runs, device="cpu").postprocessing("chosen")
    assert rules.to_json() == {"LV": {"largest_component": True}}
    assert rules.chosen_by == "label_free"
    assert set(load_ensemble(runs, device="cpu").postprocessing("largest_component").rules) == {"LV", "RV"}
