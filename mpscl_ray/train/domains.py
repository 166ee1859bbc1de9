"""The two datasets of a run: read and checked together, described for model.json, opened for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpscl_ray import __version__
from mpscl_ray.config import Config, DiscriminatorConfig, reads_target, require_datasets
from mpscl_ray.data import SOURCE_DOMAIN, TARGET_DOMAIN
from mpscl_ray.data.compatibility import check_pair
from mpscl_ray.data.dataset import Manifest, load_manifest
from mpscl_ray.data.ray_source import open_slices
from mpscl_ray.data.slices import Slices
from mpscl_ray.data.training_range import TrainingRange
from mpscl_ray.errors import ConfigError
from mpscl_ray.methods.adversarial import DISCRIMINATORS
from mpscl_ray.runs.storage import S3Path, parse_location
from mpscl_ray.train.phases import network_arguments
from mpscl_ray.train.streams import TrainingData


@dataclass(frozen=True)
class Domains:
    """The manifests of the two datasets of a run."""

    source: Manifest
    target: Manifest
    source_folder: Path | S3Path
    target_folder: Path | S3Path

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, background first."""
        return self.source.classes

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each dataset by its address."""
        return {str(self.source_folder): self.source.fingerprint, str(self.target_folder): self.target.fingerprint}


def load_domains(config: Config) -> tuple[Domains, list[str]]:
    """Read both manifests and check that they go together.

    Returns:
        The domains, and warnings.

    Raises:
        ConfigError: data.source or data.target is not set, the slices are too small for the discriminators, or
            run.select needs validation cases, or labels of them, that the target does not have.
        DataError: a dataset is missing, damaged, or does not fit the other one.
    """
    require_datasets(config)
    source_folder, target_folder = (
        located.absolute() if isinstance(located, Path) else located
        for located in map(parse_location, (config.data.source, config.data.target))
    )
    domains = Domains(load_manifest(source_folder), load_manifest(target_folder), source_folder, target_folder)
    warnings = check_pair(domains.source, domains.target)
    _check_size(config, domains.source.size)
    held_out = domains.target.split("val")
    if config.run.select == "oracle" and not (held_out and all(case.labelled for case in held_out)):
        raise ConfigError(
            f"run.select=oracle needs labels of all validation cases of the target {target_folder}, and "
            f"{sum(case.labelled for case in held_out)} of its {len(held_out)} have any; use run.select=label_free"
        )
    if config.run.select not in ("oracle", "label_free") and not held_out and _reads_target(config):
        raise ConfigError(
            f"run.select={config.run.select} judges predictions of validation cases of the target, and {target_folder} "
            "has none; use run.select=label_free, which then takes source validation Dice alone, or prepare the target "
            "with validation cases"
        )
    own = (domains.target if config.data.labelled_domain == TARGET_DOMAIN else domains.source).split("val")
    if config.run.select != "oracle" and not (own and all(case.labelled for case in own)):
        if config.run.choose_postprocessing:
            raise ConfigError(
                f"run.choose_postprocessing=true needs labelled validation cases of the {config.data.labelled_domain}, "
                "and it has none; prepare it with some, or leave the setting out"
            )
        warnings.append(
            f"the {config.data.labelled_domain} dataset has no labelled validation cases to choose the best checkpoint "
            "by; the run keeps the last one and the end of each phase"
        )
    return domains, warnings


def _check_size(config: Config, size: tuple[int, int]) -> None:
    if not isinstance(config.method, DiscriminatorConfig) or not _reads_target(config):
        return
    smallest = DISCRIMINATORS[config.method.discriminator].minimum_size
    if min(size) < smallest:
        raise ConfigError(
            f"method.discriminator={config.method.discriminator} needs slices of at least {smallest} x {smallest} "
            f"pixels, these datasets have {size[0]} x {size[1]}; prepare both with a larger --size"
        )


def _reads_target(config: Config) -> bool:
    """Whether a phase trains on slices of the target."""
    return any(reads_target(name) for name, _ in config.schedule)


def model_description(config: Config, domains: Domains) -> dict[str, Any]:
    """Content of model.json: what evaluation and prediction need beside the weights."""

    def domain(manifest: Manifest, folder: Path | S3Path) -> dict[str, Any]:
        trained_on = TrainingRange.of(manifest)
        return {
            "modality": manifest.modality,
            "scaling": {"low": manifest.scaling.low, "high": manifest.scaling.high},
            "recipe": manifest.recipe,
            "labels": manifest.labels,
            "dataset": str(folder),
            "fingerprint": manifest.fingerprint,
            "training_volumes": None if trained_on is None else trained_on.to_json(),
        }

    return {
        "version": __version__,
        "classes": list(domains.classes),
        "size": list(domains.source.size),
        "network": network_arguments(config, len(domains.classes)),
        "source": domain(domains.source, domains.source_folder),
        "target": domain(domains.target, domains.target_folder),
        "phases": [name for name, _ in config.schedule],
        "labelled": config.data.labelled_domain,
        "mirror_axes": list(config.data.mirror_axes),
    }


def open_data(config: Config, domains: Domains, open_slices: Callable[..., Slices] = open_slices) -> TrainingData:
    """Open the slices that a run reads; those that fit are read into shared memory now, checksums verified."""

    def opened(folder: Path | S3Path, split: str, labels: bool) -> Slices:
        return open_slices(folder, split, labels=labels, in_memory=config.data.in_memory)

    supervised = config.data.labelled_domain == TARGET_DOMAIN
    validation: dict[str, Slices] = {}
    for domain, manifest, folder in (
        (SOURCE_DOMAIN, domains.source, domains.source_folder),
        (TARGET_DOMAIN, domains.target, domains.target_folder),
    ):
        cases = manifest.split("val")
        if cases:
            validation[domain] = opened(folder, "val", all(case.labelled for case in cases))
    return TrainingData(
        classes=domains.classes,
        labelled=opened(domains.target_folder if supervised else domains.source_folder, "train", True),
        unlabelled=opened(domains.target_folder, "train", False) if _reads_target(config) else None,
        validation=validation,
    )
