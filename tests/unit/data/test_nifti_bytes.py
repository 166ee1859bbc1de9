"""Voxels that would be read from the wrong bytes are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from mpscl_ray.data.volumes.nifti import read_image
from tests.heart_scans import scan
from tests.nifti_files import OFFSETS_1, refusal, save
from tests.raw_volumes import write


def test_voxels_that_begin_within_a_voxel(tmp_path: Path) -> None:
    where = OFFSETS_1["vox_offset"]
    path = save(tmp_path / "v.nii", patch={where: struct.pack("<f", 353)})
    path.write_bytes(path.read_bytes() + b"\0")
    assert "begin at byte 353; expected 352 or another multiple of 16" in refusal(path)
    path = save(tmp_path / "w.nii", patch={where: struct.pack("<f", 368)})
    path.write_bytes(path.read_bytes() + bytes(16))
    read_image(path)


@pytest.mark.parametrize("kind", ["ct", "mr"])
@pytest.mark.parametrize("dtype", ["i2", "u2", "i4"])
def test_voxels_in_another_byte_order_than_the_header(tmp_path: Path, kind: str, dtype: str) -> None:
    image = (scan(0, kind)[0] + (1100 if dtype == "u2" else 0)).astype(dtype)
    write(tmp_path / "v.nii", image, np.diag([2.0, 2, 4, 1]))
    read_image(tmp_path / "v.nii")
    write(tmp_path / "w.nii", image.byteswap(), np.diag([2.0, 2, 4, 1]))
    assert "the byte order in its header is not that of its voxels" in refusal(tmp_path / "w.nii")


def test_noise_and_the_whole_range_are_read(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = random.integers(-32768, 32768, (20, 20, 9)).astype(np.int16)
    wide = (60000 * np.linspace(0, 1, 3600)).astype(np.uint16).reshape(20, 20, 9)
    for number, image in enumerate((noise, wide)):
        write(tmp_path / f"{number}.nii", image, np.diag([2.0, 2, 4, 1]))
        read_image(tmp_path / f"{number}.nii")
