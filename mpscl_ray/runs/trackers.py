"""What a run measures, passed on to MLflow and Weights & Biases where ``run.loggers`` asks for them.

The process of a command reads metrics.jsonl of its runs and passes on what is new. So workers need neither the packages
nor a way to the servers, and one process alone writes, from the first record to the final scores, whatever happens to
the workers. A tracker that fails stops no training: it is tried again every minute, and nothing is lost meanwhile.

In the folder of the command, of which a search or a comparison has one for all its runs::

    trackers/
        NAME.json      for each tracker the id of the run NAME there, and the step up to which it has the records
        mlflow.db      the local store of MLflow, unless MLFLOW_TRACKING_URI names another
        wandb/         runs of Weights & Biases, which are offline unless WANDB_MODE says otherwise
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from mpscl_ray.errors import ConfigError, MpsclError
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.environment import now
from mpscl_ray.runs.run_directory import RunDirectory

PACKAGES = {"mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}
"""What each tracker imports; a local store of MLflow is a database of SQLite."""

TRACKERS_FOLDER = "trackers"
PROJECT = "mpscl_ray"
"""Experiment of MLflow, or project of Weights & Biases, of runs that belong to no search and no comparison."""

_EVERY_S = 5.0
"""Least time between two readings of the metrics of a run; five polls in a bucket."""
_LONGEST_SHARE = 0.05
"""Of the time, for reading the metrics of a long run."""
_AGAIN_S = 60.0
"""Time until a tracker that failed is tried again."""

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "WANDB_ERROR_REPORTING": "false",
}
"""Unless set: nothing is reported to the makers, and a server that does not answer holds up the command but shortly."""


def check_installed(loggers: Sequence[str]) -> None:
    """Raises ConfigError where a package is missing that a tracker needs; imports none."""
    for name in loggers:
        missing = [package for package in PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"run.loggers has {name}, and the package {missing[0]} is not installed: run "
                f'pip install "mpscl_ray[{name}]", or leave {name} out'
            )


class _Tracker(Protocol):
    """A run in one tracker."""

    id: str

    def record(self, global_step: int, values: Mapping[str, float]) -> None:
        """Add values."""

    def close(self, state: str, scores: Mapping[str, float]) -> None:
        """Add the scores of the whole run, and say how it ended."""


@dataclass(frozen=True)
class TrackedRun:
    """What trackers show of a run beside its metrics."""

    name: str
    group: str
    """The search or the comparison that the run belongs to; "" for one of its own."""
    settings: Mapping[str, Any]
    """By dotted key."""
    tags: Mapping[str, str]
    """Such as the method and the version."""


class Tracking:
    """Passes on the metrics of one run. Nothing is imported or written where no tracker is asked for.

    Args:
        run: directory with the metrics.
        home: directory of the command, which holds its lock; ``trackers/`` is there.
        about: what is shown beside the metrics.
        loggers: ``run.loggers``.
        warn: called with a sentence once where a tracker fails.
        clock: seconds, from any origin.
    """

    def __init__(
        self,
        run: RunDirectory,
        home: RunDirectory,
        about: TrackedRun,
        loggers: Sequence[str],
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._warn, self._clock = run, warn, clock
        folder = home.path / TRACKERS_FOLDER
        self._trackers = [_Destination(name, folder, about) for name in loggers if name in PACKAGES]
        self._next = 0.0
        self._version: tuple[int, int] | None = None
        self._lock = threading.Lock()
        """The end of a trial is reported in another thread than the one that reads metrics."""

    def update(self, at_once: bool = False) -> None:
        """Pass on what is new; called as often as one likes."""
        started = self._clock()
        if not self._trackers or (started < self._next and not at_once):
            return
        with self._lock, suppress(MpsclError):  # the run itself reports a storage that does not answer
            file = self._run.store.refresh(self._run.metrics_file)
            version = (file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None
            if version is not None and (version != self._version or any(one.failed for one in self._trackers)):
                self._version = version
                records = self._run.read_metrics()
                for tracker in self._trackers:
                    if at_once or not tracker.failed or started >= tracker.next_try:
                        self._guard(tracker, functools.partial(tracker.pass_on, records))
        ended = self._clock()
        wait = max(_EVERY_S, 5 * self._run.store.poll_interval_s, (ended - started) / _LONGEST_SHARE)
        self._next = ended + wait

    def close(self, state: str, scores: Mapping[str, float] | None = None) -> None:
        """Pass on the rest, the scores of the whole run, and how it ended. Nothing more is passed on."""
        self.update(at_once=True)
        with self._lock:
            for tracker in self._trackers:
                self._guard(tracker, functools.partial(tracker.close, state, scores or {}))
            self._trackers = []

    def _guard(self, tracker: _Destination, action: Callable[[], None]) -> None:
        known = tracker.failed
        try:
            action()
            tracker.failed = False
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training continues
            tracker.failed, tracker.next_try = True, self._clock() + _AGAIN_S
            if not known:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                self._warn(
                    f"{now()}: {tracker.name} takes no records ({reason}); training continues, metrics.jsonl has them, "
                    "and they are passed on when it takes some again"
                )


@dataclass
class _Destination:
    """One tracker, and how much of the run it has."""

    name: str
    folder: Path
    about: TrackedRun
    failed: bool = False
    next_try: float = 0.0
    _tracker: _Tracker | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._file = self.folder / f"{self.about.name}.json"
        # Another server knows nothing of the run yet.
        self._server = os.environ.get("MLFLOW_TRACKING_URI", "") if self.name == "mlflow" else ""
        self._known: dict[str, Any] = {"id": None, "server": self._server, "step": 0, "records": 0}
        known = self._read().get(self.name)
        if known is not None and known["server"] == self._server:
            self._known = known

    def pass_on(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Pass on the records that the tracker does not have: those of a resumed run come again."""
        step, count = self._known["step"], self._known["records"]
        here = [record for record in records if record["global_step"] == step][count:]
        new = here + [record for record in records if record["global_step"] > step]
        if not new:
            return
        tracker = self._opened()
        for record in new:
            tracker.record(record["global_step"], dict(_numbers(record)))
        last = records[-1]["global_step"]
        self._known |= {"step": last, "records": sum(record["global_step"] == last for record in records)}
        self._write()

    def close(self, state: str, scores: Mapping[str, float]) -> None:
        if self._known["id"] is not None:
            self._opened().close(state, scores)

    def _opened(self) -> _Tracker:
        if self._tracker is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what the libraries do themselves
                self._tracker = _KINDS[self.name](self.folder, self.about, self._known["id"])
            self._known["id"] = self._tracker.id
            self._write()
        return self._tracker

    def _read(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = safe_json.read(self._file)
        except (OSError, ValueError):
            return {}
        return content

    def _write(self) -> None:
        write_atomically(self._file, json.dumps(self._read() | {self.name: self._known}).encode())


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The values of a record whose keys are tags (mpscl_ray.runs.tensorboard); NaN means no value and is left out."""
    for tag, value in record.items():
        if "/" in tag and not math.isnan(float(value)):
            yield tag, float(value)


class _MLflow:
    """A run of an experiment."""

    _ENDS: ClassVar = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "interrupted": "KILLED"}

    def __init__(self, folder: Path, about: TrackedRun, run_id: str | None) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        local = None if "MLFLOW_TRACKING_URI" in os.environ else f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=local)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self.id = run_id
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or about.group or PROJECT
        found = self._client.get_experiment_by_name(name)
        if found is None:
            files = (folder.absolute() / "mlflow-artifacts").as_uri() if local else None
            experiment = self._client.create_experiment(name, artifact_location=files)
        else:
            experiment = found.experiment_id
        self.id = self._client.create_run(experiment, run_name=about.name, tags=dict(about.tags)).info.run_id
        # A server takes at most a hundred at once.
        params = [Param(key, str(value)) for key, value in about.settings.items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(self.id, params=params[start : start + 100])

    def record(self, global_step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        time_ms = int(1000 * time.time())
        self._client.log_batch(self.id, [Metric(tag, value, time_ms, global_step) for tag, value in values.items()])

    def close(self, state: str, scores: Mapping[str, float]) -> None:
        for tag, value in scores.items():
            self._client.log_metric(self.id, tag, value)
        self._client.set_tag(self.id, "state", state)
        self._client.set_terminated(self.id, self._ENDS[state])


class _WandB:
    """A run of a project; each start of an offline one has its own folder, and ``wandb sync`` joins those of a run."""

    def __init__(self, folder: Path, about: TrackedRun, run_id: str | None) -> None:
        import wandb

        self.id = run_id or secrets.token_hex(4)
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=about.group or None,
            name=about.name,
            id=self.id,
            resume="allow",
            reinit="create_new",  # a search has several at once
            dir=folder,
            config={**about.settings},
            tags=[f"{key}: {value}"[:64] for key, value in about.tags.items()],
            settings=wandb.Settings(mode=mode, console="off", silent=True, symlink=False),
        )

    def record(self, global_step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=global_step)

    def close(self, state: str, scores: Mapping[str, float]) -> None:
        self._run.summary.update({**scores, "state": state})
        self._run.finish(exit_code=1 if state == "failed" else 0)


_KINDS: Mapping[str, Callable[[Path, TrackedRun, str | None], _Tracker]] = {"mlflow": _MLflow, "wandb": _WandB}
