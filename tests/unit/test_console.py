"""The console script ``mpscl-ray``: one name for all commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpscl_ray.__main__ import COMMANDS, MODULES, dispatch
from tests.unit.test_layers import COMMANDS_ALONE

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_command_is_there() -> None:
    packages = {path.parent.name for path in (ROOT / "mpscl_ray").glob("*/__main__.py")}
    assert set(COMMANDS) == packages | set(COMMANDS_ALONE)
    assert all((ROOT / f"{module.replace('.', '/')}.py").is_file() for module in MODULES.values())


@pytest.mark.parametrize(
    "words", [["train", "--list-presets"], ["train", "nothing"], ["compare", "--shwo"], ["score", "a", "s3://b"]]
)
def test_it_is_the_command_itself(words: list[str]) -> None:
    command, *rest = words
    ours, own = run("mpscl_ray", *words), run(f"mpscl_ray.{command}", *rest)
    assert (ours.returncode, ours.stdout, ours.stderr) == (own.returncode, own.stdout, own.stderr)


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--version"], 0), ([], 2), (["trian"], 2)])
def test_what_it_says_itself(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        dispatch(words)
    assert ended.value.code == code
    printed = capsys.readouterr()
    if words == ["--help"]:
        assert all(f"  {command} " in printed.out for command in COMMANDS)
    if words == ["--version"]:
        assert printed.out.startswith("mpscl_ray ")
    if code:
        assert "mpscl-ray: error: " in printed.err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mpscl-ray tr", ["train "]),
        ("mpscl-ray train mr2ct/mpscl_", ["mr2ct/mpscl_paper", "mr2ct/mpscl_released"]),
        ("mpscl-ray train phantom optim.lr", ["optim.lr=", "optim.lr_discriminator="]),
        ("mpscl-ray train --allow", ["--allow-change "]),
        ("mpscl-ray tune table_v preset=small/mps", ["small/mpscl "]),
        ("mpscl-ray compare --seeds 1 mps", ["mpscl "]),
        ("mpscl-ray evaluate --spl", ["--split "]),
        ("mpscl-ray score --ign", ["--ignore-label "]),
    ],
)
def test_completion_in_a_shell(line: str, expected: list[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    file = tmp_path / "completions"
    done = run(
        "mpscl_ray",
        _ARGCOMPLETE="1",
        _ARGCOMPLETE_IFS="\n",
        _ARGCOMPLETE_STDOUT_FILENAME=str(file),
        _ARGCOMPLETE_COMP_WORDBREAKS=" =",
        COMP_LINE=line,
        COMP_POINT=str(len(line)),
    )
    assert file.read_text(encoding="utf-8").split("\n") == expected, done.stderr
