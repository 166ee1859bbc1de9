"""The folder of a run: everything it needs to go on, and everything it leaves.

Layout::

    STORAGE/NAME/
        config.yaml        the resolved config, as the run was started with
        model.json         what a prediction needs besides the weights: classes, scaling, recipe, network
        environment.json   versions, platform, GPUs, commit, command line of the newest start (logs/ has older ones)
        metrics.jsonl      one record a line (mpscl_ray.runs.metrics_log): global_step, phase, iteration and tags of
                           mpscl_ray.runs.progress
        status.json        state (running, finished, failed, interrupted), exit_code, reason, resume_command, phase,
                           iteration, global_step, pid, updated
        progress.png       curves of the run so far
        features.jsonl     angles to the prototypes at each validation (mpscl_ray.train.feature_log)
        pseudo_labels/     a few target slices with their pseudo-labels at each validation
        checkpoints/       step-NNNNNNN, the newest few (mpscl_ray.runs.checkpoint)
        phases/NAME/       the checkpoint at the end of each phase
        best/              the checkpoint with the best validation score
        results/           tables of the evaluation
        tensorboard/       event files
        logs/              text of each worker, older environments
        .lock              held while a process runs the run; names its pid

One process writes at a time (:meth:`RunFolder.lock`); any number read. Files that are replaced are replaced as a whole.

A run whose storage is a bucket is a :class:`mpscl_ray.runs.bucket_run.BucketRun`, which has all this in a folder of the
node and keeps the bucket up to date; the methods under "where it really is" have nothing to do here and much there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import yaml

from mpscl_ray.errors import ConfigError, DataError, StorageError
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically
from mpscl_ray.runs.checkpoint import list_checkpoints
from mpscl_ray.runs.environment import environment, now
from mpscl_ray.runs.lock import hold_run, hold_training, holder
from mpscl_ray.runs.metrics_log import MetricsLog

State = Literal["running", "finished", "failed", "interrupted"]

_ABSENT = object()

STOP_FILE = "stop-requested"
"""Name of the file in the run folder that asks the workers to write a checkpoint and end."""

FAILURE_FILE = "failure.json"
"""Name of the file in the run folder in which a worker leaves an error that no restart will mend."""

NOTICES_FILE = "notices.log"
"""Name of the file in the run's logs that has, a line each, what the user should see of workers."""

PLACE_FILE = ".placement-group"
"""Name of the file in the run folder that names the placement group of the workers, while they have one."""

COMMANDS_FILE = ".commands"
"""Name of the file in the folder of a command with the session and the job, a line each, of the command that runs and
of those that were killed before it."""

DECIDED_FILE = ".decided"
"""Name of the file, in the folder of a run that may be stopped for falling behind others, with the global step up to
which that was decided, and ``stop`` behind it where the run is to end there. Where it is, training waits for it after
each validation."""

LOSSES_FILE = "losses.log"
"""The same of workers that were lost, written on the node of the command."""

PARTS = ("checkpoints", "phases", "results", "tensorboard", "logs")
"""Folders that every run has."""


class RunFolder:
    """A run's folder by its path ``storage/name``. Making the object touches no file."""

    look_s = 0.0
    """Seconds that should lie between two looks for what other processes leave."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.config_file = path / "config.yaml"
        self.model_file = path / "model.json"
        self.environment_file = path / "environment.json"
        self.status_file = path / "status.json"
        self.progress_image = path / "progress.png"
        self.checkpoints = path / "checkpoints"
        self.phases = path / "phases"
        self.best = path / "best"
        self.results = path / "results"
        self.tensorboard = path / "tensorboard"
        self.logs = path / "logs"
        self.metrics_file = path / "metrics.jsonl"
        self._metrics = MetricsLog(self.metrics_file)

    @property
    def exists(self) -> bool:
        """Whether a run was started here before."""
        return self.config_file.is_file()

    def create(self, parts: Collection[str] = PARTS) -> None:
        """Make the folder and its parts, and try that it can be written.

        Raises:
            StorageError: A file is in the way, or there is no permission or no space.
        """
        with storage_errors(self.path):
            for part in parts:
                (self.path / part).mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            try:
                probe.write_bytes(b"written")
            finally:
                probe.unlink(missing_ok=True)

    def require(self) -> None:
        """For commands that read a run.

        Raises:
            ConfigError: There is no run here; names the runs that are beside it.
        """
        if self.exists:
            return
        beside = self._beside()
        hint = f"; runs beside it: {', '.join(beside)}" if beside else ""
        raise ConfigError(f"{self.place} is not the folder of a run: it has no config.yaml{hint}")

    def _beside(self) -> list[str]:
        return sorted(file.parent.name for file in self.path.parent.glob("*/config.yaml"))

    # ---- where it really is ----

    @property
    def place(self) -> str:
        """Where users find the run."""
        return str(self.path)

    @property
    def address(self) -> str:
        """Where other processes and nodes find the run."""
        return str(self.path.absolute())

    @property
    def token(self) -> str:
        """Proves to the bucket that a worker belongs to the command that holds the run."""
        return ""

    @property
    def problem(self) -> Exception | None:
        """Why what is written here does not get to its place any more, so that the run should stop."""
        return None

    def settle(self) -> None:
        """Wait until all that was written so far is in its place, unless its storage fails."""

    def publish(self, path: Path) -> None:
        """Put a file, a checkpoint or a folder of files, which was written into the run's folder, in its place."""

    def fetched(self, path: Path) -> Path:
        """A checkpoint, given by its path or by the way from the run's folder, where it can be read."""
        return path if path.is_relative_to(self.path) else self.path / path

    def relative(self, path: Path) -> Path:
        """The way from the run's folder to a path in it; another path stays as it is."""
        return path.relative_to(self.path) if path.is_relative_to(self.path) else path

    def fetch_newest(self) -> None:
        """Make the newest intact checkpoint readable, and newer damaged ones."""

    def checkpoint_names(self) -> list[str]:
        """What there is to go on from or to predict with: steps, oldest first, phases, and ``best``."""
        return [*self.steps(), *self.finished_phases(), *(["best"] if self.best.is_dir() else [])]

    def steps(self) -> list[str]:
        """Names of the checkpoints to go on from, oldest first."""
        return [path.name for path in list_checkpoints(self.checkpoints)]

    def finished_phases(self) -> list[str]:
        """Names of the phases whose end is kept."""
        return sorted(path.name for path in self.phases.glob("[!.]*") if path.is_dir())

    def discard_weights(self) -> None:
        """Remove all checkpoints; settings, metrics and results stay."""
        for part in (self.checkpoints, self.phases, self.best):
            shutil.rmtree(part, ignore_errors=True)

    # ---- small files by which processes on any nodes tell each other something, whoever holds the run ----

    def leave(self, name: str, text: str) -> None:
        """Make or replace a file. Raises StorageError."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, text.encode())

    def left(self, name: str) -> str | None:
        """What is in a file now; None where there is none. Raises StorageError."""
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot read {self.path / name}: {error.strerror}") from error

    def take_away(self, name: str) -> None:
        """Remove a file, if there is one. Raises StorageError."""
        with storage_errors(self.path / name):
            (self.path / name).unlink(missing_ok=True)

    def add_notice(self, text: str, file: str = NOTICES_FILE) -> None:
        """Leave a sentence in the logs for the terminal of the command that runs the training."""
        with (self.logs / file).open("a", encoding="utf-8") as stream:
            stream.write(" ".join(text.split()) + "\n")

    # ---- workers ----

    def prepare_worker(self) -> None:
        """Make ready for a worker to read and write in; the command has made the folder before."""

    @contextmanager
    def training(self, token: str, rank: int) -> Iterator[None]:
        """What a worker trains in; worker 0 alone writes checkpoints, metrics and TensorBoard events there.

        Args:
            token: of the command that started the worker.
            rank: number of the worker.

        Raises:
            ClusterError: another worker goes on holding it.
        """
        with hold_training(self.path) if rank == 0 else nullcontext():
            yield

    # ---- one writer ----

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. The system gives the lock up when the process ends, however it ends.

        Raises:
            ConfigError: Another process of this host holds it; names its pid.
            StorageError: The lock file cannot be written.
        """
        with hold_run(self.path):
            self._remove_leftovers()
            yield

    def _remove_leftovers(self) -> None:
        """Files that a killed process was writing aside."""
        for file in self.path.glob(".*.partial-*"):
            if file.is_file():
                file.unlink(missing_ok=True)

    # ---- what is written once ----

    def write_config(self, text: str) -> None:
        """Keep the resolved config as YAML."""
        write_atomically(self.config_file, text.encode())

    def read_config(self) -> str:
        """Text of config.yaml. Raises ConfigError where there is no run."""
        self.require()
        try:
            return self.config_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {self.config_file}: {error}") from error

    def check_config(self, text: str, may_change: Collection[str] = ()) -> list[str]:
        """Compare the config of a resumed run with the one it was started with.

        Args:
            text: The resolved config now, as YAML.
            may_change: Dotted keys that may differ; ``scaling`` covers ``scaling.workers`` too.

        Returns:
            A sentence for each key of ``may_change`` that did change.

        Raises:
            ConfigError: Lists every other key that differs, with both values.
        """
        stored = _flatten(self._parse(self.read_config()))
        given = _flatten(self._parse(text))
        changed: list[str] = []
        refused: list[str] = []
        for key in sorted(stored.keys() | given.keys()):
            before, after = stored.get(key, _ABSENT), given.get(key, _ABSENT)
            if before == after:
                continue
            allowed = any(key == other or key.startswith(f"{other}.") for other in may_change)
            sentence = f"{key}: {_spell(before)} in the run, {_spell(after)} now"
            (changed if allowed else refused).append(sentence)
        if refused:
            may = f" (only these may change: {', '.join(sorted(may_change))})" if may_change else ""
            raise ConfigError(
                f"the run {self.name} was started with another config: {'; '.join(refused)}; set "
                f"{'it' if len(refused) == 1 else 'them'} back to go on, or give another run.name to start anew{may}"
            )
        return changed

    def _parse(self, text: str) -> Any:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise DataError(f"{self.config_file} is damaged, it does not read as YAML: {error}") from error

    def write_model(self, model: Mapping[str, Any]) -> None:
        """Keep what a prediction needs besides the weights, as JSON."""
        write_atomically(self.model_file, (json.dumps(model, indent=1, allow_nan=False) + "\n").encode())

    def read_model(self) -> dict[str, Any]:
        """Raises DataError where model.json is missing or damaged."""
        return _read_json(self.model_file)

    def write_environment(self, command: list[str] | None = None) -> None:
        """Keep what the run runs on; what an earlier start wrote moves to ``logs/environment-<its time>.json``."""
        with storage_errors(self.environment_file):
            if self.environment_file.exists():
                stamp = re.sub(r"\D", "", str(_lenient(self.environment_file).get("started", "")))[:14] or "earlier"
                os.replace(self.environment_file, self.logs / f"environment-{stamp}.json")
        write_atomically(self.environment_file, (json.dumps(environment(command), indent=1) + "\n").encode())

    # ---- status ----

    def write_status(
        self,
        state: State,
        *,
        exit_code: int | None = None,
        reason: str = "",
        resume_command: str | None = None,
        phase: str | None = None,
        iteration: int | None = None,
        global_step: int | None = None,
    ) -> None:
        """Replace status.json; of resume_command, phase, iteration and global_step, what is not given stays."""
        kept = _lenient(self.status_file)
        given = {
            "resume_command": resume_command,
            "phase": phase,
            "iteration": iteration,
            "global_step": global_step,
        }
        status = {
            "state": state,
            "exit_code": exit_code,
            "reason": reason,
            **{key: kept.get(key) if value is None else value for key, value in given.items()},
            "pid": os.getpid(),
            "updated": now(),
        }
        write_atomically(self.status_file, (json.dumps(status, indent=1) + "\n").encode())

    def read_status(self) -> dict[str, Any]:
        """status.json as it is; {} before the first. A killed run still says ``running``: see :meth:`holder`."""
        return _read_json(self.status_file) if self.status_file.exists() else {}

    def holder(self) -> int | None:
        """Pid of the process that holds the run now; None when nobody does."""
        return holder(self.path)

    # ---- metrics ----

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a record to metrics.jsonl; it is on the disk when this returns. Raises StorageError."""
        self._metrics.append(record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole records of metrics.jsonl. Raises DataError where a line other than the last is damaged."""
        return self._metrics.read()

    def rewind_metrics(self, global_step: int) -> int:
        """Drop the records after the global step that a resumed run goes on from. Returns how many were dropped."""
        return self._metrics.rewind(global_step)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing: the run was stopped before it wrote one") from error
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is damaged: it does not read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is damaged: expected a JSON object")
    return content


def _lenient(file: Path) -> dict[str, Any]:
    """Contents of a JSON file that is about to be replaced; {} where it is missing or damaged."""
    try:
        return _read_json(file)
    except (DataError, StorageError):
        return {}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _spell(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, default=str)
