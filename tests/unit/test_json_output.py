"""``--json``: one document on stdout, whatever happens, with the keys that docs/scripts.md lists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpscl_ray.__main__ import COMMANDS, dispatch
from mpscl_ray.errors import DataError
from mpscl_ray.runs import cli, json_output
from mpscl_ray.runs.lifecycle import carry_out
from mpscl_ray.runs.run_directory import RunDirectory
from tests.docs.documented_json import KEYS, check_keys
from tests.docs.markdown import ROOT
from tests.hearts_run import oblique, write_hearts_run, write_image
from tests.json_command import json_of
from tests.raw_volumes import mmwhs
from tests.tiny import make_pair, tiny_settings


def test_every_command_is_documented() -> None:
    assert {command.split()[0] for command in KEYS} == set(COMMANDS)


def test_commands_on_images(tmp_path: Path) -> None:
    mmwhs(tmp_path / "in")
    words = [tmp_path / "in", "--layout", "mmwhs", "--workers", "0"]
    check_keys("check", json_of(dispatch, "check", *words))
    document = json_of(dispatch, "prepare", *words, "--out", tmp_path / "out", "--split", "0.5,0.25,0.25")
    check_keys("prepare", document)
    (dataset,) = document["datasets"]
    assert dataset["folder"] == str(tmp_path / "out" / "ct")
    assert dataset["splits"]["train"]["patients"] == len(dataset["splits"]["train"]["cases"]) == 3
    assert document["next"][0].startswith("python -m mpscl_ray.train ")
    again = json_of(dispatch, "prepare", *words, "--out", tmp_path / "out", "--split", "0.5,0.25,0.25")
    assert (again["exit_code"], list(again)) == (2, ["command", "exit_code", "error"])
    assert "out/ct" in again["error"]


def test_commands_on_a_run(tmp_path: Path) -> None:
    run, out = write_hearts_run(tmp_path), tmp_path / "maps"
    scans = tmp_path / "scans"
    scans.mkdir()
    write_image(scans / "a.nii.gz", 1, oblique())
    document = json_of(dispatch, "predict", run, scans, "--out", out, "--workers", "0")
    check_keys("predict", document)
    (made,) = document["label_maps"]
    assert made["files"] == ["a_prediction.nii.gz"]
    assert made["volumes_ml"].keys() == {"MYO", "LAC", "LVC", "AA"}
    (scans / "broken.nii.gz").write_bytes(b"<html>")
    document = json_of(dispatch, "predict", run, scans, "--out", out, "--workers", "0", "--resume")
    assert (document["exit_code"], document["error"]) == (3, "1 of 1 input was not segmented")
    assert (document["kept"], document["label_maps"]) == (1, [])
    assert document["failed"][0]["image"] == str(scans / "broken.nii.gz")
    found, truth = out / "a_prediction.nii.gz", tmp_path / "truth.nii.gz"
    truth.write_bytes(found.read_bytes())
    check_keys("score", json_of(dispatch, "score", found, truth, "--labels", "1=MYO,2=LAC,3=LVC,4=AA"))
    document = json_of(dispatch, "evaluate", run, "--workers", "0", "--protocol", "prepared")
    check_keys("evaluate", document)
    assert set(document["summary"]["structures"]) == {"MYO", "LAC", "LVC", "AA", "mean"}
    assert (
        json.loads((Path(document["folder"]) / "summary.json").read_text(encoding="utf-8")).items() <= document.items()
    )
    document = json_of(dispatch, "export", run, "--out", tmp_path / "model.mpscl")
    check_keys("export", document)
    assert document["bytes"] == (tmp_path / "model.mpscl").stat().st_size


def test_settings_and_plans(tmp_path: Path) -> None:
    make_pair(tmp_path)
    words = [f"data.source={tmp_path / 'mr'}", f"data.target={tmp_path / 'ct'}", *tiny_settings("small/mpscl")]
    document = json_of(dispatch, "train", "small/mpscl", *words, "--print-config")
    check_keys("train --print-config", document)
    assert document["config"]["phases"]["warm_up"] == 4
    document = json_of(dispatch, "train", "small/mpscl", *words, "--plan")
    check_keys("train --plan", document)
    assert [phase["name"] for phase in document["phases"]] == ["source_only", "warm_up", "adaptation"]
    document = json_of(dispatch, "tune", "contrastive", "--print-config")
    check_keys("tune --print-config", document)
    assert document["search"]["search"]["num_samples"] > 0


@pytest.mark.parametrize(
    ("words", "command", "part"),
    [
        (["trian"], "mpscl-ray", "invalid choice: 'trian'"),
        (["train", "optim.lrr=1"], "train", "'optim.lrr' on the command line is not a setting"),
        (["predict", "run"], "predict", "the following arguments are required"),
        (["evaluate", "run", "--shwo"], "evaluate", "unrecognized arguments: --shwo"),
        (["compare", "nothing"], "compare", "there is no system nothing"),
        (["report", "nowhere"], "report", "nowhere"),
    ],
)
def test_what_is_refused_is_a_document_too(
    words: list[str], command: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = json_of(dispatch, *words)
    assert (document["command"], document["exit_code"]) == (command, 2)
    assert part in document["error"]


def test_what_a_command_did_before_it_failed_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: list[str]) -> int:
        json_output.report(
            files=(Path("a"), None), dice={"LV": np.float32(0.5), "RV": float("nan")}, number=np.int64(3)
        )
        print("text for people")
        raise DataError("the second file is damaged")

    document = json_of(main)
    assert document["error"] == "the second file is damaged"
    assert document["files"] == ["a", None]
    assert document["dice"] == {"LV": 0.5, "RV": None}
    assert document["number"] == 3
    assert capsys.readouterr().err == "text for people\nerror: the second file is damaged\n"


def test_a_defect_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: list[str]) -> int:
        raise ZeroDivisionError("no case")

    with pytest.raises(ZeroDivisionError):
        cli.run(main, ["--json"])
    assert json.loads(capsys.readouterr().out) == {
        "command": None,
        "exit_code": 1,
        "error": "ZeroDivisionError: no case",
    }


def test_an_interrupted_command_says_how_to_go_on(tmp_path: Path) -> None:
    def work() -> None:
        raise KeyboardInterrupt

    folder = RunDirectory(tmp_path / "run")
    folder.create()
    document = json_of(lambda _: carry_out(folder, "python -m mpscl_ray.train", work))
    assert document["exit_code"] == 130
    assert document["error"].startswith("stopped by SIGINT")
    assert document["next"] == ["python -m mpscl_ray.train"]


@pytest.mark.parametrize(("words", "start"), [(["--help"], "usage: "), (["--version"], "mpscl_ray ")])
def test_a_text_that_is_asked_for_stays_one(words: list[str], start: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(dispatch, ["evaluate", *words, "--json"])
    assert capsys.readouterr().out.startswith(start)


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mpscl_ray.score", "--json", "nowhere", "labels"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    document = json.loads(done.stdout)
    assert done.returncode == document["exit_code"] != 0
    assert done.stderr == f"error: {document['error']}\n"
