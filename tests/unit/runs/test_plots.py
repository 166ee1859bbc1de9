"""Pictures: what is in them, and that their colours stay apart."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.runs.palette import COLOURS, colour
from mpscl_ray.runs.plots import panel, plot_progress, progress_figure, save_png

CLASSES = ["background", "MYO", "LAC", "LVC", "AA"]

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
DEFICIENCIES = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB: distances in it are those that eyes perceive."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ np.clip(linear, 0, 1) / np.array([0.9505, 1.0, 1.089]), 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_classes_stay_apart_for_colour_blind_eyes(deficiency: str) -> None:
    colours = [(np.array(rgb) / 255) ** 2.2 for rgb in COLOURS[1:]]
    seen = [lab(DEFICIENCIES[deficiency] @ colour) for colour in colours]
    for (one, first), (other, second) in combinations(enumerate(seen, start=1), 2):
        assert np.linalg.norm(first - second) > 10, f"classes {one} and {other}"


# ---- panel ----


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 64, 64)).astype(np.float32)


def test_panel_shows_each_label_where_it_is(images: np.ndarray) -> None:
    images = np.zeros_like(images)
    labels = np.zeros((3, 64, 64), np.int64)
    labels[1, 10:20, 30:40] = 3
    result = panel(images, {"source-only": np.zeros_like(labels), "adaptation": labels}, CLASSES)
    assert result.dtype == np.uint8
    header, tile, gap = 24, 128, 4
    assert result.shape == (header + 3 * tile + 2 * gap + 24, 3 * tile + 2 * gap, 3)
    for column in range(3):
        for row in range(3):
            top, left = header + row * (tile + gap), column * (tile + gap)
            coloured = np.ptp(result[top : top + tile, left : left + tile].astype(int), axis=-1) > 0
            expected = np.zeros((tile, tile), bool)
            if (column, row) == (2, 1):
                expected[20:40, 60:80] = True
            np.testing.assert_array_equal(coloured, expected)
    pixel = result[header + tile + gap + 30, 2 * (tile + gap) + 70]
    np.testing.assert_allclose(pixel / pixel.sum(), np.array(COLOURS[3]) / sum(COLOURS[3]), atol=0.01)


def test_panel_names_columns_and_classes(images: np.ndarray) -> None:
    labels = np.zeros((3, 64, 64), np.uint8)
    one = panel(images, {"adaptation": labels, "label": labels}, CLASSES)
    other = panel(images, {"adaptation": labels, "truth": labels}, CLASSES)
    header = np.any(one[:24] != other[:24], axis=(0, 2))
    assert header.any()
    assert not header[: 2 * 132].any(), "only the third title differs"
    renamed = panel(images, {"adaptation": labels, "label": labels}, [*CLASSES[:-1], "aorta"])
    assert np.array_equal(one[:-24], renamed[: len(one) - 24])
    assert not np.array_equal(one[-24:], renamed[-24:])


def test_what_is_not_annotated_is_grey_and_has_a_name(images: np.ndarray) -> None:
    labels = np.zeros((3, 64, 64), np.uint8)
    plain = panel(np.zeros_like(images), {"label": labels}, CLASSES)
    labels[0, :32] = NOT_ANNOTATED
    shown = panel(np.zeros_like(images), {"label": labels}, CLASSES)
    tile = shown[24:152, 132:]
    assert np.ptp(tile.astype(int), axis=-1).max() == 0
    assert tile[:64].min() == tile[:64].max() > 50
    assert tile[64:].max() == 0
    assert np.array_equal(plain[152:280], shown[152:280])
    assert not np.array_equal(plain[-24:], shown[-24:])
    assert all(colour(index) != colour(NOT_ANNOTATED) for index in range(NOT_ANNOTATED))


def test_panel_greys_run_over_the_intensities(images: np.ndarray) -> None:
    images[0, 0, 0] = 1e6
    grey = panel(images, {}, CLASSES)[24:152, :128]
    assert np.ptp(grey.astype(int), axis=-1).max() == 0
    assert grey.min() < 10
    assert grey.max() == 255
    assert 80 < grey.mean() < 180


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 50), (1, 256, 256), (1, 300, 20)])
def test_panel_of_any_size(shape: tuple[int, int, int]) -> None:
    labels = np.zeros(shape, np.uint8)
    result = panel(np.ones(shape), {"label": labels}, [f"structure {index}" for index in range(12)])
    assert result.ndim == 3
    assert result.shape[2] == 3
    assert panel(np.ones(shape), {}, ["background"]).shape[2] == 3


def test_png_round_trip(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    save_png(tmp_path / "panel.png", image)
    found = matplotlib.image.imread(tmp_path / "panel.png")
    np.testing.assert_array_equal((found[..., :3] * 255).round().astype(np.uint8), image)


# ---- curves ----


def test_progress_draws_each_curve_and_boundary() -> None:
    records: list[dict[str, Any]] = []
    for step in range(20, 901, 20):
        phase = "source_only" if step <= 300 else "warm_up" if step <= 500 else "adaptation"
        records.append(
            {"global_step": step, "phase": phase, "train/loss_segmentation": 1 / step, "train/non_finite": 0.0}
        )
        if phase == "adaptation":
            records[-1] |= {
                "train/loss_contrastive_target": math.nan if step == 600 else 2.0,
                "train/pseudo_label_fraction": 0.4,
            }
        if step % 300 == 0:
            records[-1] |= {"val/dice/MYO": 0.5, "val/dice/mean": 0.6, "val/source/dice/mean": 0.9}
    drawn = losses, shares, dice = progress_figure(records, "demo").axes
    curves = {line.get_label(): line for axes in drawn for line in axes.get_lines()}
    assert list(curves["segmentation"].get_xdata()) == list(range(20, 901, 20))
    assert 600 not in curves["contrastive target"].get_xdata()
    assert list(curves["mean"].get_ydata()) == [0.6] * 3
    assert {"MYO", "source mean", "pseudo label fraction"} <= set(curves)
    assert "non finite" not in curves
    for axes in (losses, shares, dice):
        boundaries = [line.get_xdata()[0] for line in axes.get_lines() if str(line.get_label()).startswith("_")]
        assert boundaries == [300, 500]
    assert [text.get_text().strip() for text in losses.texts] == ["source_only", "warm_up", "adaptation"]
    styles = [(line.get_color(), line.get_linestyle()) for line in losses.get_lines()[:2]]
    assert styles[0][0] != styles[1][0]
    assert styles[0][1] != styles[1][1]


def test_a_curve_keeps_its_colour_when_others_come() -> None:
    first = {"global_step": 10, "phase": "source_only", "train/loss_segmentation": 1.0, "train/loss_dice_main": 0.5}
    later = {"global_step": 20, "phase": "warm_up", "train/loss_adversarial": 0.7, **first, "train/loss_aux": 2.0}

    def colours(records: list[dict[str, Any]]) -> dict[Any, Any]:
        lines = progress_figure(records).axes[0].get_lines()
        return {line.get_label(): line.get_color() for line in lines if not str(line.get_label()).startswith("_")}

    before, after = colours([first]), colours([first, later])
    assert len(before) == 2
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    "records", [[], [{"global_step": 1, "phase": "warm_up"}], [{"global_step": 1, "train/loss_a": math.inf}]]
)
def test_progress_before_there_is_any(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    plot_progress(records, tmp_path / "progress.png", "demo")
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    for axes in progress_figure(records).axes:
        assert "nothing measured yet" in [text.get_text() for text in axes.texts]
