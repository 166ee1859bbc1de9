"""The advice to train in bf16. What a step gives in bf16 is in unit/methods/test_mpscl.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpscl_ray.config import load_config
from mpscl_ray.train import bf16

PLACES = ["data.source=a", "data.target=b"]


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", encoding="utf-8")
    return file


def test_advice_names_the_settings_that_the_run_lacks(cpuinfo: Path) -> None:
    wide = bf16.advice(load_config("mr2ct/mpscl", PLACES), False, cpuinfo)
    assert wide == "  this processor is faster in bf16: precision.dtype=bf16 precision.channels_last=true"
    small = bf16.advice(load_config("small/mpscl", PLACES), False, cpuinfo)
    assert small == "  this processor is faster in bf16: precision.dtype=bf16"


@pytest.mark.parametrize("setting", ["precision.dtype=bf16", "network.base_channels=8"])
def test_no_advice_where_bf16_is_used_already_or_the_network_is_narrow(cpuinfo: Path, setting: str) -> None:
    assert bf16.advice(load_config("small/mpscl", [*PLACES, setting]), False, cpuinfo) is None


def test_no_advice_on_gpus_and_other_processors(cpuinfo: Path, tmp_path: Path) -> None:
    config = load_config("small/mpscl", PLACES)
    assert bf16.advice(config, True, cpuinfo) is None
    assert bf16.advice(config, False, tmp_path / "none") is None
    cpuinfo.write_text("flags\t\t: fpu avx512f avx512_vnni\n", encoding="utf-8")
    assert bf16.advice(config, False, cpuinfo) is None
