"""Every command of the documents is one that the command line takes: options, presets, systems, spaces and keys."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray.dashboard.modules.job.cli import submit

from mpscl_ray.__main__ import MODULES
from mpscl_ray.config import load_config, to_yaml
from tests.docs.markdown import GUIDES, ROOT, Command, commands

COMMANDS = list(dict.fromkeys(command.text for file in GUIDES for command in commands(file)))


class Accepting(ModuleType):
    """The module that does the work of a command, with nothing in it that works."""

    def __getattr__(self, name: str) -> Any:
        return MagicMock()


def check(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command read its arguments; it raises where it does not take them."""
    if words[:3] == ["ray", "job", "submit"]:
        parsed = submit.make_context("submit", words[3:]).params
        if parsed["runtime_env"] is not None:
            assert (ROOT / parsed["runtime_env"]).exists()
        check(list(parsed["entrypoint"]), folder, monkeypatch)
        return
    if words[0] == "mpscl-ray":
        words = ["python", "-m", f"mpscl_ray.{words[1]}", *words[2:]]
    assert words[:2] == ["python", "-m"], words
    package, *arguments = words[2:]
    name = package.removeprefix("mpscl_ray.")
    command = importlib.import_module(MODULES[name])
    if name in ("train", "tune"):
        for word in arguments:
            if word.endswith("best.yaml"):  # which a search leaves
                (folder / word).parent.mkdir(parents=True, exist_ok=True)
                (folder / word).write_text(to_yaml(load_config("mr2ct/mpscl")))
        assert command.main([*arguments, "--print-config"]) == 0
        return
    work = MODULES[name].removesuffix("command") + "run"
    monkeypatch.setitem(sys.modules, work, Accepting(work))
    # There is no bucket here; that outputs may be in one is tested in tests/cluster/test_object_storage.py.
    command.main([word.replace("s3://", "") if name == "predict" else word for word in arguments])


@pytest.mark.parametrize("text", COMMANDS)
def test_the_command_line_takes_it(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check(Command(ROOT / "README.md", text).words, tmp_path, monkeypatch)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("python -m mpscl_ray.train optim.lrr=1", "optim.lrr"),
        ("python -m mpscl_ray.tune nothing", "nothing"),
        ("python -m mpscl_ray.compare nothing", "nothing"),
        ("python -m mpscl_ray.score a b --labels nothing", "nothing"),
        ("ray job submit --nothing -- python -m mpscl_ray.train", "--nothing"),
        ("ray job submit -- python -m mpscl_ray.train mr2ct/nothing", "mr2ct/nothing"),
    ],
)
def test_a_wrong_command_is_found(text: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=error):
        check(Command(ROOT / "README.md", text).words, tmp_path, monkeypatch)
