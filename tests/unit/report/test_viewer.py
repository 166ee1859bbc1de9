"""The cases of a report one by one: their volumes and scores, and the viewer in a browser."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.volumes.geometry import Geometry, sample_image
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.errors import ConfigError
from mpscl_ray.evaluate.scoring import evaluate_checkpoint
from mpscl_ray.predict.predictor import load_segmenter
from mpscl_ray.predict.quality import FITTED, Calibration, Reference, assess
from mpscl_ray.report import command
from mpscl_ray.report.cases import CaseVolumes, HeldOutCase, leave_out_volumes
from mpscl_ray.report.groups import group_runs, predict_group
from mpscl_ray.report.run import report
from mpscl_ray.report.runs import read_runs
from mpscl_ray.report.viewer import case_tables
from mpscl_ray.report.volumes import display_affine, encode_image, original_units, plane_of, unit_of
from mpscl_ray.runs.palette import colour
from mpscl_ray.runs.run_directory import RunDirectory
from tests.browser import opened
from tests.heart_scans import cohort, prepared
from tests.tiny import make_dataset
from tests.tiny_runs import tiny_run

CLASSES = ("background", "<b>ventricle</b>", "wall & more")
"""Names that a page has to escape."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three test cases, so small that a reader's own arithmetic can follow."""
    folder = tmp_path_factory.mktemp("viewer")
    cases = {"train": 3, "val": 1, "test": 3}
    for modality, seed in (("mr", 0), ("ct", 1)):
        make_dataset(folder / modality, modality, seed=seed, cases=cases, classes=CLASSES)
    return tiny_run(folder / "run", folder / "mr", folder / "ct", ["phases.warm_up=0", "phases.adaptation=2"])


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report([run], tmp_path_factory.mktemp("report"), dpi=20, pdf=False)


def volume(content: bytes) -> Any:
    make: Any = nib.Nifti1Image
    return make.from_bytes(gzip.decompress(content))


def on_page(page: Path, name: str) -> str:
    found = re.search(rf'<script type="[^"]*" id="{name}">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, name
    return found.group(1)


def test_a_calibrated_run_has_a_column_with_the_estimates(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    home, known = RunDirectory(copy), Reference((0.4, 0.6), ((0.0, 1.0, 1.0),) * 3)
    calibration = Calibration(0.3, dict.fromkeys(FITTED, 0.2), known)  # too short a training for one of its own
    digest = load_segmenter(copy, "adaptation", "cpu").weights_digest
    home.add_of_weights(home.quality_file, digest, calibration.to_json())
    (group,) = group_runs(read_runs([copy]))
    predict_group(group, None, "cpu", volumes=True)
    assert group.held_out is not None
    predictor, last = load_segmenter(copy, "adaptation", "cpu"), len(group.columns) - 1
    expected = []
    for entry in group.held_out.cases:
        maps = predictor.predict_maps(read_case(group.held_out.dataset, entry.case)["image"])
        expected.append(assess(maps, CLASSES, predictor.calibrations).estimate)
        assert entry.estimates == {last: expected[-1]}, "the first phase is not calibrated"
    (table,) = case_tables([group])
    column = table.columns.index("estimate")
    assert [row.cells[column][0] for row in table.rows] == [f"{100 * (value or 0):.1f}" for value in expected]
    assert sum(columns for _, columns in table.above) == len(table.columns) == len(table.rows[0].cells)


@pytest.mark.parametrize(
    ("plane", "letters", "mm"),
    [
        ("coronal", "LIA", (1.0, 2.0, 3.0)),
        ("axial", "LPS", (1.0, 2.0, 3.0)),
        ("sagittal", "PIR", (1.0, 2.0, 3.0)),
        (None, "LPS", (1.0, 2.0, 3.0)),
    ],
)
def test_volumes_lie_as_the_table_of_geometry_says(plane: str | None, letters: str, mm: tuple[float, ...]) -> None:
    """Letters: where columns, rows and slices run to."""
    affine = display_affine(plane, (3.0, 2.0, 1.0))
    assert "".join(nib.aff2axcodes(affine)) == letters
    assert tuple(nib.affines.voxel_sizes(affine)) == mm


def test_an_image_keeps_its_intensities_within_half_a_grey_value() -> None:
    intensities = np.random.default_rng(0).uniform(-1000, 400, (3, 4, 5)).astype(np.float32)
    found = volume(encode_image(intensities, np.eye(4)))
    assert found.get_data_dtype() == np.uint8
    step = float(np.ptp(intensities)) / 255
    assert found.get_fdata().transpose(2, 1, 0) == pytest.approx(intensities, abs=0.51 * step)


def test_ct_is_shown_in_hounsfield_units_as_in_its_file(tmp_path: Path) -> None:
    images = cohort(tmp_path / "images", kind="ct")
    folder, manifest = prepared(images, "ct", modality="ct", recipe=Recipe(crop=(12, 16), hounsfield=True))
    case = manifest.cases[0]
    shown = original_units(read_case(folder, case)["image"], case, manifest)
    geometry = Geometry.from_json(case.geometry)
    file: Any = nib.load(images / f"{case.id}_image.nii.gz")
    expected = sample_image(file.get_fdata(dtype=np.float32), geometry.axes)
    assert unit_of(case, manifest) == "HU"
    assert plane_of(case, manifest) == "coronal"
    assert shown == pytest.approx(np.minimum(expected, geometry.clip_value), abs=0.1)


def test_cases_have_the_label_and_the_scores_of_the_evaluation(run: Path) -> None:
    evaluation = evaluate_checkpoint(run, "adaptation", device="cpu", workers=0, progress=False)
    (group,) = group_runs(read_runs([run]))
    predict_group(group, None, "cpu", volumes=True)
    held_out = group.held_out
    assert held_out is not None
    assert (held_out.split, len(held_out.cases)) == ("test", 3)
    last = len(group.columns) - 1
    means = [entry.mean_dice(last) for entry in held_out.cases]
    assert means == sorted(means)
    for entry in held_out.cases:
        expected = [score.dice for score in evaluation.scores[entry.case.id]]
        # Of the first phase there is no evaluation: its scores are those of the predictions made here.
        first, scores = entry.scores[0], entry.scores[last]
        assert first is not None
        assert scores is not None
        assert [score.dice for score in scores] == pytest.approx(expected, nan_ok=True)
        assert entry.volumes is not None
        assert entry.volumes.label is not None
        truth = np.asarray(volume(entry.volumes.label).dataobj).transpose(2, 1, 0)
        assert (truth == read_case(held_out.dataset, entry.case)["label"]).all()
        assert len(entry.volumes.predictions) == len(group.columns)
        for column, content in enumerate(entry.volumes.predictions):
            predicted = np.asarray(volume(content).dataobj).transpose(2, 1, 0)
            found = entry.scores[column]
            assert found is not None
            assert [(predicted == index).sum() for index in (1, 2)] == [score.predicted_voxels for score in found]


def test_volumes_beyond_the_limit_are_left_out_of_the_best_cases(run: Path) -> None:
    (case, *_) = load_manifest(run.parent / "ct").cases
    entries = [HeldOutCase(case, [None], CaseVolumes(b"x" * 300, None, [b"x" * 300])) for _ in range(3)]
    assert leave_out_volumes(entries, 1700) == 1
    assert [entry.volumes is None for entry in entries] == [False, False, True]


def test_a_page_with_too_many_volumes_says_what_is_left_out(run: Path, page: Path, tmp_path: Path) -> None:
    data = json.loads(on_page(page, "viewer-data"))
    sizes = [len(on_page(page, f"file-{data[0]['key']}-{name}")) for name in ("image", "label", "0", "1")]
    file = report([run], tmp_path, dpi=20, pdf=False, max_size_mb=1.2 * sum(sizes) / 1e6)
    text = file.read_text(encoding="utf-8")
    assert "Volumes of 2 of 3 cases are left out" in text
    kept = json.loads(on_page(file, "viewer-data"))
    assert [case["id"] for case in kept] == [data[0]["id"]]  # the worst one
    assert text.count("<tr data-case=") == 1


def test_without_volumes_there_is_no_viewer(run: Path, tmp_path: Path) -> None:
    text = report([run], tmp_path, dpi=20, pdf=False, volumes=False).read_text(encoding="utf-8")
    assert "viewer-data" not in text
    assert "niivue" not in text
    with pytest.raises(ConfigError, match=r"--max-size is 0; expected"):
        command.main([str(run), "--max-size", "0"])


def test_names_are_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;ventricle&lt;/b&gt;" in text
    assert "<b>ventricle" not in text
    assert json.loads(on_page(page, "viewer-data"))[0]["classes"][0]["name"] == CLASSES[1]


# ------------------------------------------------------------------------------------------------- in a browser


def inner_voxel(label: np.ndarray, index: int) -> tuple[int, int, int]:
    """A voxel (slice, row, column) with nothing but its class around it."""
    for voxel in np.argwhere(label == index):
        low, high = voxel - 1, voxel + 2
        around = label[tuple(slice(max(0, a), b) for a, b in zip(low, high, strict=True))]
        if (around == index).all() and around.size == 27:
            return tuple(map(int, voxel))  # type: ignore[return-value]
    raise AssertionError(f"no inner voxel of class {index}")


def pixel_at_crosshair(page: Any) -> tuple[int, ...]:
    x, y = page.evaluate("[...viewer.planes.frac2canvasPos(viewer.planes.scene.crosshairPos)]")
    picture = Image.open(io.BytesIO(page.locator("#v-planes").screenshot())).convert("RGB")
    return picture.getpixel((round(x), round(y)))  # type: ignore[return-value]


def test_the_viewer_in_a_browser(run: Path, page: Path) -> None:
    dataset = run.parent / "ct"
    data = json.loads(on_page(page, "viewer-data"))
    with opened(page) as seen:
        seen.page.evaluate("viewer.ready.then(() => viewer.settled())")
        assert seen.requests == [page.as_uri()]
        # The worst case is open; a click on the row of another one opens that.
        rows = seen.page.locator("tr[data-case]")
        assert rows.count() == 3
        for number in (2, 0):
            rows.nth(number).click()
            seen.page.evaluate("viewer.settled()")
            assert seen.page.locator("#v-case").input_value() == str(number)
            assert "open" in (rows.nth(number).get_attribute("class") or "")
        case = next(case for case in load_manifest(dataset).split("test") if case.id == data[0]["id"])
        label = read_case(dataset, case)["label"]
        seen.page.evaluate("""() => {
            for (const { title } of viewer.cases[0].overlays) viewer.setMode(title, "off");
            viewer.setMode("ground truth", "fill");
        }""")
        seen.page.locator("#v-opacity").fill("100")
        for index in (1, 2):
            z, row, column = inner_voxel(label, index)
            # In RAS+ order: columns run to the left and rows to the back of the patient.
            voxel = [label.shape[2] - 1 - column, label.shape[1] - 1 - row, z]
            seen.page.evaluate("voxel => viewer.goTo(voxel)", voxel)
            seen.page.wait_for_timeout(200)
            assert pixel_at_crosshair(seen.page) == pytest.approx(colour(index), abs=3)
            assert f"{z}, {row}, {column}" in seen.page.locator("#v-readout").inner_text()
            assert CLASSES[index] in seen.page.locator("#v-readout tr").last.inner_text()
        # Hidden again, the image is grey.
        seen.page.locator(".overlay").last.get_by_text("off").click()
        seen.page.wait_for_timeout(200)
        red, green, blue = pixel_at_crosshair(seen.page)
        assert math.isclose(red, green, abs_tol=2)
        assert math.isclose(green, blue, abs_tol=2)
        assert seen.problems == []
