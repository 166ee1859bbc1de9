"""Signals: the first asks for a stop, the second ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mpscl_ray.runs.signals import Interruption, signals_end


@pytest.fixture(autouse=True)
def not_under_nohup() -> Iterator[None]:
    """Tests under ``nohup`` would pass their ignored SIGHUP on to the processes that they start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


LOOP = """
import sys
import time
from mpscl_ray.runs.signals import Interruption

try:
    with Interruption() as interruption:
        print("running", flush=True)
        for step in range(6000):
            time.sleep(0.01)
            if interruption.requested and {obedient}:
                print("checkpoint after", interruption.signal_name, flush=True)
                sys.exit(130)
finally:
    print("cleaned up", flush=True)
"""


def start(obedient: bool) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP.format(obedient=obedient)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_first_signal_lets_the_loop_finish(number: signal.Signals) -> None:
    process = start(obedient=True)
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert output == f"checkpoint after {number.name}\ncleaned up\n"
    assert f"{number.name}: finishing this step and writing a checkpoint" in errors


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_second_signal_ends_the_process_at_once(first: signal.Signals, second: signal.Signals) -> None:
    process = start(obedient=False)
    process.send_signal(first)
    assert process.stderr is not None
    line = ""
    while "finishing this step" not in line:
        line = process.stderr.readline()
        assert line, "the process ended at the first signal"
    process.send_signal(second)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert output == "", "a second signal does not wait for clean-up"
    assert f"{second.name} again: leaving at once" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_twice_at_once_is_one(number: signal.Signals) -> None:
    """``timeout`` sends SIGTERM to its child and to the group, terminal and shell SIGHUP."""
    with Interruption() as interruption:
        os.kill(os.getpid(), number)
        wait_for(lambda: interruption.requested)
        os.kill(os.getpid(), number)  # would end this process
        assert interruption.signal_name == number.name


def test_under_nohup_the_end_of_the_terminal_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption, signals_end("here"):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not interruption.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


TERMINAL = """
import os, pty, signal, sys, time
child, terminal = pty.fork()
if child == 0:
    from mpscl_ray.runs.signals import Interruption
    with Interruption() as interruption:
        print("running", flush=True)
        while not interruption.requested:
            time.sleep(0.01)
        print("this goes nowhere", flush=True)
        os._exit(7)
assert b"running" in os.read(terminal, 100)
os.close(terminal)  # the kernel sends SIGHUP, and writing fails from now on
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_command_ends_in_order_when_its_terminal_is_closed() -> None:
    done = subprocess.run([sys.executable, "-c", TERMINAL], capture_output=True, text=True, timeout=60)
    assert done.stdout == "7\n", done.stderr


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: interruption.requested)
        assert interruption.signal_name == "SIGTERM"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_first_request_gives_the_name() -> None:
    interruption = Interruption()
    assert not interruption.requested
    interruption.request("driver")
    interruption.request("another")
    assert (interruption.requested, interruption.signal_name) == (True, "driver")


def test_handlers_need_the_main_thread() -> None:
    found: list[str] = []

    def enter() -> None:
        try:
            with Interruption():
                pass
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(found) == 1
    assert "main thread" in found[0]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
