"""Voxel sizes, directions and units of NIfTI files, and label maps on the grid of their image."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.data.volumes.nifti import read_image, read_label
from mpscl_ray.data.volumes.recipe import GeometryFrom
from mpscl_ray.data.volumes.same_grid import check_same_geometry, turned_to
from mpscl_ray.errors import DataError
from tests.nifti_files import AFFINE, OFFSETS_1, ramp, refusal, rotated, save


def forms(qform: int, sform: int) -> dict[int, bytes]:
    return {OFFSETS_1["forms"]: struct.pack("<2h", qform, sform)}


def test_without_sform_and_qform_a_spacing_has_to_be_assumed(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii.gz", patch=forms(0, 0))
    assert "neither an sform nor a qform" in refusal(path)
    volume = read_image(path, assume_spacing_mm=(1.0, 2.0, 4.0))
    np.testing.assert_array_equal(volume.affine, np.diag([1.0, 2.0, 4.0, 1.0]))
    assert volume.spacing_mm == (1.0, 2.0, 4.0)
    assert any("assumed" in notice for notice in volume.notices)


def test_an_assumed_spacing_does_not_override_a_usable_header(tmp_path: Path) -> None:
    volume = read_image(save(tmp_path / "v.nii.gz"), assume_spacing_mm=(9.0, 9.0, 9.0))
    np.testing.assert_allclose(volume.affine, AFFINE)
    (said,) = volume.notices
    assert said.startswith("the header has voxels of 1.5 x 2 x 3 mm and was taken; --assume-spacing is only for")
    assert read_image(tmp_path / "v.nii.gz", assume_spacing_mm=volume.spacing_mm).notices == ()


@pytest.mark.parametrize("sizes", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, float("nan"), 1.0), (1.0, 1.0)])
def test_an_assumed_spacing_has_to_be_possible(tmp_path: Path, sizes: tuple[float, ...]) -> None:
    path = save(tmp_path / "v.nii.gz", patch=forms(0, 0))
    assert "assumed spacing" in refusal(path, assume_spacing_mm=sizes)


@pytest.mark.parametrize(("qform", "sform"), [(1, 0), (0, 1), (1, 1), (2, 4)])
def test_either_form_gives_the_affine(tmp_path: Path, qform: int, sform: int) -> None:
    np.testing.assert_allclose(
        read_image(save(tmp_path / "v.nii.gz", patch=forms(qform, sform))).affine, AFFINE, atol=1e-5
    )


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_zero_voxel_sizes_are_refused_not_taken_for_one(tmp_path: Path, value: float) -> None:
    path = save(tmp_path / "v.nii.gz", patch={OFFSETS_1["pixdim"] + 4: struct.pack("<f", value)})
    assert f"voxel sizes {value:g}, 2, 3 mm" in refusal(path)
    assert read_image(path, assume_spacing_mm=(1.0, 1.0, 1.0)).spacing_mm == (1.0, 1.0, 1.0)


def test_negative_voxel_sizes_count_as_positive(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii.gz", patch={**forms(1, 0), OFFSETS_1["pixdim"] + 4: struct.pack("<f", -1.5)})
    np.testing.assert_allclose(read_image(path).affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "said"),
    [([0.0, 0.0, 0.0, 1.0], "singular"), ([0.0, 2.0, 0.0, 1.0], "singular"), ([float("nan"), 0, 0, 0], "not finite")],
)
def test_an_affine_without_inverse_is_refused(tmp_path: Path, row: list[float], said: str) -> None:
    path = save(tmp_path / "v.nii.gz", patch={280: struct.pack("<4f", *row), **forms(0, 1)})
    assert said in refusal(path)
    assert "--geometry" not in refusal(path)
    path = save(tmp_path / "v.nii.gz", patch={280: struct.pack("<4f", *row)})
    for words in ({}, {"geometry": "sform"}, {"geometry": "pixdim"}):
        assert said in refusal(path, **words)
        assert refusal(path, **words).endswith("; its qform is good: give --geometry qform")
    volume = read_image(path, geometry="qform")
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert not any("nan" in notice for notice in volume.notices)


@pytest.mark.parametrize(("asked", "codes"), [("qform", (0, 1)), ("sform", (1, 0))])
def test_a_part_that_the_header_lacks_need_not_be_named(tmp_path: Path, asked: str, codes: tuple[int, int]) -> None:
    said = refusal(save(tmp_path / "v.nii.gz", patch=forms(*codes)), geometry=asked)
    assert f"has no {asked}, which --geometry asks for; it has a" in said
    assert said.endswith("form: leave --geometry out")


def test_a_quaternion_that_is_no_rotation_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii.gz", patch={**forms(1, 0), 256: struct.pack("<3f", 0.9, 0.9, 0.9)})
    assert "quaternion" in refusal(path)


@pytest.mark.parametrize(("degrees", "noticed"), [(0, False), (14, False), (16, True), (40, True), (-30, True)])
def test_oblique_volumes_are_noticed(tmp_path: Path, degrees: float, noticed: bool) -> None:
    volume = read_image(save(tmp_path / "v.nii.gz", affine=rotated(degrees)))
    found = [notice for notice in volume.notices if "oblique" in notice]
    assert bool(found) == noticed
    if noticed:
        assert f"{abs(degrees)} degrees" in found[0]
        assert "LAS" in found[0]


def test_axes_off_the_right_angle_are_noticed(tmp_path: Path) -> None:
    affine = AFFINE.copy()
    affine[1, 2] = 1.0
    sizes = np.linalg.norm(affine[:3, :3], axis=0).astype("<f4").tobytes()
    path = save(tmp_path / "v.nii.gz", patch={80: sizes, 280: affine[:3].astype("<f4").tobytes(), **forms(0, 1)})
    assert any("right angles" in notice for notice in read_image(path).notices)


def test_forms_that_disagree_are_noticed(tmp_path: Path) -> None:
    moved = AFFINE.copy()
    moved[0, 3] += 5
    path = save(tmp_path / "v.nii.gz", patch={280: moved[:3].astype("<f4").tobytes()})
    volume = read_image(path)
    assert any("disagree by up to 5.0 mm" in notice for notice in volume.notices)
    np.testing.assert_allclose(volume.affine, moved)


def test_the_note_on_forms_that_disagree_says_which_sizes_are_used(tmp_path: Path) -> None:
    (said,) = read_image(two_sizes(tmp_path / "v.nii.gz", 1), geometry="pixdim").notices
    assert said.endswith("mm; the sform with the voxel sizes of pixdim is used")


def two_sizes(path: Path, qform: int) -> Path:
    """1.5 x 2 x 3 mm by the sform, 1.25 x 1.25 x 10 mm by pixdim and qform."""
    return save(path, patch={80: np.array([1.25, 1.25, 10], "<f4").tobytes(), **forms(qform, 1)})


@pytest.mark.parametrize("qform", [0, 1])
def test_voxel_sizes_that_are_not_those_of_the_sform_are_refused(tmp_path: Path, qform: int) -> None:
    """As in the headers of ACDC: taking the wrong one makes wrong volumes and distances."""
    path = two_sizes(tmp_path / "v.nii.gz", qform)
    said = refusal(path)
    for part in ("1.5 x 2 x 3 mm by its sform", "1.25 x 1.25 x 10 mm by its", "--geometry sform", "--geometry "):
        assert part in said
    assert f"--geometry {'qform' if qform else 'pixdim'}" in said


@pytest.mark.parametrize(
    ("geometry", "sizes"), [("sform", (1.5, 2, 3)), ("qform", (1.25, 1.25, 10)), ("pixdim", (1.25, 1.25, 10))]
)
def test_the_part_of_the_header_that_is_right_can_be_named(
    tmp_path: Path, geometry: GeometryFrom, sizes: tuple[float, ...]
) -> None:
    volume = read_image(two_sizes(tmp_path / "v.nii.gz", 1), geometry=geometry)
    np.testing.assert_allclose(volume.spacing_mm, sizes, rtol=1e-6)
    assert nib.aff2axcodes(volume.affine) == nib.aff2axcodes(AFFINE)


def test_orientations_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    turned = AFFINE.copy()
    turned[0] *= -1
    path = save(tmp_path / "v.nii.gz", patch={280: turned[:3].astype("<f4").tobytes()})
    letters = ["".join(nib.aff2axcodes(affine)) for affine in (turned, AFFINE)]
    assert f"{letters[0]} by its sform and {letters[1]} by its qform" in refusal(path)
    np.testing.assert_allclose(read_image(path, geometry="sform").affine, turned)
    np.testing.assert_allclose(read_image(path, geometry="qform").affine, AFFINE, atol=1e-5)


def test_the_voxel_sizes_of_a_header_without_forms_are_offered(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii.gz", patch=forms(0, 0))
    assert "1.5 x 2 x 3 mm (--geometry pixdim)" in refusal(path)
    np.testing.assert_allclose(read_image(path, geometry="pixdim").affine, np.diag([1.5, 2, 3, 1]), atol=1e-6)


@pytest.mark.parametrize(("code", "factor"), [(0, 1.0), (2, 1.0), (1, 1000.0), (3, 0.001), (10, 1.0), (9, 1000.0)])
def test_units_are_converted_to_mm(tmp_path: Path, code: int, factor: float) -> None:
    stored = AFFINE.copy()
    stored[:3] /= factor
    volume = read_image(save(tmp_path / "v.nii.gz", affine=stored, patch={123: bytes([code])}))
    np.testing.assert_allclose(volume.spacing_mm, (1.5, 2, 3), rtol=1e-6)
    assert bool(volume.notices) == (factor != 1.0)


@pytest.mark.parametrize("code", [1, 3])
def test_a_unit_that_no_scan_has_is_refused(tmp_path: Path, code: int) -> None:
    path = save(tmp_path / "v.nii.gz", patch={123: bytes([code])})
    assert "which no scan has; correct xyzt_units" in refusal(path)
    assert read_image(path, assume_spacing_mm=(1.0, 1.0, 2.0)).spacing_mm == (1.0, 1.0, 2.0)


def test_same_geometry_tolerates_rounding_only(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "image.nii.gz"))
    nudged, moved = AFFINE.copy(), AFFINE.copy()
    nudged[0, 3] += 5e-3
    moved[0, 3] += 5e-2
    check_same_geometry(image, read_label(save(tmp_path / "nudged.nii.gz", affine=nudged)))
    with pytest.raises(DataError, match=r"moved.*image\.nii\.gz.*0\.05 mm apart.*--fix-geometry copy-from-image"):
        check_same_geometry(image, read_label(save(tmp_path / "moved.nii.gz", affine=moved)))
    with pytest.raises(DataError, match=r"\(5, 4, 2\).*\(5, 4, 3\)"):
        check_same_geometry(image, read_label(save(tmp_path / "short.nii.gz", ramp(shape=(5, 4, 2)))))


def test_a_label_map_stored_in_another_orientation_is_turned(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "image.nii.gz"))
    o = nib.orientations
    start = o.io_orientation(AFFINE)
    for order in ((0, 1, 2), (2, 0, 1)):
        turn = np.array([[axis, -1 if axis == 1 else 1] for axis in order])
        stored = nib.Nifti1Image(ramp("i2"), AFFINE).as_reoriented(turn)
        nib.save(stored, tmp_path / "label.nii.gz")
        label = turned_to(image, read_label(tmp_path / "label.nii.gz"))
        np.testing.assert_array_equal(label.array, ramp("i2"))
        np.testing.assert_array_equal(o.io_orientation(label.affine), start)
        assert "turned to the image" in label.notices[-1]
    moved = AFFINE.copy()
    moved[0, 3] += 1
    other = read_label(save(tmp_path / "moved.nii.gz", affine=moved))
    assert turned_to(image, other) is other


def test_a_transposed_label_map_is_recognised(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "image.nii.gz"))
    label = read_label(save(tmp_path / "label.nii.gz", ramp("i2").transpose(1, 0, 2)))
    with pytest.raises(DataError, match="transposed"):
        check_same_geometry(image, label)
