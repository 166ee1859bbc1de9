"""Seconds that a checkpoint takes from training: ``python tests/benchmarks/bench_checkpoint.py [PRESET]``.

Three steps with all checkpoints at once (best, one to resume from, the end of a phase), and how long they take to be
complete. The process CPU includes the thread that writes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from mpscl_ray.config import load_config
from mpscl_ray.methods.base import Batch
from mpscl_ray.runs.checkpoint import checkpoint_name
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.checkpointing import Checkpointer, TrainerState
from mpscl_ray.train.phases import build_method, build_segmenter

preset = sys.argv[1] if len(sys.argv) > 1 else "mr2ct/mpscl"
config = load_config(preset, ["data.source=mr", "data.target=ct", "run.keep_checkpoints=2"])
phase = config.schedule[-1][0]
device = torch.device("cpu")
classes = ("background", "MYO", "LAC", "LVC", "AA")
with tempfile.TemporaryDirectory() as temporary:
    folder = RunDirectory(Path(temporary) / "run")
    folder.create()
    method = build_method(config, phase, build_segmenter(config, len(classes), phase), len(classes), device)
    method.start_phase(10)
    image = torch.zeros(2, 1, 64, 64)
    method.step(Batch(image, torch.randint(0, 5, (2, 64, 64)), image + 0.1), 0)
    checkpointer = Checkpointer(config, classes, folder, device)
    for step in range(1, 6):
        state = TrainerState(len(config.schedule) - 1, step, step)
        start, cpu = time.perf_counter(), time.process_time()
        for directory in (folder.best, folder.checkpoints / checkpoint_name(step), folder.phases / phase):
            checkpointer.save(directory, method, phase, state)
        taken = time.perf_counter() - start
        if hasattr(checkpointer, "finish"):
            checkpointer.finish()
        complete, cpu = time.perf_counter() - start, time.process_time() - cpu
        size = sum(file.stat().st_size for file in (folder.checkpoints / checkpoint_name(step)).iterdir())
        print(f"{size / 1e6:.0f} MB: {taken:.2f} s in training, complete after {complete:.2f} s, {cpu:.2f} CPU s")
