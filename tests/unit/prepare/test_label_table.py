"""Label tables: the structure of each id of a label map, and corrections of wrong ids."""

from __future__ import annotations

import pytest

from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.label_table import (
    MMWHS,
    RELEASED,
    doubtful_names,
    parse_label_table,
    with_corrections,
    with_ignored,
)


def test_label_tables_from_text() -> None:
    table = parse_label_table("200=MYO, 500=left ventricle,600=RV,601=RV,0=background")
    assert table.classes == ("background", "MYO", "left ventricle", "RV")
    assert table.values == {0: 0, 200: 1, 500: 2, 600: 3, 601: 3}
    assert table.unknown == "error"
    assert with_ignored(RELEASED, "0, 550, 600").ignored == frozenset({0, 550, 600})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MYO=200", "'MYO=200' is not ID=NAME"),
        ("200=MYO,200=LV", "id 200 has two meanings, MYO and LV"),
        ("0=MYO,1=LV", "id 0 has two meanings"),
        ("", "no class but background"),
        (",".join(f"{k}=c{k}" for k in range(1, 300)), "at most 255"),
    ],
)
def test_wrong_label_tables(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_label_table(text)


def test_wrong_ids_are_corrected() -> None:
    table = with_corrections(MMWHS, "421=420,551=550")
    assert table.effective()[421] == table.effective()[420] == 2
    assert table.effective()[551] == 0
    assert 421 not in MMWHS.effective()
    with pytest.raises(ConfigError, match="419 is not in the label table, which has 0, 205, 420"):
        with_corrections(MMWHS, "421=419")
    with pytest.raises(ConfigError, match="420 already means LAC"):
        with_corrections(MMWHS, "420=500")
    with pytest.raises(ConfigError, match="is not WRONG=MEANT"):
        with_corrections(MMWHS, "421")
    with pytest.raises(ConfigError, match="expected comma-separated whole numbers"):
        with_ignored(MMWHS, "a,b")
    with pytest.raises(ConfigError, match="--ignore-labels 600,420: 420 means LAC; a table without it"):
        with_ignored(MMWHS, "600,420")


@pytest.mark.parametrize("name", ["ignore", "IGNORED", "ignore_label", "Ignore region", "void", "not annotated"])
def test_names_of_what_nobody_annotated(name: str) -> None:
    table = parse_label_table(f"1=MYO,2=LV,3={name}")
    assert (table.classes, table.not_annotated) == (("background", "MYO", "LV"), {3})


@pytest.mark.parametrize("name", ["unknown", "Uncertain region", "exclude"])
def test_names_that_may_mean_it_are_classes_with_a_warning(name: str) -> None:
    classes = parse_label_table(f"1=MYO,2={name}").classes
    assert classes == ("background", "MYO", name)
    (said,) = doubtful_names(classes)
    assert said.startswith(f"{name!r} is a class like the others, trained and scored")
