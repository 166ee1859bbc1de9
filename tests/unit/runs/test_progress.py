"""The progress line, as a terminal shows it."""

from __future__ import annotations

import io
import os
import pty
import struct
import termios
from fcntl import ioctl
from typing import Any

import pytest

from mpscl_ray.runs.progress import ProgressLine


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Terminal:
    """A real pseudo-terminal of a given width; ``screen`` is what a person sees at the end."""

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


def test_close_shows_the_last_state_once(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressLine(10, "warm-up", stream=stream, clock=clock, every_s=2) as line:
        clock.seconds += 2
        line.update(5)
        line.message("val/dice/mean 0.71")
        clock.seconds += 1.9
        line.update(9)
        clock.seconds += 0.1
        line.update(10, loss=1.25)
    assert stream.getvalue().splitlines() == [
        "warm-up 5/10 (50%), ETA 0:02",
        "val/dice/mean 0.71",
        "warm-up 10/10 (100%), ETA 0:00, loss 1.2500",
    ]


def test_resumed_iterations_do_not_count_for_the_speed(clock: Clock) -> None:
    stream = io.StringIO()
    line = ProgressLine(10_000, "adaptation", images_per_iteration=2, start=9_000, stream=stream, clock=clock)
    clock.seconds += 10
    line.update(9_010)
    assert stream.getvalue() == "adaptation 9010/10000 (90%), ETA 16:30, 2.0 images/s\n"


def test_speed_is_that_of_the_last_half_minute(clock: Clock) -> None:
    stream = io.StringIO()
    line = ProgressLine(10_000, "p", images_per_iteration=1, stream=stream, clock=clock)
    for iteration in range(1, 101):
        clock.seconds += 10
        line.update(iteration)
    for iteration in range(101, 201):
        clock.seconds += 1
        line.update(iteration)
    assert stream.getvalue().endswith(", 1.0 images/s\n")


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


def test_nothing_to_do_shows_nothing() -> None:
    stream = io.StringIO()
    with ProgressLine(0, "volume", stream=stream):
        pass
    assert stream.getvalue() == ""
