"""Trainings on odd data, with few labels or without validation cases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mpscl_ray.methods import MPSCL
from mpscl_ray.runs import checkpoint
from tests.tiny import make_dataset, make_pair, tiny_config
from tests.tiny_runs import RecordingCallback, hashes, train

SIX_STEPS = ("phases.source_only=2", "phases.warm_up=2", "phases.adaptation=2", "run.log_every=1")
"""Two iterations a phase."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the datasets mr and ct."""
    return make_pair(tmp_path_factory.mktemp("data"))


def test_the_best_checkpoint_is_chosen_without_target_labels(pair: Path, tmp_path: Path) -> None:
    wrong = make_dataset(tmp_path / "wrong", "ct", seed=1, permuted=("train", "val"))
    settings = ["run.validate_every=1", "phases.source_only=4", "phases.warm_up=0", "phases.adaptation=0"]
    chosen = {}
    for select in ("label_free", "adjacency_agreement", "oracle"):
        for target in (pair / "ct", wrong):
            config = tiny_config(pair / "mr", target, [*settings, f"run.select={select}", "optim.lr=0.1"])
            _, run = train(config, tmp_path / f"{select}-{target.name}")
            state = checkpoint.load(run.best)
            assert state["selected_by"] == select
            scores = [record["val/selection_score"] for record in run.read_metrics() if "val/selection_score" in record]
            assert state["position"]["step"] == 1 + scores.index(max(scores))
            assert state["position"]["best"] == max(scores)
            chosen[select, target.name] = scores
    for select in ("label_free", "adjacency_agreement"):
        assert chosen[select, "ct"] == chosen[select, "wrong"]
    assert chosen["label_free", "ct"] != chosen["adjacency_agreement", "ct"]
    assert chosen["oracle", "ct"] != chosen["oracle", "wrong"]


def test_a_target_without_validation_labels(pair: Path, tmp_path: Path) -> None:
    target = make_dataset(tmp_path / "ct", "ct", seed=1, labelled=())
    callback = RecordingCallback()
    outcome, run = train(tiny_config(pair / "mr", target), tmp_path / "run", callback=callback)
    assert outcome.state == "finished"
    record = run.read_metrics()[-1]
    assert "val/entropy" in record
    assert not any(key.startswith("val/dice") for key in record)
    assert record["val/selection_score"] == pytest.approx(record["val/source/dice/mean"] - record["val/entropy"])
    assert checkpoint.load(run.best)["selected_by"] == "label_free"
    assert callback.panels[-1][3] is None


@pytest.mark.parametrize("held_out", ["source", "none"])
def test_without_validation_splits(pair: Path, tmp_path: Path, held_out: str) -> None:
    counts = {"train": 2}
    target = make_dataset(tmp_path / "ct", "ct", labelled=(), seed=1, cases=counts)
    source = pair / "mr" if held_out == "source" else make_dataset(tmp_path / "mr", "mr", cases=counts)
    callback = RecordingCallback()
    outcome, run = train(tiny_config(source, target), tmp_path / "run", callback=callback)
    assert outcome.state == "finished"
    assert run.best.is_dir() == (held_out == "source")
    record = run.read_metrics()[-1]
    assert ("val/selection_score" in record) == (held_out == "source")
    assert "val/entropy" not in record
    assert callback.panels == []


@pytest.mark.parametrize("preset", ["small/source_only", "small/supervised"])
def test_the_bounds(pair: Path, tmp_path: Path, preset: str) -> None:
    watcher = RecordingCallback()
    _, run = train(tiny_config(pair / "mr", pair / "ct", preset=preset), tmp_path, None, watcher)
    phase = preset.partition("/")[2]
    assert [path.name for path in run.phases.iterdir()] == [phase]
    assert run.best.is_dir()
    assert all(batch.target_image is None for batch in watcher.batches)
    brightest = torch.cat([batch.source_image for batch in watcher.batches]).mean(0).amax()
    assert (brightest > 0.6) == (phase == "source_only"), "ventricles are 0.8 in the source and 0.5 in the target"


# ------------------------------------------------------------------------------------------------------ unusual data


@pytest.mark.parametrize(
    ("name", "source", "overrides"),
    [
        ("a class that no label has", {"shown": (1,)}, []),
        ("batches of one class", {"shown": ()}, []),
        ("batches of one slice", {}, ["data.global_batch_size=1", "scaling.num_workers=1"]),
        ("fewer slices than a batch", {"slices": 1, "cases": {"train": 1, "val": 1}}, ["data.global_batch_size=8"]),
        ("volumes of one slice", {"slices": 1}, []),
        ("more classes than are seen", {"classes": ("background", "a", "b", "c", "d")}, []),
    ],
)
def test_odd_data_gives_finite_losses(tmp_path: Path, name: str, source: dict[str, Any], overrides: list[str]) -> None:
    shape = {key: value for key, value in source.items() if key in ("slices", "cases", "classes")}
    make_dataset(tmp_path / "mr", "mr", **source)
    make_dataset(tmp_path / "ct", "ct", seed=1, **shape)
    config = tiny_config(tmp_path / "mr", tmp_path / "ct", [*SIX_STEPS, *overrides])
    outcome, run = train(config, tmp_path / "run")
    assert (outcome.state, outcome.step) == ("finished", 6)
    for record in run.read_metrics():
        trained = {key: value for key, value in record.items() if key.startswith("train/")}
        assert all(math.isfinite(value) for value in trained.values()), trained
    networks = checkpoint.load(run.phases / "adaptation")["method"]
    assert networks["prototypes"].isfinite().all()
    assert all(tensor.isfinite().all() for tensor in networks["networks"]["segmenter"].values())


def test_views_and_shares_of_slices_resume_as_if_training_had_not_stopped(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second view comes in the phase of the method that asks for it alone."""
    monkeypatch.setattr(MPSCL, "target_views", 2)
    settings = ["data.augmentation.mapping_probability=1", "data.augmentation.degradation_probability=0.5"]
    config = tiny_config(pair / "mr", pair / "ct", [*SIX_STEPS, *settings, "data.foreground_share=0.9"])
    whole, before, after = RecordingCallback(), RecordingCallback(), RecordingCallback()
    train(config, tmp_path / "whole", None, whole)
    train(config, tmp_path / "cut", 5, before)
    train(config, tmp_path / "cut", None, after)
    assert [batch.target_view is not None for batch in whole.batches] == [False] * 4 + [True] * 2
    for ours, theirs in zip(before.batches + after.batches, whole.batches, strict=True):
        assert hashes(ours) == hashes(theirs)
        if theirs.target_view is not None:
            assert ours.target_view is not None
            assert torch.equal(ours.target_view, theirs.target_view)
            assert not torch.equal(theirs.target_view, theirs.images[1])
