"""A batch of predictions that was killed goes on where it stopped, and keeps nothing that is not its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.errors import ConfigError, Interrupted
from mpscl_ray.predict.command import main
from mpscl_ray.predict.image import Prediction
from mpscl_ray.predict.record import Record
from mpscl_ray.runs.atomic_files import replacing
from tests.untrained_run import save, segmenter, write_run

NAMES = ("a", "b", "c", "d")
KILLED = """
import os, signal, sys
from mpscl_ray.predict import record, run
add = record.Record.add
def killed(self, prediction):
    if prediction.image.name.startswith(sys.argv[1]):
        (self._job.out / ".d_prediction.nii.gz.partial-1").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, prediction)
record.Record.add = killed
from mpscl_ray.predict.command import main
main(sys.argv[2:])
"""
"""The command, killed when the files of an image are written and volumes.json does not have them yet."""


def write_image(path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(random.normal(100, 30, (34, 12, 36)).astype(np.float32), np.eye(4)), path)


@pytest.fixture
def batch(tmp_path: Path) -> list[str]:
    """Arguments of a command on four images."""
    run = write_run(tmp_path / "run").path
    save(run / "checkpoints" / "step-0000300", segmenter())
    for seed, name in enumerate(NAMES):
        write_image(tmp_path / "scans" / f"{name}.nii.gz", seed)
    words = [str(run), str(tmp_path / "scans"), "--out", str(tmp_path / "out"), "--modality", "mr", "--workers", "0"]
    return [*words, "--device", "cpu"]


def entries(out: Path) -> dict[str, Any]:
    found = json.loads((out / "volumes.json").read_text(encoding="utf-8"))["predictions"]
    assert isinstance(found, dict)
    return found


def stamps(out: Path) -> dict[str, int]:
    return {name: (out / f"{name}_prediction.nii.gz").stat().st_mtime_ns for name in NAMES}


def test_a_killed_batch_is_resumed(batch: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, "c", *batch], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(entries(out)) == ["a_prediction.nii.gz", "b_prediction.nii.gz"]
    assert (out / "c_prediction.nii.gz").exists()
    (out / "d_prediction.nii.gz").touch()  # a file without an entry counts as work in progress
    before = stamps(out)
    with pytest.raises(ConfigError, match=r"has a_prediction.nii.gz, .* and 1 more already; give --resume"):
        main(batch)
    capsys.readouterr()
    assert main([*batch, "--resume"]) == 0
    assert "2 of 4 images have their label map already" in capsys.readouterr().out
    after = stamps(out)
    assert [before[name] == after[name] for name in NAMES] == [True, True, False, False]
    assert len(entries(out)) == 4
    assert not list(out.glob(".*")), "nothing half-written is left"
    whole = {name: (out / name).read_bytes() for name in entries(out)}
    assert main([*batch, "--overwrite"]) == 0
    assert {name: (out / name).read_bytes() for name in entries(out)} == whole
    again = stamps(out)
    (out / ".a_prediction.nii.gz.partial-1").touch()  # a worker died in this write, another one made the file
    assert main([*batch, "--resume"]) == 0
    assert stamps(out) == again
    assert not list(out.glob(".*"))
    words = ["c", *batch, "--overwrite", "--largest-component"]
    subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, check=False)
    assert not entries(out).keys() & {f"{name}_prediction.nii.gz" for name in "cd"}, "whose they are is not known"


def test_label_maps_of_other_images_weights_or_settings_are_not_kept(batch: list[str], tmp_path: Path) -> None:
    out, run = tmp_path / "out", tmp_path / "run"
    assert main(batch) == 0
    before = stamps(out)
    write_image(tmp_path / "scans" / "b.nii.gz", 99)
    with pytest.raises(ConfigError, match=r"b_prediction.nii.gz \(another image\); give --overwrite as well"):
        main([*batch, "--resume"])
    for more in (["--largest-component"], ["--largest-component", "--preview"]):
        with pytest.raises(ConfigError, match=r"a_prediction.nii.gz \(another postprocessing"):
            main([*batch, "--resume", *more])
    with pytest.raises(ConfigError, match=r"a_prediction.nii.gz \(another --modality\)"):
        main([*batch[:5], "ct", *batch[6:], "--resume"])
    assert stamps(out) == before
    assert main([*batch, "--resume", "--overwrite"]) == 0
    after = stamps(out)
    assert [before[name] == after[name] for name in NAMES] == [True, False, True, True]
    save(run / "checkpoints" / "step-0000400", segmenter(1))
    with pytest.raises(ConfigError, match=r"a_prediction.nii.gz \(other weights\), .* and 1 more; give --overwrite"):
        main([*batch, "--resume"])


def test_an_image_that_is_gone_is_a_failure_of_its_own(batch: list[str], tmp_path: Path) -> None:
    images = [str(tmp_path / "scans" / f"{name}.nii.gz") for name in NAMES]
    words = [batch[0], *images, *batch[2:]]
    assert main(words) == 0
    Path(images[1]).unlink()
    (tmp_path / "out" / "c_prediction.nii.gz").unlink()
    assert main([*words, "--resume"]) == 3
    assert (tmp_path / "out" / "c_prediction.nii.gz").exists()


def test_where_every_prediction_failed_no_table_is_left(batch: list[str], tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / "scans" / f"{name}.nii.gz").write_bytes(b"not an image")
    assert main(batch) == 3
    assert not list((tmp_path / "out").iterdir())


def test_label_maps_of_a_tree_are_resumed_by_their_folders(batch: list[str], tmp_path: Path) -> None:
    for folder in ("p1", "p2/ses"):
        write_image(tmp_path / "tree" / folder / "x.nii.gz", len(folder))
    words = [batch[0], str(tmp_path / "tree"), *batch[2:], "--pattern", "**/x.nii.gz"]
    assert main([*words, "--probabilities"]) == 0
    label_maps = ["p1/x_prediction.nii.gz", "p2/ses/x_prediction.nii.gz"]
    assert list(entries(tmp_path / "out")) == label_maps
    (tmp_path / "out" / "p1" / "x_probability_RV.nii.gz").unlink()
    before = [(tmp_path / "out" / name).stat().st_mtime_ns for name in label_maps]
    assert main([*words, "--probabilities", "--resume"]) == 0
    after = [(tmp_path / "out" / name).stat().st_mtime_ns for name in label_maps]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True]


def test_a_damaged_or_changed_label_map_is_not_kept(
    batch: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(batch) == 0
    whole = {name: (out / f"{name}_prediction.nii.gz").read_bytes() for name in NAMES}
    (out / "a_prediction.nii.gz").write_bytes(whole["a"][:100])
    capsys.readouterr()
    assert main([*batch, "--resume"]) == 0
    shown = capsys.readouterr()
    assert "note: damaged, made again: a_prediction.nii.gz" in shown.err
    assert "3 of 4 images have their label map already" in shown.out
    assert (out / "a_prediction.nii.gz").read_bytes() == whole["a"]
    (out / "b_prediction.nii.gz").write_bytes(whole["c"])
    with pytest.raises(ConfigError, match=r"b_prediction.nii.gz \(changed since it was written\); give --overwrite as"):
        main([*batch, "--resume"])
    assert (out / "b_prediction.nii.gz").read_bytes() == whole["c"]
    assert main([*batch, "--resume", "--overwrite"]) == 0
    assert {name: (out / f"{name}_prediction.nii.gz").read_bytes() for name in NAMES} == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": None}, r"volumes\.json is damaged \(the entry of b_prediction.nii.gz\); give --overwrite"),
        ({"checkpoint": []}, r"volumes\.json is damaged"),
        ({"prepared_as": None}, r"b_prediction.nii.gz \(another --modality\); give --overwrite as well"),
        (None, r"b_prediction.nii.gz \(entry incomplete\); give --overwrite as well"),
    ],
)
def test_a_damaged_entry_is_said(change: dict[str, Any] | None, said: str, batch: list[str], tmp_path: Path) -> None:
    file = tmp_path / "out" / "volumes.json"
    assert main(batch) == 0
    good = entries(file.parent)
    entry = {**good["b_prediction.nii.gz"], **change} if change is not None else {}
    file.write_text(json.dumps({"predictions": {**good, "b_prediction.nii.gz": entry}}), encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        main([*batch, "--resume"])
    assert main([*batch, "--resume", "--overwrite"]) == 0
    assert entries(file.parent) == good


def test_a_truncated_record_is_called_damaged(batch: list[str], tmp_path: Path) -> None:
    file = tmp_path / "out" / "volumes.json"
    assert main(batch) == 0
    content = file.read_bytes()
    for broken, said in ((content[:-40], "is damaged"), (b"[]", "was not written by predict")):
        file.write_bytes(broken)
        with pytest.raises(ConfigError, match=f"volumes.json {said}"):
            main([*batch, "--resume"])


def test_a_batch_that_a_scheduler_ends_says_how_to_go_on(
    batch: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add = tmp_path / "out", Record.add
    before = signal.getsignal(signal.SIGTERM)  # that of Ray where an earlier test started it in this process

    def ended(self: Record, prediction: Prediction) -> None:
        if prediction.image.name.startswith("c"):
            with replacing(out / "d_prediction.nii.gz") as partial:
                partial.touch()
                os.kill(os.getpid(), signal.SIGTERM)
        add(self, prediction)

    with monkeypatch.context() as patched:
        patched.setattr(Record, "add", ended)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM before all images .* command with --resume"):
            main(batch)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not list(out.glob(".*"))
    assert sorted(entries(out)) == ["a_prediction.nii.gz", "b_prediction.nii.gz"]
    assert main([*batch, "--resume"]) == 0
    assert len(entries(out)) == 4
