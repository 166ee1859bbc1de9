"""The operators that a training step launches on a GPU, counted without one: ``python -m tests.operators``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpscl_ray.config import load_config
from mpscl_ray.distributed.folded_batch_norm import fold_batch_norm
from mpscl_ray.methods import Batch, losses, optim
from mpscl_ray.networks.deeplab import AtrousHead
from mpscl_ray.train.phases import build_method, build_segmenter

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
"""Operators without a kernel besides views."""

SYNCHRONISING = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "lift_fresh"}
"""Operators for which the host waits, or by which it sends a value of its own to the device."""

CLASSES = 5


class Operators(TorchDispatchMode):
    """Records the operators that launch a kernel: their names, and their arguments that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.parts: Counter[str] = Counter()

    @property
    def counts(self) -> Counter[str]:
        return Counter(name for name, _ in self.calls)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if _launches(function):
            values = [x for x in tree_leaves((arguments, options or {})) if not isinstance(x, Tensor)]
            self.calls.append((function._schema.name.removeprefix("aten::"), tuple(values)))
            self.parts[_part()] += 1
        return function(*arguments, **(options or {}))


def _launches(function: Any) -> bool:
    results = [result.alias_info for result in function._schema.returns]
    view = any(alias is not None and not alias.is_write for alias in results)
    return function.namespace != "profiler" and not view and function.overloadpacket.__name__ not in ALLOCATIONS


def _part() -> str:
    """The part of a step that calls an operator."""
    frame, inside = sys._getframe(2), "backward" if torch._C._current_autograd_node() is not None else ""
    while frame is not None and not inside:
        file = frame.f_code.co_filename
        if file.endswith("methods/optim.py"):
            inside = "optimisers, guard, snapshot"
        elif "mpscl_ray/networks/" in file or file.endswith("batch_norm.py"):
            inside = "forward"
        elif "mpscl_ray/methods/" in file and frame.f_code.co_name in ("accuracy", "prototype_angles"):
            inside = "metrics"
        frame = frame.f_back  # type: ignore[assignment]
    return inside or "losses, prototypes"


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Methods that are made in here, and run in here, take on a CPU the path of a GPU."""

    def in_float64(one: Tensor, other: Tensor) -> Tensor:
        return torch.matmul(one.double(), other.double()).to(one.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "convert_batch_norm", lambda module, device, fold: fold_batch_norm(module))
        patch.setattr(AtrousHead, "_forward_on_cpu", AtrousHead.convolve)
        patch.setattr(losses, "exact_matmul", in_float64)
        yield


def made(preset: str, settings: list[str]) -> tuple[Any, Batch]:
    """The method of a preset's last phase with narrow networks, started, and a batch."""
    narrow = ["network.base_channels=4", "method.discriminator_width=4"]
    config = load_config(preset, ["data.source=a", "data.target=b", *narrow, *settings])
    phase = config.schedule[-1][0]
    method = build_method(config, phase, build_segmenter(config, CLASSES, phase), CLASSES, torch.device("cpu"))
    method.start_phase(100)
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(2, 1, 64, 64, generator=generator) for _ in range(2))
    return method, Batch(source, torch.randint(0, CLASSES, (2, 64, 64), generator=generator), target)


def operators_of_a_step(preset: str, settings: list[str]) -> Operators:
    """Those of the second step; the first keeps some constants."""
    with as_on_gpu():
        method, batch = made(preset, settings)
        method.step(batch, 0)
        with Operators() as operators:
            method.step(batch, 1)
    return operators


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="?", default="mr2ct/mpscl")
    parser.add_argument("settings", nargs="*", help="SETTING=VALUE")
    options = parser.parse_args()
    operators = operators_of_a_step(options.preset, options.settings)
    print(f"| {options.preset} | operators |\n|---|---|")
    for part, number in [*operators.parts.most_common(), ("all", len(operators.calls))]:
        print(f"| {part} | {number} |")
    print(", ".join(f"{name} {number}" for name, number in operators.counts.most_common(12)))


if __name__ == "__main__":
    main()
