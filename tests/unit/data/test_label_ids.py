"""From the ids of a label map to class indices, and the messages on unknown ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpscl_ray.data.volumes import label_maps
from mpscl_ray.data.volumes.label_maps import map_labels
from mpscl_ray.errors import ConfigError, DataError

MMWHS = {205: 1, 420: 2, 500: 3, 820: 4}
REST = {550, 600, 850}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["int32", "uint16", "int64"])
def test_ids_become_class_indices(order: Any, dtype: str) -> None:
    random = np.random.default_rng(0)
    array = np.asarray(random.choice([0, *MMWHS, *REST], (6, 5, 4)), dtype=dtype, order=order)
    mapped, notices = map_labels(array, MMWHS, REST, Path("a.nii.gz"))
    assert mapped.dtype == np.uint8
    for index in np.ndindex(array.shape):
        assert mapped[index] == MMWHS.get(int(array[index]), 0)
    assert notices == ()


def test_mapping_a_view_keeps_its_axes() -> None:
    array = np.random.default_rng(1).choice([0, *MMWHS], (6, 5, 4)).astype(np.int32).transpose(1, 2, 0)[:, ::-1]
    mapped, _ = map_labels(array, MMWHS, REST, Path("a.nii.gz"))
    np.testing.assert_array_equal(mapped, np.vectorize(lambda i: MMWHS.get(i, 0))(array))


def test_unknown_ids_are_background_and_reported_with_counts() -> None:
    array = np.array([[[205, 421, 421], [5, 0, -3]]], dtype=np.int32)
    mapped, notices = map_labels(array, MMWHS, REST, Path("some/mr_1010.nii.gz"))
    np.testing.assert_array_equal(mapped, [[[1, 0, 0], [0, 0, 0]]])
    (notice,) = notices
    for part in ("mr_1010.nii.gz", "-3 (1 voxel)", "5 (1 voxel)", "421 (2 voxels)", "mistake for 420"):
        assert part in notice
    assert "205" not in notice


def test_unknown_ids_can_be_errors() -> None:
    with pytest.raises(DataError, match=r"mr\.nii.*421 \(2 voxels\).*420"):
        map_labels(np.array([421, 421, 500]), MMWHS, REST, Path("mr.nii"), unknown="error")
    mapped, notices = map_labels(np.array([421, 500]), {**MMWHS, 421: 2}, REST, Path("mr.nii"), unknown="error")
    assert (mapped.tolist(), notices) == ([2, 3], ())


def test_no_mistake_is_suspected_if_the_meant_id_is_unknown() -> None:
    _, (notice,) = map_labels(np.array([421, 1]), {1: 1}, set(), Path("a.nii"))
    assert "mistake" not in notice


def test_an_image_taken_for_a_label_map_is_one_short_sentence() -> None:
    array = np.random.default_rng(0).integers(-(2**31), 2**31 - 1, 5000).astype(np.int32)
    array[17] = 500
    mapped, notices = map_labels(array, MMWHS, REST, Path("a.nii"))
    assert np.flatnonzero(mapped).tolist() == [17]
    assert "and 4989 more" in notices[0]
    assert len(notices[0]) < 500


def test_a_class_index_beyond_a_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match="256"):
        map_labels(np.zeros(3, np.int32), {1: 256}, set(), Path("a.nii"))


def test_voxels_of_each_class_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_maps, "_PIECE", 5)
    label = np.random.default_rng(0).integers(0, 4, (3, 4, 5)).astype(np.uint8)
    for order in ("C", "F"):
        counts = label_maps.class_voxels(np.array(label, order=order), 6)
        assert counts.tolist() == [*np.bincount(label.ravel(), minlength=4), 0, 0]
    assert label_maps.class_voxels(label, 2).sum() == label.size
