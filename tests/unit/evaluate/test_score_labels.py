"""Which id is which structure, for label maps of any program."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpscl_ray.data.volumes.nifti import read_label
from mpscl_ray.errors import ConfigError, DataError, MpsclError, StorageError
from mpscl_ray.evaluate.label_names import names_beside, read_names
from mpscl_ray.evaluate.score_command import main
from tests.scored_maps import MAP, NAMES, rows_of, run, save, scored, swap


def renumber(folder: Path, side: str, change: Callable[[MAP], NDArray[Any]]) -> None:
    for path in (folder / side).glob("*.nii.gz"):
        volume = read_label(path)
        save(path, change(volume.array.astype(np.uint8)), volume.affine)


def test_swapped_ids_are_told_apart_by_the_tables(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = scored(cohort, *NAMES)
    renumber(cohort, "pred", swap)
    assert scored(cohort, *NAMES, "--prediction-labels", "1=LV,2=MYO") == before
    (cohort / "pred/dataset.json").write_text(json.dumps({"labels": {"background": 0, "LV": 1, "MYO": 2}}))
    capsys.readouterr()
    assert scored(cohort, *NAMES) == before
    printed = capsys.readouterr().out
    assert "ids of labels: 1=MYO, 2=LV (--labels)" in printed
    assert f"ids of predictions: 1=LV, 2=MYO ({cohort / 'pred/dataset.json'})" in printed
    assert scored(cohort, *NAMES, "--prediction-labels", "1=MYO,2=LV") != before


def test_names_from_files_beside_the_maps(cohort: Path) -> None:
    before = scored(cohort, *NAMES)
    (cohort / "truth/labels.json").write_text('{"1": "MYO", "2": "LV"}')
    assert scored(cohort) == before
    renumber(cohort, "pred", lambda array: np.array([0, 205, 500], np.int16)[array])
    (cohort / "pred/slicer_labels.ctbl").write_text(
        "# by predict\n0 background 0 0 0 0\n0 RV 1 2 3 4\n205 MYO 1 2 3 255\n500 LV 1 2 3 4\n"
    )
    assert scored(cohort) == before
    assert scored(cohort, "--labels", str(cohort / "truth/labels.json")) == before


def test_nnunets_table_and_its_ignore_label(cohort: Path) -> None:
    (cohort / "truth").rename(cohort / "labelsTr")
    about = {"labels": {"background": 0, "MYO": 1, "LV": 2, "ignore": 3}, "numTraining": 3}
    (cohort / "dataset.json").write_text(json.dumps(about))
    path = cohort / "labelsTr/c0.nii.gz"
    array = read_label(path).array.astype(np.uint8)
    array[:10] = 3
    save(path, array)
    (cohort / "pred/dataset.json").write_text(json.dumps(about))
    renumber(cohort, "pred", lambda array: np.where(array == 0, 3, array).astype(np.uint8))
    assert main([str(cohort / "pred"), str(cohort / "labelsTr"), "--out", str(cohort / "out"), "--workers", "0"]) == 0
    summary = json.loads((cohort / "out/summary.json").read_text(encoding="utf-8"))
    assert (summary["ignore_label"], summary["volumes"]["c0"]["ignored_voxels"]) == (3, 10 * 18 * 12)
    assert not any("does not name" in notice for notice in summary["notices"])


def test_ids_without_a_name_are_named(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = scored(cohort, *NAMES)
    renumber(cohort, "pred", lambda array: np.where(array[::-1] * (array == 0) > 0, 77, array).astype(np.uint8))
    path = cohort / "truth/c0.nii.gz"
    array = read_label(path).array.astype(np.uint8)
    array[0, 0, :3] = 9
    save(path, array)
    capsys.readouterr()
    assert scored(cohort, *NAMES) == before
    printed = capsys.readouterr().out
    assert "ids in labels that --labels does not name, counted as background: 9 (1 file)" in printed
    assert "ids in predictions that --labels does not name, counted as background: 77 (3 files)" in printed


def test_a_name_that_may_mean_what_nobody_annotated_is_said(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cohort, "--labels", "1=MYO,2=LV,3=unknown") == 0
    assert "note: 'unknown' is a class like the others" in capsys.readouterr().out


def test_structures_of_the_predictions_alone_are_named(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = scored(cohort, *NAMES)
    renumber(cohort, "pred", lambda array: np.where(array == 0, 7, array).astype(np.uint8))
    assert scored(cohort, *NAMES, "--prediction-labels", "1=MYO,2=LV,7=RV") == before
    assert "not scored, as --labels has no such structure: RV" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ("", ConfigError, r"give --labels, e.g. 1=MYO,2=LV \(.*c0.nii.gz has the ids 1, 2\)"),
        ("--labels 1=MYO,2=LV --prediction-labels 1=MYO,2=lv", ConfigError, "has no id for LV of --labels"),
        ("--labels 1=MYO,2=LV --ignore-label 2", ConfigError, "--ignore-label 2 is LV in --labels"),
        ("--labels 205=MYO,500=LV", DataError, r"no label has an id of 205=MYO, 500=LV \(--labels\); they have 1, 2"),
        (
            "--labels 1=MYO,2=LV --prediction-labels 205=MYO,500=LV",
            DataError,
            "no prediction has an id of 205=MYO.*--prediction-labels",
        ),
        ("--labels 1=MYO --out pred/c0.nii.gz/x", StorageError, "c0.nii.gz"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    words: str, kind: type[MpsclError], message: str, cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cohort)
    with pytest.raises(kind, match=message):
        run(cohort, *words.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", 'expected {"NAME": ID, ...}'),
        ("{}", 'expected {"NAME": ID, ...}'),
        (
            '{"labels": {"whole": [1, 2]}}',
            "whole' is a region of the ids 1, 2, and regions may overlap; score one region at a time: --labels 1=whole",
        ),
        ('{"MYO": true}', "is no NAME: ID pair"),
        ('{"MYO": 1, "LV": 1}', "the id 1 has two names, LV and MYO"),
        ('{"MYO": 1, "LV": 2, "LV": 3}', "'LV' is there twice, as 2 and 3"),
        ('{"LV": 1, "LV ": 2}', "'LV' and 'LV ' differ only in upper and lower case or blanks"),
        ('{"MYO": 0, "LV": 1, "background": 2}', "the label 0 is called 'MYO' and 2 background"),
        ('{"background": 0}', "0 names besides background"),
    ],
)
def test_files_that_are_no_table_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(DataError) as refused:
        read_names(path)
    assert message in str(refused.value)


def test_a_folder_without_a_table_has_no_names(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"labels": {"MYO": 1}}')
    (tmp_path / "predictions").mkdir()
    assert names_beside(tmp_path / "predictions") is None, "only labelsTr and labelsTs belong to the file above"
    (tmp_path / "labelsTs").mkdir()
    names = names_beside(tmp_path / "labelsTs")
    assert names is not None
    assert names.names == {1: "MYO"}


def test_a_region_of_nnunet_is_scored_by_the_words_of_its_refusal(cohort: Path) -> None:
    (cohort / "truth").rename(cohort / "labelsTr")
    about = {"labels": {"background": 0, "whole": [1, 2], "LV": [2]}, "regions_class_order": [1, 2]}
    (cohort / "dataset.json").write_text(json.dumps(about))
    words = [str(cohort / "pred"), str(cohort / "labelsTr"), "--out", str(cohort / "out"), "--workers", "0"]
    with pytest.raises(DataError) as refused:
        main(words)
    advice = re.search(r"--labels \S+ --prediction-labels \S+(?=,)", str(refused.value))
    assert advice is not None
    assert main([*words, *advice[0].split()]) == 0
    for (case, structure), row in rows_of(cohort / "out").items():
        one, other = (read_label(cohort / name / f"{case}.nii.gz").array > 0 for name in ("pred", "labelsTr"))
        assert structure == "whole"
        assert float(row["dice"]) == pytest.approx(2 * (one & other).sum() / (one.sum() + other.sum()))


@pytest.mark.parametrize("table", ["1=MYO,2=LV,8=void,9=ignore", '{"MYO": 1, "void": 8, "ignore": 9}'])
def test_one_id_at_most_is_left_out(table: str, cohort: Path) -> None:
    (cohort / "table.json").write_text(table)
    with pytest.raises(ConfigError, match="8, 9 are all called not annotated, and one id can be left out"):
        scored(cohort, "--labels", str(cohort / "table.json") if table[0] == "{" else table)
