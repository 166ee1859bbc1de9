"""The computations of the figures: surfaces, errors, shares, means, planes; by hand or against geometry."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mpscl_ray.config.titles import system_of
from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.slice_selection import evenly_spaced, labelled_slices
from mpscl_ray.report.figures import angles, losses, surfaces
from mpscl_ray.report.figures.feature_space import plane, sample_of
from mpscl_ray.report.figures.pseudo_labels import selection_curves
from mpscl_ray.report.figures.segmentations import (
    Segmented,
    confident_share,
    overconfident,
    side_by_side,
)
from mpscl_ray.report.figures.style import class_legend, house_style, png, wrapped
from mpscl_ray.runs.palette import hex_colour

CLASSES = ("background", "LVC", "MYO")


def ball(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float, spacing: float) -> np.ndarray:
    """A ball in a volume with slices ``spacing`` times as far apart as pixels."""
    positions = np.indices(shape).astype(float) - np.array(centre)[:, None, None, None]
    positions[0] *= spacing
    return np.linalg.norm(positions, axis=0) <= radius


def rendered(volume: np.ndarray, spacing: tuple[float, float, float], azimuth: float, elevation: float) -> np.ndarray:
    masks = surfaces._smooth_masks(volume, 3, spacing)
    return surfaces.render(masks, spacing, surfaces._bounds([volume], spacing), azimuth, elevation, size=100)


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 0), (90, 0), (40, 30)])
def test_a_ball_is_a_disc_from_every_side_whatever_the_spacing(azimuth: float, elevation: float) -> None:
    volume = ball((16, 40, 40), (8, 20, 20), 12, 2.5).astype(np.uint8)
    image = rendered(volume, (2.5, 1.0, 1.0), azimuth, elevation)
    rows, columns = np.nonzero((image < 1).any(axis=2))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert height == pytest.approx(width, rel=0.08)
    assert len(rows) == pytest.approx(math.pi / 4 * height * width, rel=0.05)


@pytest.mark.parametrize(("azimuth", "hidden"), [(0, 2), (180, 1)])
def test_the_nearer_structure_hides_the_other(azimuth: float, hidden: int) -> None:
    """The first slice is in front at azimuth 0."""
    volume = np.zeros((40, 30, 30), np.uint8)
    volume[ball(volume.shape, (8, 15, 15), 7, 1)] = 1
    volume[ball(volume.shape, (30, 15, 15), 7, 1)] = 2
    image = rendered(volume, (1, 1, 1), azimuth, 0)
    seen = image[50, 50]
    reddish = seen[0] > seen[2]  # class 1 is orange, class 2 sky blue
    assert bool(reddish) == (hidden == 2)


def test_up_in_the_slice_is_up_in_the_picture() -> None:
    volume = np.zeros((20, 40, 20), np.uint8)
    volume[ball(volume.shape, (10, 6, 10), 5, 1)] = 1
    volume[ball(volume.shape, (10, 33, 10), 5, 1)] = 2
    image = rendered(volume, (1, 1, 1), 25, 20)
    shown = [np.nonzero((image < 1).any(axis=2) & where)[0].mean() for where in (image[..., 0] > image[..., 2],)]
    assert shown[0] < 50, "the structure of the first rows should be above the middle"


def test_surfaces_of_empty_volumes_are_empty_pictures() -> None:
    empty = np.zeros((5, 8, 8), np.uint8)
    some = empty.copy()
    some[2, 3:5, 3:5] = 1
    with house_style():
        assert png(surfaces.surfaces({"nothing": empty, "something": some}, CLASSES, (1, 1, 1))).startswith(b"\x89PNG")


def test_confident_errors_are_wrong_and_of_low_entropy() -> None:
    truth = np.array([[[0, 1, 2, 1]]], np.uint8)
    column = Segmented("s", np.array([[[0, 2, 1, 1]]], np.uint8), np.array([[[0.0, 0.05, 0.9, 0.5]]], np.float32))
    assert column.confident_errors(truth).tolist() == [[[False, True, False, False]]]
    assert confident_share(column, truth) == 0.5
    assert math.isnan(confident_share(column, column.labels))
    truth[0, 0, 1] = NOT_ANNOTATED  # nobody knows whether it is wrong
    assert not column.confident_errors(truth).any()
    assert confident_share(column, truth) == 0


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("shape", [(1, 6, 6), (12, 20, 10)])
def test_slices_are_drawn_at_any_size(shape: tuple[int, int, int], labelled: bool) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=shape).astype(np.float32)
    truth = rng.integers(0, 3, shape).astype(np.uint8)
    columns = [
        Segmented("a long title of a run", rng.integers(0, 3, shape).astype(np.uint8), np.zeros(shape, np.float32))
    ]
    with house_style():
        for figure in (
            side_by_side(
                images, columns, truth if labelled else None, CLASSES, evenly_spaced(labelled_slices(truth), 4)
            ),
            overconfident(images, columns, truth if labelled else None, CLASSES),
        ):
            assert png(figure).startswith(b"\x89PNG")


def test_mean_angle_by_hand() -> None:
    histogram = [0] * 180
    histogram[10], histogram[20] = 3, 1
    assert angles.mean_angle(histogram) == pytest.approx((3 * 10.5 + 20.5) / 4)
    assert math.isnan(angles.mean_angle([0] * 180))


def test_selection_shares_by_hand() -> None:
    def counts(*classes: int) -> list[list[int]]:
        return [[number, *([0] * 179)] for number in classes]

    record = {
        "iteration": 0,
        "nearest": counts(60, 20, 20),
        "selected": counts(30, 10, 0),
        "selected_confusion": [[30, 4, 0], [0, 6, 0], [0, 0, 0]],
    }
    axes = selection_curves({"run": [record]}).axes
    assert [float(panel.lines[0].get_ydata()[0]) for panel in axes] == pytest.approx([0.4, 0.25, 0.6])


def test_loss_curves_keep_runs_apart_and_mark_phases() -> None:
    records = [
        {"global_step": step + 10, "iteration": step, "phase": "source_only", "val/loss_cross_entropy": 1.0 / step}
        for step in (1, 2)
    ]
    records += [{**records[1], "global_step": 13, "iteration": 1, "phase": "warm_up"}]
    figure = losses.loss_curves([losses.Training("one", records), losses.Training("two", records, {12: 0.3})])
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
    for axes in figure.axes:
        assert [text.get_text().strip() for text in axes.texts] == ["source-only", "warm-up"]
        assert axes.get_xlim()[0] == 10
    assert any(list(line.get_xdata()) == [12] for line in figure.axes[1].lines)
    assert png(losses.loss_curves([losses.Training("a single reading", records[:1])])).startswith(b"\x89PNG")
    assert not losses.has_losses([{"global_step": 1, "train/loss_dice_main": 1.0}])


def test_the_plane_holds_features_that_lie_in_one() -> None:
    rng = np.random.default_rng(0)
    turn = rng.uniform(0, 2 * math.pi, 200)
    axes = np.linalg.qr(rng.normal(size=(7, 7)))[0][:, :2]
    features = ((np.stack([np.cos(turn), np.sin(turn)], 1) * rng.uniform(1, 9, (200, 1))) @ axes.T).astype(np.float32)
    labels = {"source": np.arange(200, dtype=np.uint8) % 3, "target": np.zeros(200, np.uint8)}
    sample = sample_of({"source": features, "target": features}, labels, np.zeros((3, 7), np.float32), "")
    assert np.bincount(sample.labels["source"]).tolist() == [67, 67, 66]
    assert len(sample.labels["target"]) == 120
    points, _, share = plane(sample)
    assert share == pytest.approx(1)
    # Distances between unit vectors are kept.
    unit = sample.features["source"] / np.linalg.norm(sample.features["source"], axis=1, keepdims=True)
    assert np.linalg.norm(points["source"][0] - points["source"][1]) == pytest.approx(
        np.linalg.norm(unit[0] - unit[1]), abs=1e-5
    )


@pytest.mark.parametrize(
    ("method", "labelled", "system"),
    [
        ({"name": "segmentation"}, "source", "source_only"),
        ({"name": "segmentation"}, "target", "supervised"),
        ({"name": "mpscl", "beta": 0, "gamma": 0, "margin_source": 0.4}, "source", "baseline"),
        ({"name": "mpscl", "beta": 0.1, "gamma": 1, "margin_source": 0, "margin_target": 0}, "source", "cscl"),
        ({"name": "mpscl", "beta": 0.1, "gamma": 1, "margin_source": 0.4, "margin_target": 0}, "source", "mpscl"),
        ({"name": "clan"}, "source", "clan"),
        ({"name": "mean_teacher"}, "source", "mean_teacher"),
    ],
)
def test_systems_have_the_names_of_the_paper(method: dict[str, object], labelled: str, system: str) -> None:
    assert system_of({"method": method, "data": {"labelled_domain": labelled}}) == system


def test_legends_and_panels_have_the_order_of_the_tables() -> None:
    classes = ("background", "MYO", "LAC", "LVC", "AA")
    figure = Figure()
    class_legend(figure, classes)
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["AA", "LAC", "LVC", "MYO"]
    colours = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
    assert colours == [hex_colour(index) for index in (4, 2, 3, 1)], "a structure keeps the colour of its index"
    record = {"iteration": 0, "nearest": [[0] * at + [1] + [0] * (179 - at) for at in range(5)]}
    panels = angles.between_runs({"run": record}, classes).axes
    means = {panel.get_title(): panel.lines[-1].get_xdata()[0] for panel in panels}
    assert means == {"AA": 4.5, "LAC": 2.5, "LVC": 3.5, "MYO": 1.5}
    assert list(means) == ["AA", "LAC", "LVC", "MYO"]


def test_long_titles_take_two_lines() -> None:
    assert wrapped("source-only (CSCL)") == "source-only\n(CSCL)"
    assert wrapped("MPSCL") == "MPSCL"
