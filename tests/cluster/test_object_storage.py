"""Commands with data and runs in a bucket: cut off, killed, gone on with on a machine that has nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.phantom.files import make_phantom
from mpscl_ray.errors import StorageError
from mpscl_ray.evaluate import command as evaluate
from mpscl_ray.prepare.options import PrepareOptions
from mpscl_ray.prepare.run import prepare
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory, open_run
from tests.nodes import ROOT, wait_for
from tests.s3 import CREDENTIALS, Server, serve, upload_folder
from tests.tiny import SETTINGS, make_pair

PATIENCE_S = 900
OUTAGE_S = 8
PHASE, EVERY = 40, 5
STEPS = 3 * PHASE
LONG = (
    *SETTINGS,
    f"phases.source_only={PHASE}",
    f"phases.warm_up={PHASE}",
    f"phases.adaptation={PHASE}",
    f"run.checkpoint_every={EVERY}",
    f"run.validate_every={PHASE}",
    "run.log_every=1",
    "scaling.num_workers=2",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("s3")
    with serve(folder) as started:
        upload_folder(make_pair(folder / "data"), started.folder("data"))
        yield started


def start(server: Server, cache: Path, output: Path, *words: str) -> subprocess.Popen[bytes]:
    """The train command on a Ray of its own, on a machine whose only memory is its cache folder."""
    temporary = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    environment |= {"MPSCL_RAY_CACHE": str(cache), "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    data = [f"data.source={server.url('data/mr')}", f"data.target={server.url('data/ct')}"]
    with output.open("w", encoding="utf-8") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "mpscl_ray.train", "small/mpscl", *LONG, *data, *words],
            env=environment | {"OMP_NUM_THREADS": "1"},
            cwd=temporary,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def steps_there(server: Server, name: str) -> int:
    """Newest complete checkpoint of a run in the bucket."""
    found = open_run(server.url(f"runs/{name}")).store.step_checkpoints()
    return checkpoint.step_of(Path(found[-1])) if found else 0


def wait_for_step(server: Server, name: str, step: int, process: subprocess.Popen[bytes], output: Path) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while (found := steps_there(server, name)) < step:
        assert process.poll() is None, output.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, output.read_text(encoding="utf-8")
        time.sleep(0.2)
    return found


def wait_for_words(words: str, process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while words not in output.read_text(encoding="utf-8"):
        assert process.poll() is None, output.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, output.read_text(encoding="utf-8")
        time.sleep(0.1)


def assert_same_ends(server: Server, name: str, undisturbed: RunDirectory) -> None:
    """All checkpoints of the ends, byte for byte, and every record of metrics once."""
    run = open_run(server.url(f"runs/{name}"))
    run.require()
    for place in ("phases/source_only", "phases/warm_up", "phases/adaptation", "best"):
        ours, theirs = run.store.localize(Path(place)), undisturbed.path / place
        assert (ours / checkpoint.SUMS).read_bytes() == (theirs / checkpoint.SUMS).read_bytes(), place
        checkpoint.verify(ours)
    assert [record["global_step"] for record in run.read_metrics()] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The same run on a local disk."""
    folder = tmp_path_factory.mktemp("disk")
    output = folder / "output.txt"
    process = start(server, folder / "cache", output, f"run.storage={folder}", "run.name=calm")
    assert wait_for(process, output, PATIENCE_S) == 0, output.read_text(encoding="utf-8")
    return RunDirectory(folder / "calm")


def test_a_run_that_is_cut_off_and_killed_ends_as_on_a_disk(
    server: Server, undisturbed: RunDirectory, tmp_path: Path
) -> None:
    """In turn: the storage stays away for good, the command is killed, the storage is away for some seconds.

    Each command runs on a machine that knows nothing of the others.
    """
    output = tmp_path / "output.txt"
    words = (f"run.storage={server.url('runs')}", "run.name=hard")

    process = start(server, tmp_path / "first", output, *words, "run.storage_retry_minutes=0.02")
    wait_for_step(server, "hard", EVERY, process, output)
    with server.door.shut():
        assert wait_for(process, output, PATIENCE_S) == StorageError.exit_code, output.read_text(encoding="utf-8")
    text = output.read_text(encoding="utf-8")
    assert "error: the storage of the run has failed for" in text
    assert "Traceback" not in text
    stopped = steps_there(server, "hard")

    process = start(server, tmp_path / "second", output, *words)
    wait_for_step(server, "hard", stopped + 2 * EVERY, process, output)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run = open_run(server.url("runs/hard"))
    run.require()
    lost = run.read_metrics()[-1]["global_step"] - steps_there(server, "hard")
    assert lost <= EVERY, "at most one checkpoint interval is done again"
    killed = steps_there(server, "hard")
    assert killed < STEPS

    process = start(server, tmp_path / "third", output, *words)
    wait_for_words("resuming from the checkpoint step-", process, output)
    with server.door.shut():
        time.sleep(OUTAGE_S)
        assert process.poll() is None, output.read_text(encoding="utf-8")
    assert wait_for(process, output, PATIENCE_S) == 0, output.read_text(encoding="utf-8")
    text = output.read_text(encoding="utf-8")
    assert text.count("meanwhile the run continues") == 1, text
    assert text.count("answers again") == 1, text
    assert "Traceback" not in text
    assert_same_ends(server, "hard", undisturbed)
    assert not list((tmp_path / "third" / "runs").iterdir()), "copies of a run go with it"

    kept = server.folder("runs/hard").files()
    for name in (
        "model.json",
        "environment.json",
        "progress.png",
        "progress.html",
        "results/phases.txt",
        "logs/worker-1.log",
    ):
        assert name in kept
    assert {"features.jsonl", "pseudo_labels/slices.npz", f"pseudo_labels/step-{STEPS:07d}.npz"} <= set(kept)
    assert ".lease" not in kept
    for name in kept:
        content = (server.folder("runs/hard") / name).read_bytes()
        for secret in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
            assert CREDENTIALS[secret].encode() not in content, name


def test_prepare_evaluate_and_predict_by_url(server: Server, undisturbed: RunDirectory, tmp_path: Path) -> None:
    make_phantom(tmp_path / "nifti", 2, 1, 3)
    (tmp_path / "split.json").write_text(json.dumps({"train": ["mr_1001"], "val": [], "test": ["mr_1002"]}))
    options = PrepareOptions(
        tmp_path / "nifti", server.folder("made"), "mmwhs", modality="mr", split=str(tmp_path / "split.json")
    )
    assert prepare(options, progress=False) == {"mr": server.folder("made/mr")}
    manifest = load_manifest(server.url("made/mr"))
    assert len(manifest.cases) == 2
    maps = [case.label_map.file for case in manifest.cases if case.label_map is not None]
    names = [f"label_maps/{split}/labels.json" for split in ("test", "train")]
    files = ["manifest.json", "pictures.html", *(case.file for case in manifest.cases), *maps, *names]
    assert len(maps) == 2
    assert server.folder("made/mr").files() == sorted(files)

    upload_folder(undisturbed.path, server.folder("runs/copied"))
    place = server.url("runs/copied")
    assert evaluate.main([place, "--checkpoint", "warm_up", "--split", "val", "--workers", "0"]) == 0
    file = "results/warm_up_val_prepared_protocol/summary.json"
    assert file in server.folder("runs/copied").files()
    ours = json.loads((server.folder("runs/copied") / file).read_bytes())
    assert evaluate.main([str(undisturbed.path), "--checkpoint", "warm_up", "--split", "val", "--workers", "0"]) == 0
    theirs = json.loads((undisturbed.path / file).read_text(encoding="utf-8"))
    assert ours["summary"] == theirs["summary"]
