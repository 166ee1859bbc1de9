"""The training of one worker without Ray, in a process of its own: ``training_process.py TASK.json RANK``.

The task names the workers there are (``world_size``), the run folder (``run``), nested settings (``config``), whether
to compute in double precision (``double``), whether to look at each batch (``watched``) and, perhaps, after how many
steps of this process to ask for a stop (``stop_after``). What was seen is written to ``RUN/process-RANK.json``: the
outcome, and a hash of each slice that was trained on, by step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpscl_ray import feature_record, pace, training, validation
from mpscl_ray.config import config_from_dict
from mpscl_ray.data import stream
from mpscl_ray.methods.base import Batch
from mpscl_ray.run_folder import RunFolder
from tests.tiny import local_data


def hashes(batch: Batch) -> list[list[str]]:
    """A hash of each slice, its label included, by domain."""

    def of(*tensors: torch.Tensor) -> list[str]:
        rows = zip(*(tensor.numpy() for tensor in tensors), strict=True)
        return [hashlib.sha256(b"".join(array.tobytes() for array in row)).hexdigest()[:16] for row in rows]

    domains = [of(batch.source_image, batch.source_label)]
    return domains if batch.target_image is None else [*domains, of(batch.target_image)]


def compute_in_double() -> None:
    """The segmenter is made of doubles, the discriminators follow it, and images have to be."""
    single_tensors, single_segmenter = stream.tensors, training.build_segmenter

    def tensors(*arguments: Any) -> dict[str, torch.Tensor]:
        return {name: t.double() if name == "image" else t for name, t in single_tensors(*arguments).items()}

    for module in (stream, training, validation, feature_record):
        module.tensors = tensors  # type: ignore[attr-defined]
    training.build_segmenter = lambda *arguments: single_segmenter(*arguments).double()  # type: ignore[assignment]


def main(task: dict[str, Any], rank: int) -> None:
    """Train, and write down what was seen."""
    torch.set_num_threads(1)
    if task["double"]:
        compute_in_double()
    if task["world_size"] > 1:
        store = f"file://{Path(task['run']).absolute()}/rendezvous-{task['meeting']}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=task["world_size"])
    config = config_from_dict(task["config"])
    seen: list[list[list[str]]] = []

    def recorded(*tensors: torch.Tensor) -> Batch:
        batch = Batch(*tensors)
        seen.append(hashes(batch))
        return batch

    if task["watched"]:
        training.Batch = recorded  # type: ignore[assignment,misc]
        pace.LOOK_S = 0.0  # After each step.
    steps = itertools.count(1)
    folder = RunFolder(Path(task["run"]))
    if rank == 0:
        folder.create()
    if task["world_size"] > 1:
        dist.barrier()
    outcome = training.train(
        config,
        local_data(config),
        folder,
        torch.device("cpu"),
        stop_requested=lambda: next(steps) == task.get("stop_after"),
    )
    content = {"outcome": dataclasses.asdict(outcome), "seen": seen, "pid": os.getpid()}
    (folder.path / f"process-{rank}.json").write_text(json.dumps(content))
    if task["world_size"] > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
