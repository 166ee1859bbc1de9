"""The batch file for Slurm: Ray on each node, the stop file when time is up, and the command's exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mpscl_ray.config import load_config
from mpscl_ray.train.ray.worker import STOP_FILE
from mpscl_ray.tune.command import main as tune

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
PATIENCE_S = 60

FAKES = {
    "scontrol": """echo "scontrol $*" >>"$LOG"; [ "$1" = show ] && printf 'node-a\\nnode-b\\n' || true""",
    "srun": """while [[ $1 == --* ]]; do shift; done; exec "$@" """,
    "ray": """
echo "ray $*" >>"$LOG"
stat -c 'token %a %s' "$RAY_AUTH_TOKEN_PATH" >>"$LOG"
while [ "$1" != -- ]; do shift; done
shift
"$@"
""",
    "python": """
if [ "$1" = - ]; then exec "$REAL_PYTHON" "$@"; fi
echo "python $*" >>"$LOG"
echo "joins $RAY_ADDRESS in mode $RAY_AUTH_MODE" >>"$LOG"
if [ -z "$ENDLESS" ]; then exit "$CODE"; fi
echo trains >>"$LOG"
while [ ! -e "$MPSCL_STORAGE/heart/stop-requested" ]; do sleep 0.05; done
exit 130
""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which the batch file believes to run on two nodes."""
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    (tmp_path / "runs" / "heart").mkdir(parents=True)
    return {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LOG": str(tmp_path / "log"),
        "MPSCL_STORAGE": str(tmp_path / "runs"),
        "REAL_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "412345",
        "SLURM_JOB_NAME": "heart",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "32",
        "CODE": "0",
        "ENDLESS": "",
    }


BATCH = ["bash", str(CLUSTER / "slurm" / "job.sbatch")]
TRAIN = ["train", "mr2ct/mpscl", "data.source=/shared/data/mr", "data.target=/shared/data/ct"]


@pytest.mark.parametrize("code", [0, 6])
def test_the_batch_file_starts_ray_once_a_node_and_ends_as_the_training(slurm: dict[str, str], code: int) -> None:
    done = subprocess.run([*BATCH, *TRAIN], env={**slurm, "CODE": str(code)}, timeout=PATIENCE_S)
    assert done.returncode == code
    log = Path(slurm["LOG"]).read_text(encoding="utf-8").splitlines()
    assert log[0] == "scontrol show hostnames node-[a-b]"
    assert log[1].startswith(
        "ray symmetric-run --address node-a:22345 --min-nodes 2 --disable-usage-stats --num-cpus 32"
    )
    assert log[2] == "token 600 65"
    words = log[3].split()
    assert words[:3] == ["python", "-m", "mpscl_ray.train"]
    config = load_config(words[3], words[4:])
    assert (config.scaling.num_workers, config.run.storage) == (4, slurm["MPSCL_STORAGE"])
    assert (config.run.name, config.data.source) == ("heart", "/shared/data/mr")
    assert log[4:] == ["joins node-a:22345 in mode token"], "and no requeue"
    assert not list(Path(slurm["HOME"]).glob(".ray/*")), "the token is gone"


def words_of(slurm: dict[str, str], *words: str) -> list[str]:
    """What the batch file gives to a command of the package."""
    assert subprocess.run([*BATCH, *words], env=slurm, timeout=PATIENCE_S).returncode == 0
    (line,) = re.findall(r"^python -m (.+)$", Path(slurm["LOG"]).read_text(encoding="utf-8"), re.MULTILINE)
    return str(line).split()


def test_a_search_and_a_comparison_have_one_worker_a_trial_and_their_own_folder(
    slurm: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = slurm | {"MPSCL_STORAGE": "s3://hearts/runs"}
    module, *words = words_of(bucket, "tune", "mpscl", *TRAIN[2:])
    assert module == "mpscl_ray.tune"
    assert tune([*words, "--print-config"]) == 0
    search = yaml.safe_load(capsys.readouterr().out)
    assert search["run"]["storage"] == "s3://hearts/runs"
    assert search["run"]["name"] == "heart"
    assert search["scaling"]["num_workers"] == 1
    Path(slurm["LOG"]).unlink()
    module, *words = words_of(bucket, "compare", "--data", "/shared/data/mr", "/shared/data/ct", "mpscl")
    assert [module, *words[-2:]] == ["mpscl_ray.compare", "--out", "s3://hearts/runs/heart"]
    assert subprocess.run(BATCH, env=slurm, timeout=PATIENCE_S).returncode != 0, "no command"


def test_a_job_whose_time_is_up_asks_for_a_checkpoint_and_is_queued_again(slurm: dict[str, str]) -> None:
    log = Path(slurm["LOG"])
    batch = subprocess.Popen([*BATCH, *TRAIN], env={**slurm, "ENDLESS": "1"})
    deadline = time.monotonic() + PATIENCE_S
    while not (log.exists() and "trains" in log.read_text(encoding="utf-8")) and time.monotonic() < deadline:
        time.sleep(0.05)
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(PATIENCE_S) == 130
    assert (Path(slurm["MPSCL_STORAGE"]) / "heart" / STOP_FILE).exists()
    assert log.read_text(encoding="utf-8").splitlines()[-1] == "scontrol requeue 412345"
