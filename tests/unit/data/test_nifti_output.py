"""Label maps written back in the geometry of their image; texts in headers."""

from __future__ import annotations

import gzip
import itertools
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from mpscl_ray.data.volumes.nifti import Volume, read_image, read_label
from mpscl_ray.data.volumes.nifti_output import write_label_map
from mpscl_ray.data.volumes.personal_data import private_fields
from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.runs.palette import COLOURS
from tests.nifti_files import AFFINE, SHAPE, ramp, rotated, save

CLASSES = ["background", "MYO", "LAC"]
LABELS = (ramp("i4") % 3).astype(np.uint8)


def with_texts(path: Path, image: Any) -> Path:
    image.header["descrip"] = b"DOE^JANE scan 4"
    image.header["aux_file"] = b"doe_jane.txt"
    image.header["intent_name"] = b"Doe"
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"patient: Jane Doe"))
    nib.save(image, path)
    return path


@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("codes", [(1, 0), (0, 2), (2, 4)])
@pytest.mark.parametrize("name", ["out.nii.gz", "out.nii"])
def test_a_label_map_has_the_geometry_of_its_image_and_none_of_its_texts(
    tmp_path: Path, image_class: Any, endianness: str, codes: tuple[int, int], name: str
) -> None:
    affine = rotated(25)
    image = image_class(ramp("f4"), affine, image_class.header_class(endianness=endianness))
    image.set_qform(affine if codes[0] else None, code=codes[0])
    image.set_sform(affine if codes[1] else None, code=codes[1])
    image.header.set_xyzt_units("mm", "sec")
    source = with_texts(tmp_path / "in.nii.gz", image)
    write_label_map(tmp_path / name, LABELS, read_image(source), CLASSES)
    first, second = nib.load(source), nib.load(tmp_path / name)
    assert type(second) is image_class
    np.testing.assert_array_equal(np.asanyarray(second.dataobj), LABELS)
    assert second.header.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(first.affine, second.affine)
    assert (int(second.header["qform_code"]), int(second.header["sform_code"])) == codes
    np.testing.assert_array_equal(first.header["pixdim"], second.header["pixdim"])
    assert first.header["xyzt_units"] == second.header["xyzt_units"]
    content = (tmp_path / name).read_bytes()
    content = gzip.decompress(content) if name.endswith("gz") else content
    assert b"oe" not in content[: 544 if image_class is nib.Nifti2Image else 352]
    assert len(content) == second.dataobj.offset + LABELS.size
    assert private_fields(second.header) == ()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["in.nii.gz", name])
    np.testing.assert_array_equal(read_label(tmp_path / name).array, LABELS)


def test_a_label_map_keeps_a_singleton_time_axis(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "in.nii.gz", ramp(shape=(*SHAPE, 1))))
    write_label_map(tmp_path / "out.nii.gz", LABELS, image, CLASSES)
    assert nib.load(tmp_path / "out.nii.gz").shape == (*SHAPE, 1)


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_order_does_not_matter(tmp_path: Path, order: Any) -> None:
    image = read_image(save(tmp_path / "in.nii.gz"))
    write_label_map(tmp_path / "out.nii.gz", np.asarray(LABELS, order=order), image, CLASSES)
    np.testing.assert_array_equal(np.asanyarray(nib.load(tmp_path / "out.nii.gz").dataobj), LABELS)


def test_labels_that_do_not_belong_to_the_image_are_refused(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "in.nii.gz"))
    with pytest.raises(DataError, match=r"\(3, 4, 5\)"):
        write_label_map(tmp_path / "out.nii.gz", LABELS.T, image, CLASSES)
    with pytest.raises(DataError, match=r"label 2.*2 classes"):
        write_label_map(tmp_path / "out.nii.gz", LABELS, image, CLASSES[:2])
    with pytest.raises(StorageError, match=r"out\.nii\.gz"):
        write_label_map(tmp_path / "none" / "out.nii.gz", LABELS, image, CLASSES)


def test_the_same_label_map_is_the_same_file(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "in.nii.gz"))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_label_map(tmp_path / name, LABELS, image, CLASSES)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_texts_in_headers_are_found(tmp_path: Path) -> None:
    plain = read_image(save(tmp_path / "plain.nii.gz"))
    assert plain.private == ()
    volume = read_image(with_texts(tmp_path / "v.nii.gz", nib.Nifti1Image(ramp(), AFFINE)))
    assert volume.private == ("descrip", "aux_file", "intent_name", "comment extension")
    nib.save(nib.Nifti2Image(ramp(), AFFINE), tmp_path / "v2.nii.gz")
    assert read_image(tmp_path / "v2.nii.gz").private == ()


def test_a_broken_extension_is_ignored(tmp_path: Path) -> None:
    path = with_texts(tmp_path / "v.nii", nib.Nifti1Image(ramp(), AFFINE))
    content = bytearray(path.read_bytes())
    content[352:356] = struct.pack("<i", 1 << 20)
    path.write_bytes(content)
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array, ramp("f4"))
    assert any("extension" in notice for notice in volume.notices)


# Linear RGB of a colour as seen without the one or the other kind of cone (Vienot, Brettel and Mollon 1999).
PROTANOPE = np.array([[0.1124, 0.8876, 0.0], [0.1124, 0.8876, 0.0], [0.0040, -0.0040, 1.0]])
DEUTERANOPE = np.array([[0.2928, 0.7072, 0.0], [0.2928, 0.7072, 0.0], [-0.0223, 0.0223, 1.0]])


@pytest.mark.parametrize("vision", [np.eye(3), PROTANOPE, DEUTERANOPE])
def test_colours_differ_for_every_vision(vision: npt.NDArray[np.float64]) -> None:
    seen = ((np.array(COLOURS) / 255) ** 2.2 @ vision.T).clip(0, 1) ** (1 / 2.2) * 255
    for first, second in itertools.combinations(seen, 2):
        assert np.linalg.norm(first - second) > 25
    assert COLOURS[0] == (0, 0, 0)


def test_a_volume_says_where_it_comes_from(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii.gz")
    volume = read_image(str(path))
    assert isinstance(volume, Volume)
    assert volume.path == path
