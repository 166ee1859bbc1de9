"""The systems of the comparison: their presets, and the first phases that their runs can share."""

from __future__ import annotations

import dataclasses
from typing import Any

from mpscl_ray.config import Config, is_adaptation, method_of_phase, to_dict

SYSTEMS: dict[str, str] = {
    "source_only": "W/o adaptation",
    "adabn": "AdaBN",
    "adaoutput": "AdaOutput",
    "minent": "MinEnt",
    "advent": "AdvEnt",
    "clan": "CLAN",
    "cag": "CAG",
    "intrada": "IntraDA",
    "sifa_v1": "SIFA v1",
    "sifa_v2": "SIFA v2",
    "baseline": "Baseline",
    "cscl": "CSCL",
    "mpscl": "MPSCL",
    "supervised": "Supervised",
}
"""Title of every system in tables, in their order, by the last part of its presets ``mr2ct/NAME``, ``ct2mr/NAME``,
``small/NAME`` and ``phantom/NAME``."""


def phase_fingerprint(config: Config, phase: str) -> dict[str, Any]:
    """Everything that decides on the weights of a run at the end of a phase, up to rounding.

    Two runs with the same values can share their first phases: train one, and ``fork`` the other from there.

    Args:
        config: of the run.
        phase: name of one of its phases.

    Raises:
        ValueError: the run has no such phase.
    """
    names = [name for name, _ in config.schedule]
    if phase not in names:
        raise ValueError(f"the run has no phase {phase}, only {', '.join(names)}")
    values = to_dict(config)
    del values["scaling"], values["method"], values["phases"]
    del values["data"]["in_memory"], values["network"]["pretrained_prototypes"]
    values["run"] = config.run.seed
    learnt = []
    for name, iterations in config.schedule[: names.index(phase) + 1]:
        settings = method_of_phase(config, name)
        learnt.append((name, iterations, type(settings).__name__, dataclasses.asdict(settings)))
    values["phases"] = learnt
    values["source_only_lr"] = config.phases.source_only_lr
    return values


def shared_phase(one: Config, other: Config) -> str | None:
    """The last phase up to which two runs are the same, so that one can be forked from the other, or None.

    Rounds of an adaptation are not shared.
    """
    common = None
    for (name, _), (same, _) in zip(one.schedule, other.schedule, strict=False):
        if name != same or is_adaptation(name) or phase_fingerprint(one, name) != phase_fingerprint(other, name):
            break
        common = name
    return common
