"""The public Python API: names, documentation, settings, and scores of arrays and files."""

from __future__ import annotations

import ast
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import mpscl_ray
from mpscl_ray import (
    ConfigError,
    DataError,
    MpsclError,
    load_config,
    load_segmenter,
    prepare_dataset,
    score,
)
from mpscl_ray.config import differences
from tests.raw_volumes import RAW_IDS, volume

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "python-api.md"
NAMES = [name for name in mpscl_ray.__all__ if name != "__version__"]
AFFINE = np.diag([1.5, 1.5, 2.0, 1.0])


# ------------------------------------------------------------------------------------------------------- names


def test_the_package_loads_what_is_used_when_it_is_used() -> None:
    code = """if True:
        import sys, mpscl_ray
        heavy = {"torch", "ray", "numpy", "pydantic"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        assert set(mpscl_ray.__all__) <= set(dir(mpscl_ray))
        from mpscl_ray import load_config
        assert not {"torch", "ray", "numpy"} & set(sys.modules)
        from mpscl_ray import score
        assert not {"torch", "ray"} & set(sys.modules)
        from mpscl_ray import load_segmenter
        assert "ray" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mpscl_ray' has no attribute 'trian_segmenter'"):
        mpscl_ray.trian_segmenter  # type: ignore[attr-defined] # noqa: B018


def test_type_checkers_see_what_is_imported() -> None:
    tree = ast.parse(Path(mpscl_ray.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mpscl_ray")
        for alias in node.names
    }
    assert imported == mpscl_ray._MODULES
    assert sorted([*imported, "__version__"]) == sorted(mpscl_ray.__all__)


def test_no_name_is_that_of_a_package_which_would_take_its_place() -> None:
    """``score`` is also a command, whose module refuses to be imported, so that it takes no place
    (``test_score_command.py``)."""
    packages = {path.stem for path in Path(mpscl_ray.__file__).parent.iterdir()}
    assert packages & set(NAMES) == {"score"}


def test_modules_take_the_version_alone_from_the_package() -> None:
    packages = {path.stem for path in Path(mpscl_ray.__file__).parent.iterdir()}
    for file in Path(mpscl_ray.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "mpscl_ray":
                assert {alias.name for alias in node.names} <= {"__version__"} | packages, file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mpscl_ray":
                assert node.attr in {"__version__", "__file__"}, file


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_documented(name: str) -> None:
    value = getattr(mpscl_ray, name)
    text = DOCUMENT.read_text(encoding="utf-8")
    if isinstance(value, dict):  # described below its definition
        assert f"`{name}`" in text
        return
    assert re.search(rf"`{name}\b|\bm\.{name}\b", text)
    assert value.__doc__
    if inspect.isfunction(value):
        for parameter in inspect.signature(value).parameters:
            assert re.search(rf"^ +{parameter}: ", value.__doc__, re.MULTILINE), (name, parameter)


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isfunction(getattr(mpscl_ray, name))])
def test_signatures_in_the_document_are_those_of_the_functions(name: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    found = re.search(rf"`{name}\((.*?)\)`", text)
    assert found, name
    written = re.findall(r"(\*{0,2}\w+)(?:=[^,]+)?(?:, |$)", found[1].replace("..., ", ""))
    actual = [
        "*" * (2 * (item.kind is item.VAR_KEYWORD)) + item.name
        for item in inspect.signature(getattr(mpscl_ray, name)).parameters.values()
    ]
    written = [word for word in written if word != "*"]
    assert written == actual or (", ..., " in found[1] and set(written) <= set(actual))


# ----------------------------------------------------------------------------------------------------- settings


def test_overrides_are_words_or_a_mapping() -> None:
    words = load_config("phantom", ["optim.lr=0.5", "network.layers=[1,1,1,1]", "data.source=here"])
    mapping = load_config(
        "phantom", {"optim.lr": 0.5, "network": {"layers": (1, 1, 1, 1)}, "data.source": Path("here")}
    )
    assert words == mapping
    assert load_config("phantom", "optim.lr=3") == load_config("phantom", ["optim.lr=3"])
    assert set(differences(load_config("phantom"), words)) == {"optim.lr", "network.layers", "data.source"}


def test_wrong_overrides_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'optim.lrr' in the overrides is not a setting; did you mean 'optim.lr'\?"):
        load_config("phantom", {"optim.lrr": 1})
    with pytest.raises(ConfigError, match=r"'method\.min_pixels' in the overrides is not a setting"):
        load_config("phantom", {"method.min_pixels": 1})  # of CAG
    with pytest.raises(ConfigError, match=r"optim.lr='?fast'? in the overrides: expected a number"):
        load_config("phantom", {"optim.lr": "fast"})


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("phantom", {"optim.lr": object()}, r"^optim\.lr=<object object at \w+> in the overrides: "),
        ("phantom", None, "the overrides are None; expected a list of key=value words or a mapping$"),
        ("phantom", 3, "the overrides are 3; expected a list"),
        ("phantom", [3], "^3 in the overrides is not key=value$"),
        ("phantom", "optim.lr", "^'optim.lr' in the overrides is not key=value$"),
        (None, [], "None was given for a name, path or URL; expected text"),
        (3, [], "3 was given for a name, path or URL; expected text"),
    ],
)
def test_what_no_settings_can_be_read_from_is_one_sentence(preset: Any, overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(preset, overrides)
    assert "\n" not in str(error.value)


def test_no_run_and_no_images(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="None was given for a name, path or URL"):
        load_segmenter(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="3 was given for a name, path or URL"):
        prepare_dataset(3, tmp_path / "out", "mmwhs")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": "two"}, r"^workers='two': expected a whole number"),
        ({"crop": 3}, r"^crop=3: expected a list"),
        ({"labels": 5}, r"^labels=5: expected text"),
        ({"clip_percentile": "much"}, r"^clip_percentile='much': expected a number"),
        ({"workers": -1}, "--workers -1: expected 0"),
    ],
)
def test_options_of_prepare_of_another_type(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_dataset(tmp_path, tmp_path / "out", "mmwhs", **options)


def test_prepare_names_an_option_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'modalty' is not an option of prepare; did you mean 'modality'\?"):
        prepare_dataset(tmp_path, tmp_path / "out", "mmwhs", modalty="ct")
    with pytest.raises(ConfigError, match="layout"):
        prepare_dataset(tmp_path, tmp_path / "out", "dicom")
    assert not (tmp_path / "out").exists()


def test_scores_of_two_boxes_are_those_computed_by_hand() -> None:
    label = np.zeros((9, 9, 9))
    label[2:5, 2:5, 2:5] = 205.0
    prediction = np.roll(label, 1, axis=0)
    prediction[0, 0, 0] = 600
    rows = score(prediction, label, spacing=(2.0, 1.0, 1.0))
    assert list(rows) == ["205", "600"]
    assert rows["205"].dice == pytest.approx(2 / 3)
    # Surfaces of 26 voxels, moved by 2 mm: 9 of them have left the other box and are 2 mm away; the 17 others all lie
    # on the other surface but the inner voxel of the last face, 1 mm from it.
    assert rows["205"].asd_mm == pytest.approx((9 * 2 + 1) / 26)
    assert rows["205"].hd95_mm == 2.0
    assert (rows["600"].case_kind, rows["600"].dice) == ("false_alarm", 0.0)
    assert math.isnan(rows["600"].asd_mm)
    assert math.isnan(score(prediction, label)["205"].asd_mm)
    assert score(prediction, label)["205"].asd_voxel == pytest.approx((9 + 1) / 26)
    chosen = score(prediction, label, spacing=1, class_names={"MYO": 205, "LVC": 500})
    assert {name: row.case_kind for name, row in chosen.items()} == {"MYO": "ok", "LVC": "absent"}
    assert score(0 * label, label)["205"].case_kind == "missed"
    label[2], label[6] = 255, 255  # what the prediction has there counts nowhere
    row = score(prediction, label, ignore_label=255)["205"]
    assert (row.dice, row.predicted_voxels, row.truth_voxels) == (pytest.approx(2 * 18 / (27 + 18)), 27, 18)


def test_scores_of_files_have_their_spacing(tmp_path: Path) -> None:
    _, label = volume(1)
    for name, array in (("label", label), ("prediction", np.roll(label, 1, axis=2))):
        nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / f"{name}.nii.gz")
    files = score(tmp_path / "prediction.nii.gz", str(tmp_path / "label.nii.gz"))
    arrays = score(np.roll(label, 1, axis=2), label, spacing=(1.5, 1.5, 2.0))
    assert files == arrays
    assert list(files) == [str(value) for value in RAW_IDS]
    nib.save(nib.Nifti1Image(label, 2 * AFFINE), tmp_path / "moved.nii.gz")
    nib.save(nib.Nifti1Image(label[1:], AFFINE), tmp_path / "cut.nii.gz")
    with pytest.raises(DataError, match=r"affines of .* differ by up to 2 mm; expected the same grid"):
        score(tmp_path / "moved.nii.gz", tmp_path / "label.nii.gz")
    with pytest.raises(DataError, match=r"cut.nii.gz has shape \(19, 24, 18\) and .*label.nii.gz \(20, 24, 18\)"):
        score(tmp_path / "cut.nii.gz", tmp_path / "label.nii.gz")
    with pytest.raises(ConfigError, match="expected two arrays or two files"):
        score(tmp_path / "label.nii.gz", label)
    with pytest.raises(ConfigError, match="files have their own"):
        score(tmp_path / "label.nii.gz", tmp_path / "label.nii.gz", spacing=1)


ONES = np.ones((4, 4, 4), dtype=int)


@pytest.mark.parametrize(
    ("prediction", "label", "options", "kind", "message"),
    [
        (ONES, ONES[1:], {}, DataError, r"shape \(4, 4, 4\) and the label \(3, 4, 4\)"),
        (ONES * np.nan, ONES, {}, DataError, "the prediction has the value nan; expected whole numbers"),
        (ONES, ONES * 0.5, {}, DataError, "the label has the value 0.5; expected whole numbers"),
        (ONES.astype(str), ONES, {}, DataError, "expected an array of label values"),
        (0 * ONES, 0 * ONES, {}, DataError, "0 everywhere"),
        (-ONES, ONES, {}, DataError, "expected 1 to 254 structures with values above 0"),
        (
            ONES,
            3 * ONES,
            {"class_names": ("background", "LV")},
            DataError,
            "the label has values 3 to 3; expected 0 to 1",
        ),
        (5 * ONES, 3 * ONES, {}, DataError, "the prediction has the values 5 and the label 3, none of them in both"),
        (
            ONES,
            205 * ONES,
            {"class_names": {"MYO": 205, "LV": 500}},
            DataError,
            r"the prediction has the values 1, and none of them is in class_names \(MYO: 205, LV: 500\)",
        ),
        (ONES, ONES, {"class_names": ()}, ConfigError, "class_names has 0 names"),
        (ONES, ONES, {"spacing": (1, 0, 1)}, ConfigError, r"spacing is \(1, 0, 1\); expected a size in mm above 0"),
        (ONES, ONES, {"spacing": (1, 1)}, ConfigError, "for each of 3 axes"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    prediction: Any, label: Any, options: dict[str, Any], kind: type[MpsclError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        score(prediction, label, **options)
