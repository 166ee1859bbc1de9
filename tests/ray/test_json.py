"""Commands that train print one JSON document with the keys that docs/scripts.md lists; a stub trains."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from mpscl_ray.compare import command as compare
from mpscl_ray.report import command as report
from mpscl_ray.train import command as train
from mpscl_ray.tune import command as tune
from tests.docs.documented_json import check_keys
from tests.json_command import json_of
from tests.stub_fit import fit
from tests.tiny import make_pair, tiny_settings


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Settings of a tiny training on two datasets."""
    make_pair(tmp_path)
    data = [f"data.source={tmp_path / 'mr'}", f"data.target={tmp_path / 'ct'}", f"run.storage={tmp_path / 'runs'}"]
    return [*data, *tiny_settings("small/mpscl"), "scaling.num_workers=1"]


def test_a_training_and_its_report(cluster: None, words: list[str], tmp_path: Path) -> None:
    main = functools.partial(train.main, fit=fit)
    document = json_of(main, "small/mpscl", *words, "run.name=a")
    check_keys("train", document)
    assert document["run"] == str(tmp_path / "runs" / "a")
    assert set(document["scores"]["rows"]) == {"source_only", "warm_up", "adaptation"}
    again = json_of(main, "small/mpscl", *words, "run.name=a")
    check_keys("train", again)
    assert again["scores"] == document["scores"]
    document = json_of(report.main, tmp_path / "runs" / "a", "--no-volumes")
    check_keys("report", document)
    assert Path(document["page"]).is_file()


def test_a_search(cluster: None, words: list[str], tmp_path: Path) -> None:
    document = json_of(
        functools.partial(tune.main, fit=fit), "contrastive", "preset=small/mpscl", *words, "search.num_samples=1"
    )
    check_keys("tune", document)
    assert Path(document["preset"]).is_file()
    assert document["trials"] == {"finished": 1, "stopped": 0, "failed": 0}


def test_a_comparison(cluster: None, words: list[str], tmp_path: Path) -> None:
    systems = ["source_only", "supervised", "--seeds", "1", "--directions", "forward", "--presets", "small"]
    settings = [word for word in words if not word.startswith(("method.", "phases.warm_up", "phases.adaptation"))]
    document = json_of(functools.partial(compare.main, fit=fit), *systems, *settings)
    check_keys("compare", document)
    assert {row["system"] for row in document["rows"]} == {"source_only", "supervised"}
    assert all(0 <= row["dice_percent_mean"] <= 100 for row in document["rows"])
    assert {run["state"] for run in document["runs"].values()} == {"finished"}
