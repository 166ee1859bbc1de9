"""Validation on one and on two workers, in gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpscl_ray.data.slices import LocalSlices
from mpscl_ray.train.validation import validate, validation_metrics
from tests.tiny import CLASSES, make_dataset
from tests.worker_processes import on_workers


def predict(images: Tensor) -> Tensor:
    return torch.cat([images, -images, images**2], dim=1).double().softmax(dim=1)


def metrics(source: Path, target: Path) -> dict[str, float]:
    folders = {"source": source, "target": target}
    results = {
        domain: validate(predict, LocalSlices(folder, "val", labels=True), CLASSES, 4, torch.device("cpu"))
        for domain, folder in folders.items()
    }
    return validation_metrics(results, "source")


def test_criteria_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    folders = [make_dataset(tmp_path / name, name, cases={"train": 1, "val": 3}) for name in ("mr", "ct")]
    (one,), two = (on_workers(number, metrics, *folders) for number in (1, 2))
    assert {"val/unsupervised/adjacency_agreement", "val/unsupervised/source_dice_and_class_ratio"} <= one.keys()
    for found in two:
        assert found == pytest.approx(one, rel=1e-12)
