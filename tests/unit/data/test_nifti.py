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
from mpscl_ray.data.volumes.recipe import NanPolicy
from mpscl_ray.data.volumes.same_grid import check_same_geometry
from mpscl_ray.errors import DataError
from tests.nifti_files import AFFINE, OFFSETS_1, SHAPE, ramp, refusal, rotated, save

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
