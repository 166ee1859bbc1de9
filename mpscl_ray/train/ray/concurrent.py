"""Many trainings at the same time: each runs as the train command runs one, on data that all of them share.

The command that runs them opens the data once (:func:`open_shared`), before it starts any. Each training then has its
own run folder, and :func:`run_trial` may be called in any process of the cluster. One that has reserved
:func:`~mpscl_ray.train.ray.one_process.own_resources` trains itself where there is one worker.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from mpscl_ray.config import Config, to_yaml
from mpscl_ray.data.preflight import check_nodes
from mpscl_ray.data.ray_source import open_slices
from mpscl_ray.distributed.places import free_worker_slots, worker_slots
from mpscl_ray.distributed.ray_session import enable_state_tracking, state_tracking_enabled
from mpscl_ray.errors import InsufficientResources, MpsclError, StorageError, TrainingError
from mpscl_ray.runs.lifecycle import record_failure
from mpscl_ray.runs.position import position, training_status
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.domains import Domains, load_domains, model_description, open_data
from mpscl_ray.train.outcome import TrainResult
from mpscl_ray.train.ray import resources
from mpscl_ray.train.ray.launch import Fit, Launch
from mpscl_ray.train.ray.one_process import fit_in_this_process, trains_in_one_process
from mpscl_ray.train.ray.placement_groups import release
from mpscl_ray.train.streams import TrainingData

_POLL_INTERVAL_S = 0.5

Poll = Callable[[Launch], None]
"""Called several times a second while a training runs; ``training.request_stop()`` ends it after a checkpoint."""


@dataclass(frozen=True)
class Shared:
    """What concurrent trainings share. It travels to other processes as references."""

    domains: Domains
    """Manifests of both datasets."""
    data: TrainingData
    """Slices, opened by the process that runs the trainings; valid as long as that process lives."""
    use_gpu: bool
    """Whether each worker gets a GPU."""
    state_tracking: bool
    """Whether Ray's dashboard lists the trainings."""
    fit: Fit | None = None
    """Trains; None is Ray Train."""


def open_shared(
    config: Config, folder: RunDirectory, fit: Fit | None = None, *, pairs: int = 1
) -> tuple[Shared, list[str]]:
    """Open the data of trainings whose settings differ in nothing that decides which data is read.

    Args:
        config: of any of them; its datasets are folders already (:mod:`mpscl_ray.prepare.phantom_dataset`).
        folder: of the command, which exists already; the runs will be below it.
        pairs: number of pairs of datasets that the command opens, such as folds.

    Returns:
        What the trainings share, and warnings.

    Raises:
        ConfigError, DataError: the datasets are missing, damaged, or do not go together.
        ClusterError: the cluster has no room for even one of them.
        StorageError: a node cannot write where the runs will be; names it.
    """
    use_gpu = resources.check_cluster(config)
    domains, warnings = load_domains(config)
    check_nodes(folder.uri, domains.fingerprints())
    data = open_data(config, domains, partial(open_slices, pairs=pairs))
    return Shared(domains, data, use_gpu, state_tracking_enabled(), fit), warnings


def run_trial(
    config: Config,
    folder: RunDirectory,
    shared: Shared,
    poll: Poll = lambda training: None,
    *,
    display_name: str | None = None,
    resume_command: str | None = None,
    reserved: bool = False,
) -> TrainResult:
    """Train in a run folder, from its newest checkpoint if it has one; a finished run is left as it is.

    A training that loses its placement group, with a node or to another training, waits for a new one as long as the
    cluster is large enough, and for ``scaling.resource_timeout_s`` where it is not.

    status.json says how it ended, also where this raises. No worker and no placement group is left; if this process is
    killed, :func:`~mpscl_ray.train.ray.placement_groups.release` releases the placement group.

    Args:
        folder: the run folder of this training; may have been forked from another run (:mod:`mpscl_ray.runs.fork`).
        display_name: name in metrics and on Ray's dashboard; None is the folder's.
        resume_command: for status.json.
        reserved: whether this process has reserved :func:`~mpscl_ray.train.ray.one_process.own_resources`.

    Returns:
        The result: finished or interrupted.

    Raises:
        InsufficientResources: the cluster has become too small.
        TrainingError: a loss was not finite, or workers failed more often than run.max_failures allows.
        MpsclError: any other error that ended the training.
    """
    if reserved and shared.fit is None and trains_in_one_process(config):
        shared = dataclasses.replace(shared, fit=fit_in_this_process)
    folder.create()
    with folder.lock():
        release(folder)
        status = folder.read_status()
        if status.get("state") == "finished":
            return TrainResult("finished", status["phase"], status["iteration"], status["global_step"])
        folder.write_config(to_yaml(config))
        folder.write_environment()
        folder.write_model(model_description(config, shared.domains))
        folder.write_status("running", resume_command=resume_command)
        try:
            if shared.state_tracking:
                enable_state_tracking()
            with record_failure(folder):
                result = _train(config, folder, shared, poll, display_name)
                if result.state == "non_finite":
                    raise TrainingError(f"{result.describe_non_finite()}; try smaller learning rates or weights")
        finally:
            with suppress(StorageError):  # the next start releases it, or the end of the lock
                release(folder)
        code, reason = (130, "stopped from outside") if result.state == "interrupted" else (0, "")
        position_at_end = {"phase": result.phase, "iteration": result.iteration, "global_step": result.step}
        folder.write_status(result.state, exit_code=code, reason=reason, **position(folder) | position_at_end)
        return result


def _train(config: Config, folder: RunDirectory, shared: Shared, poll: Poll, display_name: str | None) -> TrainResult:
    """Train to the end, again after each loss of the placement group."""
    failed_with_room = 0
    status = training_status(folder, config.total_iterations)

    def poll_and_write(training: Launch) -> None:
        status.update()
        poll(training)

    while True:
        training = Launch(config, folder, shared.data, shared.use_gpu, display_name=display_name, fit=shared.fit)
        training.start()
        try:
            return _wait(training, poll_and_write)
        except InsufficientResources:
            release(folder)
            failed_with_room += _has_room(config, shared)
            if failed_with_room > config.run.max_failures or not _wait_for_room(config, shared, training, poll):
                raise
        if training.stop_requested:
            last = (folder.read_metrics() or [{"phase": "", "iteration": 0, "global_step": 0}])[-1]
            return TrainResult("interrupted", last["phase"], last["iteration"], last["global_step"])


def _has_room(config: Config, shared: Shared) -> bool:
    worker = resources.worker_request(config, shared.use_gpu)
    return free_worker_slots(worker) >= config.scaling.least_workers


def _wait_for_room(config: Config, shared: Shared, training: Launch, poll: Poll) -> bool:
    """Wait until there is room or ``poll`` has requested a stop; False where the cluster is too small for it."""
    too_small_since = None
    worker = resources.worker_request(config, shared.use_gpu)
    while True:
        poll(training)
        if training.stop_requested or _has_room(config, shared):
            return True
        if worker_slots(worker) >= config.scaling.least_workers:
            too_small_since = None
        elif too_small_since is None:
            too_small_since = time.monotonic()
        elif time.monotonic() - too_small_since >= config.scaling.resource_timeout_s:
            return False
        time.sleep(_POLL_INTERVAL_S)


def _wait(training: Launch, poll: Poll) -> TrainResult:
    """Wait for a training to end; stop it where ``poll`` raises."""
    try:
        return training.wait(lambda: poll(training))
    except BaseException:
        if training.running:
            training.request_stop()
            with suppress(MpsclError):
                training.wait(lambda: None)
        raise
