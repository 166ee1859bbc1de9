"""NIfTI files: read right or refused in one sentence."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from mpscl_ray.data.volumes.label_maps import map_labels
from mpscl_ray.data.volumes.nifti import read_image, read_label
from mpscl_ray.data.volumes.recipe import GeometryFrom, NanPolicy
from mpscl_ray.data.volumes.same_grid import check_same_geometry, turned_to
from mpscl_ray.errors import DataError
from tests.nifti_files import AFFINE, SHAPE, ramp, rotated, save

OFFSETS_1 = {"dim": 40, "datatype": 70, "pixdim": 76, "vox_offset": 108, "slope": 112, "inter": 116, "forms": 252}


def refusal(path: Path, **options: Any) -> str:
    """The error for a file: a single sentence that names it."""
    with pytest.raises(DataError) as caught:
        read_image(path, **options)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


# --------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize("header_class", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_type_and_byte_order_reads_as_written(
    tmp_path: Path, dtype: str, endianness: str, name: str, header_class: Any
) -> None:
    header = header_class.header_class(endianness=endianness)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(endianness))
    image = header_class(ramp(dtype), AFFINE, header)
    nib.save(image, tmp_path / name)
    volume = read_image(tmp_path / name)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, ramp("f4"))
    np.testing.assert_allclose(volume.affine, AFFINE)
    np.testing.assert_allclose(volume.spacing_mm, (1.5, 2.0, 3.0))
    assert volume.header.endianness == endianness
    assert volume.notices == ()
    assert volume.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii.gz", patch={OFFSETS_1["slope"]: struct.pack("<2f", 0.25, -7.5)})
    np.testing.assert_allclose(read_image(path).array, ramp("f8") * 0.25 - 7.5)
    np.testing.assert_allclose(read_image(path).array, np.asanyarray(nib.load(path).dataobj))


@pytest.mark.parametrize("slope", [0.0, float("nan"), float("inf")])
def test_slope_without_meaning_leaves_the_stored_values_and_is_reported(tmp_path: Path, slope: float) -> None:
    path = save(tmp_path / "v.nii", patch={OFFSETS_1["slope"]: struct.pack("<2f", slope, 100.0)})
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array, ramp("f4"))
    assert any("slope" in notice for notice in volume.notices)


def test_intercept_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii", patch={OFFSETS_1["slope"]: struct.pack("<2f", 2.0, float("nan"))})
    assert "intercept nan" in refusal(path)


def test_singleton_time_axis_is_dropped_with_a_notice(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii.gz", ramp(shape=(*SHAPE, 1)))
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array, ramp("f4"))
    assert any("axes of length 1" in notice for notice in volume.notices)


@pytest.mark.parametrize(
    ("shape", "said"),
    [((5, 4, 3, 2), "4 axes (5 x 4 x 3 x 2)"), ((5, 4, 3, 1, 3), "5 axes"), ((20, 30), "single picture of 20 x 30")],
)
def test_other_numbers_of_axes_are_refused(tmp_path: Path, shape: tuple[int, ...], said: str) -> None:
    assert said in refusal(save(tmp_path / "v.nii.gz", ramp(shape=shape)))


def test_several_gzip_members_and_padding_are_one_stream(tmp_path: Path) -> None:
    content = save(tmp_path / "v.nii").read_bytes()
    path = tmp_path / "w.nii.gz"
    path.write_bytes(gzip.compress(content[:100]) + b"\0" * 7 + gzip.compress(content[100:]) + b"\0" * 512)
    np.testing.assert_array_equal(read_image(path).array, ramp("f4"))


def test_bytes_after_the_voxels_are_reported_and_many_refused(tmp_path: Path) -> None:
    content = save(tmp_path / "v.nii").read_bytes()
    path = tmp_path / "w.nii.gz"
    path.write_bytes(gzip.compress(content + b"x" * 100))
    assert any(notice.startswith("100 bytes") for notice in read_image(path).notices)
    path.write_bytes(gzip.compress(content + b"\0" * (3 << 20)))
    assert "header and data disagree" in refusal(path)


# --------------------------------------------------------------------------------------------- damaged files


def test_every_bit_flip_in_a_gz_is_noticed_or_harmless(tmp_path: Path) -> None:
    good = save(tmp_path / "good.nii.gz", np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype("i2"))
    expected = read_image(good)
    content = good.read_bytes()
    damaged = tmp_path / "damaged.nii.gz"
    noticed = 0
    positions = np.random.default_rng(1).choice(len(content) * 8, 600, replace=False)
    for position in positions:
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << (position % 8)
        damaged.write_bytes(flipped)
        try:
            volume = read_image(damaged)
        except DataError:
            noticed += 1
        else:
            np.testing.assert_array_equal(volume.array, expected.array)
            np.testing.assert_array_equal(volume.affine, expected.affine)
            assert volume.sha256 != expected.sha256
    assert noticed >= 580


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_truncation_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    content = save(tmp_path / name).read_bytes()
    for length in range(1, len(content), 3):
        (tmp_path / name).write_bytes(content[:length])
        refusal(tmp_path / name)


def test_truncation_names_found_and_expected_bytes(tmp_path: Path) -> None:
    content = save(tmp_path / "v.nii").read_bytes()
    (tmp_path / "v.nii").write_bytes(content[:-10])
    sentence = refusal(tmp_path / "v.nii")
    assert str(len(content)) in sentence
    assert str(len(content) - 10) in sentence
    (tmp_path / "v.nii.gz").write_bytes(gzip.compress(content[:-10]))
    assert f"holds {len(content) - 10} bytes, expected {len(content)}" in refusal(tmp_path / "v.nii.gz")


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty (0 bytes)"),
        (b"<html><body>please log in</body></html>" * 30, "web page"),
        (b"<!DOCTYPE html>", "web page"),
        (b"PK\x03\x04" + b"\0" * 600, "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"\0" * 128 + b"DICM" + b"\0" * 600, "give the folder of its series"),
        (b"NRRD0004\n" + b"\0" * 600, "NRRD"),
        (b"\x01" * 900, "no format known"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path / name)


def test_web_page_inside_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "v.nii.gz").write_bytes(gzip.compress(b"<html>" * 200))
    assert "web page" in refusal(tmp_path / "v.nii.gz")


def test_wrong_names_are_refused_with_the_right_one(tmp_path: Path) -> None:
    save(tmp_path / "v.nii").rename(tmp_path / "v.nii.gz")
    assert "rename it to end in .nii" in refusal(tmp_path / "v.nii.gz")
    save(tmp_path / "w.nii.gz").rename(tmp_path / "w.nii")
    assert "rename it to end in .nii.gz" in refusal(tmp_path / "w.nii")
    save(tmp_path / "x.nii").rename(tmp_path / "x.mhd")
    assert "'.mhd'" in refusal(tmp_path / "x.mhd")


def test_missing_folder_pipe_and_link_to_itself_are_refused(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "none.nii.gz")
    assert "there is no such file" in refusal(tmp_path / "none")
    (tmp_path / "folder.nii").mkdir()
    assert "a folder without DICOM files" in refusal(tmp_path / "folder.nii")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    refusal(tmp_path / "loop.nii")
    os.mkfifo(tmp_path / "pipe.nii")
    assert "no regular file" in refusal(tmp_path / "pipe.nii")


def test_names_with_spaces_and_other_letters_are_read(tmp_path: Path) -> None:
    path = save(tmp_path / "Herz größe 心臓 (1).NII.GZ".replace(".NII.GZ", ".nii.gz"))
    np.testing.assert_array_equal(read_image(path).array, ramp("f4"))


def test_other_members_of_the_family_are_refused(tmp_path: Path) -> None:
    assert ".hdr/.img pair" in refusal(save(tmp_path / "v.nii", patch={344: b"ni1\0"}))
    assert "Analyze" in refusal(save(tmp_path / "w.nii", patch={344: b"\0\0\0\0"}))


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        ([3, 32767, 32767, 32767, 1, 1, 1, 1], "limit"),
        ([3, 5, -4, 3, 1, 1, 1, 1], "impossible dimensions"),
        ([3, 5, 0, 3, 1, 1, 1, 1], "impossible dimensions"),
        ([0, 5, 4, 3, 1, 1, 1, 1], "impossible dimensions"),
        ([9, 5, 4, 3, 1, 1, 1, 1], "impossible dimensions"),
        ([7, 5, 4, 3, 2, 2, 2, 2], "truncated"),
        ([3, 1000, 1000, 1000, 1, 1, 1, 1], "truncated or its header is wrong"),
    ],
)
@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_absurd_dimensions_are_refused_before_memory_is_allocated(
    tmp_path: Path, dims: list[int], said: str, name: str
) -> None:
    path = save(tmp_path / name, patch={OFFSETS_1["dim"]: struct.pack("<8h", *dims)})
    tracemalloc.start()
    try:
        assert said in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_the_limit_is_on_voxels(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii.gz")
    read_image(path, max_voxels=60)
    assert "limit of 59" in refusal(path, max_voxels=59)


@pytest.mark.parametrize(
    ("code", "name"), [(32, "complex64"), (128, "RGB24"), (2304, "RGBA32"), (1536, "float128"), (77, "unknown")]
)
def test_types_that_are_no_grey_values_are_named(tmp_path: Path, code: int, name: str) -> None:
    path = save(tmp_path / "v.nii.gz", patch={OFFSETS_1["datatype"]: struct.pack("<h", code)})
    assert f"type {name}" in refusal(path)


@pytest.mark.parametrize("offset", [1.0, 351.0, -352.0, float("nan"), float("inf"), 1e9])
def test_voxels_at_an_impossible_byte_are_refused(tmp_path: Path, offset: float) -> None:
    path = save(tmp_path / "v.nii", patch={OFFSETS_1["vox_offset"]: struct.pack("<f", offset)})
    refusal(path)


def test_offset_zero_means_after_the_header(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii", patch={OFFSETS_1["vox_offset"]: struct.pack("<f", 0.0)})
    np.testing.assert_array_equal(read_image(path).array, ramp("f4"))


def test_voxels_that_are_not_finite_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    array = ramp("f4")
    array[3, 1, 0] = np.nan
    array[0, 2, 1] = np.inf
    array[4, 3, 2] = -np.inf
    sentence = refusal(save(tmp_path / "v.nii.gz", array))
    assert "3 voxels" in sentence
    assert "(3, 1, 0)" in sentence
    array = ramp("f8")
    array[1, 0, 0] = 1e300
    assert "in 1 voxel," in refusal(save(tmp_path / "w.nii.gz", array))


def test_an_image_of_one_intensity_is_refused(tmp_path: Path) -> None:
    assert "intensity 7 in every voxel" in refusal(save(tmp_path / "v.nii.gz", np.full(SHAPE, 7, "i2")))


def test_any_header_is_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    """Many headers with random bytes: no other error, no memory beyond the limit."""
    random = np.random.default_rng(7)
    contents = [save(tmp_path / "v.nii").read_bytes()]
    nib.save(nib.Nifti2Image(ramp(), AFFINE), tmp_path / "v2.nii")
    contents.append((tmp_path / "v2.nii").read_bytes())
    path = tmp_path / "w.nii"
    outcomes = {True: 0, False: 0}
    tracemalloc.start()
    try:
        for number in range(1500):
            content = bytearray(contents[number % 2])
            for position in random.integers(0, len(content) - ramp().nbytes, random.integers(1, 6)):
                content[position] = random.integers(0, 256)
            path.write_bytes(content)
            try:
                volume = read_image(path, max_voxels=1 << 20)
            except DataError:
                outcomes[False] += 1
            else:
                assert np.isfinite(volume.array).all()
                assert np.isfinite(volume.affine).all()
                assert min(volume.spacing_mm) > 0
                outcomes[True] += 1
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert min(outcomes.values()) > 100


# --------------------------------------------------------------------------------------------- geometry


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
    assert volume.notices == ()


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
    path = save(tmp_path / "v.nii.gz", patch={280: struct.pack("<4f", *row)})
    assert said in refusal(path)


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


@pytest.mark.parametrize(("policy", "value"), [("lowest", -4.0), ("zero", 0.0)])
def test_voxels_that_are_not_finite_can_be_replaced(tmp_path: Path, policy: NanPolicy, value: float) -> None:
    array = np.random.default_rng(0).uniform(-3, 3, SHAPE).astype("f4")
    array[0, 0, 0], array[1, 1, 1], array[2, 2, 2] = -4, np.nan, np.inf
    path = save(tmp_path / "v.nii.gz", array)
    assert "--nan-policy" in refusal(path)
    volume = read_image(path, nan_policy=policy)
    assert volume.array[1, 1, 1] == volume.array[2, 2, 2] == value
    assert f"NaN or infinite intensities were set to {value:g}: 2 voxels" in volume.notices


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_files_of_itk_are_read_as_nifti_is(tmp_path: Path, ending: str) -> None:
    nifti = read_image(save(tmp_path / "v.nii.gz", ramp("i2"), affine=rotated(10)))
    itk = SimpleITK.ReadImage(str(nifti.path))
    SimpleITK.WriteImage(itk, str(tmp_path / f"v{ending}"))
    found = read_image(tmp_path / f"v{ending}")
    np.testing.assert_array_equal(found.array, nifti.array)
    np.testing.assert_allclose(found.affine, nifti.affine, atol=1e-5)
    assert found.notices == tuple(notice for notice in nifti.notices if "slope" not in notice)
    check_same_geometry(nifti, found)
    content = (tmp_path / f"v{ending}").read_bytes()
    (tmp_path / f"v{ending}").write_bytes(content[:-40])
    assert f"v{ending}" in refusal(tmp_path / f"v{ending}")


# --------------------------------------------------------------------------------------------- label maps


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "u8", "f4", "f8"])
def test_label_ids_are_read_from_any_type(tmp_path: Path, dtype: str) -> None:
    volume = read_label(save(tmp_path / "v.nii.gz", ramp(dtype) * np.dtype(dtype).type(3)))
    assert volume.array.dtype == np.int32
    np.testing.assert_array_equal(volume.array, ramp("i4") * 3)


def test_label_ids_go_through_slope_and_intercept(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii.gz", patch={OFFSETS_1["slope"]: struct.pack("<2f", 10.0, 5.0)})
    np.testing.assert_array_equal(read_label(path).array, ramp("i4") * 10 + 5)


def test_a_label_map_may_be_empty(tmp_path: Path) -> None:
    volume = read_label(save(tmp_path / "v.nii.gz", np.zeros(SHAPE, "u1")))
    assert not volume.array.any()
    _, notices = map_labels(volume.array, {200: 1}, set(), volume.path)
    assert "no voxel belongs to any class" in notices[0]


@pytest.mark.parametrize("value", [200.0, 200.0009, 199.9991])
def test_labels_within_rounding_are_whole(tmp_path: Path, value: float) -> None:
    array = ramp("f8")
    array[2, 2, 2] = value
    assert read_label(save(tmp_path / "v.nii.gz", array)).array[2, 2, 2] == 200


@pytest.mark.parametrize("value", [200.0011, 1.5, -0.002, float("nan"), float("inf"), 3e9])
def test_labels_that_are_no_ids_are_refused(tmp_path: Path, value: float) -> None:
    array = ramp("f8")
    array[1, 2, 0] = value
    array[4, 2, 1] = value
    path = save(tmp_path / "v.nii.gz", array)
    with pytest.raises(DataError, match=r"2 voxels.*\(1, 2, 0\)") as caught:
        read_label(path)
    assert str(path) in str(caught.value)
