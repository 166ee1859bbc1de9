"""A training that does not fit into memory: no restart helps, smaller batches or other settings do."""

from __future__ import annotations

import re

import torch

from mpscl_ray.config import Config


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU, or the memory of the machine, is full."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def describe_out_of_memory(config: Config, error: BaseException, rank: int, phase: str, step: int) -> str:
    """One sentence: which worker it was, at which global step, how much it wanted, and what to try.

    Settings with which the same run resumes come first.
    """
    wanted = re.search(r"[Tt]ried to allocate [\d.]+ ?\w+", str(error))
    wanted_text = f" ({wanted[0][0].lower() + wanted[0][1:]})" if wanted else ""
    resumes = ["a larger scaling.num_workers"]
    if not (config.optim.recompute or config.precision.compile or config.method_name == "sifa"):
        resumes.insert(0, "optim.recompute=true")
    others = [f"optim.accumulate={2 * config.optim.accumulate}"]
    others.append(f"data.global_batch_size={max(1, config.data.global_batch_size // 2)}")
    if config.precision.dtype != "bf16":
        others.append("precision.dtype=bf16")
    return (
        f"worker {rank} ran out of memory after step {step}, in the phase {phase}{wanted_text}; give "
        f"{' or '.join(resumes)}, with which the run resumes, or start another run with {', '.join(others[:-1])} or "
        f"{others[-1]}"
    )
