"""Which beginning the trials of a search have in common, from what they differ in.

A setting that does not act before a phase leaves the phases before it the same for all trials: they are trained once.
"""

from __future__ import annotations

from collections.abc import Iterable

from mpscl_ray.config import ADAPTATION, SOURCE_ONLY, WARM_UP, Config

FROM_ADAPTATION: dict[str, tuple[str, ...]] = {
    "mpscl": tuple(
        "margin_source margin_target temperature_source temperature_target base_temperature delta_th alpha gamma beta "
        "form".split()
    )
}
"""Settings of a method, by its name, that act in the adaptation alone: those of the contrastive terms."""

FROM_SOURCE_ONLY = ("method.segmentation_aux_weight",)
"""Settings of a method that act from the first phase on."""

_PHASES = (SOURCE_ONLY, WARM_UP, ADAPTATION)


def acts_from(key: str, config: Config) -> str:
    """The first phase in which a setting acts; the first of all where that is not known better."""
    section, _, name = key.partition(".")
    if key in ("phases.adaptation", "network.pretrained_prototypes"):
        return ADAPTATION
    if section == "method" and key not in FROM_SOURCE_ONLY:
        return ADAPTATION if name in FROM_ADAPTATION.get(config.method_name, ()) else WARM_UP
    if key in ("phases.warm_up", "optim.lr_discriminator", "optim.betas"):
        return WARM_UP
    if key == "optim.lr" and config.phases.source_only_lr is not None:
        return WARM_UP
    return SOURCE_ONLY


def shared_phases(config: Config, keys: Iterable[str]) -> list[tuple[str, int]]:
    """Phases, with their iterations, that are the same for all trials; the last phase of a run is never shared.

    Args:
        config: settings of any trial.
        keys: settings in which trials differ.
    """
    first = min((_PHASES.index(acts_from(key, config)) for key in keys), default=0)
    shared = [(name, length) for name, length in config.schedule if name in _PHASES[:first]]
    return shared[: len(config.schedule) - 1]


def limiting_keys(config: Config, keys: Iterable[str]) -> list[str]:
    """Settings that act before the last phase, and so keep trials from sharing all that comes before it."""
    return [key for key in keys if acts_from(key, config) != ADAPTATION]
