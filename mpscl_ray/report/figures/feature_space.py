"""Features of source and target in the plane of their principal components, with the prototypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from mpscl_ray.report.figures.style import GREY, bare, class_legend
from mpscl_ray.runs.palette import hex_colour

PER_CLASS = 120
"""Pixels drawn of each class and domain, so that background does not hide the rest."""


@dataclass(frozen=True)
class FeatureSample:
    """Pixels of one segmenter's feature maps."""

    features: Mapping[str, NDArray[np.float32]]
    """Domain -> (N, d), raw."""
    labels: Mapping[str, NDArray[np.uint8]]
    """Domain -> (N,) class of each pixel."""
    prototypes: NDArray[np.float32]
    """(C, d), raw; a row of zeros for a class without one."""
    prototypes_from: str
    """Where the prototypes come from, in words."""


def sample_of(
    features: Mapping[str, NDArray[np.float32]],
    labels: Mapping[str, NDArray[np.uint8]],
    prototypes: NDArray[np.float32],
    prototypes_from: str,
) -> FeatureSample:
    """At most PER_CLASS pixels of each class and domain, drawn at random."""
    rng = np.random.default_rng(0)
    kept = {}
    for domain, classes in labels.items():
        parts = [np.flatnonzero(classes == index) for index in range(len(prototypes))]
        kept[domain] = np.concatenate([rng.permutation(part)[:PER_CLASS] for part in parts])
    return FeatureSample(
        {domain: features[domain][pixels] for domain, pixels in kept.items()},
        {domain: labels[domain][pixels] for domain, pixels in kept.items()},
        prototypes,
        prototypes_from,
    )


def plane(sample: FeatureSample) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64], float]:
    """Unit features and prototypes in the first two principal components of the features of both domains.

    Returns:
        Domain -> (N, 2); prototypes (C, 2); the share of the variance in the plane.
    """
    units = {domain: _unit(features) for domain, features in sample.features.items()}
    together = np.concatenate(list(units.values()))
    centre = together.mean(axis=0)
    _, values, directions = np.linalg.svd(together - centre, full_matrices=False)
    axes = directions[:2].T
    # The sign of a component is arbitrary: its largest entry is made positive.
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    axes = axes * np.where(signs == 0, 1, signs)
    points = {domain: (features - centre) @ axes for domain, features in units.items()}
    total = float((values**2).sum())
    return points, (_unit(sample.prototypes) - centre) @ axes, float((values[:2] ** 2).sum()) / total if total else 1.0


def feature_space(samples: Mapping[str, FeatureSample], classes: Sequence[str]) -> Figure:
    """A panel for each segmenter: source as dots, target as crosses, prototypes as stars, all in class colours."""
    figure = Figure(figsize=(3.0 * len(samples) + 0.2, 3.5), layout="constrained")
    axes = figure.subplots(1, len(samples), squeeze=False)[0]
    for panel, (title, sample) in zip(axes, samples.items(), strict=True):
        points, prototypes, share = plane(sample)
        for domain, marker, size in (("source", "o", 9), ("target", "x", 14)):
            order = np.random.default_rng(1).permutation(len(points[domain]))
            colours = [hex_colour(int(index)) if index else GREY for index in sample.labels[domain][order]]
            style = {"facecolors": "none", "edgecolors": colours} if marker == "o" else {"c": colours}
            panel.scatter(*points[domain][order].T, s=size, marker=marker, linewidths=0.7, alpha=0.75, **style)
        for index, point in enumerate(prototypes):
            if sample.prototypes[index].any():
                shade = hex_colour(index) if index else GREY
                panel.scatter(*point, s=190, marker="*", c=shade, edgecolors="black", linewidths=0.9, zorder=5)
        panel.set_title(f"{title}\n{100 * share:.0f} % of the variance", fontsize=8)
        bare(panel)
        for spine in panel.spines.values():
            spine.set_visible(True)
            spine.set_color("#bbbbbb")
        panel.set_box_aspect(1)
    class_legend(figure, ["background", *classes[1:]])
    marks = [
        Line2D([], [], linestyle="", marker="o", markerfacecolor="none", color="black", markersize=4, label="source"),
        Line2D([], [], linestyle="", marker="x", color="black", markersize=5, label="target"),
        Line2D([], [], linestyle="", marker="*", color="black", markersize=9, label="prototype"),
        Line2D([], [], linestyle="", marker="s", color=GREY, markersize=5, label="background"),
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks))
    return figure


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    units: NDArray[np.float64] = vectors / np.maximum(norms, 1e-12)
    return units
