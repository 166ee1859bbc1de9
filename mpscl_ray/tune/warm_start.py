"""What comes before the first trial: what trials can be compared by, and the phases that all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import yaml

from mpscl_ray.config import SOURCE_ONLY, Config, config_from_dict, differences
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.signals import Interruption
from mpscl_ray.runs.storage import join_location
from mpscl_ray.train.domains import Domains, model_description
from mpscl_ray.train.ray import launch
from mpscl_ray.train.ray.concurrent import Shared, run_trial
from mpscl_ray.tune.criteria import LABEL_FREE, ORACLE, WITHOUT_SOURCE
from mpscl_ray.tune.shared_phases import PHASES, acts_from, shared_phases
from mpscl_ray.tune.space import NO_RESULT

SHARED_RUN = "shared"
"""Name of the run in the folder of a search that trains what all trials share."""


def choose_metric(metric: str, domains: Domains) -> str:
    """What trials are compared by on these datasets.

    Raises:
        ConfigError: the target or the source has not the validation volumes or labels that the criterion needs.
    """
    target, source = domains.target.split("val"), domains.source.split("val")
    labelled, source_labelled = (bool(cases) and all(case.labelled for case in cases) for cases in (target, source))
    if metric == "auto":
        metric = ORACLE if labelled else LABEL_FREE if source_labelled else WITHOUT_SOURCE
    if metric == ORACLE and not labelled:
        raise ConfigError(
            f"search.metric=oracle needs labels of all validation cases of the target {domains.target_folder}, and "
            f"{sum(case.labelled for case in target)} of its {len(target)} have any; use search.metric={LABEL_FREE}"
        )
    if metric != "source_dice" and not target:
        raise ConfigError(
            f"search.metric={metric} needs validation cases of the target {domains.target_folder}, which has none; "
            "prepare it with some, or use search.metric=source_dice"
        )
    if metric.startswith(("source_dice", "class_ratio")) and not source_labelled:
        raise ConfigError(
            f"search.metric={metric} needs labelled validation cases of the source {domains.source_folder}; prepare it "
            "with some, or use search.metric={WITHOUT_SOURCE}"
        )
    return metric


def shared_beginning(
    config: Config,
    keys: Sequence[str],
    folder: RunDirectory,
    shared: Shared,
    given: RunDirectory | None,
    interruption: Interruption,
    say: Callable[[str], None],
) -> RunDirectory | None:
    """Train the phases that all trials share, or check that a run which is given has them.

    Args:
        config: settings of any trial, with datasets that are folders.
        keys: settings in which trials differ.
        folder: of the search.
        shared: data and room.
        given: the run that trials are to begin from; None to train one.
        interruption: ends the training after a checkpoint.
        say: called with a sentence about how far it is.

    Returns:
        The run that trials go on from; None where they share nothing, or where it was interrupted.

    Raises:
        ConfigError: the given run does not fit.
        MpsclError: as training raises it.
    """
    common = [name for name, _ in shared_phases(config, keys)]
    if not common:
        if given is not None:
            first = ", ".join(key for key in keys if acts_from(key, config) == SOURCE_ONLY)
            raise ConfigError(
                f"--warm-up {given.display_path}: trials share no phase, because {first or 'the only phase'} is "
                "searched from the first one on; leave --warm-up out"
            )
        return None
    if given is not None:
        _check_given(given, config, common, keys, shared)
        return given
    run = open_run(join_location(folder.uri, SHARED_RUN), "command", 60 * config.run.outage_min)
    seen = 0

    def look(training: launch.Launch) -> None:
        nonlocal seen
        if interruption.requested:
            training.request_stop()
        for record in run.read_metrics():
            if record["global_step"] > seen:
                seen = record["global_step"]
                phase = record["phase"].replace("_", " ")
                say(f"shared by all trials: {phase} {record['iteration']} of {record['iterations']}")

    own = _shared_config(config, common, folder, shared.max_concurrent)
    outcome = run_trial(own, run, shared, look, display_name=f"{folder.name}-{SHARED_RUN}")
    return run if outcome.state == "finished" else None


def _shared_config(config: Config, common: Sequence[str], folder: RunDirectory, max_concurrent: int) -> Config:
    """Settings of the shared run: as many workers as the cluster has room for and can share the batch."""
    batch, room = config.data.batch_size, max_concurrent * config.scaling.most_workers
    workers = next(number for number in range(min(room, batch), 0, -1) if batch % number == 0)
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name=SHARED_RUN, storage=folder.display_path),
        phases=dataclasses.replace(config.phases, **{name: 0 for name in PHASES if name not in common}),
        scaling=dataclasses.replace(config.scaling, workers=workers),
    )


def _check_given(run: RunDirectory, config: Config, common: Sequence[str], keys: Sequence[str], shared: Shared) -> None:
    """Whether a run has trained the common phases as these trials would have."""
    run.require()
    if common[-1] not in run.store.finished_phases():
        raise ConfigError(
            f"--warm-up {run.display_path} has not finished the phase {common[-1]}, from which trials would go on"
        )
    theirs = config_from_dict(yaml.safe_load(run.read_config()), f"of the run {run.name}")
    last = PHASES.index(common[-1])
    wrong = [
        f"{key} is {one} there and {other} here"
        for key, (one, other) in differences(theirs, config).items()
        if (key == "run.seed" or not key.startswith(NO_RESULT))
        and PHASES.index(acts_from(key, config)) <= last
        and key not in keys
    ]
    model, own = run.read_model(), model_description(config, shared.domains)
    for domain in ("source", "target"):
        if model[domain]["fingerprint"] != own[domain]["fingerprint"]:
            wrong.append(f"the {domain} dataset is another one")
    if wrong:
        raise ConfigError(
            f"--warm-up {run.display_path} is not the beginning of these trials: {'; '.join(wrong)}; give another run, "
            "or leave --warm-up out to train it"
        )
