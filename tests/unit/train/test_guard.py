"""The guard of an adaptation: its start competes for the best state, and it ends when it does harm."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mpscl_ray.config import Config
from mpscl_ray.runs import checkpoint
from tests.tiny import make_dataset, tiny_config
from tests.tiny_runs import RecordingCallback, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source's training labels are wrong, its validation labels are not: training leads away from their shares."""
    base = tmp_path_factory.mktemp("guard")
    make_dataset(base / "mr", "mr", permuted=("train",))
    make_dataset(base / "ct", "ct", seed=1)
    return base


RECIPE = (
    "optim.kind=adamw",
    "method.segmentation_loss=plain",
    "method.class_weight_floor=1",
    "data.foreground_share=0.9",
    "data.augmentation.random_conv_probability=0",
    "data.augmentation.mapping_probability=0.8",
    "data.augmentation.degradation_probability=0.3",
)
"""How the harm was found to come at the iterations that the tests name."""


def config_of(data: Path, *overrides: str) -> Config:
    short = ("phases.source_only=2", "phases.adaptation=12", "run.validate_every=2", "run.checkpoint_every=5")
    words = [*short, *RECIPE, "run.select=oracle", *overrides]
    return tiny_config(data / "mr", data / "ct", words, "small/mean_teacher")


def test_an_adaptation_that_does_harm_ends_and_leaves_the_start_as_the_best(data: Path, tmp_path: Path) -> None:
    watcher = RecordingCallback()
    config = config_of(data, "method.guard=0.011")
    outcome, folder = train(config, tmp_path / "run", None, watcher)
    assert outcome.state == "finished"
    assert 2 <= outcome.iteration < 12
    assert outcome.step == 2 + outcome.iteration
    (warning,) = watcher.warnings
    words = r"ends at iteration (\d+) of 12: the class-ratio agreement fell from (-[\d.]+) to (-[\d.]+), more than"
    found = re.search(words, warning)
    assert found is not None, warning
    assert int(found[1]) == outcome.iteration
    assert float(found[2]) - float(found[3]) > 0.01

    best, start = checkpoint.load(folder.best), checkpoint.load(folder.phases / "source_only")
    assert (best["phase"], best["position"]["iteration"]) == ("adaptation", 0)
    weights = start["method"]["networks"]["segmenter"]
    assert all(torch.equal(best["method"]["networks"]["segmenter"][key], weights[key]) for key in weights)

    # The same command again trains nothing, and a run stopped before the end ends the same.
    assert train(config, folder.path)[0] == outcome
    assert train(config, tmp_path / "stopped", stop_after=5)[0].state == "interrupted"
    again, stopped = train(config, tmp_path / "stopped")
    assert again == outcome
    for ended in (folder, stopped):
        assert checkpoint.load(ended.phases / "adaptation")["position"]["iteration"] == outcome.iteration
    one, other = ((run.phases / "adaptation" / checkpoint.TENSORS).read_bytes() for run in (folder, stopped))
    assert one == other


def test_the_state_that_does_harm_is_not_the_best_though_the_criterion_prefers_it(data: Path, tmp_path: Path) -> None:
    outcome, folder = train(config_of(data, "method.guard=0.005", "run.select=label_free"), tmp_path)
    scores = {r["iteration"]: r["val/selection_score"] for r in folder.read_metrics() if "val/selection_score" in r}
    last = scores[outcome.iteration]
    assert outcome.iteration < 12
    assert last == max(scores.values()), "the criterion prefers it"
    position = checkpoint.load(folder.best)["position"]
    assert position["iteration"] < outcome.iteration
    assert position["best"] < last


def test_without_guard_it_goes_on(data: Path, tmp_path: Path) -> None:
    watcher = RecordingCallback()
    outcome, folder = train(config_of(data, "method.guard=null"), tmp_path, None, watcher)
    assert (outcome.iteration, watcher.warnings) == (12, [])
    assert checkpoint.load(folder.best)["position"]["iteration"] > 0
