"""The score command on Ray, and on what predict wrote: the numbers are those of evaluate."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.evaluate import command as evaluate
from mpscl_ray.evaluate import score_command
from mpscl_ray.networks import DeepLabV2
from mpscl_ray.predict import command as predict
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from tests.raw_volumes import made, volume, write
from tests.ray.conftest import Here

CLASSES = ("background", "MYO", "LAC", "LVC", "AA")
NETWORK = {"layers": [1, 1, 1, 1], "base_channels": 4, "output_stride": 4, "in_channels": 1}
SHAPE = (32, 12, 32)
"""Whole coronal slices are 32 x 32, the crop of the recipe, so that evaluate counts every voxel of the files."""


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Volumes with MM-WHS names, their grids turned about the axis of slices."""
    affine = np.eye(4)
    turn = np.deg2rad(12.0)
    affine[:3, :3] = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    affine[:3, :3] *= [1.5, 3.0, 1.25]
    for number in range(1001, 1007):
        image, label = volume(number, low=-1000.0, shape=SHAPE)
        write(tmp_path / "raw" / f"ct_train_{number}_image.nii.gz", image, affine)
        write(tmp_path / "raw" / f"ct_train_{number}_label.nii.gz", label, affine)
    return tmp_path / "raw"


def make_run(folder: Path, dataset: Path, recipe: Recipe) -> Path:
    """A run whose network was never trained."""
    home = RunDirectory(folder)
    home.create()
    home.write_config("method: {name: mpscl}\n")
    manifest = load_manifest(dataset)
    domain = {
        "modality": "ct",
        "scaling": {"low": manifest.scaling.low, "high": manifest.scaling.high},
        "recipe": recipe.to_json(),
        "labels": manifest.labels,
        "dataset": str(dataset),
        "fingerprint": manifest.fingerprint,
    }
    model = {"classes": list(CLASSES), "size": [32, 32], "network": NETWORK, "phases": ["adaptation"]}
    home.write_model({**model, "source": domain, "target": domain})
    network = DeepLabV2(num_classes=len(CLASSES), **NETWORK)
    generator = torch.Generator().manual_seed(2)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
    state = {"method": {"networks": {"segmenter": network.state_dict()}}, "position": {"step": 20}}
    checkpoint.save(home.checkpoints / "step-0000020", {**state, "classes": list(CLASSES), "phase": "adaptation"})
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_scores_of_predicted_files_are_those_of_evaluate(here: Here, raw: Path, tmp_path: Path) -> None:
    recipe = Recipe(crop=(32, 32), centre="image")
    dataset, manifest = made(raw, recipe=recipe)
    run = make_run(tmp_path / "run", dataset, recipe)
    assert here(evaluate, str(run), "--out", str(tmp_path / "evaluated"), "--workers", "0")[0] == 0
    images = [str(raw / f"{case.id.replace('ct_', 'ct_train_')}_image.nii.gz") for case in manifest.split("test")]
    assert images
    assert here(predict, str(run), *images, "--out", str(tmp_path / "pred"), "--workers", "0")[0] == 0
    words = [str(tmp_path / "pred"), str(raw), "--labels", "205=MYO,420=LAC,500=LVC,820=AA", "--allow-missing"]
    words += ["--label-pattern", "ct_train_{case}_label.nii.gz", "--prediction-pattern", "ct_train_{case}_image_*"]
    words += ["--cross-check", "medpy"]
    for workers in ("0", "2"):
        code, output = here(score_command, *words, "--workers", workers, "--out", str(tmp_path / workers))
        assert code == 0, output
    for name in ("scores.csv", "summary.json", "summary.md"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    scores = rows_of(tmp_path / "0" / "scores.csv")
    wanted = rows_of(tmp_path / "evaluated" / "per_volume.csv")
    assert len(scores) == len(wanted) == 4 * len(images)
    assert sum(row["case_kind"] == "ok" for row in scores) >= 4
    for found, row in zip(scores, wanted, strict=True):
        assert f"ct_{found.pop('case')}" == row.pop("case")
        exact = ("structure", "case_kind", "dice", "predicted_voxels", "truth_voxels")
        assert [found.pop(name) for name in exact] == [row.pop(name) for name in exact]
        for name, value in row.items():
            assert (float(found[name] or "nan"), name) == (pytest.approx(float(value or "nan"), nan_ok=True), name)
    summaries = [
        json.loads((tmp_path / part / "summary.json").read_text(encoding="utf-8")) for part in ("0", "evaluated")
    ]
    dice = [summary["summary"]["structures"]["mean"]["dice"] for summary in summaries]
    assert dice[0] == dice[1]
