"""The phantom hearts: plausible anatomy, right physics, and files like those of MM-WHS."""

from __future__ import annotations

import functools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from mpscl_ray.data.phantom.anatomy import AA, LABEL_IDS, LAC, LVC, MYO, PA, RA, RV
from mpscl_ray.data.phantom.case import Modality, make_case
from mpscl_ray.data.phantom.files import make_phantom
from mpscl_ray.data.phantom.imaging import ARTERIAL, VENOUS, CtScan, MrScan, Tissue
from mpscl_ray.data.phantom.shapes import Ellipsoid, Tube
from mpscl_ray.errors import StorageError

SEED = 3
made = functools.cache(make_case)
"""Cases that several tests read; none changes them."""

# Millilitres: what real hearts have, widened by what 10 % in each diameter does. The aorta and the pulmonary artery are
# cut where the labels of MM-WHS end.
VOLUME_ML = {MYO: (40, 190), LAC: (25, 130), LVC: (35, 180), AA: (25, 120), RA: (20, 130), RV: (60, 260), PA: (25, 120)}


def canonical(case) -> tuple[NDArray[np.float64], NDArray[np.int16], NDArray[np.float64]]:
    """Image and label in RAS order, and the voxel size."""
    image = nib.as_closest_canonical(nib.Nifti1Image(case.image, case.affine))
    label = nib.as_closest_canonical(nib.Nifti1Image(case.label.astype(np.int16), case.affine))
    return np.asarray(image.dataobj, float), np.asarray(label.dataobj), np.asarray(image.header.get_zooms(), float)


@pytest.fixture(scope="module", params=["mr", "ct"])
def cases(request: pytest.FixtureRequest):
    return [made(request.param, 1001 + i, SEED) for i in range(4)]


def middle(label: NDArray[np.int16], structure: int, zooms: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.argwhere(label == structure).mean(axis=0) * zooms


def mean_inside(image, label, structure: int) -> float:
    """Mean signal of a structure away from its surface."""
    return float(image[ndimage.binary_erosion(label == structure)].mean())


@pytest.mark.parametrize("modality", ["mr", "ct"])
def test_same_seed_gives_same_case_and_another_seed_does_not(modality: Modality) -> None:
    one, again, other = make_case(modality, 1002, 5), make_case(modality, 1002, 5), make_case(modality, 1002, 6)
    np.testing.assert_array_equal(one.image, again.image)
    np.testing.assert_array_equal(one.label, again.label)
    np.testing.assert_array_equal(one.affine, again.affine)
    assert one.image.shape != other.image.shape or not np.array_equal(one.label, other.label)


def test_mr_and_ct_cases_of_one_number_are_different_patients() -> None:
    volumes = []
    for modality in ("mr", "ct"):
        case = made(modality, 1001, SEED)
        voxel = abs(np.linalg.det(case.affine[:3, :3]))
        volumes.append([(case.label == structure).sum() * voxel for structure in LABEL_IDS])
    ratio = np.array(volumes[0]) / np.array(volumes[1])
    assert np.abs(np.log(ratio)).max() > 0.1


def test_every_structure_is_there_with_a_plausible_volume(cases) -> None:
    for case in cases:
        assert set(np.unique(case.label)) == {0, *LABEL_IDS}
        voxel_ml = abs(np.linalg.det(case.affine[:3, :3])) / 1000
        for structure, (low, high) in VOLUME_ML.items():
            assert low < (case.label == structure).sum() * voxel_ml < high, structure


def test_scans_differ_in_shape_spacing_and_orientation(cases) -> None:
    assert len({case.image.shape for case in cases}) > 1
    assert len({tuple(np.abs(case.affine[:3, :3]).sum(axis=0).round(3)) for case in cases}) == len(cases)
    assert len({nib.aff2axcodes(case.affine) for case in cases}) > 1
    for case in cases:
        assert case.image.shape == case.label.shape
        assert 50 <= min(case.image.shape) <= max(case.image.shape) <= 128


def test_anatomy_is_the_right_way_up_once_the_affine_is_followed(cases) -> None:
    for case in cases:
        _, label, zooms = canonical(case)
        position = {structure: middle(label, structure, zooms) for structure in LABEL_IDS}
        right, anterior, superior = 0, 1, 2
        assert position[LVC][right] < position[RA][right] - 30  # the left ventricle is on the patient's left
        assert position[LAC][anterior] < position[RV][anterior] - 20  # the left atrium is at the back
        assert position[AA][superior] > position[LVC][superior] + 20  # the aorta leaves upwards
        assert position[PA][superior] > position[RV][superior]


def test_myocardium_wraps_the_left_ventricle(cases) -> None:
    for case in cases:
        cavity = case.label == LVC
        shell = ndimage.binary_dilation(cavity, iterations=2) & ~cavity
        assert (case.label[shell] == MYO).mean() > 0.6
        for structure in (MYO, LVC, LAC, AA):
            _, pieces = ndimage.label(case.label == structure)
            sizes = np.bincount(_.ravel())[1:]
            assert sizes.max() > 0.98 * sizes.sum(), f"{structure} is in {pieces} pieces"


def test_ct_is_calibrated_in_hounsfield_units() -> None:
    for number in range(1001, 1005):
        image, label, _ = canonical(made("ct", number, SEED))
        assert 250 < mean_inside(image, label, LVC) < 520  # contrast agent, papillary muscles included
        assert 70 < mean_inside(image, label, MYO) < 160
        assert mean_inside(image, label, AA) > mean_inside(image, label, MYO) + 120
        assert -1024 <= image.min() < -700  # lung
        assert np.median(image[image < -500]) == pytest.approx(-830, abs=80)


def test_ct_right_heart_is_between_washed_out_and_enhanced() -> None:
    ratios = []
    for seed in range(60):
        values = CtScan().draw_values(np.random.default_rng(seed))
        assert values[Tissue.AIR] < values[Tissue.LUNG] < values[Tissue.FAT] < values[Tissue.MYOCARDIUM]
        assert values[Tissue.MYOCARDIUM] < min(values[tissue] for tissue in ARTERIAL)
        ratios.append(values[Tissue.RIGHT_VENTRICLE] / values[Tissue.LEFT_VENTRICLE])
    assert min(ratios) < 0.4  # bolus timing differs from patient to patient
    assert max(ratios) > 0.6
    assert max(ratios) < 1.05


def test_mr_blood_is_bright_on_both_sides_and_suppressed_fat_is_dark() -> None:
    for seed in range(60):
        values = MrScan().draw_values(np.random.default_rng(seed))
        blood = [values[tissue] for tissue in ARTERIAL + VENOUS]
        assert values[Tissue.AIR] == 0
        assert values[Tissue.LUNG] < values[Tissue.MYOCARDIUM] < 0.6 * min(blood)
        assert values[Tissue.FAT] < 0.6 * min(blood)
        assert min(values[tissue] for tissue in VENOUS) > 0.4 * max(blood)


def test_fat_without_suppression_is_brighter_than_blood() -> None:
    values = MrScan(fat_residual=(1.0, 1.0), preparation_ms=(0.0, 0.0)).draw_values(np.random.default_rng(0))
    assert values[Tissue.FAT] > max(values[tissue] for tissue in ARTERIAL)


def test_mr_follows_the_steady_state_signal() -> None:
    """Myocardium over arterial blood at 90 degrees: (PD T2 / (T1 + T2)) exp(-TE/T2), with spread of T1 and T2."""
    scan = MrScan(flip_deg=(90.0, 90.0), preparation_ms=(0.0, 0.0), flow_loss=(0.0, 0.0))
    ratios = [scan.draw_values(np.random.default_rng(seed))[Tissue.MYOCARDIUM] for seed in range(200)]
    expected = (0.80 * 52 / 1052 * np.exp(-1.8 / 52)) / (0.93 * 240 / 1720 * np.exp(-1.8 / 240))
    assert np.mean(ratios) == pytest.approx(expected, rel=0.02)


def test_mr_order_holds_in_the_image() -> None:
    for number in range(1001, 1005):
        image, label, _ = canonical(made("mr", number, SEED))
        assert image.min() >= 0
        blood, muscle = mean_inside(image, label, LVC), mean_inside(image, label, MYO)
        assert 1.7 * muscle < blood
        assert mean_inside(image, label, RV) > 1.3 * muscle  # in CT the washed-out right ventricle is not


def test_mr_coil_field_falls_from_front_to_back() -> None:
    quiet = MrScan(coil_fall=(0.4, 0.4), bias=(0.0, 0.0), snr=(1e6, 1e6), flow_loss=(0.0, 0.0))
    image, label, zooms = canonical(make_case("mr", 1001, SEED, quiet))
    inside = ndimage.binary_erosion(label == RV, iterations=2)
    depth = -np.argwhere(inside)[:, 1] * zooms[1] / 100
    slope = np.polyfit(depth, np.log(image[inside]), 1)[0]
    assert slope == pytest.approx(-0.4, abs=0.05)


def test_noise_has_the_stated_level() -> None:
    case = make_case("ct", 1001, SEED, CtScan(noise_hu=(30.0, 30.0)))
    inside = ndimage.binary_erosion(case.label == RV, iterations=3)
    assert case.image[inside].std() == pytest.approx(30, rel=0.2)


def test_surfaces_are_soft_within_about_a_voxel() -> None:
    """Partial volume: across the lung's border there are voxels of every value in between."""
    sharp = CtScan(noise_hu=(1e-3, 1e-3), kernel_mm=(0.1, 0.1))
    image = make_case("ct", 1001, SEED, sharp).image
    between = (image > -700) & (image < -250)
    assert 0.002 < between.mean() < 0.1


def test_distances_are_millimetres() -> None:
    x, y, z = (np.array([v], np.float32) for v in (0.0, 0.0, 13.0))
    assert Ellipsoid(np.zeros(3), (10.0, 10.0, 10.0), np.eye(3)).distance(x, y, z)[0] == pytest.approx(3, abs=1e-4)
    assert Ellipsoid(np.zeros(3), (5.0, 8.0, 10.0), np.eye(3)).distance(x, y, z)[0] == pytest.approx(3, abs=0.6)
    tube = Tube(np.array([[0.0, -20, 0], [0, 20, 0]]), (4.0, 8.0))
    assert tube.distance(x, y, z)[0] == pytest.approx(13 - 6, abs=1e-4)


def test_files_are_in_the_layout_of_mm_whs(tmp_path: Path) -> None:
    paths = make_phantom(tmp_path / "phantom", cases_mr=2, cases_ct=1, seed=SEED)
    assert [path.name for path in paths] == [
        f"{modality}_train_{number}_{kind}.nii.gz"
        for modality, number in (("mr", 1001), ("mr", 1002), ("ct", 1001))
        for kind in ("image", "label")
    ]
    case = made("mr", 1002, SEED)
    image, label = nib.load(paths[2]), nib.load(paths[3])
    np.testing.assert_array_equal(np.asarray(image.dataobj), case.image)
    np.testing.assert_array_equal(np.asarray(label.dataobj), case.label)
    for volume in (image, label):
        np.testing.assert_allclose(volume.affine, case.affine, atol=1e-4)
        assert int(volume.header["qform_code"]) == int(volume.header["sform_code"]) == 1
        assert volume.header.get_xyzt_units()[0] == "mm"


def test_a_case_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few = make_phantom(tmp_path / "few", cases_mr=1, cases_ct=0, seed=SEED)
    more = make_phantom(tmp_path / "more", cases_mr=2, cases_ct=1, seed=SEED)
    for one, other in zip(few, more, strict=False):
        np.testing.assert_array_equal(np.asarray(nib.load(one).dataobj), np.asarray(nib.load(other).dataobj))


def test_unwritable_folder_is_one_plain_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="phantom cannot be written"):
        make_phantom(tmp_path / "file" / "below", cases_mr=1, cases_ct=0, seed=0)
