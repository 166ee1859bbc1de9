"""The prepared dataset on disk: what is written, and that nothing damaged is ever read as data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpscl_ray.data.dataset import (
    FORMAT_VERSION,
    Case,
    Manifest,
    Scaling,
    load_manifest,
    save_manifest,
)
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.parquet_writer import write_case
from mpscl_ray.errors import DataError

CLASSES = ("background", "MYO", "LV")


def make_case(
    folder: Path, name: str = "patient1", split: str = "train", slices: int = 5, labelled: bool = True
) -> Case:
    random = np.random.default_rng(slices)
    image = random.uniform(-1, 1, size=(slices, 8, 6)).astype(np.float32)
    label = random.integers(0, 3, size=image.shape).astype(np.uint8) if labelled else None
    return write_case(
        folder,
        id=name,
        patient=name,
        split=split,
        image=image,
        label=label,
        classes=CLASSES,
        content_sha256=hashlib.sha256(name.encode()).hexdigest(),
        geometry={"shape": [6, 8, slices]},
        spacing_mm=(2.0, 1.0, 1.0),
        cropped_around_labels=False,
        sources={"image": f"{name}.nii.gz"},
        notices=("oblique",),
    )


def make_manifest(cases: list[Case], **changes: Any) -> Manifest:
    values = {
        "version": FORMAT_VERSION,
        "modality": "mr",
        "classes": CLASSES,
        "size": (8, 6),
        "scaling": Scaling(-1.8, 4.4, "given"),
        "recipe": {"crop": [8, 6]},
        "splitting": {"method": "fractions"},
        "labels": {},
        "steps": ("a step",),
        "notices": (),
        "command": "python -m mpscl_ray.prepare IN --layout mmwhs --out OUT",
        "product_version": "0.1.0",
        "cases": tuple(cases),
    }
    return Manifest(**{**values, **changes})


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    cases = [make_case(tmp_path), make_case(tmp_path, "patient2", "test", labelled=False)]
    save_manifest(tmp_path, make_manifest(cases))
    return tmp_path


def test_a_case_comes_back_bit_for_bit(tmp_path: Path) -> None:
    case = make_case(tmp_path, slices=130)
    arrays = read_case(tmp_path, case)
    random = np.random.default_rng(130)
    np.testing.assert_array_equal(arrays["image"], random.uniform(-1, 1, size=(130, 8, 6)).astype(np.float32))
    np.testing.assert_array_equal(arrays["label"], random.integers(0, 3, size=(130, 8, 6)).astype(np.uint8))
    assert case.class_voxels == tuple(np.bincount(arrays["label"].ravel()).tolist())


def test_any_arrow_reader_understands_the_file(tmp_path: Path) -> None:
    case = make_case(tmp_path, slices=130)
    file = pq.ParquetFile(tmp_path / case.file)
    schema = file.schema_arrow
    assert schema.names == ["case", "slice_index", "image", "label"]
    assert schema.field("image").type == pa.fixed_shape_tensor(pa.float32(), (8, 6))
    assert schema.field("label").type == pa.fixed_shape_tensor(pa.uint8(), (8, 6))
    assert schema.field("slice_index").type == pa.int32()
    groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
    assert [group.num_rows for group in groups] == [64, 64, 2]
    assert groups[0].column(0).compression == "LZ4"
    table = file.read()
    assert table.column("case").unique().to_pylist() == ["patient1"]
    assert table.column("slice_index").to_pylist() == list(range(130))


def test_page_checksums_are_written(tmp_path: Path) -> None:
    # Found by a reader that does not know the manifest's hashes.
    case = make_case(tmp_path)
    path = tmp_path / case.file
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 4
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(pa.BufferReader(bytes(data)), page_checksum_verification=True).read()


def test_a_case_without_labels_has_no_label_column(tmp_path: Path) -> None:
    case = make_case(tmp_path, labelled=False)
    assert pq.read_schema(tmp_path / case.file).names == ["case", "slice_index", "image"]
    assert set(read_case(tmp_path, case)) == {"image"}
    assert (case.labelled, case.class_voxels, case.class_centres, case.structure_width) == (False, None, None, None)


def test_only_the_columns_asked_for_come(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    assert set(read_case(tmp_path, case, columns=["image"])) == {"image"}


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    path = tmp_path / case.file
    good = path.read_bytes()
    for position in np.random.default_rng(0).choice(8 * len(good), size=200, replace=False):
        damaged = bytearray(good)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"patient1\.parquet: damaged"):
            read_case(tmp_path, case)


def test_a_missing_file_and_one_of_another_length_are_named(dataset: Path) -> None:
    first, second = load_manifest(dataset).cases
    (dataset / first.file).unlink()
    with (dataset / second.file).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError, match=r"patient1\.parquet: missing"):
        read_case(dataset, first)
    with pytest.raises(DataError, match=r"patient2\.parquet: \d+ bytes"):
        read_case(dataset, second)


def rewritten(folder: Path, case: Case, table: pa.Table) -> Case:
    """The case with another table in its file and hashes that fit: only the checks of the contents remain."""
    path = folder / case.file
    pq.write_table(table, path)
    data = path.read_bytes()
    return dataclasses.replace(case, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns("image"), "no column 'image'"),
        (lambda table: table.drop_columns("label"), "no column 'label'"),
        (lambda table: table.slice(0, 3), "3 slices, the manifest says 5"),
        (lambda table: table.replace_schema_metadata({}), "format version None"),
        (
            lambda table: table.set_column(
                2, "image", pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((5, 8, 6), np.float64))
            ),
            "column 'image' is .*expected .*value_type=float",
        ),
        (
            lambda table: table.set_column(
                3, "label", pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((5, 4, 6), np.uint8))
            ),
            r"column 'label' is .*shape=\[4,6\].*expected .*shape=\[8,6\]",
        ),
    ],
)
def test_another_content_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    case = make_case(tmp_path)
    table = pq.read_table(tmp_path / case.file)
    case = rewritten(tmp_path, case, change(table))
    with pytest.raises(DataError, match=rf"patient1\.parquet: .*{message}"):
        read_case(tmp_path, case)


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    (tmp_path / case.file).write_bytes(b"PAR1 and nothing else")
    case = dataclasses.replace(case, bytes=21, sha256=hashlib.sha256(b"PAR1 and nothing else").hexdigest())
    with pytest.raises(DataError, match="damaged or unreadable"):
        read_case(tmp_path, case)


def test_the_manifest_comes_back(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    assert manifest == make_manifest([make_case(dataset), make_case(dataset, "patient2", "test", labelled=False)])
    assert [case.id for case in manifest.split("test")] == ["patient2"]
    assert manifest.split("val") == ()
    with pytest.raises(DataError, match="no split is called 'tests'"):
        manifest.split("tests")


def test_the_fingerprint_is_that_of_the_data(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    one = make_manifest([case])
    assert one.fingerprint == make_manifest([case], notices=("other",), command="other").fingerprint
    for other in (
        make_manifest([dataclasses.replace(case, sha256="0" * 64)]),
        make_manifest([dataclasses.replace(case, split="val")]),
        make_manifest([case], classes=("background", "LV", "MYO")),
        make_manifest([case], scaling=Scaling(-1.8, 4.5, "given")),
    ):
        assert one.fingerprint != other.fingerprint


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))


@pytest.mark.parametrize(("version", "age"), [(0, "older"), (99, "newer"), (None, "older or unknown"), ("1", "older")])
def test_another_version_asks_to_prepare_again(dataset: Path, version: Any, age: str) -> None:
    edit(dataset, version=version)
    with pytest.raises(DataError, match=f"{age}.*this program reads version 1.*prepare it again: python -m mpscl_ray"):
        load_manifest(dataset)


def test_an_edited_manifest_is_refused(dataset: Path) -> None:
    edit(dataset, modality="ct")
    with pytest.raises(DataError, match="damaged or edited"):
        load_manifest(dataset)


def test_every_flipped_bit_of_the_manifest_is_found(dataset: Path) -> None:
    path = dataset / "manifest.json"
    good = path.read_bytes()
    expected = load_manifest(dataset)
    for position in np.random.default_rng(1).choice(8 * len(good), size=200, replace=False):
        damaged = bytearray(good)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found = load_manifest(dataset)
        except DataError as error:
            assert "manifest.json" in str(error)  # noqa: PT017 (some flips only change white space)
        else:
            assert found == expected


def test_a_case_outside_the_folder_is_refused(tmp_path: Path) -> None:
    case = dataclasses.replace(make_case(tmp_path), file="../../elsewhere.parquet")
    save_manifest(tmp_path, make_manifest([case]))
    with pytest.raises(DataError, match=r"elsewhere\.parquet', expected 'train/"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "../../elsewhere", "file": "train/../../elsewhere.parquet"}, r"cases\.0\.id"),
        ({"split": "tests", "file": "tests/patient1.parquet"}, r"cases\.0\.split"),
        ({"spacing_mm": (0.0, 1.0, 1.0)}, r"cases\.0\.spacing_mm\.0: Input should be greater than 0"),
    ],
)
def test_an_impossible_case_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_manifest(tmp_path, make_manifest([dataclasses.replace(make_case(tmp_path), **changes)]))
    with pytest.raises(DataError, match=message):
        load_manifest(tmp_path)


def test_an_empty_range_is_refused(tmp_path: Path) -> None:
    save_manifest(tmp_path, make_manifest([], scaling=Scaling(1.0, 1.0, "given")))
    with pytest.raises(DataError, match=r"scaling\.low is not below scaling\.high"):
        load_manifest(tmp_path)


def test_the_error_for_a_missing_dataset_says_what_to_do(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder; prepare a dataset first: python .* INPUT --layout LAYOUT "):
        load_manifest(tmp_path / "nowhere")
    outer = tmp_path / "outer"
    (outer / "mr").mkdir(parents=True)
    with pytest.raises(DataError, match=r"it has no manifest\.json"):
        load_manifest(outer)
    save_manifest(outer / "mr", make_manifest([]))
    with pytest.raises(DataError, match="holds the datasets mr; give one of them"):
        load_manifest(outer)
    with pytest.raises(DataError, match="a file, expected the folder"):
        load_manifest(dataset / "manifest.json")
    (outer / "mr" / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="not the manifest of a prepared dataset"):
        load_manifest(outer / "mr")


def test_unfinished_folders_are_not_offered(tmp_path: Path) -> None:
    (tmp_path / ".mr.unfinished-host-1-x").mkdir()
    (tmp_path / ".mr.unfinished-host-1-x" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"it has no manifest\.json"):
        load_manifest(tmp_path)
