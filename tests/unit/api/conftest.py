"""One training by the Python API, for the tests of what it leaves and of what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpscl_ray import Config, TrainingResult, load_config, prepare_dataset, train_segmenter
from tests.raw_volumes import mmwhs
from tests.tiny import tiny_settings


@pytest.fixture(scope="session")
def hearts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw volumes of CT and MR in ``scans``, and their datasets in ``data``."""
    folder = tmp_path_factory.mktemp("hearts")
    for modality in ("ct", "mr"):
        mmwhs(folder / "scans", modality)
    data = prepare_dataset(folder / "scans", folder / "data", "mmwhs", split="0.5,0.25,0.25", crop=(32, 32), workers=0)
    assert data == {"ct": folder / "data" / "ct", "mr": folder / "data" / "mr"}
    return folder


@pytest.fixture(scope="session")
def tiny(hearts: Path) -> Config:
    """The preset phantom made tiny, on those datasets."""
    places = [f"data.source={hearts / 'data' / 'ct'}", f"data.target={hearts / 'data' / 'mr'}"]
    return load_config(
        "phantom", [*tiny_settings("phantom"), "scaling.num_workers=2", *places, f"run.storage={hearts / 'runs'}"]
    )


@pytest.fixture(scope="session")
def result(tiny: Config) -> TrainingResult:
    return train_segmenter(tiny, device="cpu")
