"""Dice and surface distances: parity with medpy, analytic shapes, and empty masks as named cases."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medpy.metric import binary

from mpscl_ray.evaluate.metrics import StructureScore, dice, released_protocol_scores, volume_scores
from mpscl_ray.evaluate.surface_distance import (
    SurfaceDistances,
    average,
    distances_between,
    find_surfaces,
    percentile_95,
    voxel_size,
)
from mpscl_ray.evaluate.tables import format_table, scores_csv, summarise, summary_csv
from mpscl_ray.runs.structures import display_order

CLASSES = ["background", "MYO", "LAC", "LVC", "AA"]
SPACINGS = [(1.0, 1.0, 1.0), (8.0, 1.25, 1.25), (0.7, 1.9, 3.1)]


def surface_distances(a, b, spacing=None, connectivity=1) -> SurfaceDistances:
    surfaces = find_surfaces((a != 0).astype(np.uint8), (b != 0).astype(np.uint8), connectivity)
    return distances_between(surfaces.prediction(1), surfaces.truth(1), voxel_size(spacing, a.ndim))


def average_surface_distance(a, b, spacing=None, definition="pooled", connectivity=1) -> float:
    return average(surface_distances(a, b, spacing, connectivity), definition)


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float, spacing: tuple[float, ...]) -> np.ndarray:
    axes = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    return sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) <= radius**2


def random_labels(seed: int, shape: tuple[int, ...] = (14, 17, 19), classes: int = 5) -> np.ndarray:
    """Blobs that touch each other and the border, with a few single voxels."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for _ in range(9):
        centre = tuple(rng.uniform(0, n) for n in shape)
        labels[ball(shape, centre, rng.uniform(1.5, 6), (1.0,) * len(shape))] = rng.integers(1, classes)
    labels.ravel()[rng.integers(0, labels.size, 6)] = rng.integers(0, classes, 6)
    return labels


def medpy_mean_of_means(
    p: np.ndarray, t: np.ndarray, spacing: tuple[float, ...] | None, connectivity: int = 1
) -> float:
    """``assd`` as medpy 0.4 had it."""
    return float(np.mean([binary.asd(p, t, spacing, connectivity), binary.asd(t, p, spacing, connectivity)]))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(6))
def test_volume_scores_equal_medpy_on_whole_volumes(seed: int, spacing: tuple[float, float, float]) -> None:
    p, t = random_labels(seed), random_labels(seed + 100)
    scored = 0
    for index, score in enumerate(volume_scores(p, t, CLASSES, spacing), start=1):
        a, b = p == index, t == index
        if not (a.any() and b.any()):
            assert score.case_kind != "ok"
            continue
        scored += 1
        assert score.dice == pytest.approx(binary.dc(a, b), rel=1e-14)
        assert score.asd_mm == pytest.approx(binary.assd(a, b, spacing), rel=1e-12)
        assert score.asd_voxel == pytest.approx(binary.assd(a, b), rel=1e-12)
        assert score.asd_mm_mean_of_means == pytest.approx(medpy_mean_of_means(a, b, spacing), rel=1e-12)
        assert score.asd_voxel_mean_of_means == pytest.approx(medpy_mean_of_means(a, b, None), rel=1e-12)
        assert score.hd95_mm == pytest.approx(binary.hd95(a, b, spacing), rel=1e-12)
        assert score.asd_mm_worst_case == score.asd_mm
        assert (score.predicted_voxels, score.truth_voxels) == (a.sum(), b.sum())
    assert scored >= 2


def test_the_two_definitions_differ_where_medpys_do() -> None:
    a, b = ball((20, 20, 20), (9, 9, 9), 3, (1, 1, 1)), ball((20, 20, 20), (10, 10, 10), 8, (1, 1, 1))
    pooled, means = average_surface_distance(a, b), average_surface_distance(a, b, definition="mean_of_means")
    assert pooled == pytest.approx(binary.assd(a, b), rel=1e-12)
    assert means == pytest.approx(medpy_mean_of_means(a, b, None), rel=1e-12)
    assert abs(pooled - means) > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    density=st.floats(0.05, 1.0),
    connectivity=st.integers(1, 3),
)
def test_any_pair_of_masks_equals_medpy(seed: int, shape: list[int], density: float, connectivity: int) -> None:
    rng = np.random.default_rng(seed)
    connectivity = min(connectivity, len(shape))
    spacing = tuple(rng.uniform(0.3, 4.0, len(shape)))
    a, b = rng.random(shape) < density, rng.random(shape) < density
    a.ravel()[rng.integers(a.size)] = True
    b.ravel()[rng.integers(b.size)] = True
    got = average_surface_distance(a, b, spacing, connectivity=connectivity)
    assert got == pytest.approx(binary.assd(a, b, spacing, connectivity), rel=1e-12, abs=1e-14)
    means = average_surface_distance(a, b, spacing, "mean_of_means", connectivity)
    assert means == pytest.approx(medpy_mean_of_means(a, b, spacing, connectivity), rel=1e-12, abs=1e-14)
    assert percentile_95(surface_distances(a, b, spacing, connectivity)) == pytest.approx(
        binary.hd95(a, b, spacing, connectivity), rel=1e-12, abs=1e-14
    )
    assert dice(a, b) == pytest.approx(binary.dc(a, b))


def test_single_voxels_are_as_far_apart_as_their_centres() -> None:
    a, b = np.zeros((9, 9, 9), bool), np.zeros((9, 9, 9), bool)
    a[0, 0, 0] = b[3, 4, 0] = True
    assert average_surface_distance(a, b) == pytest.approx(5.0, rel=1e-15)
    assert average_surface_distance(a, b, (4.0, 4.0, 0.5)) == pytest.approx(20.0, rel=1e-15)
    assert average_surface_distance(a, b, 2.0) == pytest.approx(10.0, rel=1e-15)
    assert surface_distances(a, b).from_prediction.tolist() == [5.0]


def test_parallel_plates_are_exactly_their_gap_apart() -> None:
    a, b = np.zeros((12, 8, 8), bool), np.zeros((12, 8, 8), bool)
    a[2], b[7] = True, True  # one voxel thick, touching the border on four sides
    for definition in ("pooled", "mean_of_means"):
        assert average_surface_distance(a, b, (3.0, 1.0, 1.0), definition) == pytest.approx(15.0, rel=1e-15)
    assert dice(a, b) == 0.0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.8)])
def test_concentric_spheres_are_their_difference_in_radius_apart(spacing: tuple[float, float, float]) -> None:
    shape = tuple(round(52 / s) + 3 for s in spacing)
    centre = tuple(n // 2 * s for n, s in zip(shape, spacing, strict=True))
    inner, outer = ball(shape, centre, 14, spacing), ball(shape, centre, 22, spacing)
    for definition in ("pooled", "mean_of_means"):
        distance = average_surface_distance(inner, outer, spacing, definition)
        assert distance == pytest.approx(8.0, abs=max(spacing) / 2)  # surfaces are drawn in whole voxels
    assert dice(inner, outer) == pytest.approx(2 * 14**3 / (14**3 + 22**3), abs=0.01)


def test_the_surface_of_a_solid_excludes_its_inside() -> None:
    solid, shell = np.zeros((9, 9, 9), bool), np.zeros((9, 9, 9), bool)
    solid[2:7, 2:7, 2:7] = shell[2:7, 2:7, 2:7] = True
    shell[4, 4, 4] = False  # a cavity adds its six face neighbours
    outer = 5**3 - 3**3
    assert len(surface_distances(solid, solid).from_prediction) == outer
    assert len(surface_distances(shell, solid).from_prediction) == outer + 6
    full = np.ones((4, 4, 4), bool)  # outside the volume is background
    assert len(surface_distances(full, full).from_truth) == 4**3 - 2**3


def test_cropping_does_not_change_the_value() -> None:
    p, t = random_labels(3), random_labels(4)
    wide = [np.pad(labels, ((20, 3), (0, 17), (6, 9))) for labels in (p, t)]
    tight, loose = volume_scores(p, t, CLASSES, SPACINGS[1]), volume_scores(*wide, CLASSES, SPACINGS[1])
    for small, large in zip(tight, loose, strict=True):
        if small.case_kind == "ok":
            assert (small.asd_mm, small.dice, small.hd95_mm) == (large.asd_mm, large.dice, large.hd95_mm)
            masks = [labels == CLASSES.index(large.structure) for labels in wide]
            assert large.asd_mm == pytest.approx(binary.assd(*masks, SPACINGS[1]), rel=1e-12)


def four_cases() -> tuple[np.ndarray, np.ndarray]:
    """MYO in both, LAC in the truth only, LVC in the prediction only, AA in neither."""
    p, t = np.zeros((10, 20, 30), np.uint8), np.zeros((10, 20, 30), np.uint8)
    p[2:4, 2:6, 2:6] = t[2:5, 2:6, 2:6] = 1
    t[6:8, 10:12, 10:12] = 2
    p[6:8, 15:17, 20:22] = 3
    return p, t


def test_an_empty_mask_is_a_named_case_and_never_a_flattering_number() -> None:
    spacing = (2.0, 1.0, 0.5)
    ok, missed, invented, absent = volume_scores(*four_cases(), CLASSES, spacing)
    diagonal_mm, diagonal_voxel = math.hypot(20, 20, 15), math.hypot(10, 20, 30)
    assert [s.case_kind for s in (ok, missed, invented, absent)] == ["ok", "missed", "false_alarm", "absent"]
    assert 0 < ok.dice < 1
    assert 0 < ok.asd_mm < 2
    for wrong in (missed, invented):
        assert wrong.dice == 0.0
        assert math.isnan(wrong.asd_mm)
        assert math.isnan(wrong.asd_voxel)
        assert math.isnan(wrong.asd_mm_mean_of_means)
        assert math.isnan(wrong.hd95_mm)
        assert wrong.asd_mm_worst_case == pytest.approx(diagonal_mm)
        assert wrong.asd_voxel_worst_case == pytest.approx(diagonal_voxel)
    assert all(math.isnan(getattr(absent, name)) for name in ("dice", "asd_mm", "asd_voxel", "asd_mm_worst_case"))
    assert math.isnan(dice(np.zeros(3), np.zeros(3)))
    assert math.isnan(average_surface_distance(np.zeros((3, 3)), np.ones((3, 3))))
    assert math.isnan(average_surface_distance(np.ones((3, 3)), np.zeros((3, 3)), definition="mean_of_means"))
    assert math.isnan(average(surface_distances(np.zeros((3, 3)), np.zeros((3, 3)))))


def test_no_distance_in_the_volume_exceeds_the_worst_case() -> None:
    a, b = np.zeros((7, 8, 9), np.uint8), np.zeros((7, 8, 9), np.uint8)
    a[0, 0, 0] = b[-1, -1, -1] = 1
    far = volume_scores(a, b, ["background", "x"], (3.0, 1.0, 2.0))[0]
    missed = volume_scores(np.zeros_like(a), b, ["background", "x"], (3.0, 1.0, 2.0))[0]
    assert far.asd_mm < missed.asd_mm_worst_case
    assert far.asd_voxel < missed.asd_voxel_worst_case


def test_without_spacing_only_the_distances_in_mm_are_unknown() -> None:
    ok, missed, *_ = volume_scores(*four_cases(), CLASSES, None)
    assert math.isnan(ok.asd_mm)
    assert ok.asd_voxel == volume_scores(*four_cases(), CLASSES, (3.0, 3.0, 3.0))[0].asd_voxel
    assert math.isnan(missed.asd_mm_worst_case)
    assert missed.asd_voxel_worst_case > 0


def test_the_released_protocol_drops_the_last_slices_and_scores_a_missed_organ_as_one_voxel() -> None:
    t = np.zeros((70, 12, 12), np.uint8)
    t[10:30, 3:8, 3:8] = 1
    t[66:69, 3:8, 3:8] = 2  # inside the last 70 mod 32 slices
    p = t.copy()
    p[30:34, 3:8, 3:8] = 1
    first, tail, neither, _ = released_protocol_scores(p, t, CLASSES)
    a, b = p == 1, t == 1
    assert first.dice == pytest.approx(binary.dc(a, b))
    assert first.asd_voxel == pytest.approx(medpy_mean_of_means(a, b, None), rel=1e-12)
    assert (tail.case_kind, tail.dice, tail.asd_voxel) == ("missed", 0.0, 1.0)
    assert (neither.case_kind, neither.dice, neither.asd_voxel) == ("absent", 0.0, 1.0)
    assert p[66:69].any()  # the caller's prediction is not changed
    assert volume_scores(p, t, CLASSES, None)[1].dice == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3)), np.zeros((3, 2)), CLASSES, None), "shape"),
        ((np.full((2, 2), 5), np.zeros((2, 2), int), CLASSES, None), "prediction must be class indices 0 to 4"),
        ((np.zeros((2, 2), int), np.full((2, 2), -1), CLASSES, None), "truth must be class indices"),
        ((np.zeros((2, 2)), np.zeros((2, 2)), CLASSES, None), "must be integers"),
        ((np.zeros((2, 2), int), np.zeros((2, 2), int), CLASSES, (1.0, 0.0)), "spacing must be positive"),
        ((np.zeros((2, 2), int), np.zeros((2, 2), int), ["background"], None), "2 to 255 classes"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        volume_scores(*arguments)


def test_an_unknown_definition_is_refused() -> None:
    with pytest.raises(ValueError, match="pooled"):
        average_surface_distance(np.ones((2, 2)), np.ones((2, 2)), definition="mean")


def score(structure: str, kind: str, dice_value: float, asd: float, worst: float | None = None) -> StructureScore:
    worst = asd if worst is None else worst
    return StructureScore(structure, kind, dice_value, asd, asd, asd, asd, asd, worst, worst, 1, 1)


NAN = math.nan


def test_the_summary_counts_what_it_leaves_out() -> None:
    summary = summarise(
        {
            "one": [score("LV", "ok", 0.8, 2.0), score("RV", "ok", 0.6, 4.0)],
            "two": [score("LV", "missed", 0.0, NAN, 100.0), score("RV", "absent", NAN, NAN)],
            "three": [score("LV", "ok", 0.4, 6.0), score("RV", "ok", 0.2, 8.0)],
        }
    )
    lv, rv = summary.structures
    assert (lv.structure, lv.counts["ok"], lv.counts["missed"]) == ("LV", 2, 1)
    assert lv.measures["dice"].mean == pytest.approx(0.4)  # the missed one counts as 0
    assert lv.measures["dice"].sd == pytest.approx(np.std([0.8, 0.0, 0.4]))
    assert (lv.measures["asd_mm"].mean, lv.measures["asd_mm"].n) == (4.0, 2)
    assert lv.measures["asd_mm_worst_case"].mean == pytest.approx(36.0)
    assert (rv.measures["dice"].mean, rv.measures["dice"].n) == (pytest.approx(0.4), 2)
    assert summary.mean.measures["dice"].mean == pytest.approx(0.4)
    assert summary.mean.measures["asd_mm"].mean == pytest.approx(5.0)
    assert summary.mean.counts == {"ok": 4, "missed": 1, "false_alarm": 0, "absent": 1}
    assert summary.mean.measures["dice"].sd == pytest.approx(np.std([0.7, 0.0, 0.3]))
    assert summary.structure("mean") is summary.mean
    text = format_table({"adaptation": summary})
    assert "40.0 ± 32.7 (1m)" in text
    assert "ASD mm, worst case" in text
    assert "missed" in text


def test_a_structure_that_is_always_missed_leaves_no_mean_distance() -> None:
    always = {"one": [score("LV", "missed", 0.0, NAN, 90.0), score("RV", "ok", 0.9, 1.0)]}
    mean = summarise(always).mean
    assert math.isnan(mean.measures["asd_mm"].mean)  # 1.0 would be too good
    assert mean.measures["asd_mm_worst_case"].mean == pytest.approx(45.5)
    assert "n/a (1m)" in format_table({"row": summarise(always)})
    nowhere = {"one": [score("LV", "absent", NAN, NAN), score("RV", "ok", 0.9, 1.0)]}
    assert summarise(nowhere).mean.measures["asd_mm"].mean == 1.0
    assert summarise(nowhere).to_json()["structures"]["LV"]["dice"] == {"mean": None, "sd": None, "n": 0}


def test_columns_are_in_the_order_of_the_paper() -> None:
    assert display_order(["MYO", "LAC", "LVC", "AA"]) == ("AA", "LAC", "LVC", "MYO")
    assert display_order(["MYO", "PA", "LAC", "LVC", "AA"]) == ("AA", "LAC", "LVC", "MYO", "PA")
    assert display_order(["MYO", "LV", "RV"]) == ("MYO", "LV", "RV")
    p, t = four_cases()
    summary = summarise({"one": volume_scores(p, t, CLASSES, (1.0, 1.0, 1.0))})
    text = format_table({"source_only": summary, "adaptation": summary}, measures=("dice",), legend=False)
    assert text.splitlines()[0].split() == ["Dice", "%", "AA", "LAC", "LVC", "MYO", "mean"]
    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == ["source_only", "adaptation"]
    markdown = format_table({"a|b": summary}, style="markdown")
    assert "| Dice % | AA | LAC | LVC | MYO | mean |" in markdown
    assert "| a\\|b |" in markdown


def test_csv_has_every_number_in_full_and_leaves_the_undefined_empty() -> None:
    p, t = four_cases()
    scores = volume_scores(p, t, CLASSES, (1.3, 1.0, 1.0))
    rows = list(csv.DictReader(io.StringIO(scores_csv({"case, 1": scores}))))
    assert [row["structure"] for row in rows] == CLASSES[1:]
    assert rows[0]["case"] == "case, 1"
    assert float(rows[0]["asd_mm"]) == scores[0].asd_mm
    assert (rows[1]["case_kind"], rows[1]["asd_mm"]) == ("missed", "")
    assert float(rows[1]["asd_mm_worst_case"]) == scores[1].asd_mm_worst_case
    summary = summarise({"one": scores})
    lines = list(csv.DictReader(io.StringIO(summary_csv({"last": summary}))))
    assert [line["structure"] for line in lines] == ["AA", "LAC", "LVC", "MYO", "mean"]
    assert lines[1]["missed"] == "1"
    assert float(lines[3]["dice_mean"]) == scores[0].dice


def test_volumes_with_different_structures_are_not_averaged() -> None:
    with pytest.raises(ValueError, match="structures"):
        summarise({"one": [score("LV", "ok", 1.0, 0.0)], "two": [score("RV", "ok", 1.0, 0.0)]})
    with pytest.raises(ValueError, match="no volume"):
        summarise({})
