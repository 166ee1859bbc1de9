"""Which beginning the trials of a search have in common, from what they differ in.

A setting that does not act before a phase leaves the phases before it the same for all trials: they are trained once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from mpscl_ray.config import ADAPTATION, SOURCE_ONLY, WARM_UP, Config, method_of_phase

PHASES = (SOURCE_ONLY, WARM_UP, ADAPTATION)


def acts_from(key: str, config: Config) -> str:
    """The first phase in which a setting acts; the first of all where that is not known better."""
    section, _, name = key.partition(".")
    if section == "method":
        return next((phase for phase in (SOURCE_ONLY, WARM_UP) if name in _settings(config, phase)), ADAPTATION)
    if key in ("phases.adaptation", "network.pretrained_prototypes"):
        return ADAPTATION
    if key in ("phases.warm_up", "optim.lr_discriminator", "optim.betas"):
        return WARM_UP
    if key == "optim.lr" and config.phases.source_only_lr is not None:
        return WARM_UP
    return SOURCE_ONLY


def _settings(config: Config, phase: str) -> set[str]:
    """Settings of the method that a phase is given."""
    return {field.name for field in dataclasses.fields(method_of_phase(config, phase))}


def shared_phases(config: Config, keys: Iterable[str]) -> list[tuple[str, int]]:
    """Phases, with their iterations, that are the same for all trials; the last phase of a run is never shared.

    Args:
        config: settings of any trial.
        keys: settings in which trials differ.
    """
    first = min((PHASES.index(acts_from(key, config)) for key in keys), default=0)
    shared = [(name, length) for name, length in config.schedule if name in PHASES[:first]]
    return shared[: len(config.schedule) - 1]


def limiting_keys(config: Config, keys: Iterable[str]) -> list[str]:
    """Settings that act in a phase before the last, and so keep trials from sharing all that comes before it."""
    before = [PHASES.index(name) for name, _ in config.schedule[:-1] if name in PHASES]
    return [key for key in keys if before and PHASES.index(acts_from(key, config)) <= max(before)]
