"""The systems of the comparison: their presets, and the first phases that their runs can share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mpscl_ray.config import (
    ADAPTATION,
    SOURCE_ONLY,
    WARM_UP,
    Config,
    SegmentationConfig,
    flatten,
    is_adaptation,
    method_of_phase,
    to_dict,
)

SYSTEMS: dict[str, str] = {
    "source_only": "W/o adaptation",
    "source_randomised": "W/o adaptation, randomised",
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
    "mean_teacher": "Mean teacher (ours)",
    "supervised": "Supervised",
}
"""Title of every system in tables, in their order, by the last part of its presets ``mr2ct/NAME``, ``ct2mr/NAME``,
``small/NAME`` and ``phantom/NAME``."""


DESCRIPTIONS: dict[str, str] = {
    "source_only": "lower bound: the segmenter trained on labels of the source only",
    "source_randomised": "the same with randomised appearance, another loss and AdamW",
    "adabn": "the source-only network with batch statistics of the target",
    "adaoutput": "discriminators on class probabilities (AdaptSegNet)",
    "minent": "the entropy of the target's predictions as a loss",
    "advent": "discriminators on self-information maps",
    "clan": "discriminators weighted by where two classifiers disagree",
    "cag": "category anchors and pseudo-labels, in rounds (CAG-UDA)",
    "intrada": "aligns the target's hard images with its easy ones",
    "sifa_v1": "synthesis of target images and shared features, as in 2019",
    "sifa_v2": "the same with a second classifier, as in 2020",
    "baseline": "the adversarial part of MPSCL alone",
    "cscl": "MPSCL without margin",
    "mpscl": "prototypes, margin and self-paced pseudo-labels",
    "mean_teacher": "self-training by a moving average of the network, with balanced pseudo-labels",
    "supervised": "upper bound: the segmenter trained on labels of the target",
}
"""What each system is, in a line that holds in every group of presets."""

_NOT_LEARNT = ("run.", "scaling.", "method.", "phases.", "data.in_memory")
"""Settings that decide nothing about weights, and those that phase_fingerprint adds phase by phase."""

_NOT_IN_PLAIN_SEGMENTATION = ("optim.lr_discriminator", "optim.betas", f"phases.{WARM_UP}")


def phase_fingerprint(config: Config, phase: str) -> dict[str, Any]:
    """Every setting that decides what a run has learnt when a phase ends, up to rounding; value by key.

    Two runs whose fingerprints are equal can share their phases up to this one: train one run, and ``fork`` the other
    from there. A setting whose key is not in the fingerprint acts later or not at all.

    Args:
        config: of the run.
        phase: name of one of its phases.
    """
    names = [name for name, _ in config.schedule]
    values = {key: value for key, value in flatten(to_dict(config)) if not key.startswith(_NOT_LEARNT)}
    values["run.seed"] = config.run.seed
    values["phases.source_only_lr"] = config.phases.source_only_lr
    # A phase without iterations counts too: another run may have some.
    values |= {f"phases.{name}": getattr(config.phases, name) for name in (SOURCE_ONLY, WARM_UP, ADAPTATION)}
    trained = [(name, method_of_phase(config, name)) for name in names[: names.index(phase) + 1]]
    values["trained"] = [(name, type(settings).__name__) for name, settings in trained]
    for _, settings in trained:
        values |= {f"method.{name}": value for name, value in dataclasses.asdict(settings).items()}
    later: list[str] = []
    if not is_adaptation(phase):
        later += [f"phases.{ADAPTATION}", "network.pretrained_prototypes"]
    if all(type(settings) is SegmentationConfig for _, settings in trained):
        later += _NOT_IN_PLAIN_SEGMENTATION
        later += ["optim.lr"] if config.phases.source_only_lr is not None else []
    return {key: value for key, value in values.items() if key not in later}


def acts_on(key: str, fingerprint: Mapping[str, Any]) -> bool:
    """Whether a setting is part of a fingerprint; ``key`` may name a group of settings, or one of a group."""
    return any(key == known or key.startswith(f"{known}.") or known.startswith(f"{key}.") for known in fingerprint)


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


def common_phases(config: Config, keys: Sequence[str]) -> list[tuple[str, int]]:
    """Phases, with their iterations, that runs share if they differ only in the settings ``keys``; never the last."""
    shared = []
    for name, iterations in config.schedule[:-1]:
        if is_adaptation(name) or any(acts_on(key, phase_fingerprint(config, name)) for key in keys):
            break
        shared.append((name, iterations))
    return shared


def limiting_keys(config: Config, keys: Sequence[str]) -> list[str]:
    """The settings that act before the adaptation or the last phase, so that runs which differ in them share less."""
    before = [name for name, _ in config.schedule[:-1] if not is_adaptation(name)]
    return [key for key in keys if before and acts_on(key, phase_fingerprint(config, before[-1]))]
