"""Every method resumes bit for bit: a short form of ``python -m tests.trust.resume``."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpscl_ray.config import load_config
from mpscl_ray.methods import METHODS
from tests.trust.resume import PRESETS, check, config_of, make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


ONE_OF_EACH = PRESETS[: len(METHODS)]


def test_no_method_is_left_out() -> None:
    assert sorted(load_config(f"small/{name}").method_name for name in ONE_OF_EACH) == sorted(METHODS)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_run_resumes_bit_for_bit(data: Path, tmp_path: Path, name: str) -> None:
    """Stopped at the end of the first phase and of the last but one, and killed within the last one."""
    config = config_of(data, name, steps=6)
    lengths = [iterations for _, iterations in config.schedule]
    steps = sum(lengths)
    stops = sorted({lengths[0], steps - lengths[-1]}) if len(lengths) > 1 else [steps // 2]
    report = check(config, tmp_path, stops, [steps - 1])
    assert report["lost"] in ([1], [2])
    assert report["different"] == {}
