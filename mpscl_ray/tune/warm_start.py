"""What comes before the first trial: the criterion that trials are compared by, and the phases that they share."""

from __future__ import annotations

from collections.abc import Sequence

from mpscl_ray.config import ADAPTATION, SOURCE_ONLY, WARM_UP, Config, config_from_dict, differences, override
from mpscl_ray.config.systems import acts_on, phase_fingerprint
from mpscl_ray.config.titles import phase_title
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import safe_yaml
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.signals import Interruption
from mpscl_ray.runs.storage import join_location
from mpscl_ray.train.domains import Domains, model_description
from mpscl_ray.train.ray import launch
from mpscl_ray.train.ray.concurrent import Shared, run_trial
from mpscl_ray.train.ray.trials import StopFile
from mpscl_ray.tune.criteria import LABEL_FREE, ORACLE, WITHOUT_SOURCE
from mpscl_ray.tune.space import NO_RESULT
from mpscl_ray.tune.study import Study

SHARED_RUN = "shared"
"""Name of the run in the folder of a search that trains the phases that all trials share."""


def choose_metric(metric: str, domains: Domains) -> str:
    """What trials are compared by on these datasets.

    Raises:
        ConfigError: the target or the source lacks the validation volumes or labels that the criterion needs.
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
    if metric.startswith(("source_dice", "class_ratio", "adjacency")) and not source_labelled:
        raise ConfigError(
            f"search.metric={metric} needs labelled validation cases of the source {domains.source_folder}; prepare it "
            f"with some, or use search.metric={WITHOUT_SOURCE}"
        )
    return metric


def train_shared_phases(
    study: Study, given: RunDirectory | None, places: int, interruption: Interruption
) -> RunDirectory | None:
    """Train the phases that all trials share, or check that the given run has them.

    Args:
        study: of the search.
        given: the run that trials are to be forked from; None to train one.
        places: how many trials fit at once; their workers train one.
        interruption: ends the training after a checkpoint.

    Returns:
        The run that trials are forked from; None where they share nothing, or where it was interrupted.

    Raises:
        ConfigError: the given run does not fit.
        MpsclError: as training raises it.
    """
    config, keys, folder = study.resolved, study.space.keys, study.folder
    common = [name for name, _ in study.shared_phases]
    if not common:
        if given is not None:
            first = phase_fingerprint(config, config.schedule[0][0])
            acting = ", ".join(key for key in keys if acts_on(key, first))
            raise ConfigError(
                f"--warm-up {given.display_path}: trials share no phase, because {acting} acts in the first one; leave "
                "--warm-up out"
            )
        return None
    if given is not None:
        _check_given(given, config, common, keys, study.shared)
        return given
    run = open_run(join_location(folder.uri, SHARED_RUN), "command", 60 * config.run.storage_retry_minutes)
    seen, stop_file = 0, StopFile(folder)

    def poll(training: launch.Launch) -> None:
        nonlocal seen
        stop_file.look(interruption)
        if interruption.requested:
            training.request_stop()
        for record in run.read_metrics():
            if record["global_step"] > seen:
                seen = record["global_step"]
                phase = phase_title(record["phase"])
                study.log(f"shared by all trials: {phase} {record['iteration']} of {record['iterations']}")

    own = _shared_config(config, common, folder, places)
    outcome = run_trial(own, run, study.shared, poll, display_name=f"{folder.name}-{SHARED_RUN}")
    return run if outcome.state == "finished" else None


def _shared_config(config: Config, common: Sequence[str], folder: RunDirectory, at_once: int) -> Config:
    """Settings of the shared run, with as many workers as there is room for and as divide the batch."""
    room = at_once * config.scaling.most_workers
    workers = next(number for number in range(room, 0, -1) if config.suits(number))
    left_out = {f"phases.{name}": 0 for name in (SOURCE_ONLY, WARM_UP, ADAPTATION) if name not in common}
    where = {"run.name": SHARED_RUN, "run.storage": folder.display_path, "scaling.num_workers": workers}
    return override(config, {**left_out, **where})


def _check_given(run: RunDirectory, config: Config, common: Sequence[str], keys: Sequence[str], shared: Shared) -> None:
    """Check that a run has trained the common phases as these trials would have."""
    run.require()
    if common[-1] not in run.store.finished_phases():
        raise ConfigError(
            f"--warm-up {run.display_path} has not finished the phase {common[-1]}, at whose end trials are forked"
        )
    theirs = config_from_dict(safe_yaml.load(run.read_config()), f"of the run {run.name}")
    deciding = phase_fingerprint(config, common[-1])
    wrong = [
        f"{key} is {one} there and {other} here"
        for key, (one, other) in differences(theirs, config).items()
        if (key == "run.seed" or not key.startswith(NO_RESULT)) and acts_on(key, deciding) and key not in keys
    ]
    model, own = run.read_model(), model_description(config, shared.domains)
    for domain in ("source", "target"):
        if model[domain]["fingerprint"] != own[domain]["fingerprint"]:
            wrong.append(f"the {domain} dataset is another one")
    if wrong:
        raise ConfigError(
            f"--warm-up {run.display_path} does not have the phases that these trials share: {'; '.join(wrong)}; give "
            "another run, or leave --warm-up out to train them"
        )
