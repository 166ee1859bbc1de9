"""Searches and comparisons in a bucket: killed, gone on with, each trial and each cell once, nothing left behind."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mpscl_ray.compare import command as compare
from mpscl_ray.config import load_config, to_dict
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import open_run
from mpscl_ray.runs.storage import S3Path
from mpscl_ray.train import command as train
from mpscl_ray.tune import command as tune
from tests.ray_commands import assert_nothing_is_reserved, run_until_killed
from tests.s3 import CREDENTIALS, Server, serve, upload_folder
from tests.tiny import SETTINGS, make_pair
from tests.tiny_presets import write_presets

ITERATIONS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two datasets, and a Ray of two CPUs whose processes have its credentials."""
    folder = tmp_path_factory.mktemp("s3")
    with serve(folder) as started:
        upload_folder(make_pair(folder / "data"), started.folder("data"))
        with connect(2, object_store_memory=200 * 2**20):
            yield started


def records(folder: S3Path) -> list[dict[str, object]]:
    """The ledger of a search, as it is in the bucket."""
    try:
        lines = (folder / "ledger.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def count(folder: S3Path, event: str) -> int:
    return sum(record["event"] == event for record in records(folder))


def assert_clean(folder: S3Path) -> None:
    """Nobody holds the folder, no place is noted, and no secret is in any file."""
    names = folder.files()
    assert ".lease" not in names
    assert not [name for name in names if name.endswith("/.placement-group")]
    for name in names:
        content = (folder / name).read_bytes()
        for secret in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
            assert CREDENTIALS[secret].encode() not in content, name


def test_a_killed_search_in_a_bucket_goes_on_and_stops_what_falls_behind(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = [f"data.source={server.url('data/mr')}", f"data.target={server.url('data/ct')}"]
    lengths = [f"phases.adaptation={ITERATIONS}", "run.validate_every=2", "scaling.num_workers=1"]
    base = to_dict(load_config("small/mpscl", [*SETTINGS, *place, *lengths, f"run.storage={server.url('runs')}"]))
    base["run"]["name"] = "search"
    search = {
        "method": "grid",
        "scheduler": "pausing_asha",
        "grace_period": 2,
        "reduction_factor": 50,
        "metric": "information",
        "evaluate": "best",
    }
    file = tmp_path / "space.yaml"
    space = {"method.gamma": {"choice": [10, 1, 0.1]}}
    file.write_text(yaml.safe_dump({**base, "preset": "small/mpscl", "search": search, "space": space}))
    folder = server.folder("runs/search")

    words = ["mpscl_ray.tune", str(file)]
    other = open_run(folder, "other")
    other.create()
    with other.lock(), pytest.raises(ConfigError, match="the run search is in use by process"):
        tune.main(words[1:])

    run_until_killed(words, lambda: count(folder, "report") >= 2)
    assert count(folder, "end") < 3
    assert tune.main(words[1:]) == 0
    text = capsys.readouterr().out
    assert_nothing_is_reserved()

    ends = {record["number"]: record for record in records(folder) if record["event"] == "end"}
    assert sorted(ends) == [1, 2, 3]
    assert count(folder, "end") == count(folder, "trial") == 3, "each trial once"
    reports = [(record["number"], record["iteration"]) for record in records(folder) if record["event"] == "report"]
    assert len(reports) == len(set(reports))
    finished = [number for number, end in ends.items() if end["state"] == "finished"]
    stopped = [number for number, end in ends.items() if end["state"] == "stopped"]
    assert finished
    assert stopped, "with less weight on the contrast they learn less in so few iterations"
    for number, end in ends.items():
        run = open_run(folder / "trials" / f"{number:03d}")
        run.require()
        last = max(iteration for trial, iteration in reports if trial == number)
        assert run.read_metrics()[0]["phase"] == "adaptation", "it begins where the shared phases ended"
        if end["state"] == "stopped":
            assert str(end["reason"]).endswith(f" {last}"), "it waited for the decision"
            assert not run.store.checkpoint_names(), "weights of a stopped trial are of no use"
        else:
            assert last == ITERATIONS
            assert run.store.step_checkpoints()
    assert_clean(folder)

    summary = json.loads((folder / "results" / "summary.json").read_bytes())
    best = train.config_from_arguments([server.url("runs/search/best.yaml"), "run.seed=7"])
    assert (best.run.name, best.run.storage, best.run.seed) == ("search-best", server.url("runs"), 7)
    assert f"python -m mpscl_ray.train {shlex.quote(server.url('runs/search/best.yaml'))}" in text
    with pytest.raises(ConfigError, match=r"there is no preset file s3://bucket/runs/search/none\.yaml"):
        train.config_from_arguments([server.url("runs/search/none.yaml")])
    assert summary["trials"] == {"finished": len(finished), "stopped": len(stopped), "failed": 0}
    assert {"search.yaml", "status.json", "environment.json", "results/test.txt", "results/curves.png"} <= set(
        folder.files()
    )
    assert json.loads((folder / "status.json").read_bytes())["state"] == "finished"
    trial = f"runs/search/trials/{summary['best']:03d}"
    assert f"python -m mpscl_ray.predict {shlex.quote(server.url(trial))}" in text

    table = server.folder(trial) / "results" / "adaptation_test_prepared_protocol" / "summary.json"
    evaluated = table.version_stamp()
    assert tune.main(words[1:]) == 0
    assert count(folder, "end") == 3
    assert table.version_stamp() == evaluated, "what is evaluated is not evaluated again"
    assert "not used for any choice" in capsys.readouterr().out


def test_a_killed_comparison_in_a_bucket_goes_on_with_what_is_missing(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = server.folder("runs/table")
    words = [
        "--data",
        server.url("data/mr"),
        server.url("data/ct"),
        "--presets",
        str(write_presets(tmp_path / "presets")),
    ]
    words += [
        "--out",
        str(out),
        "--seeds",
        "1",
        "--directions",
        "forward",
        "--max-concurrent",
        "1",
        "baseline",
        "mpscl",
    ]

    def cells() -> dict[str, dict[str, object]]:
        try:
            found: dict[str, dict[str, object]] = json.loads((out / "cells.json").read_bytes())["cells"]
        except FileNotFoundError:
            return {}
        return found

    run_until_killed(["mpscl_ray.compare", *words], lambda: "finished" in [cell["state"] for cell in cells().values()])
    trained = (out / "cells" / "mr2ct-seed1-baseline" / "metrics.jsonl").version_stamp()
    assert compare.main(words) == 0
    assert_nothing_is_reserved()
    assert {cell["state"] for cell in cells().values()} == {"finished"}
    assert (out / "cells" / "mr2ct-seed1-baseline" / "metrics.jsonl").version_stamp() == trained, (
        "it is not trained again"
    )
    mpscl = open_run(out / "cells" / "mr2ct-seed1-mpscl")
    mpscl.require()
    assert [record["global_step"] for record in mpscl.read_metrics()] == [10, 12], "it trains its own phase alone"
    assert cells()["mr2ct-seed1-mpscl"]["forked"] == ["mr2ct-seed1-baseline", "warm_up"]
    rows = list(csv.DictReader(io.StringIO((out / "comparison.csv").read_bytes().decode())))
    scores = json.loads(
        (out / "cells" / mpscl.name / "results" / "adaptation_test_prepared_protocol" / "summary.json").read_bytes()
    )
    (row,) = (row for row in rows if (row["system"], row["structure"]) == ("mpscl", "mean"))
    assert float(row["dice_percent_mean"]) == pytest.approx(
        100 * scores["summary"]["structures"]["mean"]["dice"]["mean"]
    )
    assert checkpoint.SUMS in [name.rpartition("/")[2] for name in (out / "cells" / mpscl.name / "phases").files()]
    assert "has the table as comparison.txt" in capsys.readouterr().out
    assert_clean(out)
