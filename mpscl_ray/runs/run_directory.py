"""The directory of a run: all that it needs to resume, and all that it leaves.

Layout::

    STORAGE/NAME/
        config.yaml        the resolved config, as the run was started with
        model.json         what a prediction needs besides the weights: classes, scaling, recipe, network
        postprocessing.json  rules for label maps by the weights that they were chosen for, if they were chosen
        quality.json       what estimates the quality of label maps, by the weights that it was calibrated for
        environment.json   versions, platform, GPUs, commit, command line of the newest start (logs/ has older ones)
        metrics.jsonl      one record a line (mpscl_ray.runs.json_lines): global_step, phase, iteration and tags of
                           mpscl_ray.runs.tensorboard
        status.json        state (running, finished, failed, interrupted), exit_code, reason, resume_command; how far it
                           is (mpscl_ray.runs.position); pid, host and time of who wrote it
        progress.png       curves of the run so far
        progress.html      the same and more as a page that renews itself (mpscl_ray.runs.live_page)
        slices/            a few target slices with their predictions at each validation
        features.jsonl     angles to the prototypes at each validation (mpscl_ray.train.feature_log)
        pseudo_labels/     a few target slices with their pseudo-labels at each validation
        checkpoints/       step-NNNNNNN, the newest few (mpscl_ray.runs.checkpoint)
        phases/NAME/       the checkpoint at the end of each phase
        best/              the checkpoint with the best validation score
        results/           tables of the evaluation
        tensorboard/       event files
        trackers/          what other trackers have of the run (mpscl_ray.runs.trackers)
        logs/              log of each worker, warnings, worker failures, older environments
        .lock              held by the process that trains; names its pid

One process writes at a time (:meth:`RunDirectory.lock`); any number read. Files are replaced as a whole.

The store of a run knows where it is kept: :class:`~mpscl_ray.runs.local_store.LocalStore` on a shared file system,
:class:`~mpscl_ray.runs.bucket_store.BucketStore` in a bucket, with a copy on this node at ``path``.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import yaml

from mpscl_ray.errors import ConfigError, DataError, StorageError
from mpscl_ray.runs import safe_json, safe_yaml
from mpscl_ray.runs.atomic_files import storage_errors
from mpscl_ray.runs.bucket_store import BucketStore
from mpscl_ray.runs.config_diff import check_config_change
from mpscl_ray.runs.control_files import WARNINGS_FILE
from mpscl_ray.runs.environment import environment, now
from mpscl_ray.runs.json_lines import MetricsLog
from mpscl_ray.runs.local_store import PARTS, LocalStore
from mpscl_ray.runs.moved import with_moved_datasets, with_relative_paths
from mpscl_ray.runs.storage import S3Path, parse_location

State = Literal["running", "finished", "failed", "interrupted"]

_OF_ONE_STATE = ("state", "exit_code", "reason", "iterations_per_s", "eta_s", "pid", "host", "updated")
"""Keys of status.json that are not kept when a run changes its state."""


def open_run(
    location: RunDirectory | Path | S3Path | str,
    role: str = "reader",
    patience_s: float = 0.0,
    uploads: Sequence[str] = (),
) -> RunDirectory:
    """The directory of a run by its path or URL.

    Args:
        location: Where it is; a run directory is returned as it is.
        role: Of this process: ``command``, ``worker-N``, ``reader`` or another name. In a bucket each has its own copy.
        patience_s: How long a bucket may fail to answer.
        uploads: Patterns of files that the command writes beside those of a training.

    Raises:
        ConfigError: The URL cannot be used.
    """
    if isinstance(location, RunDirectory):
        return location
    found = parse_location(location)
    if isinstance(found, S3Path):
        store = BucketStore(found, role, patience_s, uploads)
        return RunDirectory(store.path, store)
    return RunDirectory(found)


class RunDirectory:
    """Files of a run: their paths and contents. Making the object touches no file.

    Args:
        path: ``storage/name``, or the copy of a run in a bucket.
        store: Where the run is kept; by default the path itself.
    """

    def __init__(self, path: Path, store: LocalStore | BucketStore | None = None) -> None:
        self.path = path
        self.store = store or LocalStore(path)
        """Access of processes on all nodes: locks, uploads, checkpoints that exist."""
        self.control_files = self.store.control_files
        """Files by which processes signal each other (:mod:`mpscl_ray.runs.control_files`)."""
        self.name = self.store.name
        self.config_file = path / "config.yaml"
        self.model_file = path / "model.json"
        self.postprocessing_file = path / "postprocessing.json"
        self.quality_file = path / "quality.json"
        self.environment_file = path / "environment.json"
        self.status_file = path / "status.json"
        self.progress_image = path / "progress.png"
        self.progress_page = path / "progress.html"
        self.slices = path / "slices"
        self.checkpoints = path / "checkpoints"
        self.phases = path / "phases"
        self.best = path / "best"
        self.results = path / "results"
        self.tensorboard = path / "tensorboard"
        self.logs = path / "logs"
        self.metrics_file = path / "metrics.jsonl"
        self._metrics = MetricsLog(self.metrics_file)

    @property
    def display_path(self) -> str:
        """Where users find the run."""
        return self.store.display_path

    @property
    def uri(self) -> str:
        """Where other processes and nodes find the run."""
        return self.store.uri

    @property
    def exists(self) -> bool:
        """Whether a run was started here before."""
        return self.store.has(self.config_file)

    def create(self, parts: Collection[str] = PARTS) -> None:
        """Make the directory and its parts. Raises StorageError where it cannot be written."""
        self.store.create(parts)

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run for this process while the block runs. Raises ConfigError where another process holds it."""
        return self.store.lock()

    def require(self) -> None:
        """For commands that read a run.

        Raises:
            ConfigError: There is no run here; names the runs in the same directory.
        """
        if self.exists:
            return
        neighbours = self.store.neighbours()
        hint = f"; runs beside it: {', '.join(neighbours)}" if neighbours else ""
        if isinstance(self.store, LocalStore) and not self.path.exists():
            raise ConfigError(f"{self.display_path}: no such folder, expected that of a run{hint}")
        raise ConfigError(f"{self.display_path} is not the folder of a run: it has no config.yaml{hint}")

    def relative_to_run(self, path: Path) -> Path:
        """A path in the run relative to it; another path stays as it is."""
        return path.relative_to(self.path) if path.is_relative_to(self.path) else path

    def add_warning(self, text: str, file: str = WARNINGS_FILE) -> None:
        """Append a sentence to a file in the logs, which the command that trains prints."""
        with (self.logs / file).open("a", encoding="utf-8") as stream:
            stream.write(" ".join(text.split()) + "\n")

    # ---- config, model, environment ----

    def write_config(self, text: str) -> None:
        """Keep the resolved config as YAML."""
        self.store.write(self.config_file, text.encode())

    def read_config(self) -> str:
        """Text of config.yaml. Raises ConfigError where there is no run."""
        self.require()
        try:
            return safe_yaml.read_text(self.config_file)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {self.config_file}: {error}") from error

    def check_config(
        self,
        text: str,
        may_change: Collection[str] = (),
        option: str = "",
        defaults: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Compare a resolved config, as YAML, with the one of this run (:func:`check_config_change`)."""
        stored, given = self._parse(self.read_config()), self._parse(text)
        return check_config_change(self.name, stored, given, may_change, option, defaults)

    def _parse(self, text: str) -> dict[str, Any]:
        try:
            content = safe_yaml.load(text)
        except yaml.YAMLError as error:
            raise DataError(f"{self.config_file} is damaged, it does not read as YAML: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{self.config_file} is damaged: expected a mapping of settings")
        return content

    def write_model(self, model: Mapping[str, Any]) -> None:
        """Keep what a prediction needs besides the weights, as JSON."""
        on_disk = isinstance(self.store, LocalStore)
        self.store.write(self.model_file, _json(with_relative_paths(model, self.path) if on_disk else model))

    def read_model(self) -> dict[str, Any]:
        """Raises DataError where model.json is missing or damaged. Datasets may have moved together with the run."""
        model = safe_json.read_object(self.model_file)
        return with_moved_datasets(model, self.path) if isinstance(self.store, LocalStore) else model

    def add_of_weights(self, file: Path, weights_sha256: str, entry: Mapping[str, Any]) -> None:
        """Keep what was found for some weights: in the file of the postprocessing, or of the quality."""
        self.store.refresh(file)
        self.store.write(file, _json(_lenient(file) | {weights_sha256: entry}))

    def read_of_weights(self, file: Path) -> dict[str, Any]:
        """Entries of such a file by the SHA-256 of the weights; {} without one. Raises DataError for a damaged file."""
        return safe_json.read_object(file) if self.store.has(file) else {}

    def write_environment(self, command: list[str] | None = None) -> None:
        """Keep versions and platform; what an earlier start wrote moves to ``logs/environment-<its time>.json``."""
        with storage_errors(self.environment_file):
            if self.environment_file.exists():
                stamp = re.sub(r"\D", "", str(_lenient(self.environment_file).get("started", "")))[:14] or "earlier"
                os.replace(self.environment_file, self.logs / f"environment-{stamp}.json")
        self.store.write(self.environment_file, _json(environment(command)))

    # ---- status and metrics ----

    def write_status(
        self,
        state: State,
        *,
        exit_code: int | None = None,
        reason: str = "",
        resume_command: str | None = None,
        **position: Any,
    ) -> None:
        """Replace status.json; resume_command and position (:mod:`mpscl_ray.runs.position`) stay unless given."""
        before = _lenient(self.status_file)
        kept = {key: value for key, value in before.items() if key not in _OF_ONE_STATE}
        kept["resume_command"] = kept.get("resume_command") if resume_command is None else resume_command
        status = {"state": state, "exit_code": exit_code, "reason": reason, **kept, **position}
        self.store.write(self.status_file, _json(status | _writer()))

    def update_status(self, **position: Any) -> None:
        """Replace the position in status.json; its state stays. Only the process that holds the run may call it."""
        self.store.write(self.status_file, _json(_lenient(self.status_file) | position | _writer()))

    def read_status(self) -> dict[str, Any]:
        """status.json, or {}. A killed run still says ``running``: its store's ``lock_owner()`` is None then."""
        file = self.store.refresh(self.status_file)
        return safe_json.read_object(file) if file.exists() else {}

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a record to metrics.jsonl; it is on the disk when this returns. Raises StorageError."""
        self._metrics.append(record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole records of metrics.jsonl. Raises DataError where a line other than the last is damaged."""
        self.store.refresh(self.metrics_file)
        return self._metrics.read()

    def rewind_metrics(self, global_step: int, phase: str | None = None) -> None:
        """Drop the records after the global step that the run resumes from, and those at it of another phase, if given.

        A phase can have a record of its start, at the global step at which the phase before ended.
        """
        self._metrics.rewind(global_step, phase)


def _writer() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": platform.node(), "updated": now()}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _lenient(file: Path) -> dict[str, Any]:
    """Contents of a JSON file that is about to be replaced; {} where it is missing or damaged."""
    try:
        return safe_json.read_object(file)
    except (DataError, StorageError):
        return {}
