"""From a config to a finished training on Ray: open the data, check what is asked, run the workers, watch them.

The same launch serves the train command and a search trial. Ray must be connected (``cluster_session.connect``).
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback

from mpscl_ray import __version__
from mpscl_ray.config import Config, to_dict
from mpscl_ray.data import SOURCE_DOMAIN, TARGET_DOMAIN
from mpscl_ray.data.agreement import check_pair
from mpscl_ray.data.pipeline import open_slices
from mpscl_ray.data.schema import Manifest, load_manifest
from mpscl_ray.data.stream import Slices
from mpscl_ray.errors import ClusterError, ConfigError, DataError, MpsclError, StorageError, TrainingError
from mpscl_ray.run_folder import RunFolder
from mpscl_ray.training import Outcome, TrainingData, network_arguments
from mpscl_ray.worker import FAILURE_FILE, STOP_FILE, WorkerTask, run_worker

FAILURES_LOG = "failures.log"
"""Name of the file in the run's logs that has a line for each time workers were lost."""

_POLL_S = 0.5

_FINAL: dict[int, type[MpsclError]] = {
    kind.exit_code: kind for kind in (ConfigError, DataError, ClusterError, StorageError, TrainingError)
}


@dataclass(frozen=True)
class Domains:
    """The manifests of the two datasets of a run; ``source`` is the target's too where only that one is trained on."""

    source: Manifest
    target: Manifest
    source_folder: Path
    target_folder: Path

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, background first."""
        return self.source.classes


def load_domains(config: Config) -> tuple[Domains, list[str]]:
    """Read both manifests and check that they go together.

    Returns:
        The domains, and a sentence for each thing that deserves a warning.

    Raises:
        ConfigError: data.source or data.target is not set.
        DataError: a dataset is missing, damaged, or does not fit the other one.
    """
    for key, value in (("data.source", config.data.source), ("data.target", config.data.target)):
        if not value:
            raise ConfigError(
                f"{key} is not set: give the folder of a prepared dataset ({key}=FOLDER); "
                "python -m mpscl_ray.prepare --help tells how to make one"
            )
    source_folder, target_folder = Path(config.data.source).absolute(), Path(config.data.target).absolute()
    domains = Domains(load_manifest(source_folder), load_manifest(target_folder), source_folder, target_folder)
    return domains, check_pair(domains.source, domains.target)


def model_description(config: Config, domains: Domains) -> dict[str, Any]:
    """What evaluation and prediction need beside the weights, for model.json."""

    def domain(manifest: Manifest, folder: Path) -> dict[str, Any]:
        return {
            "modality": manifest.modality,
            "scaling": {"low": manifest.scaling.low, "high": manifest.scaling.high},
            "recipe": manifest.recipe,
            "labels": manifest.labels,
            "dataset": str(folder),
            "fingerprint": manifest.fingerprint,
        }

    return {
        "version": __version__,
        "classes": list(domains.classes),
        "size": list(domains.source.size),
        "network": network_arguments(config, len(domains.classes)),
        "source": domain(domains.source, domains.source_folder),
        "target": domain(domains.target, domains.target_folder),
        "phases": [name for name, _ in config.schedule],
        "labelled": config.data.labelled,
    }


def open_data(config: Config, domains: Domains) -> TrainingData:
    """Open the slices that a run reads; those that fit are read into shared memory now, checksums verified."""

    def opened(folder: Path, split: str, labels: bool) -> Slices:
        return open_slices(folder, split, labels=labels, in_memory=config.data.in_memory)

    supervised = config.data.labelled == "target"
    labelled = opened(domains.target_folder if supervised else domains.source_folder, "train", True)
    adapts = any(name not in ("source_only", "supervised") for name, _ in config.schedule)
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
        labelled=labelled,
        unlabelled=opened(domains.target_folder, "train", False) if adapts else None,
        validation=validation,
    )


def check_machine(config: Config) -> None:
    """Refuse, before Ray starts, what this machine cannot give to a run of its own.

    Raises:
        ClusterError: with the numbers, where more CPUs are asked for than there are.
    """
    have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    need = config.scaling.workers * config.scaling.cpus_per_worker
    if need > have and not os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
        raise ClusterError(
            f"{config.scaling.workers} workers with {config.scaling.cpus_per_worker:g} CPUs each need {need:g} CPUs and "
            f"this machine has {have}; ask for fewer with scaling.workers={max(1, int(have / config.scaling.cpus_per_worker))}, "
            "or set RAY_ADDRESS to a larger cluster"
        )


def check_cluster(config: Config) -> bool:
    """Compare what a run asks for with what the cluster has, so that nobody waits for what will never come.

    Returns:
        Whether workers get a GPU each.

    Raises:
        ClusterError: with the numbers, where the cluster is too small or too busy and stays so for
            ``scaling.wait_s`` seconds.
    """
    deadline = time.monotonic() + config.scaling.wait_s
    while True:
        total, free = ray.cluster_resources(), ray.available_resources()
        gpus = total.get("GPU", 0.0)
        use_gpu = config.scaling.device == "gpu" or (config.scaling.device == "auto" and gpus > 0)
        need = {"CPU": config.scaling.workers * config.scaling.cpus_per_worker}
        if use_gpu:
            need["GPU"] = config.scaling.workers
        lacking = [name for name, amount in need.items() if amount > total.get(name, 0.0)]
        busy = [name for name, amount in need.items() if amount > free.get(name, 0.0)]
        if not busy:
            return use_gpu
        if time.monotonic() >= deadline:
            break
        time.sleep(_POLL_S)
    asked = " and ".join(f"{amount:g} {name}s" for name, amount in need.items())
    has = " and ".join(f"{total.get(name, 0.0):g} {name}s ({free.get(name, 0.0):g} free)" for name in need)
    fits = min(math.floor(free.get(name, 0.0) / (amount / config.scaling.workers)) for name, amount in need.items())
    offers = [f"scaling.workers={fits}"] if fits >= 1 else []
    offers += ["scaling.device=cpu"] if "GPU" in lacking else []
    offers += ["scaling.wait_s=SECONDS to wait for more"]
    raise ClusterError(
        f"{config.scaling.workers} workers need {asked}, and the cluster has {has}; use {', or '.join(offers)}"
    )


class _FailuresToFile(UserCallback):  # type: ignore[misc]
    """Writes a line for each time that workers were lost; runs in the controller of Ray Train."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with self.file.open("a", encoding="utf-8") as stream:
            for rank, error in sorted(worker_exceptions.items()):
                text = str(error).strip().splitlines() or [type(error).__name__]
                stream.write(f"{stamp} worker {rank} was lost: {text[-1][:300]}\n")


class Launch:
    """One training on Ray: started by :meth:`start`, ended when :attr:`running` is False.

    ``fit`` runs in a thread, so that the main thread stays free for signals and for showing how far the run is.
    """

    def __init__(self, config: Config, folder: RunFolder, data: TrainingData, use_gpu: bool) -> None:
        self.config, self.folder = config, folder
        self._result: Any = None
        self._error: BaseException | None = None
        for name in (STOP_FILE, FAILURE_FILE):
            (folder.path / name).unlink(missing_ok=True)
        resources = {"CPU": config.scaling.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
        # The name is new each time: going on from a checkpoint is our own business, and Ray's idea of it would get in the way.
        launch = f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self._trainer = ray.train.torch.TorchTrainer(
            run_worker,
            train_loop_config=WorkerTask(to_dict(config), str(folder.path.absolute()), data),  # type: ignore[arg-type]
            scaling_config=ScalingConfig(
                num_workers=config.scaling.workers, use_gpu=use_gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=launch,
                storage_path=str((folder.path / "ray").absolute()),
                failure_config=FailureConfig(max_failures=config.run.restarts),
                callbacks=[_FailuresToFile(folder.logs.absolute() / FAILURES_LOG)],
            ),
        )
        self._thread = threading.Thread(target=self._fit, name="ray train", daemon=True)

    def start(self) -> None:
        """Start the workers; returns at once."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether training goes on."""
        return self._thread.is_alive()

    def request_stop(self) -> None:
        """Ask the workers to write a checkpoint and end."""
        (self.folder.path / STOP_FILE).touch()

    def watch(self, look: Callable[[], None]) -> Outcome:
        """Call ``look`` twice a second until training ends, and return how it did.

        Raises:
            MpsclError: what a worker could not go on with, as it raised it.
            TrainingError: workers were lost more often than run.restarts allows.
        """
        while self.running:
            look()
            self._thread.join(_POLL_S)
        look()
        (self.folder.path / STOP_FILE).unlink(missing_ok=True)
        if self._error is not None:
            raise self._explained(self._error)
        outcome = self._result.return_value
        if outcome["state"] == "failed":
            raise _FINAL.get(outcome["exit_code"], TrainingError)(outcome["reason"])
        return Outcome(**outcome)

    def _fit(self) -> None:
        try:
            self._result = self._trainer.fit()
        except BaseException as error:  # noqa: BLE001 - raised again by watch(), in the main thread
            self._error = error

    def _explained(self, error: BaseException) -> BaseException:
        """The error of a worker as a sentence; what it left in the run folder comes first."""
        failure = self.folder.path / FAILURE_FILE
        if failure.exists():
            content = json.loads(failure.read_text(encoding="utf-8"))
            return _FINAL.get(content["exit_code"], TrainingError)(content["reason"])
        if isinstance(error, ray.train.WorkerGroupError):
            workers = "; ".join(
                f"worker {rank}: {(str(cause).strip().splitlines() or [type(cause).__name__])[-1][:300]}"
                for rank, cause in sorted(error.worker_failures.items())
            )
            return TrainingError(
                f"workers were lost {self.config.run.restarts + 1} times, which is once more than run.restarts allows "
                f"({workers}); see {self.folder.logs} for each worker's log"
            )
        return error
