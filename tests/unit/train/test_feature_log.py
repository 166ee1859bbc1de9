"""What is recorded of features and pseudo-labels, against loops over pixels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpscl_ray.config import Config
from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.slices import LocalSlices
from mpscl_ray.errors import StorageError
from mpscl_ray.methods import MPSCL
from mpscl_ray.train.feature_log import PANEL_SLICES, FeatureRecord
from mpscl_ray.train.phases import build_method, build_segmenter
from tests.tiny import CLASSES, SIZE, make_dataset, tiny_config

POSITION = {"global_step": 8, "phase": "adaptation", "iteration": 0}


def method_of(config: Config, source: Path) -> MPSCL:
    method = build_method(config, "adaptation", build_segmenter(config, 3), 3, torch.device("cpu"))
    assert isinstance(method, MPSCL)
    method.start_phase(10)
    slices = LocalSlices(source, "train", labels=True)
    method.initialise_prototypes((b["image"], b["label"]) for b in slices.shard(0, 1, 4))
    return method


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder / "mr", "mr")
    make_dataset(folder / "ct", "ct", seed=1, slices=5)
    return folder


@pytest.fixture(scope="module")
def method(data: Path) -> MPSCL:
    return method_of(tiny_config(data / "mr", data / "ct", ["method.delta_th=0.002"]), data / "mr")


def by_loop(method: MPSCL, slices: LocalSlices) -> dict[str, Any]:
    """The counts, pixel by pixel, with angles between vectors in numpy."""
    counts = {name: np.zeros((3, 180), int) for name in ("nearest", "selected", "label")}
    confusion = np.zeros((3, 3), int)
    prototypes = method.prototypes.numpy()
    for _, arrays in slices.volumes():
        method.segmenter.eval()
        with torch.no_grad():
            features = method.segmenter(torch.from_numpy(arrays["image"])[:, None]).features.numpy()
        method.segmenter.train()
        for number in range(len(features)):
            _, height, width = features[number].shape
            for row in range(height):
                for column in range(width):
                    f = features[number, :, row, column]
                    norms = np.maximum(np.linalg.norm(prototypes, axis=1) * np.linalg.norm(f), 1e-30)
                    cosine = np.clip(prototypes @ f / norms, -1, 1)
                    degrees = np.minimum(np.degrees(np.arccos(cosine)).astype(int), 179)
                    first, second = np.argsort(-cosine, kind="stable")[:2]
                    truth = arrays["label"][number, row * SIZE[0] // height, column * SIZE[1] // width]
                    counts["nearest"][first, degrees[first]] += 1
                    if truth != NOT_ANNOTATED:
                        counts["label"][truth, degrees[truth]] += 1
                    if cosine[first] - cosine[second] > method.config.delta_th:
                        counts["selected"][first, degrees[first]] += 1
                        if truth != NOT_ANNOTATED:
                            confusion[truth, first] += 1
    return {**counts, "selected_confusion": confusion}


@pytest.mark.parametrize("hidden", [0, 16])
def test_histograms_count_each_pixel_at_its_angle(hidden: int, method: MPSCL, tmp_path: Path) -> None:
    """Those by label count the annotated pixels, here all or half of them."""
    slices = LocalSlices(make_dataset(tmp_path / "ct", "ct", seed=1, slices=5, hidden=hidden), "val", labels=True)
    record = FeatureRecord(tmp_path)
    record.record(method, slices, 4, POSITION)
    (found,) = record.read()
    assert {key: found[key] for key in POSITION} == POSITION
    assert (found["volumes"], found["delta_th"]) == (2, 0.002)
    pixels = 2 * 5 * math.prod(record.read_panels()[0].nearest.shape[1:])
    for name, expected in by_loop(method, slices).items():
        counts = np.array(found[name])
        # An angle on the edge of a degree, or a difference at the threshold, may fall to either side.
        assert abs(counts - expected).sum() <= 0.01 * pixels, name
        total = expected.sum() if name in ("nearest", "label") else pytest.approx(expected.sum(), abs=2)
        assert counts.sum() == total
    assert np.sum(found["nearest"]) == pixels
    assert (np.sum(found["label"]) == pixels) == (hidden == 0)
    assert 0 < np.sum(found["selected"]) < pixels, "the threshold should split the pixels"


def test_panel_shows_slices_of_the_first_volume(method: MPSCL, data: Path, tmp_path: Path) -> None:
    slices = LocalSlices(data / "ct", "val", labels=True)
    record = FeatureRecord(tmp_path)
    record.record(method, slices, 4, POSITION)
    shown = record.read_slices()
    assert shown is not None
    case, arrays = next(slices.volumes())
    assert str(shown["case"]) == case.id
    for name in ("image", "label"):
        assert (shown[name] == arrays[name][shown["slice_index"]]).all()
    (panel,) = record.read_panels()
    assert panel.global_step == 8
    assert len(panel.nearest) == len(shown["image"]) == PANEL_SLICES
    assert panel.nearest.max() < len(CLASSES)
    assert (panel.selected == (panel.difference > method.config.delta_th)).all()


def test_without_images_numbers_alone_are_kept(method: MPSCL, data: Path, tmp_path: Path) -> None:
    slices = LocalSlices(data / "ct", "val", labels=True)
    for images in (True, False):
        (tmp_path / str(images)).mkdir()
        FeatureRecord(tmp_path / str(images), images=images).record(method, slices, 4, POSITION)
    with_images, without = (FeatureRecord(tmp_path / str(images)) for images in (True, False))
    assert without.read() == with_images.read()
    assert with_images.panels.exists()
    assert not without.panels.exists()


def test_recording_changes_neither_network_nor_random_numbers(method: MPSCL, data: Path, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in method.segmenter.state_dict().items()}
    random = torch.get_rng_state()
    FeatureRecord(tmp_path).record(method, LocalSlices(data / "ct", "val", labels=True), 4, POSITION)
    assert method.segmenter.training
    assert (torch.get_rng_state() == random).all()
    assert all((tensor == before[name]).all() for name, tensor in method.segmenter.state_dict().items())


def test_without_labels_there_is_nothing_of_labels(method: MPSCL, data: Path, tmp_path: Path) -> None:
    record = FeatureRecord(tmp_path)
    record.record(method, LocalSlices(data / "ct", "val", labels=False), 4, POSITION)
    assert not {"label", "selected_confusion"} & record.read()[0].keys()
    assert "label" not in (record.read_slices() or {})


@pytest.mark.parametrize("overrides", [["method.beta=0", "method.gamma=0"], None], ids=["baseline", "no validation"])
def test_nothing_is_recorded_without_contrast_or_validation(
    data: Path, tmp_path: Path, overrides: list[str] | None
) -> None:
    method = method_of(tiny_config(data / "mr", data / "ct", overrides or []), data / "mr")
    slices = LocalSlices(data / "ct", "val", labels=True) if overrides else None
    record = FeatureRecord(tmp_path)
    record.record(method, slices, 4, POSITION)
    assert (record.read(), record.read_panels(), record.read_slices()) == ([], [], None)
    assert list(tmp_path.iterdir()) == []


def test_rewind_drops_later_records(method: MPSCL, data: Path, tmp_path: Path) -> None:
    slices = LocalSlices(data / "ct", "val", labels=True)
    record = FeatureRecord(tmp_path)
    for step in (4, 6, 9):
        record.record(method, slices, 4, POSITION | {"global_step": step})
    record.rewind(6)
    assert [entry["global_step"] for entry in record.read()] == [4, 6]
    assert [panel.global_step for panel in record.read_panels()] == [4, 6]


def test_a_folder_that_cannot_be_written_is_a_plain_error(method: MPSCL, data: Path, tmp_path: Path) -> None:
    (tmp_path / "pseudo_labels").write_text("a file in the way")
    with pytest.raises(StorageError, match="pseudo_labels"):
        FeatureRecord(tmp_path).record(method, LocalSlices(data / "ct", "val", labels=True), 4, POSITION)
