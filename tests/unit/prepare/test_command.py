"""The prepare command: what it prints, and that an incomplete dataset never appears."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mpscl_ray.prepare.run as prepare_module
from mpscl_ray.config import preset_names
from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.errors import ConfigError, DataError, StorageError
from mpscl_ray.prepare.command import main
from mpscl_ray.prepare.run import prepare
from mpscl_ray.runs import cli
from tests.raw_volumes import made, mmwhs, options


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return mmwhs(tmp_path / "in")


def test_a_finished_dataset_is_not_replaced_unasked(source: Path) -> None:
    _, first = made(source)
    with pytest.raises(ConfigError, match="there is a finished dataset already; give --overwrite"):
        prepare(options(source), progress=False)
    _, second = made(source, overwrite=True, seed=1)
    assert first.fingerprint != second.fingerprint
    assert [path.name for path in (source.parent / "out").iterdir()] == ["ct"]


def test_something_else_in_the_output_folder_is_never_touched(source: Path) -> None:
    precious = source.parent / "out" / "ct" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(StorageError, match="something else than a dataset"):
        prepare(options(source, overwrite=True), progress=False)
    assert precious.read_text(encoding="utf-8") == "years of work"


def test_a_failure_while_writing_leaves_the_old_dataset(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, first = made(source)
    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return finish(*args, **kwargs)

    finish = prepare_module.finish_case
    monkeypatch.setattr(prepare_module, "finish_case", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(options(source, overwrite=True, seed=1), progress=False)
    assert len(calls) == 4
    assert [path.name for path in folder.parent.glob("[!.]*")] == ["ct"]
    assert load_manifest(folder) == first
    for case in first.cases:
        read_case(folder, case)


def test_a_killed_run_leaves_no_dataset_and_the_next_one_cleans_up(source: Path, tmp_path: Path) -> None:
    for number in range(1007, 1040):
        mmwhs(source, "ct", range(number, number + 1))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mpscl_ray.prepare", str(source), "--layout", "mmwhs", "--out", str(out)]
    process = subprocess.Popen([*command, "--workers", "0", "--crop", "16,16"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(out.glob(".ct.unfinished-*/.staged/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = out.iterdir()
    assert left.name.startswith(".ct.unfinished-")
    for folder in (out, out / "ct", left):
        with pytest.raises(DataError):
            load_manifest(folder)
    made(source)
    assert [path.name for path in out.iterdir()] == ["ct"]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_cannot_be_written(source: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        prepare(options(source, out=tmp_path / place), progress=False)


def test_a_full_disk_is_reported_and_leaves_nothing(source: Path) -> None:
    script = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000)); "
        "sys.argv[0] = 'prepare'; runpy.run_module('mpscl_ray.prepare', run_name='__main__')"
    )
    out = source.parent / "out"
    command = [
        sys.executable,
        "-B",
        "-c",
        script,
        str(source),
        "--layout",
        "mmwhs",
        "--out",
        str(out),
        "--workers",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "no space left: needed" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(out.iterdir()) == []


def test_the_command_prints_a_table_and_the_next_command(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.parent / "out"
    arguments = [str(source), "--layout", "mmwhs", "--out", str(out), "--crop", "16,16", "--workers", "0"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()]
    assert ["split", "patients", "cases", "labelled", "slices", "background", "AA", "LAC", "LVC", "MYO"] in rows
    assert ["train", "4", "4", "4", "96"] in [row[:5] for row in rows]
    preset = rows[-1][rows[-1].index("mpscl_ray.train") + 1]
    assert rows[-1] == [
        "next:",
        "python",
        "-m",
        "mpscl_ray.train",
        preset,
        f"data.source={out}/ct",
        "data.target=OTHER",
    ]
    assert preset in preset_names()
    assert "reading and normalising 6/6" in printed.err


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--layout", "mmwhs", "--split", "0.5,0.5"], 2, "three fractions"),
        (["--layout", "mmwhs", "--unlabelled", "trian"], 2, "'trian' is none of train, val, test"),
        (["--layout", "mmwhs", "--orientation", "stored"], 2, "slice_axis is 'coronal'"),
        (["--layout", "mmwhs", "--crop", "16"], 2, "expected 2 comma-separated numbers"),
        (["--layout", "mmwhs", "--crop", "keep,16"], 2, "crop is (None, 16); expected rows and columns"),
        (["--layout", "mmwhs", "--assume-spacing", "0,1,1"], 2, "expected three sizes in mm above 0"),
        (["--layout", "mmwhs", "--split", "1,0,0", "--spacing-mm", "0.01,1,1"], 2, "0.05 to 50 mm"),
        (["--layout", "tfrecord"], 3, "no *.tfrecords files"),
        (["--layout", "mmwhs", "--modality", "mr"], 3, "of the modality 'mr'"),
    ],
)
def test_exit_codes_and_plain_sentences(
    source: Path, change: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(main, [str(source), "--out", str(source.parent / "out"), *change])
    assert ended.value.code == code
    assert words in capsys.readouterr().err
