"""DICOM series: read right, or refused in one sentence."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpscl_ray.data.volumes.geometry import orientation_letters
from mpscl_ray.data.volumes.intensities import other_modality
from mpscl_ray.data.volumes.nifti import read_image
from mpscl_ray.errors import DataError
from tests.dicom_files import rescaled, series, with_identifier

STORED = np.random.default_rng(0).integers(0, 2000, (12, 10, 8)).astype(np.int16)
LOCALISER = {"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"}


def refusal(path: Path) -> str:
    """The error for a series: a single sentence that names it and no patient."""
    with pytest.raises(DataError) as caught:
        read_image(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    assert not any(text in sentence for text in ("DOE", "ID7719", "1951"))
    return sentence


def test_a_series_is_a_volume(tmp_path: Path) -> None:
    folder = series(tmp_path / "p1", STORED)
    volume = read_image(folder)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, STORED)
    np.testing.assert_allclose(
        volume.affine, [[-1.5, 0, 0, -5], [0, -1.25, 0, -6], [0, 0, 3, 10], [0, 0, 0, 1]], atol=1e-6
    )
    assert (volume.spacing_mm, volume.scanner, volume.notices) == ((1.5, 1.25, 3.0), "MR", ())
    files = b"".join(file.read_bytes() for file in sorted(folder.iterdir()))
    assert volume.sha256 == hashlib.sha256(files).hexdigest()
    assert volume.private == ("PatientName", "PatientID", "PatientBirthDate")
    assert not any(text in repr(volume.header) for text in ("DOE", "ID7719", "1951"))


def test_slices_are_ordered_by_position_not_by_name(tmp_path: Path) -> None:
    volume = read_image(series(tmp_path / "p1", STORED, positions=[-3.0 * index for index in range(8)], name="{}"))
    np.testing.assert_array_equal(volume.array, STORED[:, :, ::-1])
    assert volume.affine[2, 3] == -21


@pytest.mark.parametrize("degrees", [0, 17, 80])
def test_an_oblique_series_is_where_its_header_says(tmp_path: Path, degrees: float) -> None:
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    right, down = np.array([cosine, sine, 0]), np.array([0.0, 0.0, -1.0])
    volume = read_image(series(tmp_path / "p1", STORED, directions=(*right, *down)))
    place = np.cross(right, down) * (10 + 3 * 7) + (5, 6, 0) + right * 1.5 * 4 + down * 1.25 * 2  # LPS
    np.testing.assert_allclose((volume.affine @ (4, 2, 7, 1))[:3], place * (-1, -1, 1), atol=1e-4)
    assert orientation_letters(volume.affine) == {0: "LIP", 17: "LIP", 80: "PIR"}[int(degrees)]


def test_slope_and_intercept_of_each_slice_are_applied(tmp_path: Path) -> None:
    folder = series(tmp_path / "p1", STORED, modality="CT", slope=(1, -1024))
    last = folder / "IM0007.dcm"
    last.write_bytes(rescaled(last.read_bytes(), 0.5, -1000))
    volume = read_image(folder)
    np.testing.assert_array_equal(volume.array[:, :, :7], STORED[:, :, :7] - 1024.0)
    np.testing.assert_array_equal(volume.array[:, :, 7], STORED[:, :, 7] * 0.5 - 1000)


def test_the_modality_is_that_of_the_header(tmp_path: Path) -> None:
    volume = read_image(series(tmp_path / "p1", STORED))
    assert other_modality(volume.array, "lge", volume.scanner) is None
    assert other_modality(volume.array, "phantom", volume.scanner) is None
    assert "its DICOM header says MR, not CT" in str(other_modality(volume.array, "cta", volume.scanner))


def test_a_folder_may_hold_other_files_and_a_localiser(tmp_path: Path) -> None:
    folder = series(tmp_path / "p1", STORED, name="IM{}")  # without an ending
    series(folder, STORED[:, :, :3], number=1, name="LOC{}", tags=LOCALISER)
    (folder / "notes.txt").write_text("nothing")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    volume = read_image(folder)
    np.testing.assert_array_equal(volume.array, STORED)
    assert volume.notices == ("DICOM series that are no volumes are left out: series1 (3 slices, a localiser)",)


def test_one_of_several_series_has_to_be_named(tmp_path: Path) -> None:
    folder = series(tmp_path / "p1", STORED)
    series(folder, STORED[:, :, :5] + 1, number=12, name="B{}")
    series(folder, STORED[:, :, :1], number=1, name="C{}")
    said = refusal(folder)
    assert "holds 3 DICOM series: series1 (one slice), series3 (8 slices), series12 (5 slices)" in said
    assert f"name one, e.g. {folder / 'series3'}" in said
    np.testing.assert_array_equal(read_image(folder / "series12").array, STORED[:, :, :5] + 1)
    assert "no volume: series1 (one slice)" in refusal(folder / "series1")
    assert "no such DICOM series" in refusal(folder / "series4")


def two_sizes(folder: Path) -> None:
    series(folder, STORED)
    series(folder, STORED[:6, :, :2], positions=[50, 53], name="B{}")


def two_directions(folder: Path) -> None:
    series(folder, STORED)
    series(folder, STORED, directions=(0, 1, 0, 0, 0, -1), name="B{}")


def changed(change: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: change(series(folder, STORED) / "IM0003.dcm")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda folder: (series(folder, STORED) / "IM0003.dcm").unlink(),
        "3 mm apart, but 6 mm between IM0002.dcm and IM0004.dcm; 1 slice missing, it seems",
    ),
    "uneven": (
        lambda folder: series(folder, STORED, positions=[0, 3, 6, 9, 12, 16, 20, 23]),
        "3 mm apart, but 4 mm between IM0004.dcm and IM0005.dcm (2 such gaps); resample",
    ),
    "copy": (
        lambda folder: series(folder, STORED, positions=[0, 3, 6, 9, 12, 15, 18, 18]),
        "1 of 7 positions of a DICOM series have several slices, e.g. IM0006.dcm and IM0007.dcm",
    ),
    "phases": (
        lambda folder: series(folder, STORED, positions=[0, 0, 3, 3, 6, 6, 9, 9]),
        "2 slices at each of 4 positions in a DICOM series, as in a 4-D scan",
    ),
    "localiser": (lambda folder: series(folder, STORED, tags=LOCALISER), "series3 (8 slices, a localiser)"),
    "one slice": (lambda folder: series(folder, STORED[:, :, :1]), "no volume among its DICOM series"),
    "capture": (
        lambda folder: [
            with_identifier(file, 2, b"1.2.840.10008.5.1.4.1.1.7") for file in series(folder, STORED).iterdir()
        ],
        "(secondary capture)",
    ),
    "sizes": (two_sizes, "slices of different sizes in a DICOM series (8 of 12 x 10, 2 of 6 x 10)"),
    "directions": (two_directions, "slices in different directions"),
    "tilt": (lambda folder: series(folder, STORED, shift=(0, 0.5)), "tilted by 9.5 degrees"),
    "compressed": (
        changed(lambda file: with_identifier(file, 16, b"1.2.840.10008.1.2.4.201")),
        "IM0003.dcm is compressed in a way that is not read (transfer syntax 1.2.840.10008.1.2.4.201)",
    ),
    "truncated": (
        changed(lambda file: file.write_bytes(file.read_bytes()[:-50])),  # type: ignore[arg-type, return-value]
        "truncated or damaged, 1: IM0003.dcm",
    ),
    "no image": (
        lambda folder: [
            with_identifier(file, 2, b"1.2.840.10008.5.1.4.1.1.88.11") for file in series(folder, STORED).iterdir()
        ],
        "no image among its DICOM files",
    ),
    "empty": (lambda folder: folder.mkdir(), "a folder without DICOM files"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_volume_is_refused(tmp_path: Path, kind: str) -> None:
    make, said = BAD[kind]
    make(tmp_path / "p1")
    assert said in refusal(tmp_path / "p1")


def test_colour_pictures_are_no_volume(tmp_path: Path) -> None:
    import SimpleITK

    folder = tmp_path / "p1"
    folder.mkdir()
    for index in range(3):
        picture = SimpleITK.GetImageFromArray(np.zeros((1, 8, 8, 3), np.uint8), isVector=True)
        SimpleITK.WriteImage(picture, str(folder / f"{index}.dcm"))
    assert "colour pictures" in refusal(folder)


def test_a_single_file_points_to_its_folder(tmp_path: Path) -> None:
    file = series(tmp_path / "p1", STORED, name="IM{}") / "IM3"
    assert "one file of a DICOM series: give the folder" in refusal(file)
    with_identifier(file, 2, b"1.2.840.10008.1.3.10")
    assert "the index of a DICOM disc" in refusal(file)
