"""The advice to train in bf16, for a run on CPUs that multiply it faster than fp32."""

from __future__ import annotations

import re
from pathlib import Path

from mpscl_ray.config import Config

LEAST_WIDTH = 16
"""Least network.base_channels for which a gain was measured."""


def advice(config: Config, use_gpu: bool, cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """A line that names the settings, where this processor has instructions for bf16 and the run does not use them.

    None elsewhere, and for networks that are narrower than those measured. The processors of other nodes are taken to
    be like this one.
    """
    if use_gpu or config.precision.dtype == "bf16" or config.network.base_channels < LEAST_WIDTH:
        return None
    if not (cpuinfo.is_file() and re.search(r"\bamx_bf16\b", cpuinfo.read_text(encoding="utf-8"))):
        return None
    settings = "precision.dtype=bf16" + ("" if config.precision.channels_last else " precision.channels_last=true")
    return f"  this processor is faster in bf16: {settings}"
