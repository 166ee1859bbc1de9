"""NRRD and MetaImage headers that leave out voxel sizes or directions, which SimpleITK makes up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpscl_ray.data.volumes.nifti import read_image
from mpscl_ray.errors import DataError

ARRAY = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 6 5 4\n{}encoding: raw\nendian: little\n\n"
META = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n{}"
    "DimSize = 6 5 4\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
)
FIELDS = {
    ".nrrd": (NRRD, "spacings: 2 2 4\n", "space: left-posterior-superior\nspace directions: (2,0,0) (0,2,0) (0,0,4)\n"),
    ".mha": (META, "ElementSpacing = 2 2 4\n", "TransformMatrix = 1 0 0 0 1 0 0 0 1\nElementSpacing = 2 2 4\n"),
}


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode() + ARRAY.tobytes())
    return path


@pytest.mark.parametrize("ending", FIELDS)
def test_voxel_sizes_are_not_made_up(ending: str, tmp_path: Path) -> None:
    header = FIELDS[ending][0]
    path = write(tmp_path / f"a{ending}", header.format(""))
    with pytest.raises(DataError, match=r"voxel sizes 0, 0, 0 mm.*--assume-spacing"):
        read_image(path)
    assert read_image(path, assume_spacing_mm=(2, 2, 4)).spacing_mm == (2, 2, 4)


@pytest.mark.parametrize("ending", FIELDS)
def test_missing_directions_are_said(ending: str, tmp_path: Path) -> None:
    header, sizes, whole = FIELDS[ending]
    without = read_image(write(tmp_path / f"a{ending}", header.format(sizes)))
    assert "the header has no directions" in without.notices[0]
    complete = read_image(write(tmp_path / f"b{ending}", header.format(whole)))
    assert not complete.notices
    np.testing.assert_allclose(without.affine, complete.affine)
    np.testing.assert_array_equal(without.array, complete.array)
