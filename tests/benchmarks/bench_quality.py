"""How well the quality estimate ranks volumes of the target: ``python -m tests.benchmarks.bench_quality RUN [FOLDER]``.

RUN was calibrated (``evaluate RUN --calibrate-quality``). Every labelled volume of the target is segmented as it is,
and again with noise, blur, and shifted, inverted or halved intensities: other draws than those of the calibration.
Labels of the target, also of its training volumes, are read for this evaluation alone. Rows: the rank correlation of
each feature and of the estimate with the true mean Dice of prepared slices, over volumes as they are and over all.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mpscl_ray.data import NOT_ANNOTATED, SPLITS
from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.degradations import Image, blur
from mpscl_ray.evaluate.calibrate_quality import spearman
from mpscl_ray.evaluate.case_scores import CaseToScore, read_slices
from mpscl_ray.evaluate.metrics import dice, left_out_where
from mpscl_ray.predict.predictor import load_segmenter
from mpscl_ray.predict.quality import assess

CHANGES = {
    "as it is": lambda image, rng: image,
    "noise 0.15": lambda image, rng: image + rng.normal(0, 0.15, image.shape),
    "noise 0.4": lambda image, rng: image + rng.normal(0, 0.4, image.shape),
    "blur 1.5": lambda image, rng: np.stack([blur(one, 1.5) for one in image]),
    "blur 3": lambda image, rng: np.stack([blur(one, 3.0) for one in image]),
    "inverted": lambda image, rng: -image,
    "halved": lambda image, rng: image * 0.5,
    "brighter by 0.6": lambda image, rng: np.clip(image + 0.6, -1, 1),
}


def main(run: str, folder: str | None = None) -> None:
    predictor, rng = load_segmenter(run, device="cpu"), np.random.default_rng(0)
    assert predictor.model is not None
    domain, classes = predictor.model.domains["target"], predictor.classes
    dataset = Path(folder or str(domain.dataset))
    manifest = load_manifest(dataset)
    rows: list[dict[str, float]] = []
    kinds: list[str] = []
    for case in [case for split in SPLITS for case in manifest.split(split) if case.labelled]:
        image, truth = read_slices(CaseToScore(dataset, case, manifest.scaling, domain), label=True)
        assert truth is not None
        for name, change in CHANGES.items():
            changed: Image = change(image, rng).astype(np.float32)
            maps = predictor.predict_maps(changed)
            labels, known = left_out_where(truth == NOT_ANNOTATED, maps.labels, truth)
            scores = [dice(labels, known, index) for index in range(1, len(classes))]
            quality = assess(maps, classes, predictor.calibrations)
            estimate = {} if quality.estimate is None else {"estimate": quality.estimate}
            rows.append({"dice": float(np.nanmean(scores)), **quality.features, **estimate})
            kinds.append(name)
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    table["ratios"] = -table.get("ratios", np.zeros(len(rows)))  # a distance: the smaller, the better
    clean = np.array([kind == "as it is" for kind in kinds])
    for kind in CHANGES:
        print(f"mean Dice, {kind}: {table['dice'][[one == kind for one in kinds]].mean():.3f}")
    for title, which in (("as they are", clean), ("all", np.ones(len(rows), bool))):
        found = {name: values[which] for name, values in table.items()}
        true = found.pop("dice")
        print(f"\n{len(true)} volumes, {title}: mean Dice {true.min():.3f} to {true.max():.3f}, mean {true.mean():.3f}")
        for name, values in found.items():
            print(f"  {name:14s} Spearman {spearman(list(values), list(true)):5.2f}")
        if "estimate" in found:
            difference = found["estimate"] - true
            print(f"  estimate: mean error {np.abs(difference).mean():.3f}, bias {difference.mean():+.3f}")
            worst = set(np.argsort(true)[: max(1, len(true) // 5)].tolist())
            hits = len(worst & set(np.argsort(found["estimate"])[: len(worst)].tolist()))
            print(f"  {hits} of the {len(worst)} worst are among the {len(worst)} lowest estimates")


if __name__ == "__main__":
    main(*sys.argv[1:])
