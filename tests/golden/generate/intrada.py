"""Runs the released ranking of IntraDA whole, and its copy of ADVENT's loop."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from tests.golden.generate.adversarial import advent_loop
from tests.golden.generate.patches import Segmenter, load, prepare
from tests.golden.released_inputs import CLASSES, RANKED, RANKED_SIZE, SEGMENTER, fill, ranked_images


def intrada(folder: Path) -> dict[str, Any]:
    """``main`` of the ranking: scores, the split, and the pseudo-labels that it writes as images; then training."""
    prepare(folder / "ADVENT")
    entropy = load(folder / "entropy_rank" / "entropy.py")
    network = Segmenter(CLASSES, **SEGMENTER)
    fill(network, 5)
    entropy.get_deeplab_v2 = lambda num_classes, multi_level: network
    entropy.torch.load = lambda file: network.state_dict()
    entropy.CityscapesDataSet = lambda **_: None
    images = [(image, None, None, [f"city/{row:02}.png"]) for row, image in enumerate(ranked_images().split(1))]
    entropy.data.DataLoader = lambda *_, **__: images
    entropy.cfg.update(GPU_ID="cpu", NUM_CLASSES=CLASSES)
    entropy.cfg.TRAIN.update(INPUT_SIZE_TARGET=(RANKED_SIZE, RANKED_SIZE))
    scores: list[tuple[str, float]] = []
    split = entropy.cluster_subdomain
    entropy.cluster_subdomain = lambda found, part: split(scores.extend(found) or found, part)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        config = folder / "ADVENT" / "advent" / "scripts" / "configs" / "advent.yml"
        entropy.main(SimpleNamespace(cfg=str(config), best_iter=0, normalize=False, lambda1=0.67))
        rows = {
            name: [int(Path(line).stem) for line in Path(f"{name}_split.txt").read_text(encoding="utf-8").split()]
            for name in ("easy", "hard")
        }
        labels = [np.array(Image.open(f"color_masks/{row:02}.png")) for row in range(RANKED)]
        os.chdir(here)
    training = advent_loop(load(folder / "intrada" / "train_UDA.py"), "intrada")
    return {
        "scores": np.array([score for _, score in scores]),
        "pseudo_labels": np.stack(labels),
        **{name: np.array(value) for name, value in rows.items()},
        **{f"train_{key}": value for key, value in training.items()},
    }
