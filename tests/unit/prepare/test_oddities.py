"""Real files that break careless readers, and real cardiac volumes; skipped if they are not available."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.data.volumes.geometry import restore_labels
from mpscl_ray.data.volumes.label_maps import map_labels
from mpscl_ray.data.volumes.nifti import read_image, read_label
from mpscl_ray.data.volumes.nifti_output import write_label_map
from mpscl_ray.data.volumes.preprocess import label_centre, label_free_centre, prepare_volume
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.data.volumes.same_grid import check_same_geometry
from mpscl_ray.errors import DataError

OBLIQUE = "the volume is oblique: its axes are up to 17 degrees"
ACCEPTED: dict[str, tuple[tuple[int, int, int], str, float, float, tuple[str, ...]]] = {
    # name: shape, orientation, lowest and highest intensity, notices
    "CT_AVM.nii.gz": ((256, 242, 154), "RAS", 0.0, 563.200003, ()),
    "CT_pitch.nii.gz": ((175, 248, 58), "RAS", 0.0, 255.0, (OBLIQUE,)),
    "MR_Gd.nii.gz": ((176, 188, 144), "RAS", 0.0, 1652.999947, ()),
    "anatomical.nii": ((33, 41, 25), "LAS", -610.0, 30393.0, ()),
    "example_ct_sm.nii.gz": ((122, 101, 30), "RAS", -1100.0, 1207.0, ()),
    "example_mr_sm.nii.gz": ((117, 91, 20), "LPS", -47.0, 833.0, ()),
    "fmri_pitch.nii.gz": ((64, 64, 35), "RAS", 0.0, 2210.000081, ()),
    "reoriented_anat_moved.nii": ((21, 26, 22), "RAS", 0.0, 21199.936, ()),
    "spmMotor.nii.gz": ((79, 95, 79), "LAS", -6.862357, 12.156505, ()),
}
FOUR_AXES = {
    "example4d.nii.gz": "128 x 96 x 24 x 2",
    "example_nifti2.nii.gz": "32 x 20 x 12 x 2",
    "functional.nii": "17 x 21 x 3 x 20",
    "pcasl.nii.gz": "52 x 68 x 20 x 10",
}
LABEL_MAPS = {
    "example_seg.nii.gz": ("example_ct_sm.nii.gz", "RAS", {1: 9452, 5: 38634, 13: 1}),
    "example_seg_mr.nii.gz": ("example_mr_sm.nii.gz", "LPS", {1: 1941, 5: 18480, 49: 135}),
}


@pytest.fixture(scope="module")
def oddities(reference_data: Path) -> Path:
    return reference_data / "oddities"


def test_every_file_of_the_collection_is_covered(oddities: Path) -> None:
    assert {path.name for path in oddities.glob("*.nii*")} == {*ACCEPTED, *FOUR_AXES, *LABEL_MAPS}


@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_but_sound_images_are_read_right(oddities: Path, name: str) -> None:
    shape, orientation, low, high, notices = ACCEPTED[name]
    volume = read_image(oddities / name)
    reference = nib.load(oddities / name)
    assert volume.array.shape == shape
    assert (volume.array.min(), volume.array.max()) == pytest.approx((low, high), rel=1e-6)
    np.testing.assert_allclose(volume.array, np.asanyarray(reference.dataobj), rtol=2e-7)
    np.testing.assert_array_equal(volume.affine, reference.affine)
    np.testing.assert_allclose(volume.spacing_mm, reference.header.get_zooms(), rtol=1e-4)
    assert len(volume.notices) == len(notices)
    for found, start in zip(volume.notices, notices, strict=True):
        assert found.startswith(start)
    prepared = prepare_volume(volume.array, volume.affine, None, Recipe(crop=(32, 32)))
    assert prepared.geometry.steps[0].startswith(f"orientation {orientation}")


@pytest.mark.parametrize("name", FOUR_AXES)
def test_series_are_refused_with_their_axes(oddities: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        read_image(oddities / name)
    sentence = str(caught.value)
    assert sentence.startswith(f"{oddities / name} has 4 axes ({FOUR_AXES[name]})")
    assert "time point" in sentence


@pytest.mark.parametrize("name", ["functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz", "pcasl.nii.gz"])
def test_one_time_point_of_a_series_is_read_with_its_slope(oddities: Path, name: str, tmp_path: Path) -> None:
    series = nib.load(oddities / name)
    stored = np.asanyarray(series.dataobj.get_unscaled())[..., 1:2]
    point = type(series)(stored, None, series.header)
    point.header.set_slope_inter(series.dataobj.slope, series.dataobj.inter)
    (tmp_path / "point.nii").write_bytes(point.to_bytes())
    volume = read_image(tmp_path / "point.nii")
    np.testing.assert_allclose(volume.array, np.asanyarray(series.dataobj)[..., 1], rtol=2e-7)
    np.testing.assert_array_equal(volume.affine, series.affine)
    assert any("length 1" in notice for notice in volume.notices)


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_label_maps_are_on_the_grid_of_their_images(oddities: Path, name: str) -> None:
    image_name, orientation, counts = LABEL_MAPS[name]
    image, label = read_image(oddities / image_name), read_label(oddities / name)
    check_same_geometry(image, label)
    assert "".join(nib.aff2axcodes(label.affine)) == orientation
    for raw_id, voxels in counts.items():
        assert np.count_nonzero(label.array == raw_id) == voxels
    assert label.private == ("extension of code 0",)
    mapped, (notice,) = map_labels(label.array, {5: 1}, set(range(6, 200)), label.path)
    assert np.count_nonzero(mapped) == counts[5]
    assert f"1 ({counts[1]} voxels)" in notice
    assert "6 (" not in notice
    for plane in ("coronal", "axial", "sagittal"):
        prepared = prepare_volume(image.array, image.affine, mapped, Recipe(slice_axis=plane, crop=(128, 128)))
        assert prepared.label is not None
        np.testing.assert_array_equal(restore_labels(prepared.label, prepared.geometry), mapped)


def test_the_liver_of_both_orientations_is_on_the_left_of_the_picture(oddities: Path) -> None:
    """The patient's right is on the left of axial and coronal slices, whether stored RAS or LPS."""
    for name, (image_name, _, _) in LABEL_MAPS.items():
        image, label = read_image(oddities / image_name), read_label(oddities / name)
        liver = (label.array == 5).astype(np.uint8)
        for plane in ("coronal", "axial"):
            recipe = Recipe(slice_axis=plane, crop=(128, 128), centre="image")
            prepared = prepare_volume(image.array, image.affine, liver, recipe)
            assert prepared.label is not None
            columns = np.nonzero(prepared.label)[2]
            assert columns.mean() < prepared.geometry.axes[2].inside().start + image.array.shape[0] / 2 - 5


@pytest.mark.parametrize("name", ["CT_pitch.nii.gz", "anatomical.nii", "MR_Gd.nii.gz"])
def test_label_maps_are_written_on_the_grid_of_odd_images(oddities: Path, name: str, tmp_path: Path) -> None:
    volume = read_image(oddities / name)
    labels = (volume.array > volume.array.mean()).astype(np.uint8)
    write_label_map(tmp_path / "out.nii.gz", labels, volume, ["background", "bright"])
    first, second = nib.load(oddities / name), nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(first.affine, second.affine)
    np.testing.assert_array_equal(np.asanyarray(second.dataobj), labels)
    for code in ("qform_code", "sform_code"):
        assert int(first.header[code]) == int(second.header[code])
    check_same_geometry(volume, read_label(tmp_path / "out.nii.gz"))


# --------------------------------------------------------------------------------------------- MS-CMRSeg


SHORT_AXIS = Recipe(orientation="stored", slice_axis="2", crop=(144, 144), centre="labels", size=(80, 80))
TABLE = {200: 1, 500: 2, 600: 3}


@pytest.mark.parametrize(
    ("name", "slices"),
    [("bssfp/patient1_C0", 12), ("bssfp/patient10_C0", 10), ("lge/patient1_LGE", 15), ("lge/patient5_LGE", 16)],
)
def test_short_axis_stacks_are_sliced_as_acquired(reference_data: Path, name: str, slices: int) -> None:
    folder = reference_data / "mscmrseg"
    image, label = read_image(folder / f"{name}.nii.gz"), read_label(folder / f"{name}_manual.nii.gz")
    check_same_geometry(image, label)
    assert any("oblique" in notice for notice in image.notices)
    mapped, notices = map_labels(label.array, TABLE, set(), label.path)
    assert notices == ()
    assert np.unique(mapped).tolist() == [0, 1, 2, 3]
    prepared = prepare_volume(image.array, image.affine, mapped, SHORT_AXIS)
    assert prepared.image.shape == (slices, 80, 80)
    assert prepared.label is not None
    np.testing.assert_allclose(np.mean(np.nonzero(prepared.label)[1:], axis=1), 39.5, atol=1.0)
    restored = restore_labels(prepared.label, prepared.geometry)
    for index in (1, 2, 3):
        overlap = 2 * np.count_nonzero((restored == index) & (mapped == index))
        assert overlap / (np.count_nonzero(restored == index) + np.count_nonzero(mapped == index)) > 0.92
    whole = prepare_volume(image.array, image.affine, mapped, Recipe(orientation="stored", slice_axis="2", crop=None))
    assert whole.label is not None
    np.testing.assert_array_equal(restore_labels(whole.label, whole.geometry), mapped)


def test_the_heart_is_found_without_labels(reference_data: Path) -> None:
    distances = []
    for path in sorted((reference_data / "mscmrseg").glob("*/*_manual.nii.gz")):
        image = read_image(path.with_name(path.name.replace("_manual", "")))
        found = np.array(label_free_centre(image.array, image.spacing_mm))
        truth = label_centre(read_label(path).array)
        assert truth is not None
        distances.append(np.hypot(*(found - np.array(truth))[:2]))
    assert len(distances) == 40
    assert np.mean(distances) < 7.5
    assert np.max(distances) < 18
