"""Being connected to Ray for as long as a command needs it."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from mpscl_ray.errors import ClusterError, MpsclError

_QUIET = {
    # Nothing is reported to anyone; the rest keeps Ray's own chatter off the terminal.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
_LONGEST_TEMP_DIR = 40
"""Ray's socket paths add about 60 characters to it, and the system allows 107."""

_PREEMPTION = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""For each training, a process that looks for nodes which will be taken away. A private cluster has its machine alone,
which stays as long as the command does."""

_KNOCK_S = 10.0

START_ATTEMPTS = 3
"""Starts of a private cluster before it is given up. Ray allows 30 seconds for each, which a busy machine exceeds."""

_ACCOUNT = "RAY_TRAIN_ENABLE_STATE_TRACKING"
"""With it Ray Train tells the dashboard of its trainings, in a process which is for nothing where there is none. It is
read by the process that starts a training, and the processes of a cluster do not have the environment of a command."""


@contextmanager
def connect(
    num_cpus: int | None = None,
    *,
    dashboard: bool = False,
    log_to_driver: bool = False,
    object_store_memory: int | None = None,
) -> Iterator[None]:
    """Ray inside the block: the cluster this process is on already, the one ``RAY_ADDRESS`` names, or a private one.

    A private cluster obeys this process and its workers only (a fresh token guards it, and never leaves the machine),
    logs into a short temporary folder, and is stopped with all it started when the block ends. A cluster that was
    there before is left running, and keeps its own size; if it lets in whoever has no token, a warning says so.

    Args:
        num_cpus: CPUs of a private cluster; None is all there are. May be more than there are: it only counts.
        dashboard: Whether a private cluster serves its dashboard on 127.0.0.1.
        log_to_driver: Whether what workers print is shown here.
        object_store_memory: Bytes of shared memory of a private cluster; None leaves it to Ray.

    Raises:
        ClusterError: where Ray cannot be reached, or cannot be started after several attempts.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray  # after the environment is set, and only in commands that need it: importing takes a second

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address or dashboard:
        os.environ.setdefault(_ACCOUNT, "1")
    if address:
        try:
            _knock(address)
            context = ray.init(log_to_driver=log_to_driver, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ClusterError(
                f"the Ray cluster at RAY_ADDRESS={address} cannot be reached: {_first_line(error)}; check that it "
                "runs, that RAY_AUTH_MODE=token is set and the token is that of the cluster (ray get-auth-token), or "
                "unset RAY_ADDRESS to use this machine alone"
            ) from error
        try:
            if _is_open(context.dashboard_url):
                print(_OPEN_DOOR.format(address=address), file=sys.stderr, flush=True)
            yield
        finally:
            ray.shutdown()
        return
    restore = {_PREEMPTION: os.environ.get(_PREEMPTION)} | _guard_by_token()
    os.environ.setdefault(_PREEMPTION, "0")
    folder: Path | None = None
    try:
        folder = _start(
            num_cpus=num_cpus,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            log_to_driver=log_to_driver,
            object_store_memory=object_store_memory,
        )
        yield
    finally:
        ray.shutdown()
        for name, before in restore.items():
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _start(**options: Any) -> Path:
    """Start a private cluster and return its temporary folder.

    Raises:
        ClusterError: every attempt failed.
    """
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        folder = _short_temp_dir()
        try:
            ray.init(address="local", logging_level=logging.ERROR, _temp_dir=str(folder), **options)
            return folder
        except BaseException as error:
            ray.shutdown()
            _kill_processes_with(folder)
            shutil.rmtree(folder, ignore_errors=True)
            # Ray raises a bare Exception where a node is too slow to start. Ctrl-C and SIGTERM are not tried again.
            if isinstance(error, MpsclError) or not isinstance(error, Exception):
                raise
            failure = error
            if attempt < START_ATTEMPTS:
                print(f"warning: Ray did not start ({_first_line(error)}); trying again", file=sys.stderr, flush=True)
    raise ClusterError(
        f"Ray cannot be started on this machine, tried {START_ATTEMPTS} times: {_first_line(failure)}; try again when "
        "the machine is less busy and has free memory, or set RAY_ADDRESS to a running cluster"
    ) from failure


def _kill_processes_with(folder: Path) -> None:
    """Kill the processes of a failed start, which have its folder in their command line; Ray leaves them running."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or not ours
            if f"{folder}/".encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def state_tracking_enabled() -> bool:
    """Whether the cluster keeps account of the trainings that this process starts."""
    return os.environ.get(_ACCOUNT) == "1"


def enable_state_tracking() -> None:
    """Let the cluster keep account of those that this process starts, because it does of the command's it works for."""
    os.environ[_ACCOUNT] = "1"


def _knock(address: str) -> None:
    """Whether anything listens there: Ray itself would try for minutes.

    Raises:
        OSError: where nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()


_OPEN_DOOR = (
    "warning: the Ray cluster at {address} lets in whoever can reach its ports, which listen beyond this machine: "
    "anyone there can run code on it, and read and change data and runs; start it with RAY_AUTH_MODE=token and a "
    "token (ray get-auth-token --generate), as the files in cluster/ do"
)


def _is_open(dashboard: str | None) -> bool:
    """Whether a cluster works for those who have no token.

    Its dashboard is asked without one, as a stranger would. Where it cannot be asked, only this is known: a process
    that is not in token mode, and was let in, needed none.
    """
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{dashboard}/api/version", timeout=_KNOCK_S):
            return True
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return False
    except (OSError, ValueError):
        pass
    return os.environ.get("RAY_AUTH_MODE", "").lower() != "token"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _short_temp_dir() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    if len(str(folder)) > _LONGEST_TEMP_DIR:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    return folder


def _guard_by_token() -> dict[str, str | None]:
    """Let the cluster that is about to start be entered only with a token of this process.

    Its ports are open to the network, whatever the dashboard binds to. ``RAY_AUTH_MODE`` stays unset: Ray then turns
    tokens on by itself, also where it was imported before, and would write one into the user's home if it found none.

    Returns:
        Environment variables as they were.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    before = {name: os.environ.get(name) for name in names}
    if not any(before.values()):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file())
    return before


@cache
def _token_file() -> Path:
    """One token for the life of the process: Ray reads it once."""
    folder = Path(tempfile.mkdtemp(prefix="ray-token-"))  # only its owner may enter
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "token"
    path.write_text(secrets.token_hex(32), encoding="ascii")
    path.chmod(0o600)
    return path
