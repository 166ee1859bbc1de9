"""``--plan``: what a training will take, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpscl_ray.config import load_config
from mpscl_ray.train.command import main
from mpscl_ray.train.phases import build_method, build_segmenter
from mpscl_ray.train.plan import plan
from tests.tiny import CLASSES, make_pair, tiny_settings
from tests.tiny_methods import CPU

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    pair = make_pair(tmp_path)
    return [f"data.source={pair / 'mr'}", f"data.target={pair / 'ct'}", f"run.storage={tmp_path / 'runs'}"]


@pytest.mark.parametrize("preset", ["small/mpscl", "small/cag", "small/intrada", "small/sifa_v2", "small/supervised"])
def test_every_phase_has_a_row(
    preset: str, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny_settings(preset), *data, "scaling.num_workers=2", "scaling.device=cpu"]
    assert main([preset, *words, "--plan"]) == 0
    text = capsys.readouterr().out
    config = load_config(preset, words)
    rows = text.split("\n\n")[1].splitlines()[1:]
    assert [int(re.split(r" {2,}", row)[1]) for row in rows] == [iterations for _, iterations in config.schedule]
    assert "2 workers on CPU, 2 slices of 32 x 32" in text
    assert "kept in memory" in text
    assert not (tmp_path / "runs").exists()


def test_micro_batches_are_said(data: list[str]) -> None:
    words = [*tiny_settings("small/supervised"), *data, "scaling.num_workers=1", "scaling.device=cpu"]
    text = plan(load_config("small/supervised", [*words, "optim.accumulate=2"]))
    assert "4 slices of 32 x 32 of each domain a worker and step, in 2 micro-batches;" in text
    assert "micro-batches" not in plan(load_config("small/supervised", words))


def test_sizes_are_those_of_the_networks(data: list[str]) -> None:
    words = [*tiny_settings("small/mpscl"), *data, "scaling.num_workers=1", "scaling.device=cpu"]
    config = load_config("small/mpscl", words)
    last = plan(config).split("\n\n")[1].splitlines()[-1]
    weights, unit = re.split(r" {2,}", last)[4].split()
    phase = config.schedule[-1][0]
    method = build_method(config, phase, build_segmenter(config, len(CLASSES), phase), len(CLASSES), CPU)
    expected = sum(t.nbytes for network in method.networks.values() for t in network.state_dict().values())
    assert float(weights) * UNITS[unit] == pytest.approx(expected, rel=0.01)
