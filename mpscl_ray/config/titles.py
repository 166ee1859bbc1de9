"""Names of a run's system and phases in figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpscl_ray.config.systems import SYSTEMS

PHASE_TITLES: Mapping[str, str] = {"source_only": "source-only", "warm_up": "warm-up"}
"""Phases whose name in prose is not their name in files."""


def system_of(config: Mapping[str, Any]) -> str:
    """The system that a run's settings describe: a key of ``SYSTEMS``, or the name of the method.

    Args:
        config: nested plain values, as in ``config.yaml``.

    Returns:
        ``baseline`` is MPSCL with beta = gamma = 0 (Table IV of Liu et al. 2022), ``cscl`` without margins (Table V);
        ``source_randomised`` is plain segmentation with ``data.augmentation.mapping_probability``.
    """
    method = config.get("method", {})
    name = str(method.get("name", "mpscl"))
    if name == "segmentation":
        data = config.get("data", {})
        if data.get("labelled_domain") == "target":
            return "supervised"
        randomised = data.get("augmentation", {}).get("mapping_probability", 0) > 0
        return "source_randomised" if randomised else "source_only"
    if name == "mpscl":
        if not method.get("beta", 1) and not method.get("gamma", 1):
            return "baseline"
        if not method.get("margin_source", 1) and not method.get("margin_target", 1):
            return "cscl"
    if name == "advent" and method.get("variant") == "minent":
        return "minent"
    if name == "sifa":
        return f"sifa_{method.get('version', 'v2')}"
    return name


def title_of(system: str) -> str:
    """Title of a system in figures and tables."""
    return SYSTEMS.get(system, system)


def phase_title(phase: str) -> str:
    """Title of a phase in figures and sentences; code, files and tables have its name."""
    return PHASE_TITLES.get(phase, phase.replace("_", " "))
