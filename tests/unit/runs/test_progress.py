"""Progress line and TensorBoard events, as a terminal and as TensorBoard would read them."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import struct
import termios
from fcntl import ioctl
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from mpscl_ray.errors import StorageError
from mpscl_ray.runs import progress
from mpscl_ray.runs.progress import ProgressLine, TensorBoard


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Terminal:
    """A real pseudo-terminal of a given width; ``screen`` is what a person sees in the end."""

    def __init__(self, columns: int) -> None:
        self._master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w")
        self.columns = columns
        self.raw = ""

    def screen(self) -> list[str]:
        self.stream.flush()
        os.set_blocking(self._master, False)
        try:
            while data := os.read(self._master, 65536):
                self.raw += data.decode()
        except BlockingIOError:
            pass
        lines = [""]
        column = 0
        for character in self.raw:
            assert character in "\r\n" or character.isprintable(), "escape codes"
            if character == "\n":
                lines.append("")
            elif character == "\r":
                column = 0
            else:
                assert column < self.columns - 1, "the line would wrap"
                lines[-1] = lines[-1][:column] + character + lines[-1][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _real_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


# ---- progress line ----


def test_plain_lines_when_not_a_terminal(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressLine(100, "adaptation", images_per_iteration=16, stream=stream, every_s=10, clock=clock) as line:
        for iteration in range(1, 31):
            clock.seconds += 1
            line.update(iteration, loss=0.5 if iteration == 12 else None)
    assert stream.getvalue().splitlines() == [
        "adaptation 10/100 (10%), ETA 1:30, 16.0 images/s",
        "adaptation 20/100 (20%), ETA 1:20, 16.0 images/s, loss 0.5000",
        "adaptation 30/100 (30%), ETA 1:10, 16.0 images/s, loss 0.5000",
    ]


def test_report_and_close_show_the_last_state_once(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressLine(10, "warm-up", stream=stream, clock=clock) as line:
        clock.seconds += 2
        line.update(5)
        line.report()
        line.message("val/dice/mean 0.71")
        clock.seconds += 2
        line.update(10, loss=1.25)
        line.report()
    assert stream.getvalue().splitlines() == [
        "warm-up 5/10 (50%), ETA 0:02",
        "val/dice/mean 0.71",
        "warm-up 10/10 (100%), ETA 0:00, loss 1.2500",
    ]


def test_resumed_iterations_do_not_count_for_the_speed(clock: Clock) -> None:
    stream = io.StringIO()
    line = ProgressLine(10_000, "adaptation", images_per_iteration=2, start=9_000, stream=stream, clock=clock)
    assert line.images_per_s == 0
    clock.seconds += 10
    line.update(9_010)
    assert line.images_per_s == pytest.approx(2.0)
    assert stream.getvalue() == "adaptation 9010/10000 (90%), ETA 16:30, 2.0 images/s\n"


def test_speed_is_that_of_the_last_half_minute(clock: Clock) -> None:
    line = ProgressLine(10_000, "p", images_per_iteration=1, stream=io.StringIO(), clock=clock)
    for iteration in range(1, 101):
        clock.seconds += 10
        line.update(iteration)
    for iteration in range(101, 201):
        clock.seconds += 1
        line.update(iteration)
    assert line.images_per_s == pytest.approx(1.0)


def test_hours(clock: Clock) -> None:
    stream = io.StringIO()
    line = ProgressLine(7_384, "p", stream=stream, clock=clock)
    clock.seconds += 10
    line.update(10)
    assert "ETA 2:02:54" in stream.getvalue()


def test_one_line_on_a_terminal(clock: Clock) -> None:
    terminal = Terminal(120)
    with ProgressLine(200, "adaptation", images_per_iteration=16, stream=terminal.stream, clock=clock) as line:
        for iteration in range(1, 101):
            clock.seconds += 0.5
            line.update(iteration, loss=10.0 if iteration < 50 else 1.0)
        assert terminal.screen() == [
            "adaptation 100/200 (50%)  [##########----------]  ETA 0:50  32.0 images/s  loss 1.0000"
        ]
        line.message("val/dice/mean 0.71")
    assert terminal.screen() == [
        "val/dice/mean 0.71",
        "adaptation 100/200 (50%)  [##########----------]  ETA 0:50  32.0 images/s  loss 1.0000",
        "",
    ]
    terminal.close()


def test_redrawn_at_most_ten_times_a_second(clock: Clock) -> None:
    terminal = Terminal(80)
    line = ProgressLine(10_000, "p", stream=terminal.stream, clock=clock)
    for iteration in range(1, 1001):
        clock.seconds += 0.001
        line.update(iteration)
    terminal.screen()
    assert 5 <= terminal.raw.count("\r") <= 11
    terminal.close()


@pytest.mark.parametrize("columns", [2, 12, 25, 40, 60, 80])
def test_narrow_terminals_do_not_wrap(clock: Clock, columns: int) -> None:
    terminal = Terminal(columns)
    with ProgressLine(200, "adaptation", images_per_iteration=16, stream=terminal.stream, clock=clock) as line:
        for iteration in range(1, 101):
            clock.seconds += 0.5
            line.update(iteration, loss=10.0)
    lines = terminal.screen()
    assert len(lines) == 2
    assert lines[0].startswith("adaptation"[: columns - 1])
    if columns >= 40:
        assert "ETA" in lines[0]
    terminal.close()


def test_dumb_terminals_get_plain_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal(80)
    with ProgressLine(10, "p", stream=terminal.stream, clock=clock) as line:
        line.update(1)
    assert terminal.screen() == ["p 1/10 (10%)", ""]
    terminal.close()


def test_closed_pipe_does_not_end_a_run(clock: Clock) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    with ProgressLine(10, "p", stream=stream, clock=clock) as line:
        clock.seconds += 20
        line.update(1)
        line.report()
        line.message("text")
    with pytest.raises(BrokenPipeError):
        stream.close()
    with ProgressLine(10, "p", stream=stream_that_is_closed(), clock=clock) as line:
        line.update(1)


def stream_that_is_closed() -> Any:
    class Closed(io.StringIO):
        def isatty(self) -> bool:
            return False

    stream = Closed()
    stream.close()
    return stream


def test_standard_error_is_the_default(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(10, "p", clock=clock) as line:
        line.update(1)
    assert capsys.readouterr().err == "p 1/10 (10%)\n"


# ---- TensorBoard ----


def events_of(folder: Path) -> list[Event]:
    """All events as TensorBoard reads them: files by name, records after their lengths, purged at each restart."""
    events: list[Event] = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                events = [earlier for earlier in events if earlier.step < event.step]
            events.append(event)
            data = data[16 + length :]
    return events


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events_of(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_records_arrive_under_their_tags_at_once(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard")
    record = {
        "global_step": 20,
        "phase": "adaptation",
        "iteration": 5,
        "train/loss_segmentation": 0.5,
        "train/pseudo_label_fraction": torch.tensor(0.25),
        "val/dice/LVC": np.float64(0.75),
        "val/dice/AA": math.nan,
        "val/source/dice/mean": 1,
        "perf/images_per_s": math.inf,
    }
    board.record(record)
    assert scalars_of(tmp_path / "tensorboard") == {
        "train/loss_segmentation": [(20, 0.5)],
        "train/pseudo_label_fraction": [(20, 0.25)],
        "val/dice/LVC": [(20, 0.75)],
        "val/source/dice/mean": [(20, 1.0)],
        "perf/images_per_s": [(20, math.inf)],
    }
    board.close()
    board.close()
    board.record(record)


def test_documented_tags_are_kept_word_for_word(tmp_path: Path) -> None:
    assert progress.__doc__ is not None
    tags = re.findall(
        r"(?:train|val|speed)/[\w/]+", progress.__doc__.replace("*", "main").replace("<structure>", "LVC")
    )
    assert len(tags) >= 9
    with TensorBoard(tmp_path) as board:
        board.record({"global_step": 1, **dict.fromkeys(tags, 1.0)})
    assert set(scalars_of(tmp_path)) == set(tags)


def test_curves_are_continuous_over_restarts(tmp_path: Path) -> None:
    with TensorBoard(tmp_path) as board:
        for step in range(10, 60, 10):
            board.record({"global_step": step, "train/loss": 1.0})
    # Two restarts within a second; the first of them is killed before it closes its file.
    killed = TensorBoard(tmp_path, resume_step=30)
    killed.record({"global_step": 40, "train/loss": 2.0})
    with TensorBoard(tmp_path, resume_step=40) as board:
        board.record({"global_step": 50, "train/loss": 3.0})
    assert scalars_of(tmp_path)["train/loss"] == [(10, 1.0), (20, 1.0), (30, 1.0), (40, 2.0), (50, 3.0)]
    killed.close()


def test_panel_is_a_png(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    with TensorBoard(tmp_path) as board:
        board.panel(7, "target", image)
    (value,) = [value for event in events_of(tmp_path) for value in event.summary.value]
    assert value.tag == "panel/target"
    assert (value.image.height, value.image.width) == (20, 30)
    assert value.image.encoded_image_string.startswith(b"\x89PNG")


def test_full_disk_is_said_once_and_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    board = TensorBoard(tmp_path, notice=notices.append)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for step in range(100):
            board.record({"global_step": step, "train/loss": 1.0})
    board.close()
    assert len(notices) == 1
    assert f"{tmp_path} cannot be written (No space left on device)" in notices[0]


def test_unwritable_folder_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(StorageError, match="tensorboard is a file where a folder is needed"):
        TensorBoard(tmp_path / "tensorboard")


def test_hyperparameters_are_what_tensorboard_compares_runs_by(tmp_path: Path) -> None:
    with TensorBoard(tmp_path) as board:
        board.hyperparameters(
            {"method.gamma": 0.3, "method.margin_form": "paper", "data.in_memory": True}, ["search/score"]
        )
    plugins = [
        HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events_of(tmp_path)
        for value in event.summary.value
    ]
    session = next(plugin.session_start_info for plugin in plugins if plugin.HasField("session_start_info"))
    assert session.hparams["method.gamma"].number_value == 0.3
    assert session.hparams["method.margin_form"].string_value == "paper"
    assert session.hparams["data.in_memory"].bool_value or session.hparams["data.in_memory"].number_value == 1
    experiment = next(plugin.experiment for plugin in plugins if plugin.HasField("experiment"))
    assert [info.name.tag for info in experiment.metric_infos] == ["search/score"]
