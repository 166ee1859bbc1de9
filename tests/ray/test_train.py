"""The train command on a real local Ray: undisturbed, and with two workers lost and a stop in between."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.train.v2._internal.state.state_actor import get_state_actor
from tensorboardX.proto.event_pb2 import Event

from mpscl_ray.config import load_config
from mpscl_ray.predict.predictor import load_segmenter
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train import command as train
from tests.ray.conftest import Here, join_ray
from tests.tiny import make_pair
from tests.train_command import (
    EVERY,
    LONG,
    PHASE,
    STEPS,
    Runs,
    Start,
    assert_same_run,
    check_status,
    contents,
    signal_worker,
    started_commands,
    starts,
)


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    with started_commands() as started:
        yield started


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(make_pair(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def calm(runs: Runs) -> tuple[str, RunDirectory]:
    """What a run with two workers printed that nothing disturbs, and its folder."""
    join_ray()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        assert train.main(runs.arguments("calm", *LONG)) == 0
    return printed.getvalue(), runs["calm"]


def test_what_a_run_leaves(calm: tuple[str, RunDirectory], runs: Runs) -> None:
    _, run = calm
    newest = checkpoint.list_checkpoints(run.checkpoints)
    assert [path.name for path in newest] == [f"step-{STEPS - PHASE % EVERY:07d}", f"step-{STEPS:07d}"]
    for directory in (*newest, run.best, *(run.phases / phase for phase in ("source_only", "warm_up", "adaptation"))):
        checkpoint.verify(directory)
    assert checkpoint.load(run.best)["selected_by"] == "label_free"
    file, *overrides = runs.arguments("calm", *LONG)
    assert load_config(run.config_file) == load_config(file, overrides)
    model = run.read_model()
    assert model["classes"] == ["background", "ventricle", "wall"]
    assert model["target"]["dataset"] == str(runs.data / "ct")
    environment = json.loads(run.environment_file.read_text(encoding="utf-8"))
    assert environment["command"][:3] == ["python", "-m", "mpscl_ray.train"]
    assert "All phases are trained" in run.progress_page.read_text(encoding="utf-8")
    assert run.progress_image.read_bytes().startswith(b"\x89PNG")
    assert (run.results / "phases.png").read_bytes().startswith(b"\x89PNG")
    assert (run.results / "phases.csv").is_file()
    check_status(run, "finished", 0, "")
    status = run.read_status()
    assert (status["phase"], status["iteration"], status["global_step"]) == ("adaptation", PHASE, STEPS)
    assert [record["global_step"] for record in run.read_metrics()] == list(range(1, STEPS + 1))
    assert starts(run) == [0]
    assert not (run.path / "checkpoint_manager_snapshot.json").exists(), "Ray Train keeps nothing there"
    predictor = load_segmenter(run.path)
    assert predictor.classes == ("background", "ventricle", "wall")


def test_tensorboard_has_losses_scores_and_panels(calm: tuple[str, RunDirectory]) -> None:
    _, run = calm
    (file,) = run.tensorboard.iterdir()
    tags: dict[str, list[int]] = {}
    for event in read_events(file):
        for value in event.summary.value:
            tags.setdefault(value.tag, []).append(event.step)
    assert tags["train/loss_segmentation"] == list(range(1, STEPS + 1))
    assert tags["train/pseudo_label_fraction"] == list(range(2 * PHASE + 1, STEPS + 1))
    for tag in ("train/discriminator_accuracy_main", "train/prototype_angle_min", "perf/images_per_s"):
        assert tag in tags
    for tag in ("val/dice/wall", "val/dice/mean", "panel/target"):
        assert tags[tag] == [PHASE, 2 * PHASE, STEPS]


def read_events(file: Path) -> Iterator[Event]:
    """Events of a TensorBoard file: records of length, its checksum, the message, its checksum."""
    data = file.read_bytes()
    place = 0
    while place < len(data):
        length = int.from_bytes(data[place : place + 8], "little")
        yield Event.FromString(data[place + 12 : place + 12 + length])
        place += 16 + length


def test_what_a_run_says(calm: tuple[str, RunDirectory]) -> None:
    text, run = calm
    for words in (
        "mr to ct, structures ventricle, wall",
        "18 labelled mr slices and 18 ct slices without labels, 2 CPU workers",
        "the target's labels are not used for training",
        f"warm-up {PHASE}: validation target Dice",
        f"adaptation {PHASE}/{PHASE} (100%)",
        "source_only",
        f"python -m mpscl_ray.evaluate {run.path}",
    ):
        assert words in text, text
    rows = [line.split()[0] for line in text.splitlines() if re.search(r"\d ± \d", line)]
    assert {"source_only", "warm_up", "adaptation"} == set(rows)
    assert "Traceback" not in text


def test_a_finished_run_is_not_run_again(calm: tuple[str, RunDirectory], here: Here, runs: Runs) -> None:
    _, run = calm
    before = contents(run.phases / "adaptation")
    code, text = here(train, *runs.arguments("calm", *LONG))
    assert code == 0
    assert "is finished" in text
    assert "adaptation" in text
    assert contents(run.phases / "adaptation") == before


def test_a_streamed_run_is_the_same_and_ray_train_lists_its_datasets(
    calm: tuple[str, RunDirectory], here: Here, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    code, text = here(train, *runs.arguments("streamed", *LONG, "data.in_memory=false"))
    assert code == 0, text
    assert_same_run(runs["streamed"], calm[1])
    tracked = ray.get(get_state_actor().get_train_runs.remote()).values()
    (listed,) = (run.run_settings.datasets for run in tracked if run.name == "streamed")
    assert sorted(listed) == ["source", "source_validation", "target", "target_validation"]


def test_a_run_that_loses_workers_and_is_stopped_ends_as_if_it_had_not(
    calm: tuple[str, RunDirectory], cluster: None, start: Start, runs: Runs
) -> None:
    """SIGKILL to a worker, SIGTERM to the other, Ctrl-C, on a Ray of its own; then the same command on another Ray."""
    run, words = runs["disturbed"], runs.arguments("disturbed", *LONG)
    command = start(words)
    reached = [command.wait_for_steps(run, PHASE + 3)]
    signal_worker(run, 1, signal.SIGKILL)
    reached.append(command.wait_for_steps(run, 3, start=2))
    signal_worker(run, 0, signal.SIGTERM)
    command.wait_for_steps(run, 3, start=3)
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does, to all processes of the command
    assert command.wait() == 130, command.text
    for rank in (0, 1):
        assert f"worker {rank} was lost: its process died; the workers are replaced and resume" in command.text
    assert "resuming from the checkpoint step-" in command.text
    assert check_status(run, "interrupted", 130, "stopped by SIGINT at iteration") in command.text
    assert "Traceback" not in command.text
    stopped = run.read_metrics()[-1]["global_step"]
    assert checkpoint.list_checkpoints(run.checkpoints)[-1].name == f"step-{stopped:07d}"
    command.assert_nothing_left()
    assert command.temporary_files() == []

    command = start(words, cluster=True)
    assert command.wait() == 0, command.text
    check_status(run, "finished", 0, "")
    first, *again, last = starts(run)
    assert (first, last) == (0, stopped)
    for step, begun in zip(reached, again, strict=True):
        assert step - EVERY <= begun <= stopped, "at most one checkpoint interval is done again"
    assert_same_run(run, calm[1])
    events = (event for file in sorted(run.tensorboard.iterdir()) for event in read_events(file))
    resumed = [event.step - 1 for event in events if event.HasField("session_log")]
    assert resumed == [first, *again, last], "TensorBoard hides what a start had written beyond the next one's begin"
