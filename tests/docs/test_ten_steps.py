"""The example in ten steps runs as it stands, on small scans and with a tiny network."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import slicerio

from tests.docs.markdown import ROOT
from tests.raw_volumes import mmwhs
from tests.tiny import tiny_settings

SCRIPT = ROOT / "docs" / "examples" / "ten_steps.py"


@pytest.mark.filterwarnings("ignore:.*structure")  # none is found, or one is cut off, after a few steps of training
def test_the_ten_steps_lead_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for hospital, modality in (("A", "mr"), ("B", "ct")):
        mmwhs(tmp_path / hospital, modality, range(1001, 1009))
    runpy.run_path(str(SCRIPT))["main"](tmp_path, tiny_settings("small/mpscl"))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[3:6]] == ["source_only", "warm_up", "adaptation"]
    assert printed[-1] == f"open {tmp_path / 'report' / 'index.html'}"
    assert (tmp_path / "report" / "index.html").is_file()
    assert (tmp_path / "a-to-b.mpscl").is_file()
    names = [
        segment["name"] for segment in slicerio.read_segmentation(str(tmp_path / "maps" / "new.seg.nrrd"))["segments"]
    ]
    assert names == ["MYO", "LAC", "LVC", "AA"]
    manifest = json.loads((tmp_path / "data" / "ct" / "manifest.json").read_text(encoding="utf-8"))
    assert not any(case["labelled"] for case in manifest["cases"] if case["split"] == "train")
