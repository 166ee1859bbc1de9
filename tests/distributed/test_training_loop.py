"""The training loop on one and on two workers, in gloo processes, at the precision it is used with."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from mpscl_ray.config import Config
from mpscl_ray.distributed import collectives
from mpscl_ray.errors import TrainingError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.feature_log import FeatureRecord
from mpscl_ray.train.outcome import TrainResult
from tests.tiny import make_pair, tiny_config
from tests.tiny_runs import RecordingCallback, Spoilt, train, train_and_watch
from tests.worker_processes import on_workers

SINGLE = ("phases.source_only=3", "phases.warm_up=2", "phases.adaptation=2", "optim.lr=1e-5", "run.log_every=1")
"""Seven steps at a low rate. At a usual one a single rounding in the initial weights changes the third gradient of one
worker by a third, because ReLUs have kinks: what the loop does can then be compared in double precision only."""
DOUBLE = ("phases.source_only=3", "phases.warm_up=3", "run.log_every=1")
"""Ten steps at a high rate."""

RUNS = {
    "one": [(1, None)],
    "two": [(2, None)],
    "two, stopped": [(2, 4), (2, None)],
    "two, then one": [(2, 4), (1, None)],
    "one in double": [(1, None)],
    "two in double": [(2, None)],
    "two, one and two in double": [(2, 4), (1, 3), (2, None)],
}
"""Workers, and the number of steps after which they are stopped, for each process group in turn."""

Runs = dict[str, tuple[RunDirectory, list[list[list[str]]]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Run folder and what the workers saw."""
    data = make_pair(tmp_path_factory.mktemp("data"))
    found: Runs = {}
    for name, groups in RUNS.items():
        steps, dtype = (DOUBLE, torch.float64) if "double" in name else (SINGLE, torch.float32)
        config = tiny_config(data / "mr", data / "ct", steps)
        run = tmp_path_factory.mktemp(name.replace(" ", "-"))
        seen: list[list[list[str]]] = []
        for workers, stop in groups:
            ends = on_workers(workers, train_and_watch, config, run, stop, dtype)
            seen += by_step([hashes for _, hashes in ends])
        assert all(outcome.state == "finished" for outcome, _ in ends)
        found[name] = RunDirectory(run), seen
    return found


def by_step(workers: list[list[list[list[str]]]]) -> list[list[list[str]]]:
    """What all workers saw, one after the other, by step and domain."""
    return [
        [list(itertools.chain(*parts)) for parts in zip(*domains, strict=True)]
        for domains in zip(*workers, strict=True)
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("one", "two"),
        ("one", "two, stopped"),
        ("one", "two, then one"),
        ("one in double", "two, one and two in double"),
    ],
)
def test_the_data_and_their_order_do_not_depend_on_the_number_of_workers(runs: Runs, one: str, other: str) -> None:
    """The ten steps in double take 40 slices of the source, of which there are 18: two epochs and a part of one."""
    expected = runs[one][1]
    assert [len(domains) for domains in expected] == [1] * 3 + [2] * (len(expected) - 3)
    assert all(len(slices) == 4 for domains in expected for slices in domains)
    assert runs[other][1] == expected


@pytest.mark.parametrize(
    ("one", "other", "tolerance"),
    [
        ("one", "two", 1e-3),
        ("one", "two, then one", 1e-3),
        ("one in double", "two in double", 1e-7),
        ("one in double", "two, one and two in double", 1e-7),
    ],
)
def test_metrics_and_weights_do_not_depend_on_the_number_of_workers(
    runs: Runs, one: str, other: str, tolerance: float
) -> None:
    reference, run = runs[one][0], runs[other][0]
    for ours, theirs in zip(run.read_metrics(), reference.read_metrics(), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, float) and not key.startswith("perf/"):
                assert ours[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (key, ours["global_step"])
    for phase in ("source_only", "warm_up", "adaptation"):
        ours, theirs = (checkpoint.load(folder.phases / phase)["method"] for folder in (run, reference))
        for network, weights in theirs["networks"].items():
            for key, tensor in weights.items():
                torch.testing.assert_close(
                    ours["networks"][network][key], tensor, rtol=tolerance, atol=tolerance / 100, msg=f"{phase} {key}"
                )
    assert theirs["prototypes"].abs().sum() > 0
    torch.testing.assert_close(ours["prototypes"], theirs["prototypes"], rtol=tolerance, atol=tolerance)


def test_two_workers_that_were_stopped_go_on_bit_for_bit(runs: Runs) -> None:
    for phase in ("source_only", "warm_up", "adaptation"):
        for file in (checkpoint.TENSORS, checkpoint.STATE):
            whole, cut = ((runs[name][0].phases / phase / file).read_bytes() for name in ("two", "two, stopped"))
            assert whole == cut, (phase, file)


def drift(config: Config, run: Path) -> str:
    """Train while a weight of worker 1 moves by itself; what ended it."""

    def move(optimiser: torch.optim.Optimizer, *_: object) -> None:
        optimiser.param_groups[0]["params"][0].data.add_(1e-3)

    if collectives.rank() == 1:
        register_optimizer_step_post_hook(move)
    with pytest.raises(TrainingError) as ended:
        train(config, run)
    return str(ended.value)


def test_workers_whose_weights_drift_apart_write_no_checkpoint(tmp_path: Path) -> None:
    data = make_pair(tmp_path / "data")
    told = on_workers(2, drift, tiny_config(data / "mr", data / "ct", SINGLE), tmp_path / "run")
    assert all("the weights of segmenter are not the same on all 2 workers" in sentence for sentence in told)
    assert RunDirectory(tmp_path / "run").store.checkpoint_names() == []


def go_back(config: Config, run: Path) -> tuple[TrainResult, list[int]]:
    """Train while two batches of worker 1 are spoilt."""
    callback = Spoilt(9, 10) if collectives.rank() == 1 else RecordingCallback()
    return train(config, run, callback=callback)[0], callback.starts


def test_all_workers_go_back_where_steps_of_one_are_not_finite(tmp_path: Path) -> None:
    data = make_pair(tmp_path / "data")
    settings = [*DOUBLE, "run.checkpoint_every=2", "optim.max_skipped_steps=1"]
    for outcome, starts in on_workers(2, go_back, tiny_config(data / "mr", data / "ct", settings), tmp_path / "run"):
        assert (outcome.state, outcome.step, starts) == ("finished", 10, [0, 8])
    rates = [record["train/learning_rate_segmenter"] for record in RunDirectory(tmp_path / "run").read_metrics()]
    assert rates[8] < 0.6 * rates[7]


def test_angle_histograms_do_not_depend_on_the_number_of_workers(runs: Runs) -> None:
    one, two = (FeatureRecord(runs[f"{name} in double"][0].path).read() for name in ("one", "two"))
    assert [record["iteration"] for record in one] == [0, 4]
    assert one == two
