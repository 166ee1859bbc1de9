"""Files of JSON records beyond what the tests of metrics.jsonl show: nested numbers, and records that are refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from mpscl_ray.errors import DataError
from mpscl_ray.runs.json_lines import JsonLines


def test_nested_numbers_survive(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "ledger.jsonl")
    log.append({"event": "report", "values": {"a": math.inf, "b": np.float64(0.1), "c": -math.inf}})
    log.append({"values": {"d": math.nan}, "parts": [1, 2]})
    first, second = log.read()
    assert first == {"event": "report", "values": {"a": math.inf, "b": 0.1, "c": -math.inf}}
    assert math.isnan(second["values"]["d"])
    assert second["parts"] == [1, 2]
    log.replace([first])
    assert log.read() == [first]


def test_an_object_that_is_no_record_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    file.write_text('{"number": 1}\n{"other": 2}\n{"number": 3}\n')
    log = JsonLines(file, "a record of a trial", lambda record: "number" in record)
    with pytest.raises(
        DataError, match=r"ledger.jsonl line 2 is damaged: expected a record of a trial; remove that line"
    ):
        log.read()
    file.write_text('{"number": 1}\n{"other": 2}\n')
    assert log.read() == [{"number": 1}], "the last line counts as torn"
