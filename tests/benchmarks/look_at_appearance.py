"""One slice in the appearances that training gives it: a picture to judge the settings of ``data.augmentation`` by.

``python tests/benchmarks/look_at_appearance.py DATASET [--out appearance.png]`` takes the training slice that shows
most of the structures. A row is a mapping or the degradations; its first column is the slice, with the outlines of its
labels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpscl_ray.config import AugmentConfig
from mpscl_ray.data.appearance import MAPPINGS, change_appearance
from mpscl_ray.data.label_values import is_structure
from mpscl_ray.data.sampler import sample_keys
from mpscl_ray.data.slices import LocalSlices

COLUMNS = 7


def rows(image: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Appearances (COLUMNS, 1, H, W) by name of one slice (1, 1, H, W) with its label (1, H, W)."""
    keys = sample_keys(1, "source", 0, COLUMNS)
    images, labels = image.repeat(COLUMNS, 1, 1, 1), label.repeat(COLUMNS, 1, 1)
    each = {name: AugmentConfig(mapping_probability=1, mappings=(name,)) for name in MAPPINGS}
    each["degradations"] = AugmentConfig(degradation_probability=0.5)
    everything = AugmentConfig(mapping_probability=0.8, degradation_probability=0.3)
    changed = {name: change_appearance(images, labels, keys, config) for name, config in each.items()}
    changed["all"] = change_appearance(images, labels, keys, everything)
    changed["second view"] = change_appearance(images, None, keys, everything)
    return changed


def draw(image: Tensor, label: Tensor, path: Path) -> None:
    """Write the picture of one slice (1, 1, H, W) with its label (1, H, W)."""
    changed = rows(image, label)
    figure = Figure(figsize=(1.5 * (COLUMNS + 1), 1.6 * len(changed)), layout="constrained")
    axes = figure.subplots(len(changed), COLUMNS + 1, squeeze=False)
    for line, (name, images) in zip(axes, changed.items(), strict=True):
        for axis, shown in zip(line, [image[0, 0], *images[:, 0]], strict=True):
            axis.imshow(shown, cmap="gray", vmin=float(image.min()) - 0.2, vmax=float(image.max()) + 0.2)
            axis.set_axis_off()
        for number in np.unique(label[is_structure(label.numpy())]):
            line[0].contour(label[0] == number, [0.5], linewidths=0.5, colors=f"C{number}")
        line[0].set_title(name, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, default=Path("appearance.png"))
    arguments = parser.parse_args()
    slices = LocalSlices(arguments.dataset, "train", labels=True)
    arrays = slices.files.read(np.arange(slices.rows))
    best = int(is_structure(arrays["label"]).sum(axis=(1, 2)).argmax())
    image, label = (torch.from_numpy(arrays[name][best : best + 1]) for name in ("image", "label"))
    draw(image[:, None], label, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
