"""Personal data in headers and names: said once, with counts, and never repeated."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.data.volumes.nifti import read_image
from mpscl_ray.prepare.check_command import main
from tests.raw_volumes import made, mmwhs, volume, write

TEXTS = (b"DOE^JANE", b"doe_jane.txt", b"Doe")


def with_texts(path: Path, *, description: bytes = b"", extensions: tuple[int, ...] = ()) -> None:
    image = nib.load(path)
    image = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header)
    image.header["descrip"] = description
    image.header.extensions.extend(nib.nifti1.Nifti1Extension(code, b"Doe^Jane 19510203") for code in extensions)
    nib.save(image, path)


def notes(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    main([str(folder), *(words or ("--layout", "mmwhs")), "--workers", "0"])
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("  note: ") for line in lines if " may " in line]


def test_texts_of_headers_are_said_once_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = mmwhs(tmp_path / "in")
    for number in range(1001, 1005):
        with_texts(folder / f"ct_train_{number}_image.nii.gz", description=b"DOE^JANE")
    with_texts(folder / "ct_train_1005_label.nii.gz", extensions=(2, 6))
    expected = (
        "headers have texts that may name a person, and are not copied: descrip (4 cases), extension with DICOM tags "
        "(1 case), comment extension (1 case)"
    )
    assert notes(folder, capsys) == [f"ct: {expected}"]
    out, manifest = made(folder)
    assert [notice for notice in manifest.notices if " may name " in notice] == [expected]
    assert "DOE" not in (out / "manifest.json").read_text(encoding="utf-8").upper()


def test_descriptions_by_programs_are_none(tmp_path: Path) -> None:
    for number, text in enumerate((b"FSL5.0", b"6.0.3:b862cdd5", b"TE=2.5;Time=101112.5", b"ITK 5.4", b"SPM12", b"")):
        write(tmp_path / f"{number}.nii.gz", volume(0)[0])
        with_texts(tmp_path / f"{number}.nii.gz", description=text)
        assert read_image(tmp_path / f"{number}.nii.gz").private == (("descrip",) if number == 1 else ())


def test_keys_of_other_formats(tmp_path: Path) -> None:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    for key in ("0010|0010", "DICOM_0010_0030", "PatientName", "modality"):
        image.SetMetaData(key, "Doe^Jane")
    for name in ("a.nrrd", "a.mha"):
        SimpleITK.WriteImage(image, str(tmp_path / name))
        assert set(read_image(tmp_path / name).private) == {"0010|0010", "DICOM_0010_0030", "PatientName"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("Doe_Jane", "MUELLER_HANS", "p3"), "tell a person, 2, e.g. D**_J***, M******_H***; names of"),
        (("Doe^Jane_lge", "p2", "p3"), "tell a person, 1, e.g. D**^J***; names of"),
        (
            ("p1_19510203", "p2_1951-02-03", "p3_03.02.1951"),
            "tell a date, perhaps of birth, 3, e.g. 1*******, 1***-0*-0*",
        ),
        (("Heart_Cine_1", "Heart_Cine_2", "Heart_Cine_3"), None),
        (("Leiden_Utrecht_1", "Leiden_Utrecht_2", "Leiden_Utrecht_3"), None),  # two sites: all cases share it
        (("patient_LGE", "Case_One", "sub-01_ses-02"), None),
        (("12345678", "20241301", "1003_20"), None),
    ],
)
def test_names_of_files(
    tmp_path: Path, names: tuple[str, ...], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(names):
        image, label = volume(seed)
        write(tmp_path / "in" / name / "image.nii.gz", image)
        write(tmp_path / "in" / name / "label.nii.gz", label)
    labels = "205=MYO,420=LAC,500=LVC,820=AA"
    patterns = ("--image-pattern", "{case}/image.nii.gz", "--label-pattern", "{case}/label.nii.gz")
    words = ("--layout", "folder", "--modality", "mr", "--labels", labels, "--patient-pattern", ".+", *patterns)
    found = notes(tmp_path / "in", capsys, *words)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
    assert not any(name in line for name in names[:2] for line in found)
