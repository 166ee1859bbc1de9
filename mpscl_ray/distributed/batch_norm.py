"""Batch normalisation over the images of all workers, and with separate statistics for each domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpscl_ray.distributed.collectives import all_reduce_sums, world_size
from mpscl_ray.distributed.folded_batch_norm import (
    FoldedBatchNorm2d,
    FoldedSyncBatchNorm,
    fold_batch_norm,
    update_running_stats,
)
from mpscl_ray.distributed.micro_batches import in_micro_batches


def batch_norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch normalisation layers of a network, those over workers included."""
    return [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def changing_buffers(network: nn.Module) -> list[Tensor]:
    """Buffers that a forward pass in training mode changes: all but the counters of folded layers."""
    still = {id(layer.num_batches_tracked) for layer in batch_norms(network) if isinstance(layer, FoldedBatchNorm2d)}
    return [buffer for buffer in network.buffers() if id(buffer) not in still]


def set_cumulative_average(network: nn.Module, number: int) -> None:
    """Make running statistics the mean over passes; the next pass in training mode is number ``number``, from 1."""
    for layer in batch_norms(network):
        layer.momentum = 1.0 / number


def convert_batch_norm(module: nn.Module, device: torch.device, *, fold: bool = True) -> nn.Module:
    """Make batch normalisation use the statistics of all workers' images together, and of each domain alone.

    Parameters, buffers and state-dict keys stay the same. On GPUs the layers become :class:`FoldedBatchNorm2d`, with
    several workers on nn.SyncBatchNorm; elsewhere :class:`WorkersBatchNorm2d`, and in one process nothing changes.
    Calling it twice is harmless.

    Args:
        module: the network.
        device: where it trains.
        fold: whether layers on a GPU are folded. In channels-last memory that would copy every activation: without, all
            inputs of a :class:`PerDomainForward` pass one after the other, through nn.SyncBatchNorm where there are
            several workers.

    Returns:
        The module, changed in place; where it is a batch normalisation itself, its replacement.
    """
    alone = world_size() == 1
    if device.type == "cuda" and fold:
        return fold_batch_norm(module, FoldedBatchNorm2d if alone else FoldedSyncBatchNorm)
    if alone:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call, no-any-return]
    return _replace(module)


def _replace(module: nn.Module) -> nn.Module:
    if type(module) is nn.BatchNorm2d:
        return _workers_batch_norm(module)
    for name, child in module.named_children():
        setattr(module, name, _replace(child))
    return module


def _workers_batch_norm(layer: nn.BatchNorm2d) -> nn.Module:
    converted = WorkersBatchNorm2d(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )
    converted.weight, converted.bias = layer.weight, layer.bias
    converted.running_mean, converted.running_var = layer.running_mean, layer.running_var
    converted.num_batches_tracked = layer.num_batches_tracked
    return converted.train(layer.training)


class WorkersBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the images of all workers, on CPUs, where SyncBatchNorm does not run.

    Equals nn.BatchNorm2d on the union of the workers' batches, running statistics (with the unbiased variance of the
    union) and gradients included. The workers' batches may differ in size.
    """

    parts: Sequence[bool] = (True,)
    """The batch consists of ``len(parts)`` equal parts, normalised as if each came in its own forward; each entry
    says whether its part updates the running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if self.momentum is None:
            raise NotImplementedError("WorkersBatchNorm2d has no cumulative average (momentum=None)")
        output, means, variances, counts = _WorkersNorm.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self.eps, len(self.parts)
        )
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                for updates, mean, variance, count in zip(self.parts, means, variances, counts, strict=True):
                    if updates:
                        unbiased = variance * (count / (count - 1))
                        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(sum(self.parts))
        return output  # type: ignore[no-any-return]


class _WorkersNorm(torch.autograd.Function):
    """``y = weight * (x - mean) / sqrt(variance + eps) + bias`` with mean and variance over all workers, part by part.

    With ``g`` the gradient of y, ``h = (x - mean) / sqrt(variance + eps)`` and means over all workers:
    ``dx = weight / sqrt(variance + eps) * (g - mean(g) - h * mean(g h))``, ``dweight = sum g h``, ``dbias = sum g``
    (these two over this worker's images; averaging the gradients over workers adds the others).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, parts: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # torch.var_mean takes several times as long on CPUs as the kernel that batch normalisation itself uses.
        local = [torch.ops.aten.batch_norm_update_stats(part, None, None, 0.0) for part in x.chunk(parts)]
        mean = torch.stack([part[0] for part in local]).double()
        variance = torch.stack([part[1] for part in local]).double()
        count = mean.new_full((parts, 1), x.numel() // x.shape[1] // parts)
        count, sums, squares = all_reduce_sums(count, count * mean, count * (variance + mean * mean))
        mean = sums / count
        variance = (squares / count - mean * mean).clamp_(min=0.0)
        dtype = x.dtype if weight is None else weight.dtype
        means, variances = mean.to(dtype), variance.to(dtype)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, means, variances, count)
        ctx.mark_non_differentiable(mean, variance, count)
        normalised = [
            torch.batch_norm(part, weight, bias, means[i], variances[i], False, 0.0, eps, False)
            for i, part in enumerate(x.chunk(parts))
        ]
        return torch.cat(normalised) if parts > 1 else normalised[0], mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, means, variances, count = ctx.saved_tensors
        scale = torch.ones_like(means[0]) if weight is None else weight
        parts = len(means)
        # In evaluation mode this kernel gives sum(g h) and sum(g) for the given mean and variance.
        local = [
            torch.ops.aten.native_batch_norm_backward(
                g, part, scale, means[i], variances[i], None, None, False, ctx.eps, [False, True, True]
            )
            for i, (g, part) in enumerate(zip(grads[0].chunk(parts), x.chunk(parts), strict=True))
        ]
        sum_gh = torch.stack([part[1] for part in local])
        sum_g = torch.stack([part[2] for part in local])
        dx = None
        if ctx.needs_input_grad[0]:
            all_gh, all_g = all_reduce_sums(sum_gh, sum_g)
            inverse = torch.rsqrt(variances + ctx.eps)
            factor = scale * inverse
            slope = -factor * inverse * (all_gh / count.to(means.dtype))
            offset = -factor * (all_g / count.to(means.dtype)) - slope * means
            dx = torch.empty_like(x)
            for i, (out, g, part) in enumerate(
                zip(dx.chunk(parts), grads[0].chunk(parts), x.chunk(parts), strict=True)
            ):
                a, b, c = (values[i].view(1, -1, 1, 1) for values in (factor, slope, offset))
                torch.addcmul(c, g, a, out=out).addcmul_(part, b)
        return (
            dx,
            sum_gh.sum(dim=0) if ctx.needs_input_grad[1] else None,
            sum_g.sum(dim=0) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


class PerDomainForward(nn.Module):
    """Run a network on several inputs in one forward, with separate batch statistics for each input.

    DistributedDataParallel allows one forward per backward. Inputs of the same shape pass through the network as one
    batch if all its normalisation layers can separate them, which halves the collectives for two inputs; otherwise they
    pass one after the other.

    Args:
        network: takes one input; gives a tensor, or a named tuple of tensors and None, with the batch in front.
        update_running_stats: for each input, whether it updates the running statistics. None: all do.
        micro_batches: parts in which the inputs pass (:func:`in_micro_batches`), each with its own statistics.
    """

    def __init__(
        self, network: nn.Module, update_running_stats: Sequence[bool] | None = None, micro_batches: int = 1
    ) -> None:
        super().__init__()
        self.network = network
        self.update_running_stats = update_running_stats
        self.micro_batches = micro_batches
        self._norms = batch_norms(network)

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        outputs: tuple[Any, ...] = in_micro_batches(self._forward, self.micro_batches, inputs, self.network.buffers())
        return outputs

    def _forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        updates = self.update_running_stats or (True,) * len(inputs)
        separable = all(isinstance(layer, WorkersBatchNorm2d) for layer in self._norms)
        alike = len({x.shape for x in inputs}) == 1
        folded = [layer for layer in self._norms if isinstance(layer, FoldedBatchNorm2d)]
        if alike and len(inputs) > 1 and folded and len(folded) == len(self._norms):
            return self._folded(inputs, updates, folded)
        if separable and alike:
            for layer in self._norms:
                layer.parts = updates  # type: ignore[assignment]
            try:
                return _split(self.network(torch.cat(inputs)), len(inputs))
            finally:
                for layer in self._norms:
                    layer.parts = (True,)  # type: ignore[assignment]
        outputs = []
        for x, update in zip(inputs, updates, strict=True):
            # Without the attribute, a forward in training mode does not update the running statistics.
            for layer in self._norms:
                layer.track_running_stats = update
            try:
                outputs.append(self.network(x))
            finally:
                for layer in self._norms:
                    layer.track_running_stats = True
        return tuple(outputs)

    def _folded(
        self, inputs: Sequence[Tensor], updates: Sequence[bool], layers: list[FoldedBatchNorm2d]
    ) -> tuple[Any, ...]:
        """All inputs as one batch in which their images alternate."""
        for layer in layers:
            layer.parts = updates
        try:
            output = self.network(torch.stack(list(inputs), dim=1).flatten(0, 1))
            if self.training:
                update_running_stats(layers)
        finally:
            for layer in layers:
                layer.parts = (True,)
        return _unfold(output, len(inputs))


def _unfold(output: Any, number: int) -> tuple[Any, ...]:
    """Split the output for inputs whose images alternated."""
    if output is None:
        return (None,) * number
    if isinstance(output, Tensor):
        return output.reshape(-1, number, *output.shape[1:]).unbind(1)
    kind = type(output)
    return tuple(kind(*fields) for fields in zip(*(_unfold(field, number) for field in output), strict=True))


def _split(output: Any, number: int) -> tuple[Any, ...]:
    """Split the output for several inputs that passed as one batch."""
    if output is None:
        return (None,) * number
    if isinstance(output, Tensor):
        return output.chunk(number)
    kind = type(output)
    return tuple(kind(*fields) for fields in zip(*(_split(field, number) for field in output), strict=True))
