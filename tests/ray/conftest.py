"""One Ray for all tests of this folder, and commands on it in this process."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray

from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.runs import cli

CPUS = 3
"""Three trainings of one worker, or one of two and something beside it."""

Here = Callable[..., tuple[int, str]]
"""Exit code, and all that was printed."""

_shared = ExitStack()


def join_ray() -> None:
    """Be on a small Ray, which is started where there is none."""
    if not ray.is_initialized():
        _shared.enter_context(connect(CPUS, object_store_memory=200 * 2**20))


@pytest.fixture
def cluster() -> None:
    """This process is on the Ray of the tests, which the first that asks for it starts."""
    join_ray()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Tests elsewhere are not on this Ray."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        _shared.close()


@pytest.fixture
def here(cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs a command in this process, on the Ray of the tests: ``here(train, "small/mpscl", ..., fit=...)``."""

    def run(command: ModuleType, *words: str, **options: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [command.__name__.rpartition(".")[2], *words])
        with pytest.raises(SystemExit) as ended:
            cli.run(functools.partial(command.main, **options))
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return run
