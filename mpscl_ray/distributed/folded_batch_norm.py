"""Batch normalisation that keeps several inputs apart in one kernel: for GPUs, where a launch costs more than its work.

The images of P inputs alternate in the batch: (B P, C, H, W), the P images of number b side by side. In memory that is
(B, P C, H, W): one normalisation over P C channels gives each input its own statistics, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d for a batch of ``len(parts)`` alternating inputs, each normalised by its own statistics.

    Parameters, buffers and state-dict keys are those of nn.BatchNorm2d; the counter of batches, which nothing needs
    where the momentum is a number, stays as it is.
    """

    parts: Sequence[bool] = (True,)
    """For each input, whether it updates the running statistics (:func:`update_running_stats`)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._batch_stats: list[Tensor] = []
        self.part_stats: list[tuple[Tensor, Tensor]] = []
        """Mean and unbiased variance (C) of each input of the last folded batch; no part of the state."""
        self._affine: tuple[tuple[int, ...], tuple[Tensor | None, Tensor | None]] = ((), (None, None))

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if len(self.parts) == 1:
            running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
            return self._normalise(input, *running, self.weight, self.bias, self.momentum or 0.0)
        number, (batch, channels, height, width) = len(self.parts), input.shape
        folded = input.reshape(batch // number, number * channels, height, width)
        if len(self.part_stats) != number or self._batch_stats[0].device != input.device:
            self._batch_stats = [self.running_mean.repeat(number) for _ in range(2)]  # type: ignore[union-attr]
            self.part_stats = list(zip(*(stats.chunk(number) for stats in self._batch_stats), strict=True))
        # With momentum 1 the kernel leaves the statistics of the batch itself.
        mean, var = self._batch_stats
        output = self._normalise(folded, mean, var, *self._folded_affine(number), 1.0)
        # Not a view for autograd: the rectifier that follows works in place, and on a view that copies.
        return torch.ops.aten._unsafe_view(output, input.shape)  # type: ignore[no-any-return]

    def _normalise(
        self, x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, m: float
    ) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, True, m, self.eps)

    def _folded_affine(self, number: int) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias once for each input; kept while nothing trains or changes them."""
        parameters: list[Tensor | None] = [self.weight, self.bias]
        if torch.compiler.is_compiling():  # It cannot compare addresses.
            weight, bias = (None if p is None else p.repeat(number) for p in parameters)
            return weight, bias
        state = tuple(-1 if p is None else p._version for p in parameters)
        key = (number, *state, *(0 if p is None else p.data_ptr() for p in parameters))
        if self._affine[0] == key:
            return self._affine[1]
        weight, bias = (None if p is None else p.repeat(number) for p in parameters)
        if not any(p is not None and p.requires_grad for p in parameters):
            self._affine = key, (weight, bias)
        return weight, bias


class FoldedSyncBatchNorm(FoldedBatchNorm2d):
    """The same over the images of all workers, by nn.SyncBatchNorm: one collective for all inputs."""

    def _normalise(
        self, x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, m: float
    ) -> Tensor:
        # On the device meta: a description of the layer, whose tensors are those given below.
        layer = nn.SyncBatchNorm(
            x.shape[1], self.eps, m, affine=weight is not None, track_running_stats=mean is not None, device="meta"
        )
        values = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        given = {name: value for name, value in values.items() if value is not None}
        return torch.func.functional_call(layer, given, (x,))  # type: ignore[no-any-return]


def fold_batch_norm(module: nn.Module, kind: type[FoldedBatchNorm2d] = FoldedBatchNorm2d) -> nn.Module:
    """Replace each nn.BatchNorm2d of a network by its folded version; a layer's parameters and buffers stay the same.

    Returns:
        The module, changed in place; where it is a batch normalisation itself, its replacement.
    """
    if type(module) is nn.BatchNorm2d:
        folded = kind(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        folded.weight, folded.bias = module.weight, module.bias
        folded.running_mean, folded.running_var = module.running_mean, module.running_var
        folded.num_batches_tracked = module.num_batches_tracked
        return folded.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, fold_batch_norm(child, kind))
    return module


@torch.no_grad()
def update_running_stats(layers: Sequence[FoldedBatchNorm2d]) -> None:
    """Move the running statistics of all layers by those of their last folded batch, input by input, in few kernels."""
    if not layers:
        return
    parts, momentum = layers[0].parts, layers[0].momentum or 0.0
    running: Any = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
    for number, updates in enumerate(parts):
        if updates:
            found = [stats for layer in layers for stats in layer.part_stats[number]]
            torch._foreach_lerp_(running, found, momentum)
