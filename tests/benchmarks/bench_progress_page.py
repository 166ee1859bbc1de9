"""How long one writing of ``progress.html`` takes at the end of a long training.

python -m tests.benchmarks.bench_progress_page
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from mpscl_ray.config import load_config
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.training_page import TrainingPage

CLASSES = ("background", "MYO", "LAC", "LVC", "AA")
LOSSES = ("segmentation", "adversarial_main", "adversarial_aux", "contrastive_source", "contrastive_target")
PICTURES = 120


def main() -> None:
    """Print times and the size of the page."""
    config = load_config("mr2ct/mpscl", ["data.source=mr", "data.target=ct"])
    total, every, validates = config.total_iterations, config.run.log_every, config.run.validate_every
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        folder = RunDirectory(Path(place) / "run")
        folder.create()
        for step in range(every, total + 1, every):
            position = {"global_step": step, "phase": "adaptation", "iteration": step, "iterations": total}
            tags = [f"train/loss_{name}" for name in LOSSES] + ["train/learning_rate_segmenter"]
            if step % validates == 0:
                tags += [*(f"val/dice/{name}" for name in (*CLASSES[1:], "mean")), "val/entropy", "val/selection_score"]
            folder.append_metrics(position | {tag: float(rng.random()) for tag in tags})
        page = TrainingPage(folder, config, CLASSES)
        page.start(total)
        for number in range(PICTURES):
            page.picture(number * total // PICTURES, rng.integers(0, 4, (560, 400, 3)).astype(np.uint8) * 64)
        for _ in range(5):
            started, computed = time.perf_counter(), time.process_time()
            page.close()
            seconds, own = time.perf_counter() - started, time.process_time() - computed
            size = folder.progress_page.stat().st_size / 1e6
            print(f"{total} iterations: {1e3 * own:.0f} ms of a CPU, {1e3 * seconds:.0f} ms in all, {size:.1f} MB")


if __name__ == "__main__":
    main()
