"""``run.profile``: a trace and a table of a few steps of each phase, and the same training."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny import make_pair, tiny_config
from tests.tiny_runs import train


def test_steps_of_each_phase_are_profiled(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    runs = []
    for name, profiled in (("plain", []), ("profiled", ["run.profile=2"])):
        settings = ["phases.source_only=8", "phases.warm_up=3", "phases.adaptation=8", *profiled]
        runs.append(train(tiny_config(pair / "mr", pair / "ct", settings), tmp_path / name)[1])
    plain, folder = runs
    assert not (plain.path / "profile").exists()
    for phase in ("source_only", "adaptation"):
        trace = json.loads((folder.path / "profile" / f"{phase}.json").read_text(encoding="utf-8"))["traceEvents"]
        assert len({event["name"] for event in trace if event["name"].startswith("ProfilerStep#")}) == 2
        assert sum(event["name"] == "aten::convolution" for event in trace) > 20
        assert "aten::" in (folder.path / "profile" / f"{phase}.txt").read_text(encoding="utf-8")
    losses = [
        [{key: value for key, value in record.items() if key.startswith("train/")} for record in run.read_metrics()]
        for run in runs
    ]
    assert losses[0] == losses[1]
