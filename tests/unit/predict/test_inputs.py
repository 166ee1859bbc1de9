"""What predict takes for an image: files of a folder, and intensities that fit the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.data.volumes.nifti import read_image
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import DataError
from mpscl_ray.predict.image import SLICER_LABELS, Job, _refuse_other_modality
from mpscl_ray.predict.model import Checkpoint, Domain
from mpscl_ray.predict.run import _without_long_names, find_images

JOB = Job("run", Checkpoint("last", Path("weights")), 0, "target", Path("out"), probabilities=True)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_own_outputs_are_no_images_and_the_rest_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.nii.gz", "b.mha", "a_seg.nii.gz", "note.txt", "a_prediction.nii.gz", "a_probability_LV.nii.gz"):
        (tmp_path / name).touch()
    (tmp_path / "more").mkdir()
    assert "a_probability_LV.nii.gz" in names(find_images([tmp_path], None)[0])  # not ours without the label table
    (tmp_path / SLICER_LABELS).touch()
    capsys.readouterr()
    images, failed = find_images([tmp_path], None)
    assert names(images) == ["a.nii.gz", "b.mha"]
    assert not failed
    said = capsys.readouterr().err
    for part in ("a_seg.nii.gz", "note.txt", "more/", "a_probability_LV.nii.gz"):
        assert part in said
    assert "a_prediction" not in said


def test_a_name_that_is_too_long_does_not_stop_the_batch() -> None:
    images = [Path(f"{'x' * 240}.nii.gz"), Path("good.nii.gz")]
    failed: list = []
    assert _without_long_names(images, JOB, ("background", "LV"), failed) == [Path("good.nii.gz")]
    assert "too long a name" in failed[0].error


def test_an_image_of_another_modality_is_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    domain = Domain("ct", -2.0, 3.0, Recipe(hounsfield=True), None, None, {})
    for name, low in (("mr", 0), ("ct", -1000)):
        image = np.abs(random.normal(200, 100, (12, 12, 8))) + low
        nib.save(nib.Nifti1Image(image.astype(np.int16), np.eye(4)), tmp_path / f"{name}.nii.gz")
    mr, ct = (read_image(tmp_path / f"{name}.nii.gz") for name in ("mr", "ct"))
    _refuse_other_modality(ct, domain)
    with pytest.raises(DataError, match=r"mr\.nii\.gz: .* no Hounsfield units.*--any-modality"):
        _refuse_other_modality(mr, domain)
    _refuse_other_modality(mr, replace(domain, recipe=Recipe()))  # trained on CT of any intensities
    _refuse_other_modality(mr, replace(domain, modality="mr"))
    with pytest.raises(DataError, match="are Hounsfield units"):
        _refuse_other_modality(ct, replace(domain, modality="mr"))
