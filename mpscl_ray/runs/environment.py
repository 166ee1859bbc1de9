"""What a run ran on: versions, platform, GPUs, commit and command line. No environment variables, no host, no user."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mpscl_ray

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SECRET = re.compile(r"(?i)((?:token|password|passwd|secret|api_?key|access_?key)[\w.-]*[=\s])\S+")


def environment(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe the present process and machine as JSON values.

    Args:
        command: Command line to record; ``sys.argv`` without it. Its credentials are blanked.

    Returns:
        Keys started, mpscl_ray, commit, command, python, platform, cpus, torch, gpus, gpu_driver, packages.
    """
    import torch  # It takes seconds, and callers of now() do not need it.

    return {
        "started": now(),
        "mpscl_ray": mpscl_ray.__version__,
        "commit": _commit(Path(mpscl_ray.__file__).parent),
        "command": [_blank(argument) for argument in (sys.argv if command is None else command)],
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpus": _cpus(),
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "threads": torch.get_num_threads(),
        },
        **_gpus(Path("/proc/driver/nvidia")),
        "packages": _packages(),
    }


def now() -> str:
    """The time in UTC, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _blank(argument: str) -> str:
    return _SECRET.sub(r"\1***", _CREDENTIALS.sub("***", argument))


def _cpus() -> str:
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        models = []
    return f"{len(models)} x {models[0]}" if models else platform.processor() or platform.machine()


def _gpus(driver: Path) -> dict[str, Any]:
    """GPU names and driver as the kernel reports them: asking CUDA would open a context on a GPU the run needs."""
    try:
        cards = [file.read_text() for file in sorted(driver.glob("gpus/*/information"))]
        version = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", (driver / "version").read_text())
    except OSError:
        return {"gpus": [], "gpu_driver": None}
    names = [match.group(1).strip() for match in (re.search(r"^Model:(.+)$", c, re.MULTILINE) for c in cards) if match]
    return {"gpus": names, "gpu_driver": version.group(1) if version else None}


def _packages() -> dict[str, str]:
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _commit(package: Path) -> str | None:
    """Commit of the source tree that the code runs from, with ``-dirty`` after local changes; None when installed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # An installed copy inside somebody else's repository is not tracked there: that commit says nothing.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
