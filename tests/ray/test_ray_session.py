"""Starting, joining and leaving Ray; in processes of their own, since a process is on one cluster only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")

PRIVATE = """
import os, stat
from pathlib import Path
from mpscl_ray.distributed.ray_session import connect

AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
with connect(3, dashboard=True):
    import ray
    assert ray.cluster_resources()["CPU"] == 3
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text(encoding="utf-8")) >= 32
    mode = ray.remote(lambda: os.environ.get("RAY_AUTH_MODE"))
    assert ray.get(mode.remote()) == "token"
    from ray._common.usage.usage_lib import usage_stats_enabled
    assert not usage_stats_enabled()
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen
    url = f"http://{ray._private.worker._global_node.webui_url}/api/version"
    try:
        urlopen(url)
    except HTTPError as error:
        refused = error.code
    with urlopen(Request(url, headers={"Authorization": f"Bearer {token.read_text().strip()}"})) as answer:
        print(f"{refused} without, {answer.status} with the token")
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert session.is_dir()
    with connect(1):
        assert ray.cluster_resources()["CPU"] == 3, "the one that runs is used"
    assert ray.is_initialized(), "and left running"
assert not ray.is_initialized()
assert not session.exists()
assert not any(name in os.environ for name in AUTH)
assert not Path.home().joinpath(".ray").exists()
print("all well")
"""

OPEN = """
import os, subprocess, sys
import ray

context = ray.init(address="local", num_cpus=1, include_dashboard=True, logging_level="ERROR")
join = "from mpscl_ray.distributed.ray_session import connect\\nwith connect(): print('joined')"
environment = {**os.environ, "RAY_ADDRESS": context.address_info["gcs_address"]}
for mode in ("disabled", "token"):
    done = subprocess.run(
        [sys.executable, "-c", join], env={**environment, "RAY_AUTH_MODE": mode}, capture_output=True, text=True
    )
    assert done.stdout == "joined\\n", done.stderr
    print(done.stderr)
"""

UNREACHABLE = """
from mpscl_ray.distributed.ray_session import connect
from mpscl_ray.errors import ClusterError

try:
    with connect():
        pass
except ClusterError as error:
    print(error)
"""


def run(script: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in AUTH}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**inherited, **environment}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_private_cluster_is_guarded_and_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    address, asked, end = run(PRIVATE, HOME=str(tmp_path_factory.mktemp("home"))).splitlines()
    assert re.fullmatch(r"dashboard: http://127.0.0.1:\d+, which asks for the token in /\S+/token", address)
    assert (asked, end) == ("401 without, 200 with the token", "all well")


@pytest.mark.cluster
def test_a_cluster_that_lets_in_whoever_comes_is_told_of(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    printed = run(OPEN, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN_PATH=str(token), RAY_USAGE_STATS_ENABLED="0")
    warnings = [line for line in printed.splitlines() if line.startswith("warning: the Ray cluster at ")]
    assert len(warnings) == 2, printed
    for warning in warnings:
        assert "accepts anyone who can reach its ports, which listen beyond this machine" in warning
        assert "start it with RAY_AUTH_MODE=token" in warning


def test_an_address_where_nothing_listens_is_told_soon() -> None:
    # Ray alone tries for minutes; the time limit of the process is what fails then.
    printed = run(UNREACHABLE, RAY_ADDRESS="127.0.0.1:1")
    assert printed.startswith("the Ray cluster at 127.0.0.1:1 cannot be reached")
    assert "or unset RAY_ADDRESS, and give no --ray, to use this machine alone" in printed
