"""Some slices of a split, renumbered, with other labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpscl_ray.data.loader import SliceStream
from mpscl_ray.data.slices import LocalSlices
from mpscl_ray.data.subset import SubsetSlices
from tests.tiny import make_dataset


@pytest.mark.parametrize("own", [False, True], ids=["their labels", "own labels"])
def test_rows_and_labels_stay_together(tmp_path: Path, own: bool) -> None:
    slices = LocalSlices(make_dataset(tmp_path / "ct", "ct"), "train", labels=True)
    every = next(slices.fetch([np.arange(slices.rows)]))
    rows = np.array([2, 3, 11, 17])
    labels = np.arange(4 * 32 * 32, dtype=np.uint8).reshape(4, 32, 32) if own else None
    chosen = SubsetSlices(slices, rows, labels)
    assert chosen.rows == 4
    expected = every["label"][rows] if labels is None else labels
    batches = [np.array([3, 0]), np.array([1]), np.array([1, 2, 3])]
    for asked, found in zip(batches, chosen.fetch(batches), strict=True):
        assert np.array_equal(found["image"], every["image"][rows[asked]])
        assert np.array_equal(found["label"], expected[asked])
    with SliceStream(chosen, seed=1, domain="easy", global_batch=8) as stream:
        batch = stream.next()
    for image, label in zip(batch["image"][:, 0].numpy(), batch["label"].numpy(), strict=True):
        (position,) = [k for k, row in enumerate(rows) if np.array_equal(every["image"][row], image)]
        assert np.array_equal(label, expected[position])
    assert sum(len(batch["image"]) for batch in chosen.shard(0, 2, 8)) == 2
