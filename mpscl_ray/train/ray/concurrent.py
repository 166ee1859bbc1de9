"""One of many trainings side by side: the same launch as the train command's, on data that all of them share.

The command that runs them opens the data once (:func:`open_shared`), before it starts any. Each training then has a
run folder of its own, and :func:`run_trial` may be called in any process of the cluster, such as a task or an actor
that holds no CPU itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from mpscl_ray.config import Config, to_yaml
from mpscl_ray.distributed.ray_session import keep_account, keeps_account
from mpscl_ray.errors import MpsclError, NoRoom, StorageError, TrainingError
from mpscl_ray.runs.lifecycle import record_failure
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.loop import Outcome
from mpscl_ray.train.ray import launch, resources
from mpscl_ray.train.ray.placement_groups import release
from mpscl_ray.train.ray.preflight import check_nodes
from mpscl_ray.train.streams import TrainingData

_LOOK_S = 0.5


@dataclass(frozen=True)
class Shared:
    """What trainings side by side share. Travels to other processes as references.

    Attributes:
        domains: manifests of both datasets.
        data: slices, opened by the process that runs the trainings; valid as long as that process lives.
        use_gpu: whether each worker gets a GPU.
        at_once: how many trainings the cluster has room for at a time.
        account: whether Ray's dashboard is told of the trainings.
        fit: what trains; None is Ray Train.
    """

    domains: launch.Domains
    data: TrainingData
    use_gpu: bool
    at_once: int
    account: bool
    fit: launch.Fit | None = None


def open_shared(config: Config, folder: RunDirectory, fit: launch.Fit | None = None) -> tuple[Shared, list[str]]:
    """Open the data of trainings that differ in settings which do not decide on what is read.

    Args:
        config: of any of them; its datasets are folders already (:mod:`mpscl_ray.prepare.phantom_dataset`).
        folder: of the command, which is there already; the runs will be below it.
        fit: what trains; None is Ray Train.

    Returns:
        What the trainings share, and a sentence for each thing that deserves a warning.

    Raises:
        ConfigError, DataError: the datasets are missing, damaged, or do not go together.
        ClusterError: the cluster has no room for even one of them.
        StorageError: a node cannot write where the runs will be; names it.
    """
    use_gpu = resources.check_cluster(config)
    domains, warnings = launch.load_domains(config)
    check_nodes(folder.uri, domains.fingerprints())
    data = launch.open_data(config, domains)
    at_once = resources.trainings_at_once(config, use_gpu)
    return Shared(domains, data, use_gpu, at_once, keeps_account(), fit), warnings


def run_trial(
    config: Config,
    folder: RunDirectory,
    shared: Shared,
    look: Callable[[launch.Launch], None] = lambda training: None,
    *,
    display_name: str | None = None,
    resume_command: str | None = None,
) -> Outcome:
    """Train in a run folder, from its newest checkpoint if it has one; a run that is finished is left as it is.

    A training that loses its place, with a node or to a training beside it, waits for another one as long as the
    cluster is large enough, and for ``scaling.wait_s`` where it is not.

    The folder's status.json tells how it went, also where this raises. Nothing of the training is left when this
    returns: no worker, no reserved place. Where this process is killed meanwhile,
    :func:`~mpscl_ray.train.ray.placement_groups.release` does the rest.

    Args:
        config: settings of this training.
        folder: its run folder; may have been forked from another run (:mod:`mpscl_ray.runs.fork`).
        shared: of :func:`open_shared`.
        look: called several times a second while it trains; ``training.request_stop()`` ends it after a checkpoint.
        display_name: name in metrics and in Ray's account of trainings; None is the folder's.
        resume_command: what to give to go on, for status.json.

    Returns:
        The outcome: finished or interrupted.

    Raises:
        NoRoom: the cluster has become too small.
        TrainingError: a loss was not finite, or workers were lost more often than run.restarts allows.
        MpsclError: whatever else it could not go on with.
    """
    folder.create()
    with folder.lock():
        release(folder)
        status = folder.read_status()
        if status.get("state") == "finished":
            return Outcome("finished", status["phase"], status["iteration"], status["global_step"])
        folder.write_config(to_yaml(config))
        folder.write_environment()
        folder.write_model(launch.model_description(config, shared.domains))
        folder.write_status("running", resume_command=resume_command)
        if shared.account:
            keep_account()
        try:
            with record_failure(folder):
                outcome = _train(config, folder, shared, look, display_name)
                if outcome.state == "non_finite":
                    raise TrainingError(_non_finite(outcome))
        finally:
            with suppress(StorageError):  # then the end of the lock, or the next start, does it
                release(folder)
        finished = outcome.state == "finished"
        folder.write_status(
            "finished" if finished else "interrupted",
            exit_code=0 if finished else 130,
            reason="" if finished else "stopped from outside",
            phase=outcome.phase,
            iteration=outcome.iteration,
            global_step=outcome.step,
        )
        return outcome


def _train(
    config: Config,
    folder: RunDirectory,
    shared: Shared,
    look: Callable[[launch.Launch], None],
    display_name: str | None,
) -> Outcome:
    """Train to the end, however often the place has to be found anew."""
    in_vain = 0
    while True:
        training = launch.Launch(config, folder, shared.data, shared.use_gpu, display_name=display_name, fit=shared.fit)
        training.start()
        try:
            return _watch(training, look)
        except NoRoom:
            release(folder)
            in_vain += _has_room(config, shared)
            if in_vain > config.run.restarts or not _wait_for_room(config, shared, training, look):
                raise
        if training.stop_requested:
            last = (folder.read_metrics() or [{"phase": "", "iteration": 0, "global_step": 0}])[-1]
            return Outcome("interrupted", last["phase"], last["iteration"], last["global_step"])


def _has_room(config: Config, shared: Shared) -> bool:
    return resources.free_places(resources.worker_place(config, shared.use_gpu)) >= config.scaling.least_workers


def _wait_for_room(
    config: Config, shared: Shared, training: launch.Launch, look: Callable[[launch.Launch], None]
) -> bool:
    """Wait until there is room or ``look`` has asked for the end; False where the cluster is too small for it."""
    too_small_since = None
    place = resources.worker_place(config, shared.use_gpu)
    while True:
        look(training)
        if training.stop_requested or _has_room(config, shared):
            return True
        if resources.places(place) >= config.scaling.least_workers:
            too_small_since = None
        elif too_small_since is None:
            too_small_since = time.monotonic()
        elif time.monotonic() - too_small_since >= config.scaling.wait_s:
            return False
        time.sleep(_LOOK_S)


def _watch(training: launch.Launch, look: Callable[[launch.Launch], None]) -> Outcome:
    """Watch a training to its end, which comes early where ``look`` raises."""
    try:
        return training.watch(lambda: look(training))
    except BaseException:
        if training.running:
            training.request_stop()
            with suppress(MpsclError):
                training.watch(lambda: None)
        raise


def _non_finite(outcome: Outcome) -> str:
    losses = ", ".join(f"{name} {value:g}" for name, value in outcome.losses.items())
    return (
        f"a loss or gradient was not finite, seen at iteration {outcome.iteration} of the phase {outcome.phase} "
        f"({losses}); try smaller learning rates or weights"
    )
