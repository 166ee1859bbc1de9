"""Flip single bits of files that the product wrote or reads, and count what is noticed before anything uses them.

    python -m tests.trust.flips --flips 250

A flip is detected (an error of the product), harmless (what is read is the same, bit for bit) or unnoticed. Exits with
1 if a file with a checksum has an unnoticed one. A plain ``.nii`` has none: it is counted to say so.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.label_map_files import encode_label_map, read_label_map, write_label_map_file
from mpscl_ray.data.parquet_reader import SplitFiles, read_case
from mpscl_ray.data.volumes.nifti import read_image
from mpscl_ray.errors import MpsclError
from mpscl_ray.runs import checkpoint, model_file
from tests.checkpoints import small_state
from tests.nifti_files import AFFINE
from tests.trust.inputs import CLASSES, model_members
from tests.written_dataset import save_plain_manifest, write_plain_case

NUMBERS = np.random.default_rng(0)
WITHOUT_CHECKSUM = {"nifti, not compressed"}


def _volume() -> bytes:
    return nib.Nifti1Image(NUMBERS.integers(-900, 900, (24, 20, 12)).astype("i2"), AFFINE).to_bytes()


def _write_nifti(folder: Path) -> None:
    (folder / "v.nii.gz").write_bytes(gzip.compress(_volume(), mtime=0))


def _write_plain_nifti(folder: Path) -> None:
    (folder / "v.nii").write_bytes(_volume())


def _read_volume(folder: Path) -> list[Any]:
    volume = read_image(next(folder.iterdir()))
    return [volume.array, volume.affine, np.array(volume.spacing_mm)]


def _write_dataset(folder: Path) -> None:
    image = NUMBERS.normal(size=(6, 32, 32)).clip(-1, 1).astype(np.float32)
    label = (image > 0.3).astype(np.uint8)
    case = write_plain_case(folder, "p1", "train", image, label, CLASSES, spacing_mm=(3.0, 1.0, 1.0))
    stored = write_label_map_file(folder, "train", "p1", encode_label_map(label, AFFINE))
    save_plain_manifest(folder, "mr", CLASSES, (32, 32), [dataclasses.replace(case, label_map=stored)])


def _read_dataset(folder: Path) -> list[Any]:
    """By both readers: whole cases, and slices as training takes them."""
    manifest = load_manifest(folder)
    case = manifest.cases[0]
    slices = SplitFiles.find(folder, "train", labels=True).read(np.arange(6))
    whole = read_case(folder, case)
    assert all(np.array_equal(slices[name], whole[name]) for name in whole)
    return [json.dumps(dataclasses.asdict(manifest)), read_label_map(folder, case), *whole.values()]


def _read_slices(folder: Path) -> list[Any]:
    """As training takes them: without the SHA-256 of the whole file."""
    return list(SplitFiles.find(folder, "train", labels=True).read(np.arange(6)).values())


def _write_checkpoint(folder: Path) -> None:
    checkpoint.save(folder / "step-0000001", {**small_state(1), "fixed": {"split": torch.arange(500)}})


def _read_checkpoint(folder: Path) -> list[Any]:
    state = checkpoint.load(folder / "step-0000001")
    return [json.dumps(state, default=lambda value: value.numpy().tobytes().hex(), sort_keys=True)]


def _write_model(folder: Path) -> None:
    (folder / "m.mpscl").write_bytes(model_file.pack(model_members()))


def _read_model(folder: Path) -> list[Any]:
    return list(model_file.unpack((folder / "m.mpscl").read_bytes(), "m.mpscl").values())


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], list[Any]]]] = {
    "nifti, .nii.gz": (_write_nifti, _read_volume),
    "prepared dataset": (_write_dataset, _read_dataset),
    "prepared dataset, slices alone": (_write_dataset, _read_slices),
    "checkpoint": (_write_checkpoint, _read_checkpoint),
    "model file": (_write_model, _read_model),
    "nifti, not compressed": (_write_plain_nifti, _read_volume),
}


def same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(
        np.array_equal(one, other, equal_nan=True) if isinstance(other, np.ndarray) else one == other
        for one, other in zip(found, expected, strict=True)
    )


def flip(kind: str, count: int, seed: int, folder: Path) -> Counter[str]:
    """Flip one bit after the other, each put back before the next."""
    write, read = KINDS[kind]
    folder.mkdir()
    write(folder)
    good = read(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    numbers, found = random.Random(seed), Counter[str]()
    for _ in range(count):
        path = numbers.choices(files, sizes)[0]
        content = path.read_bytes()
        changed = bytearray(content)
        position = numbers.randrange(8 * len(content))
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            found["harmless" if same(read(folder), good) else "unnoticed"] += 1
        except MpsclError:
            found["detected"] += 1
        path.write_bytes(content)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trust.flips", description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=250, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        for number, kind in enumerate(KINDS):
            found = flip(kind, options.flips, options.seed, Path(temporary) / str(number))
            wrong += 0 if kind in WITHOUT_CHECKSUM else found["unnoticed"]
            print(json.dumps({"kind": kind, **found}), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
