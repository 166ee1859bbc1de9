"""The guard of an adaptation: its start competes for the best state, and it ends when it does harm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mpscl_ray.config import Config
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.outcome import TrainResult
from tests.tiny import make_dataset, make_pair, tiny_config
from tests.tiny_runs import Killed, Killer, RecordingCallback, train


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


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)["method"]["networks"]["segmenter"]  # type: ignore[no-any-return]


def assert_all_doors_lead_to_the_best(folder: RunDirectory) -> None:
    """Those of the table, of ``predict`` and ``evaluate`` by default, and of --checkpoint best."""
    last, _ = folder.store.latest_checkpoint()
    assert last is not None
    best = weights(folder.best)
    for path in (last, folder.phases / "adaptation"):
        assert all(torch.equal(tensor, best[name]) for name, tensor in weights(path).items())


def measured(folder: RunDirectory) -> list[dict[str, Any]]:
    """The validations of the adaptation, without what depends on time."""
    records = [r for r in folder.read_metrics() if r["phase"] == "adaptation" and "val/selection_score" in r]
    return [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in records]


def test_an_adaptation_that_does_harm_ends_with_its_best_state(data: Path, tmp_path: Path) -> None:
    watcher = RecordingCallback()
    outcome, folder = train(config_of(data, "method.guard=0.011"), tmp_path, None, watcher)
    assert outcome.state == "finished"
    assert 2 <= outcome.iteration < 12
    assert outcome.step == 2 + outcome.iteration
    (warning,) = watcher.warnings
    words = r"ends at iteration (\d+) of 12: the class-ratio agreement fell from (-[\d.]+) to (-[\d.]+), more than"
    found = re.search(words + ".*; it ends with its best state, that of iteration 0", warning)
    assert found is not None, warning
    assert int(found[1]) == outcome.iteration
    assert float(found[2]) - float(found[3]) > 0.01

    best = checkpoint.load(folder.best)
    assert (best["phase"], best["position"]["iteration"]) == ("adaptation", 0)
    start = weights(folder.phases / "source_only")
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(folder.best).items())
    assert_all_doors_lead_to_the_best(folder)

    # The state before the first step is in the metrics, as is the one that did harm.
    records = [record for record in folder.read_metrics() if record["phase"] == "adaptation"]
    assert [(r["global_step"], r["iteration"]) for r in (records[0], records[-1])] == [
        (2, 0),
        (outcome.step, outcome.iteration),
    ]


def end_of(folder: RunDirectory, outcome: TrainResult) -> tuple[list[float], dict[str, Any]]:
    """Scores of the adaptation: before, while it goes on, of the state that did harm, of the corrected best one."""
    *_, harmed, corrected = measured(folder)
    assert harmed["iteration"] == corrected["iteration"] == outcome.iteration < 12
    return [record["val/selection_score"] for record in measured(folder)], checkpoint.load(folder.best)["position"]


def test_a_correction_that_makes_the_best_state_no_better_is_undone(data: Path, tmp_path: Path) -> None:
    outcome, folder = train(config_of(data, "method.guard=0.011", "method.share_matching=0.5"), tmp_path)
    (before, *_, corrected), best = end_of(folder, outcome)
    assert corrected <= before == best["best"]
    assert best["iteration"] == 0
    assert_all_doors_lead_to_the_best(folder)


def test_a_run_that_the_guard_ends_resumes_bit_for_bit(tmp_path: Path) -> None:
    """With right labels, its best state is better with the class shares matched."""
    make_pair(tmp_path)
    words = ("method.guard=0", "method.alignment=0", "optim.lr=0.03", "run.select=class_ratio_agreement")
    config = config_of(tmp_path, "method.share_matching=1", *words)
    outcome, straight = train(config, tmp_path / "run")
    (*others, harmed, corrected), best = end_of(straight, outcome)
    assert corrected == best["best"] > max(others) > harmed
    assert best["iteration"] == outcome.iteration
    assert_all_doors_lead_to_the_best(straight)

    assert train(config, straight.path)[0] == outcome, "the same command again trains nothing"
    stopped, killed = tmp_path / "stopped", tmp_path / "killed"
    assert train(config, stopped, stop_after=3)[0].state == "interrupted"
    with pytest.raises(Killed):  # before the adaptation has a checkpoint, so that its start is validated again
        train(config, killed, None, Killer(lambda record: record["phase"] == "adaptation"))
    for path in (stopped, killed):
        again, run = train(config, path)
        assert again == outcome
        assert measured(run) == measured(straight)
        assert_all_doors_lead_to_the_best(run)
        one, other = ((each.phases / "adaptation" / checkpoint.TENSORS).read_bytes() for each in (straight, run))
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
