"""DICOM series as inputs of predict: which are images, and what their label maps are called."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.data.volumes.nifti import read_image
from mpscl_ray.data.volumes.nifti_output import write_label_map
from mpscl_ray.predict.image import stem
from mpscl_ray.predict.run import find_images
from tests.dicom_files import series

STORED = np.random.default_rng(0).integers(0, 2000, (12, 10, 8)).astype(np.int16)


def test_dicom_series_are_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    series(tmp_path / "scans" / "p1", STORED)
    series(tmp_path / "scans" / "p2", STORED)
    series(tmp_path / "scans" / "p2", STORED[:, :, :4], number=5, name="B{}")
    series(tmp_path / "scans" / "p2", STORED[:, :, :1], number=1, name="C{}")
    images, failed = find_images([tmp_path / "scans"], None)
    assert not failed
    assert [stem(image) for image in images] == ["p1", "p2_series3", "p2_series5"]
    assert [read_image(image).array.shape[2] for image in images] == [8, 8, 4]
    assert "holds 3 DICOM series" in capsys.readouterr().err
    assert find_images([tmp_path / "scans" / "p1"], None)[0] == [tmp_path / "scans" / "p1"]


def test_folders_and_files_that_hold_no_single_series(tmp_path: Path) -> None:
    series(tmp_path / "p1", STORED, tags={"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"})
    series(tmp_path / "p2", STORED)
    (tmp_path / "p2" / "other.nii.gz").touch()
    slices = sorted(series(tmp_path / "p3", STORED).iterdir())
    images, failed = find_images([tmp_path / "p1", tmp_path / "p2", *slices], None)
    assert images == []
    said = [str(one.error) for one in failed]
    assert len(said) == 3
    for path, part in (
        ("p1", "a localiser"),
        ("p2", "beside its other images"),
        ("p3", "give the folder of the"),
    ):
        assert sum(str(tmp_path / path) in error and part in error for error in said) == 1
    (tmp_path / "p2" / "other.nii.gz").rename(tmp_path / "p2" / "p2_seg.nii.gz")  # a label map of the series
    assert find_images([tmp_path / "p2"], None)[0] == [tmp_path / "p2"]


def test_a_label_map_is_on_the_grid_of_its_series(tmp_path: Path) -> None:
    image = read_image(series(tmp_path / "p1", STORED, directions=(0.6, 0.8, 0, 0, 0, -1)))
    labels = (STORED > 1000).astype(np.uint8)
    write_label_map(tmp_path / "out.nii.gz", labels, image, ("background", "LV"))
    written = nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), labels)
    np.testing.assert_allclose(written.affine, image.affine, atol=1e-5)
