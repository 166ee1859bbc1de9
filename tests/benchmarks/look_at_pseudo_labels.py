"""What the pseudo-labels of MPSCL and CAG are worth: theirs against the true labels of the target's training slices.

``python tests/benchmarks/look_at_pseudo_labels.py RUN [RUN ...] [--phase warm_up]`` takes the method as it was at the
end of an adaptation, or lets it begin one with the segmenter of a phase before. The labels of the target are read for
this look alone; no training sees them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpscl_ray.config import is_adaptation, load_config
from mpscl_ray.data.slices import LocalSlices
from mpscl_ray.methods import MPSCL
from mpscl_ray.methods.cag import CAG, IGNORE
from mpscl_ray.methods.losses import cosine_to_prototypes
from mpscl_ray.methods.prototypes import downsample_labels, self_paced_pseudo_labels
from mpscl_ray.prepare import phantom_dataset
from mpscl_ray.runs import checkpoint
from mpscl_ray.train.phases import build_method, build_segmenter, transfer_weights
from mpscl_ray.train.streams import training_slices
from tests.tiny import local_data

CPU = torch.device("cpu")
BATCH = 8


def labellers(method: MPSCL | CAG) -> dict[str, Callable[[Tensor], Tensor]]:
    """By what they are called: slices (B, 1, H, W) to pseudo-labels (B, h, w), IGNORE where a pixel is left out."""
    if isinstance(method, CAG):
        return {
            "A, nearest anchor": lambda image: method.pseudo_labels(image)[0],
            "P, probability": lambda image: method.pseudo_labels(image)[1],
        }

    def self_paced(image: Tensor) -> Tensor:
        cosine = cosine_to_prototypes(method.evaluate(image).features, method.prototypes)
        labels, mask = self_paced_pseudo_labels(cosine, method.config.delta_th)
        return torch.where(mask, labels, IGNORE)

    return {"nearest prototype": self_paced}


def look(folder: Path, phase: str) -> None:
    config = phantom_dataset.resolve(load_config(str(folder / "config.yaml")), progress=False)
    data = local_data(config)
    classes = len(data.classes)
    adaptation = next(name for name, _ in config.schedule if is_adaptation(name))
    method = build_method(config, adaptation, build_segmenter(config, classes, adaptation), classes, CPU)
    assert isinstance(method, (MPSCL, CAG)), f"{config.method_name} has no pseudo-labels of this kind"
    state = checkpoint.load(folder / "phases" / phase)["method"]
    if is_adaptation(phase):
        method.load_state_dict(state)
    else:
        transfer_weights(method.networks, state["networks"])
        method.prepare(training_slices(config, data, CPU, dict, 0, 1))
    truth = LocalSlices(Path(config.data.target), "train", labels=True)
    for name, labeller in labellers(method).items():
        # Rows: true class; columns: pseudo-label, the last one for pixels that are left out.
        pixels = torch.zeros(classes, classes + 1, dtype=torch.float64)
        for batch in truth.shard(0, 1, BATCH):
            found = labeller(batch["image"])
            true = downsample_labels(batch["label"], (found.shape[1], found.shape[2]))
            found = torch.where(found == IGNORE, classes, found)
            pairs = (true * (classes + 1) + found).flatten()
            pixels += torch.bincount(pairs, minlength=pixels.numel()).reshape(pixels.shape)
        selected = pixels[:, :-1]
        right = selected.diagonal() / selected.sum(dim=0).clamp(min=1)
        print(
            f"{folder.name}, end of {phase}, {name}: {selected.sum() / pixels.sum():.0%} of the pixels selected, "
            f"{selected[1:].sum() / selected.sum():.1%} of these are a structure, "
            f"{selected[:, 1:].sum() / selected.sum():.1%} are called one; right of those called "
            + ", ".join(f"{title} {share:.0%}" for title, share in zip(data.classes, right.tolist(), strict=True))
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--phase", default="warm_up", help="at whose end (default: warm_up)")
    options = parser.parse_args()
    with torch.no_grad():
        for run in options.runs:
            look(run, options.phase)


if __name__ == "__main__":
    main()
