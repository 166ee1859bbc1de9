"""What predict takes for an image: files of a folder, and intensities that fit the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mpscl_ray.data.volumes.nifti import Volume, read_image
from mpscl_ray.data.volumes.personal_data import private_fields
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.predict.command import main
from mpscl_ray.predict.image import Job, outputs
from mpscl_ray.predict.model import Domain
from mpscl_ray.predict.output_names import SLICER_LABELS
from mpscl_ray.predict.run import _without_long_names, find_images
from mpscl_ray.predict.segmenter import load_segmenter
from mpscl_ray.predict.volume import refuse_other_modality
from tests.untrained_run import save, segmenter, write_run

JOB = Job((), "target", Path("out"), probabilities=True)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.mark.parametrize("own", [SLICER_LABELS, "a_prediction.nii.gz"])
def test_own_outputs_are_no_images_and_the_rest_is_listed(
    own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.nii.gz", "b.mha", "a_seg.nii.gz", "note.txt", "a_probability_LV.nii.gz"):
        (tmp_path / name).touch()
    (tmp_path / "more").mkdir()
    assert "a_probability_LV.nii.gz" in names(find_images([tmp_path], None)[0])  # nothing says that it is ours
    (tmp_path / own).touch()
    capsys.readouterr()
    images, failed = find_images([tmp_path], None)
    assert names(images) == ["a.nii.gz", "b.mha"]
    assert not failed
    said = capsys.readouterr().err
    for part in ("a_seg.nii.gz", "note.txt", "more/", "a_probability_LV.nii.gz"):
        assert part in said
    assert "a_prediction" not in said


def test_a_pattern_with_folders_finds_images_below_and_label_maps_keep_the_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["sub-01/anat/sub-01_cine.nii.gz", "sub-02/ses-1/anat/sub-02_cine.nii.gz"]
    others = ["top.nii.gz", "sub-01/anat/sub-01_T1w.nii.gz", ".git/anat/x_cine.nii.gz"]
    written = ["maps/sub-01/anat/sub-01_cine_prediction.nii.gz", "maps/sub-01/anat/sub-01_cine_probability_LV.nii.gz"]
    for name in (*wanted, *others, *written, "maps/anat/alone.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    images, failed = find_images([tmp_path], "sub-*/**/*_cine.nii.gz")
    assert [path.relative_to(tmp_path).as_posix() for path in images] == wanted
    assert not failed
    said = capsys.readouterr().err
    assert "4: maps/anat/alone.nii.gz" in said
    assert "top.nii.gz" in said
    everything = {path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path], "**/*.nii.gz")[0]}
    assert everything == {*wanted, *others[:2], "maps/anat/alone.nii.gz"}
    job = replace(JOB, roots=(tmp_path,))
    assert outputs(images[1], job, ("background", "LV")) == (
        "sub-02/ses-1/anat/sub-02_cine_prediction.nii.gz",
        "sub-02/ses-1/anat/sub-02_cine_probability_LV.nii.gz",
    )
    for pattern in ("/abs/*.nii.gz", "a**/*.nii.gz"):
        with pytest.raises(ConfigError, match=r"expected a path below the folder, such as '\*\*/anat/\*.nii.gz'"):
            find_images([tmp_path], pattern)


def test_images_of_one_name_in_different_folders_of_a_tree_do_not_clash(tmp_path: Path) -> None:
    for folder in ("a/p1", "a/p2", "b/p1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "cine.nii.gz").touch()
    images, _ = find_images([tmp_path / "a"], "**/cine.nii.gz")
    assert len(images) == 2
    with pytest.raises(ConfigError, match=r"a/p1/cine.nii.gz.*b/p1/cine.nii.gz would give label maps of the same name"):
        find_images([tmp_path / "a", tmp_path / "b"], "**/cine.nii.gz")
    assert len(find_images([tmp_path], "**/cine.nii.gz")[0]) == 3
    (nothing,) = find_images([tmp_path / "a"], None)[1]
    assert "'**/*.nii.gz'" in (nothing.error or "")


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

    def check(volume: Volume, domain: Domain) -> None:
        refuse_other_modality(volume.array, domain, volume.path.name)

    check(ct, domain)
    with pytest.raises(DataError, match=r"mr\.nii\.gz: .* no Hounsfield units.*--any-modality"):
        check(mr, domain)
    check(mr, replace(domain, recipe=Recipe()))  # trained on CT of any intensities
    check(mr, replace(domain, modality="mr"))
    with pytest.raises(DataError, match="are Hounsfield units"):
        check(ct, replace(domain, modality="mr"))


def test_label_maps_and_own_probability_maps_are_refused_whatever_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, scans, out = write_run(tmp_path / "run").path, tmp_path / "scans", tmp_path / "out"
    save(run / "checkpoints" / "step-0000300", segmenter())
    image = np.random.default_rng(0).normal(100, 30, (34, 12, 36)).astype(np.float32)
    scans.mkdir()
    nib.save(nib.Nifti1Image(image, np.eye(4)), scans / "a.nii.gz")
    options = ["--modality", "mr", "--workers", "0", "--device", "cpu"]
    assert main([str(run), str(scans), "--out", str(out), *options, "--probabilities"]) == 0
    (out / "a_prediction.nii.gz").rename(scans / "labels.nii.gz")
    probability = (out / "a_probability_LV.nii.gz").rename(scans / "a_probability_LV.nii.gz")
    assert private_fields(nib.load(probability).header) == ()
    capsys.readouterr()
    assert main([str(run), str(scans), "--out", str(tmp_path / "again"), *options]) == 3
    shown = capsys.readouterr()
    assert "a_prediction.nii.gz: " in shown.out
    assert "labels.nii.gz has only" in shown.err
    assert "as a label map; give the image, or --any-modality if it is one" in shown.err
    assert "a_probability_LV.nii.gz is a probability map that predict wrote; give the image" in shown.err
    assert [path.name for path in (tmp_path / "again").glob("*.nii.gz")] == ["a_prediction.nii.gz"]
    arguments = [str(run), str(scans / "labels.nii.gz"), "--out", str(tmp_path / "any"), *options]
    assert main([*arguments, "--any-modality"]) == 0
    trained = load_segmenter(run, device="cpu")
    for name, said in (("labels", "or any_modality=True if it is one"), ("a_probability_LV", "a probability map")):
        with pytest.raises(DataError, match=said):
            trained.predict_file(scans / f"{name}.nii.gz", tmp_path / "new.nii.gz", modality="mr")
    with pytest.raises(DataError, match="the volume has only 2 different values, 0, 1, as a label map"):
        trained.predict(image > 100, np.eye(4), modality="mr")


def test_slices_across_thick_voxels_and_several_volumes_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run").path
    save(run / "checkpoints" / "step-0000300", segmenter())
    image = np.random.default_rng(0).normal(100, 30, (34, 36, 5, 2)).astype(np.float32)
    for name, array in (("thick", image[..., 0]), ("cine", image)):
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 20.0, 1.0])), tmp_path / f"{name}.nii.gz")
    files = [str(tmp_path / f"{name}.nii.gz") for name in ("thick", "cine")]
    options = ["--out", str(tmp_path / "out"), "--modality", "mr", "--workers", "0", "--device", "cpu"]
    assert main([str(run), *files, *options]) == 3
    shown = capsys.readouterr()
    assert "note: slices run across voxels that are 20 mm thick, and 2 mm along them, as the model" in shown.out
    assert "cine.nii.gz has 4 axes" in shown.err
    assert "extract one time point" in shown.err
    assert "--frames" not in shown.err
