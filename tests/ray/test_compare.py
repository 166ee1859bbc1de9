"""The compare command on a real Ray: a whole table, one failing cell, going on after a signal."""

from __future__ import annotations

import csv
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

ray = pytest.importorskip("ray")

from mpscl_ray import checkpoint, compare  # noqa: E402
from mpscl_ray.cluster_session import connect  # noqa: E402
from mpscl_ray.errors import ConfigError, TrainingError  # noqa: E402
from mpscl_ray.run_folder import RunFolder  # noqa: E402
from tests.tiny import make_pair, tiny_settings  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 300
METHOD: dict[str, dict[str, object]] = {
    "source_only": {},
    "supervised": {},
    "baseline": {"beta": 0, "gamma": 0},
    "mpscl": {},
}
"""Systems of the tests, with what tiny settings would overwrite."""


def write_presets(folder: Path, phase: int = 4, **changes: dict[str, dict[str, object]]) -> Path:
    """A family of tiny presets with equal budgets."""
    folder.mkdir(exist_ok=True)
    for system, method in METHOD.items():
        settings: dict[str, Any] = {"preset": f"small/{system}", "scaling": {"workers": 1}}
        for line in tiny_settings(f"small/{system}"):
            key, _, value = line.partition("=")
            section, _, name = key.partition(".")
            settings.setdefault(section, {})[name] = yaml.safe_load(value)
        plain = system in ("source_only", "supervised")
        lengths = (3 * phase, 0, 0) if plain else (phase, phase, phase)
        settings["phases"] |= dict(zip(("source_only", "warm_up", "adaptation"), lengths, strict=True))
        if method:
            settings["method"] |= method
        settings["data"] = {"batch_size": settings["data"]["batch_size"]}
        for section, values in changes.get(system, {}).items():
            settings[section] = {**settings[section], **values}
        (folder / f"{system}.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connect(3, object_store_memory=200_000_000):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("data"))


def arguments(data: Path, presets: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(data / "mr"), str(data / "ct"), "--presets", str(presets), "--out", str(out), *more]


def test_a_table_with_shared_phases_that_goes_on_and_grows(
    cluster: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    presets, out = write_presets(tmp_path / "presets"), tmp_path / "out"
    words = arguments(data, presets, out, "--seeds", "1", "--directions", "forward")
    assert compare.main([*words, *METHOD]) == 0

    cells = {path.name: RunFolder(path) for path in (out / "cells").iterdir()}
    assert cells.keys() == {f"mr2ct-seed1-{system}" for system in METHOD}
    baseline, mpscl = cells["mr2ct-seed1-baseline"], cells["mr2ct-seed1-mpscl"]
    for file in (checkpoint.TENSORS, checkpoint.STATE):
        ends = {(run.phases / "warm_up" / file).read_bytes() for run in (baseline, mpscl)}
        assert len(ends) == 1
    assert baseline.read_metrics()[0]["global_step"] == 2
    assert [record["global_step"] for record in mpscl.read_metrics()] == [10, 12], "it trains its own phase alone"

    rows = list(csv.DictReader((out / "comparison.csv").open()))
    for system, last in (("mpscl", "adaptation"), ("supervised", "supervised"), ("source_only", "source_only")):
        scores = json.loads((cells[f"mr2ct-seed1-{system}"].results / f"{last}_test" / "summary.json").read_text())
        (row,) = (row for row in rows if (row["system"], row["structure"]) == (system, "mean"))
        dice = scores["summary"]["structures"]["mean"]["dice"]["mean"]
        assert float(row["dice_percent_mean"]) == pytest.approx(100 * dice)
        assert (row["iterations"], row["seeds"]) == ("12", "1")
        assert float(row["minutes"]) > 0
    for file in ("comparison.txt", "comparison.md", "comparison.tex"):
        assert "MPSCL" in (out / file).read_text()
    assert "mpscl_ray.report" in capsys.readouterr().out
    assert json.loads((out / "status.json").read_text())["state"] == "finished"

    before = {name: run.metrics_file.stat().st_mtime_ns for name, run in cells.items()}
    assert compare.main([*words, *METHOD]) == 0
    assert {name: run.metrics_file.stat().st_mtime_ns for name, run in cells.items()} == before

    with pytest.raises(ConfigError, match=r"mr2ct-seed1-\w+ was started with another config: optim.lr"):
        compare.main([*words, *METHOD, "optim.lr=0.5"])


def test_a_cell_that_fails_does_not_stop_the_rest_and_is_tried_again(cluster: None, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    presets = write_presets(tmp_path / "presets", baseline={"optim": {"lr": 1e30}, "phases": {"source_only_lr": 1e30}})
    words = arguments(data, presets, out, "--seeds", "1", "--directions", "backward", "baseline", "mpscl")
    with pytest.raises(TrainingError, match="1 of 2 cells failed: ct2mr-seed1-baseline"):
        compare.main(words)
    cells = json.loads((out / "cells.json").read_text())["cells"]
    assert "not finite" in cells["ct2mr-seed1-baseline"]["reason"]
    assert cells["ct2mr-seed1-mpscl"]["state"] == "finished"
    assert json.loads((out / "status.json").read_text())["exit_code"] == 6
    assert "MPSCL" in (out / "comparison.md").read_text()

    write_presets(tmp_path / "presets")
    assert compare.main(words) == 0
    cells = json.loads((out / "cells.json").read_text())["cells"]
    assert {cell["state"] for cell in cells.values()} == {"finished"}


def processes_of_cells() -> list[int]:
    """Those of the cluster that was started here, which is below this process."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # ended meanwhile
            if (process / "cmdline").read_text().startswith("ray::run_cell"):
                parents = [int(process.name)]
                while parents[-1] > 1 and parents[-1] != os.getpid():
                    status = (Path("/proc") / str(parents[-1]) / "status").read_text()
                    parents.append(int(status.partition("PPid:")[2].split()[0]))
                found += parents[:1] if parents[-1] == os.getpid() else []
    return found


def test_a_lost_cell_goes_on_a_signal_stops_it_after_a_checkpoint_and_so_does_the_same_command(
    cluster: None, data: Path, tmp_path: Path
) -> None:
    presets, out = write_presets(tmp_path / "presets", phase=60), tmp_path / "out"
    words = arguments(data, presets, out, "--seeds", "1", "--directions", "forward", "mpscl", "run.report_every=1")
    environment = os.environ | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_AUTH_MODE": "token",
        "PYTHONPATH": str(ROOT),
        "MPSCL_RAY_TEST_MARK": secrets.token_hex(4),
    }
    with (tmp_path / "output.txt").open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "mpscl_ray.compare", *words], env=environment, stdout=stream, stderr=stream
        )
        run = RunFolder(out / "cells" / "mr2ct-seed1-mpscl")
        try:
            log = run.logs / "worker-0.log"
            deadline = time.monotonic() + PATIENCE_S
            for start in (1, 2):
                while time.monotonic() < deadline and process.poll() is None:
                    begun = re.findall(r"training starts at step (\d+)", log.read_text() if log.exists() else "")
                    if len(begun) == start and len(run.read_metrics()) >= int(begun[-1]) + 3:
                        break
                    time.sleep(0.1)
                if start == 1:
                    (cell,) = processes_of_cells()
                    os.kill(cell, signal.SIGKILL)
            assert int(begun[1]) > 0, "it goes on from a checkpoint"
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 130, (tmp_path / "output.txt").read_text()
        finally:
            process.kill()
    step = run.read_metrics()[-1]["global_step"]
    assert 3 <= step < 180
    assert "to go on" in (tmp_path / "output.txt").read_text()
    assert json.loads((out / "status.json").read_text())["state"] == "interrupted"
    assert compare.main(words) == 0
    assert [record["global_step"] for record in run.read_metrics()] == list(range(1, 181))
    assert json.loads((out / "cells.json").read_text())["cells"][run.name]["state"] == "finished"
