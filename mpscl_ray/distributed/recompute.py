"""Blocks of a network that keep their input alone, and are computed once more in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_MODE = ("track_running_stats", "parts")
"""Attributes of batch norms that a forward pass of several domains changes for its time."""


def recompute_in_backward(blocks: Iterable[nn.Module]) -> None:
    """Let blocks, in place, keep no activations for the backward pass but their input.

    Losses, gradients and running statistics stay the same, bit for bit. Blocks take one tensor and draw no random
    numbers. Their batch norms are those of :func:`mpscl_ray.distributed.batch_norm.convert_batch_norm`.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    for block in blocks:
        norms = [layer for layer in block.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        block.forward = functools.partial(_run, block.forward, norms)


def _run(forward: Callable[[Tensor], Tensor], norms: Sequence[nn.Module], x: Tensor) -> Any:
    if not torch.is_grad_enabled():
        return forward(x)
    mode = _mode(norms)
    return checkpoint(
        forward,
        x,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _again(norms, mode)),
    )


def _mode(norms: Sequence[nn.Module]) -> list[dict[str, Any]]:
    return [{name: getattr(layer, name) for name in _MODE if hasattr(layer, name)} for layer in norms]


@contextmanager
def _again(norms: Sequence[nn.Module], mode: list[dict[str, Any]]) -> Iterator[None]:
    """Batch norms work as in the first pass; in the end their running statistics are as they were."""
    buffers = [buffer for layer in norms for buffer in layer.buffers()]
    before, mode_before = [buffer.clone() for buffer in buffers], _mode(norms)
    _set_mode(norms, mode)
    try:
        yield
    finally:
        _set_mode(norms, mode_before)
        with torch.no_grad():
            torch._foreach_copy_(buffers, before)


def _set_mode(norms: Sequence[nn.Module], mode: list[dict[str, Any]]) -> None:
    for layer, values in zip(norms, mode, strict=True):
        for name, value in values.items():
            setattr(layer, name, value)
