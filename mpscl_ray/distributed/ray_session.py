"""The connection of a command to Ray: a running cluster, or a private one that ends with the command."""

from __future__ import annotations

import atexit
import fcntl
import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mpscl_ray.errors import ClusterError, MpsclError

_QUIET = {
    # No usage reports; the next three keep Ray's own output off the terminal.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    # Processes start when they are needed, not one for each CPU of the machine.
    "RAY_prestart_worker_first_driver": "0",
}
_LONGEST_TEMP_DIR = 40
"""Ray's socket paths add about 60 characters to it, and the system allows 107."""

PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Makes Ray Train start a process for each training that watches for nodes about to be preempted. A private cluster
runs on this machine alone, so it needs none."""

_OWNER = "owner.lock"
"""File in each temporary folder, locked as long as the command lives that made it."""

_PORT_TIMEOUT_S = 10.0

START_ATTEMPTS = 2
"""Attempts to start a private cluster."""

START_PATIENCE_S = 150.0
"""Seconds that the processes of a private cluster may take to start, which is long on a busy machine."""

_STATE_TRACKING = "RAY_TRAIN_ENABLE_STATE_TRACKING"
"""Makes Ray Train report its trainings to the dashboard, in a process that is useless without one. It is read by the
process that starts a training, and the processes of a cluster do not have the environment of a command."""


@contextmanager
def connect(
    num_cpus: int | None = None,
    *,
    address: str | None = None,
    dashboard: bool = False,
    object_store_memory: int | None = None,
) -> Iterator[None]:
    """Ray inside the block: the cluster this process is connected to, the one at an address, or a private one.

    A private cluster accepts this process and its workers only (a fresh token guards it, and never leaves the machine),
    logs into a short temporary folder, and is stopped with all it started when the block ends. A cluster that was
    running before keeps running and keeps its size; if it accepts processes without a token, a warning says so.

    Args:
        num_cpus: CPUs of a private cluster; None: all of this machine. Ray only counts them, so it may be more.
        address: of a cluster, or ``auto`` for the one that ``RAY_ADDRESS`` names or that runs on this machine; None:
            the one of ``RAY_ADDRESS``, if it is set.
        dashboard: Whether a private cluster serves its dashboard on 127.0.0.1; its address is printed.
        object_store_memory: Bytes of shared memory of a private cluster; None leaves it to Ray.

    Raises:
        ClusterError: Ray cannot be reached, or cannot be started.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray  # after the environment is set, and only in commands that need it: importing takes a second

    if ray.is_initialized():
        yield
        return
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() not in ("token", "disabled"):
        raise ClusterError(f"RAY_AUTH_MODE is {mode!r}; expected token or disabled, or leave it unset")
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    if address or dashboard:
        os.environ.setdefault(_STATE_TRACKING, "1")
    session = (
        _running_cluster(address)
        if address
        else _private_cluster(
            num_cpus=num_cpus,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            object_store_memory=object_store_memory,
        )
    )
    with session:
        yield


_private: list[Path] = []
"""Temporary folder of the private cluster that this process has started."""


def is_private() -> bool:
    """Whether this process has started its Ray, which ends with it."""
    return bool(_private)


def state_tracking_enabled() -> bool:
    """Whether the trainings that this process starts are reported to the dashboard."""
    return os.environ.get(_STATE_TRACKING) == "1"


def enable_state_tracking() -> None:
    """Report the trainings that this process starts to the dashboard, as its command does."""
    os.environ[_STATE_TRACKING] = "1"


# ---- a running cluster ----


@contextmanager
def _running_cluster(address: str) -> Iterator[None]:
    """Join the cluster at an address. Raises ClusterError where it cannot be reached."""
    import ray

    try:
        _check_port(address)
        context = ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(_unreachable(address, error)) from error
    try:
        if _is_unauthenticated(context.dashboard_url):
            print(_UNAUTHENTICATED_WARNING.format(address=address), file=sys.stderr, flush=True)
        yield
    finally:
        ray.shutdown()


def _unreachable(address: str, error: BaseException) -> str:
    """Why a cluster cannot be joined, and what to do."""
    if "Version mismatch" in str(error):
        return (
            f"the Ray cluster at {address} runs other versions than this command: "
            f"{' '.join(str(error).split())}; install the same Ray and Python as on the cluster"
        )
    return (
        f"the Ray cluster at {address} cannot be reached: {_first_line(error)}; check that it runs, that "
        "RAY_AUTH_MODE=token is set and the token is that of the cluster (ray get-auth-token), or unset RAY_ADDRESS, "
        "and give no --ray, to use this machine alone"
    )


def _check_port(address: str) -> None:
    """Raises OSError where nothing listens at an address; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PORT_TIMEOUT_S).close()


_UNAUTHENTICATED_WARNING = (
    "warning: the Ray cluster at {address} accepts anyone who can reach its ports, which listen beyond this machine: "
    "they can run code on it, and read and change data and runs; start it with RAY_AUTH_MODE=token and a "
    "token (ray get-auth-token --generate), as the files in cluster/ do"
)


def _is_unauthenticated(dashboard: str | None) -> bool:
    """Whether a cluster accepts processes without a token.

    Asks its dashboard without one. If the dashboard does not answer, the cluster needs a token only if this process,
    which was accepted, is in token mode.
    """
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{dashboard}/api/version", timeout=_PORT_TIMEOUT_S):
            return True
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return False
    except (OSError, ValueError):
        pass
    return os.environ.get("RAY_AUTH_MODE", "").lower() != "token"


# ---- a private cluster ----


@contextmanager
def _private_cluster(**options: Any) -> Iterator[None]:
    """Start a cluster with these options of ``ray.init``, and restore the environment when it has ended."""
    import ray

    environment = {PREEMPTION_WATCHER: os.environ.get(PREEMPTION_WATCHER)} | _guard_by_token()
    os.environ.setdefault(PREEMPTION_WATCHER, "0")
    try:
        _private.append(_start(**options))
        yield
    finally:
        ray.shutdown()
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        while _private:
            shutil.rmtree(_private.pop(), ignore_errors=True)


def _start(**options: Any) -> Path:
    """Start a private cluster and return its temporary folder.

    Raises:
        ClusterError: Ray refused the start, or every attempt failed.
    """
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        folder = _temp_dir("ray-")
        try:
            with _patched_start(monitors=options["include_dashboard"]):
                context = ray.init(
                    address="local", log_to_driver=False, logging_level=logging.ERROR, _temp_dir=str(folder), **options
                )
            if options["include_dashboard"]:
                print(f"dashboard: http://{context.dashboard_url}{_way_in()}", flush=True)
            return folder
        except BaseException as error:
            ray.shutdown()
            _kill_processes_with(folder)
            shutil.rmtree(folder, ignore_errors=True)
            # Ray raises a bare Exception where a node is too slow to start. Ctrl-C and SIGTERM are not retried.
            if isinstance(error, MpsclError) or not isinstance(error, Exception):
                raise
            if isinstance(error, ValueError):
                raise ClusterError(
                    f"Ray refuses to start on this machine: {_first_line(error)}; correct the value that it names, "
                    "such as an environment variable RAY_*, or set RAY_ADDRESS to a running cluster"
                ) from error
            failure = error
            if attempt < START_ATTEMPTS:
                print(f"warning: Ray did not start ({_first_line(error)}); trying again", file=sys.stderr, flush=True)
    raise ClusterError(
        f"Ray cannot be started on this machine, tried {START_ATTEMPTS} times: {_first_line(failure)}; try again when "
        "the machine is less busy and has free memory, or set RAY_ADDRESS to a running cluster"
    ) from failure


@contextmanager
def _patched_start(*, monitors: bool) -> Iterator[None]:
    """What Ray has no option for, while it starts its processes inside the block.

    - It waits START_PATIENCE_S for them instead of 30 seconds.
    - Each is in a process group of its own: a signal to the group of the command, from a terminal or ``timeout``, then
      reaches the command alone, which needs Ray until the checkpoint is written. From Ctrl-C Ray shields them itself.
    - Without ``monitors`` the autoscaler, which has no nodes to add, and what forwards logs to nobody do not start.
    """
    from ray._private import node, services

    get_node, deadline = services.get_node, time.monotonic() + START_PATIENCE_S

    def wait_for_node(*arguments: Any) -> Any:
        while True:
            try:
                return get_node(*arguments)  # type: ignore[no-untyped-call]
            except RuntimeError:  # it is not there yet
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    with ExitStack() as patches:
        replace = functools.partial(_replaced, patches)
        replace(services, "ConsolePopen", functools.partial(services.ConsolePopen, process_group=0))
        replace(services, "get_node", wait_for_node)
        if not monitors:
            replace(node.Node, "start_monitor", lambda self: None)
            replace(node.Node, "start_log_monitor", lambda self: None)
        yield


def _replaced(patches: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Replace an attribute until ``patches`` are closed."""
    patches.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _way_in() -> str:
    """Where the token is that the dashboard asks for."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return ""
    if "RAY_AUTH_TOKEN" in os.environ:
        return ", which asks for the token in RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")
    return f", which asks for the token in {path}"


def _kill_processes_with(folder: Path) -> None:
    """Kill the processes of a failed start, which have its folder in their command line; Ray leaves them running."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or of another user
            if f"{folder}/".encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _temp_dir(prefix: str) -> Path:
    """A new temporary folder, with a short path. Removes those that commands left when they were killed."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    if len(str(folder)) > _LONGEST_TEMP_DIR:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    owner = os.open(folder / "starting", os.O_CREAT | os.O_WRONLY)  # open until this process ends
    fcntl.flock(owner, fcntl.LOCK_EX)
    os.rename(folder / "starting", folder / _OWNER)
    for left in folder.parent.glob(f"ray-*/{_OWNER}"):
        with suppress(OSError), left.open("rb") as file:  # of another user
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises an OSError while its owner lives
            shutil.rmtree(left.parent, ignore_errors=True)
    return folder


def _guard_by_token() -> dict[str, str | None]:
    """Make the cluster that is about to start accept only processes that have a token of this one.

    Its ports are open to the network, whatever the dashboard binds to. ``RAY_AUTH_MODE`` stays unset: Ray then turns
    tokens on by itself, even if it was imported before, and would write one into the user's home if it found none.

    Returns:
        Values of the environment variables before.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    before = {name: os.environ.get(name) for name in names}
    if not any(before.values()):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file())
    return before


@functools.cache
def _token_file() -> Path:
    """File with one token for the life of the process: Ray reads it once."""
    folder = _temp_dir("ray-token-")  # only its owner may enter
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "token"
    path.write_text(secrets.token_hex(32), encoding="ascii")
    path.chmod(0o600)
    return path
