"""A prepare that is stopped while it reads volumes, and the same command after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.prepare.command import main
from tests.raw_volumes import mmwhs


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_the_same_command_does_not_read_again_what_was_read(tmp_path: Path, name: str) -> None:
    """Volumes that were read are made unreadable, with size and time as before."""
    source, out = mmwhs(tmp_path / "in", numbers=range(1001, 1025)), tmp_path / "out"
    words = [str(source), "--layout", "mmwhs", "--crop", "16,16", "--workers", "0", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-m", "mpscl_ray.prepare", *words, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(out.glob(".ct.unfinished-*/.staged/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    process.wait()
    kept = list(out.glob(".ct.unfinished-*/.staged/*_staged.json"))
    assert 3 <= len(kept) < 24, "it was stopped while it read"
    for file in kept:
        number = json.loads(file.read_bytes())["case"]["sources"]["image"].split("_")[2]
        image = source / f"ct_train_{number}_image.nii.gz"
        before = image.stat()
        image.write_bytes(bytes(before.st_size))
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert main([*words, str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["ct"]
    assert load_manifest(out / "ct").fingerprint == load_manifest(tmp_path / "whole" / "ct").fingerprint
    pages = [(folder / "ct" / "pictures.html").read_bytes() for folder in (out, tmp_path / "whole")]
    assert pages[0] == pages[1]


def test_what_changed_is_read_again(tmp_path: Path) -> None:
    source, out = mmwhs(tmp_path / "in", numbers=range(1001, 1025)), tmp_path / "out"
    words = [str(source), "--layout", "mmwhs", "--workers", "0", "--no-pictures", "--out"]
    command = [sys.executable, "-m", "mpscl_ray.prepare", *words, str(out), "--crop", "16,16"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(out.glob(".ct.unfinished-*/.staged/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert main([*words, str(out), "--crop", "12,12"]) == 0
    assert main([*words, str(tmp_path / "whole"), "--crop", "12,12"]) == 0
    assert load_manifest(out / "ct").fingerprint == load_manifest(tmp_path / "whole" / "ct").fingerprint
