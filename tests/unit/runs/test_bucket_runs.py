"""A run in a bucket: who may write it, and what command, worker and reader see of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpscl_ray import load_segmenter
from mpscl_ray.errors import ClusterError, ConfigError, StorageError
from mpscl_ray.export.command import main as export
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.bucket_store import LEASE, BucketStore
from mpscl_ray.runs.control_files import STOP_FILE, VALIDATION_GATE_FILE
from mpscl_ray.runs.lease import Lease
from mpscl_ray.runs.live_page import Content, LivePage
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from mpscl_ray.runs.storage import S3Path, parse_location
from mpscl_ray.train.ray.worker import STOP_THERE, wait_for_decision
from tests.s3 import PATIENCE_S, Server, state, upload_folder, wait_until
from tests.untrained_run import save, segmenter, write_run


def bucket_run(remote: S3Path, role: str, patience_s: float = 0.0, lease: Lease | None = None) -> RunDirectory:
    store = BucketStore(remote, role, patience_s)
    store._lease = lease or store._lease
    return RunDirectory(store.path, store)


# ------------------------------------------------------------------------------------------------------ lease


def elsewhere(remote: S3Path) -> None:
    """Move the owner of a lease to another host, so that only renewals show that it is alive."""
    (remote / LEASE).write_bytes(json.dumps(json.loads((remote / LEASE).read_bytes()) | {"host": "x"}).encode())


def test_a_run_has_one_writer(remote: S3Path) -> None:
    first, second = (
        bucket_run(remote, role, lease=Lease(remote / LEASE, renew_s=0.2)) for role in ("command", "other")
    )
    first.create()
    second.create()
    with first.lock():
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on .*another run.name"), second.lock():
            pass
        assert second.store.lock_owner() == os.getpid()
    assert second.store.lock_owner() is None
    with second.lock():
        pass


def test_the_lease_of_a_dead_owner_on_another_host_can_be_acquired(remote: S3Path) -> None:
    dead = Lease(remote / LEASE)
    dead.acquire()
    elsewhere(remote)
    new = Lease(remote / LEASE, dead_after_s=2.0)
    new.acquire()
    new.check()
    with pytest.raises(ClusterError, match=f"was taken over by process {os.getpid()} on"):
        dead.renew()


def test_the_lease_of_a_killed_process_of_this_host_is_free_at_once(remote: S3Path) -> None:
    script = (
        "import sys; from mpscl_ray.runs.lease import Lease; from mpscl_ray.runs.storage import parse_location\n"
        "Lease(parse_location(sys.argv[1]) / '.lease').acquire(); print('mine', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(remote)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "mine\n"
        owner.kill()
    Lease(remote / LEASE).acquire()


def test_a_process_that_lost_the_lease_uploads_nothing_more(remote: S3Path) -> None:
    command, worker = bucket_run(remote, "command"), bucket_run(remote, "worker-0", PATIENCE_S)
    command.create()

    def train() -> None:
        worker.store.init_worker_dir()
        with worker.store.worker_lock(command.store.fencing_token, 0):
            Lease(remote / LEASE)._write()
            checkpoint.save(worker.checkpoints / "step-0000001", state(1))
            wait_until(lambda: worker.store.sync_error is not None)

    def run() -> None:
        with command.lock():
            command.write_config("a: 1\n")
            command.store.flush()
            with pytest.raises(ClusterError, match="was taken over"):
                train()
            wait_until(lambda: command.store.sync_error is not None)
            command.write_config("a: 2\n")

    with pytest.raises(ClusterError, match="was taken over"):
        run()
    assert (remote / "config.yaml").read_bytes() == b"a: 1\n"
    assert open_run(str(remote)).store.step_checkpoints() == []


# -------------------------------------------------------------------------------------------------------- run


def test_command_and_worker_share_a_run_and_a_fresh_node_resumes(remote: S3Path) -> None:
    command = bucket_run(remote, "command")
    command.create()
    with command.lock():
        command.write_config("a: 1\n")
        command.write_status("running")
        worker = bucket_run(remote, "worker-0", PATIENCE_S)
        worker.store.init_worker_dir()
        with worker.store.worker_lock(command.store.fencing_token, 0):
            for step in (1, 2, 3):
                worker.append_metrics({"global_step": step})
                checkpoint.save(worker.checkpoints / checkpoint.checkpoint_name(step), state(step))
                checkpoint.prune(worker.checkpoints, 2)
                worker.store.flush()
                assert open_run(str(remote)).store.step_checkpoints()[-1] == f"step-000000{step}", (
                    "there when it returns"
                )
            LivePage(worker.progress_page, lambda: Content("run", "running", 0.5)).update()
            worker.slices.mkdir()
            (worker.slices / "step-0000003.png").write_bytes(b"png")
            checkpoint.save(worker.phases / "warm_up", state(3))
            wait_until(lambda: len(command.read_metrics()) == 3)
            (command.path / STOP_FILE).touch()
            wait_until((worker.path / STOP_FILE).exists)
    assert b"running" in (remote / "progress.html").read_bytes()
    assert (remote / "slices/step-0000003.png").read_bytes() == b"png"
    fresh = open_run(str(remote))
    fresh.require()
    assert fresh.store.checkpoint_names() == ["step-0000002", "step-0000003", "warm_up"]
    assert [record["global_step"] for record in fresh.read_metrics()] == [1, 2, 3]
    assert fresh.read_status()["state"] == "running"
    newest, warnings = fresh.store.latest_checkpoint()
    assert newest is not None
    assert (checkpoint.load(newest)["step"], warnings) == (3, [])

    data = bytearray((remote / "checkpoints/step-0000003" / checkpoint.TENSORS).read_bytes())
    data[-1] ^= 1
    (remote / "checkpoints/step-0000003" / checkpoint.TENSORS).write_bytes(bytes(data))
    other = bucket_run(remote, "other")
    newest, warnings = other.store.latest_checkpoint()
    assert newest is not None
    assert newest.name == "step-0000002"
    assert "step-0000003 is damaged" in warnings[0]
    assert not command.path.exists(), "the copy is deleted"
    assert not worker.path.exists()


def test_a_process_without_the_lock_reads_status_and_control_files(remote: S3Path, server: Server) -> None:
    command, worker, other = (open_run(remote, role) for role in ("command", "worker-0", "reader"))
    command.create()
    assert worker.control_files.read(VALIDATION_GATE_FILE) is None
    assert wait_for_decision(worker, 10), "no gate"
    with command.lock():
        command.write_status("running")
        command.store.flush()
        assert other.read_status()["state"] == "running"
        other.control_files.write(VALIDATION_GATE_FILE, "0")
        assert not wait_for_decision(worker, 10, patience_s=0)
        other.control_files.write(VALIDATION_GATE_FILE, f"10 {STOP_THERE}")
        worker.store.init_worker_dir()
        assert wait_for_decision(worker, 10)
        assert (worker.path / STOP_FILE).exists(), "whatever the bucket has of it"
        with server.door.shut():
            assert not wait_for_decision(worker, 20, patience_s=0), "a bucket that is away ends nothing"
            with pytest.raises(StorageError):
                other.control_files.read(VALIDATION_GATE_FILE)
        other.control_files.clear(VALIDATION_GATE_FILE)
        assert worker.control_files.read(VALIDATION_GATE_FILE) is None
    other.write_status("failed", exit_code=5, reason="written without the lock")
    assert open_run(remote).read_status()["reason"] == "written without the lock"


def test_a_search_downloads_and_uploads_its_own_files_and_none_of_its_trials(remote: S3Path) -> None:
    (remote / "trials" / "001" / "config.yaml").write_bytes(b"a: 1")
    (remote / "ledger.jsonl").write_bytes(b"{}\n")
    search = open_run(remote, "command", uploads=("ledger.jsonl", "tensorboard"))
    search.create()
    with search.lock():
        assert (search.path / "ledger.jsonl").read_bytes() == b"{}\n"
        assert not (search.path / "trials").exists()
        (search.path / "ledger.jsonl").write_bytes(b"{}\n{}\n")
        (search.path / "tensorboard" / "001").mkdir()
        (search.path / "tensorboard" / "001" / "events").write_bytes(b"events")
        search.store.flush()
        assert (remote / "ledger.jsonl").read_bytes() == b"{}\n{}\n", "uploaded before anything is decided by it"
        assert (remote / "tensorboard" / "001" / "events").read_bytes() == b"events"
        for part in ("checkpoints", "phases", "best"):
            (remote / part / "x").write_bytes(b"x")
        search.store.delete_checkpoints()
        assert not [name for name in remote.files() if name.startswith(("checkpoints", "phases", "best"))]


@pytest.mark.filterwarnings("ignore:.*the edge of the crop")
def test_a_run_in_a_bucket_is_exported_and_its_model_predicts_from_there(
    remote: S3Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run").path
    save(run / "best", segmenter())
    upload_folder(run, remote / "run")
    model = server.url(f"{remote.name}/hearts.mpscl")
    assert export([server.url(f"{remote.name}/run"), "--out", model]) == 0
    assert export([str(run), "--out", str(tmp_path / "hearts.mpscl")]) == 0
    assert parse_location(model).read_bytes() == (tmp_path / "hearts.mpscl").read_bytes()
    with pytest.raises(ConfigError, match="is there already; give another name, or --overwrite"):
        export([server.url(f"{remote.name}/run"), "--out", model])
    with pytest.raises(ConfigError, match=r"none\.mpscl.*no such file, expected a model"):
        load_segmenter(server.url(f"{remote.name}/none.mpscl"))
    volume = np.random.default_rng(0).normal(100, 30, (34, 12, 36))
    labels = [load_segmenter(place, "best", device="cpu").predict(volume, np.eye(4)) for place in (model, run)]
    assert len(np.unique(labels[0])) > 1
    np.testing.assert_array_equal(*labels)
