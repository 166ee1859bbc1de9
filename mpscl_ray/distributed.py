"""The seam to the other workers: every collective of the product is called from here.

In one process, with or without a process group, each function is the identity, so that no other module asks how many
workers there are. Objects travel as JSON and tensors as they are; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mpscl_ray.errors import TrainingError

T = TypeVar("T")


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this worker, 0 to ``world_size() - 1``."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    """Wait until every worker is here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of a tensor over the workers, without gradient and in the dtype given.

    Args:
        tensor: same shape and dtype on every worker.

    Returns:
        A new tensor; in one process the argument itself, detached.
    """
    if world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def all_reduce_sums(*tensors: Tensor) -> list[Tensor]:
    """Sum several tensors over the workers in ONE collective.

    They travel as float64, in which counts are exact and sums of float32 lose nothing that matters.

    Args:
        tensors: same shapes on every worker.

    Returns:
        The sums, in the shapes and dtypes given.
    """
    if world_size() == 1:
        return [tensor.detach() for tensor in tensors]
    total = all_reduce_sum(torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors]))
    parts = total.split_with_sizes([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def all_reduce_mean(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over the workers of each 0-dim tensor, in one collective.

    Args:
        values: the same names, in the same order, on every worker.

    Returns:
        The means as 0-dim float64 tensors on the device of the values.
    """
    if not values:
        return {}
    stacked = torch.stack([value.detach().double() for value in values.values()])
    return dict(zip(values, (all_reduce_sum(stacked) / world_size()).unbind(), strict=True))


def reduce_metrics(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Global values of what ``Method.step`` returned: mean over the workers, read on the host.

    Every worker calls it, at the report interval: this is the one place where the host waits for the device.
    """
    means = all_reduce_mean(values)
    numbers: list[float] = torch.stack(list(means.values())).tolist() if means else []
    return dict(zip(means, numbers, strict=True))


def share_of_ratio(numerator: Tensor, global_denominator: Tensor) -> Tensor:
    """A worker's share of a ratio of sums: ``W * numerator / denominator``.

    The mean of the shares over the W workers, and so the gradient that DistributedDataParallel averages, is
    ``sum_r numerator_r / denominator``.

    Args:
        numerator: this worker's sum, 0-dim, with gradient.
        global_denominator: sum over all workers, 0-dim.
    """
    return numerator * world_size() / global_denominator


def any_worker(flag: Tensor) -> Tensor:
    """1.0 on every worker if the 0-dim ``flag`` is true on one of them, else 0.0 (float32)."""
    return (all_reduce_sum(flag.to(torch.float32)) > 0).to(torch.float32)


def broadcast_object(value: T) -> T:
    """The value that worker 0 has, on every worker.

    Args:
        value: of JSON types; ignored except on worker 0.
    """
    return value if world_size() == 1 else gather_objects(value)[0]


def gather_objects(value: T) -> list[T]:
    """The values of all workers, in the order of their ranks, on every worker.

    Args:
        value: of JSON types (tuples come back as lists).
    """
    if world_size() == 1:
        return [value]
    device = _device_of_collectives()
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([data.numel()], device=device))
    lengths = [int(size.item()) for size in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(text[:length].tolist())) for text, length in zip(texts, lengths, strict=True)]


def _device_of_collectives() -> torch.device:
    """NCCL alone moves GPU memory only; every other set-up takes CPU tensors."""
    if dist.get_backend_config() in ("nccl", "cuda:nccl"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class ForEach(nn.Module):
    """Run a network on several inputs in one forward, with batch statistics of each input by itself.

    A wrapped network may be run forward once per backward. Inputs of the same shape go through the network as one batch
    where its normalisation can tell them apart, which halves the collectives of two inputs; else one after the other.

    Args:
        network: takes one input; gives a tensor, or a named tuple of tensors and None, with the batch in front.
        moves_statistics: for each input, whether its pass moves the running statistics. None: all do.
    """

    def __init__(self, network: nn.Module, moves_statistics: Sequence[bool] | None = None) -> None:
        super().__init__()
        self.network = network
        self.moves_statistics = moves_statistics
        self._norms = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        moves = self.moves_statistics or (True,) * len(inputs)
        tell_apart = all(isinstance(layer, WorkersBatchNorm2d) for layer in self._norms)
        if tell_apart and len({x.shape for x in inputs}) == 1:
            for layer in self._norms:
                layer.parts = moves  # type: ignore[assignment]
            try:
                return _split(self.network(torch.cat(inputs)), len(inputs))
            finally:
                for layer in self._norms:
                    layer.parts = (True,)  # type: ignore[assignment]
        outputs = []
        for x, tracked in zip(inputs, moves, strict=True):
            # With the attribute off, a pass in training mode leaves the running statistics alone.
            for layer in self._norms:
                layer.track_running_stats = tracked
            try:
                outputs.append(self.network(x))
            finally:
                for layer in self._norms:
                    layer.track_running_stats = True
        return tuple(outputs)


def _split(output: Any, number: int) -> tuple[Any, ...]:
    """Cut what a network gave for inputs that went in as one batch."""
    if output is None:
        return (None,) * number
    if isinstance(output, Tensor):
        return output.chunk(number)
    kind = type(output)
    return tuple(kind(*fields) for fields in zip(*(_split(field, number) for field in output), strict=True))


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """Average the gradients of a module over the workers, which start from the weights of worker 0.

    Wrap while every parameter that will ever be trained requires a gradient: one that is frozen here is never averaged.
    Buffers are averaged nowhere, because the batch normalisation of :func:`convert_batch_norm` keeps them equal.

    Args:
        module: on ``device`` already.
        device: of the module.

    Returns:
        The module in DistributedDataParallel, or the module itself in one process.
    """
    if world_size() == 1:
        return module
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, forward_sync_buffers=False, gradient_as_bucket_view=True)


@torch.no_grad()
def start_alike(module: nn.Module) -> nn.Module:
    """Give a module that is not wrapped the weights and buffers of worker 0; returns it."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)
    return module


def average_gradients(gradients: Sequence[Tensor]) -> None:
    """Average gradients over the workers in place, in one collective: for networks that are not wrapped.

    Args:
        gradients: of the same parameters, in the same order, on every worker; all of one dtype.
    """
    if world_size() == 1 or not gradients:
        return
    total = all_reduce_sum(torch.cat([gradient.reshape(-1) for gradient in gradients])) / world_size()
    parts = total.split_with_sizes([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def sum_with_gradient(tensor: Tensor) -> Tensor:
    """Sum over the workers, with the gradient that the average over workers needs.

    Where every worker computes the same loss from the sum, the mean of their gradients is that of the loss.
    """
    return all_reduce_sum(tensor) + (tensor - tensor.detach()) * world_size()


def gather_batch(tensor: Tensor) -> Tensor:
    """The parts (B, ...) of all workers as one batch (W B, ...), in the order of their ranks, without gradient."""
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def weights_checksum(modules: Mapping[str, nn.Module]) -> str:
    """SHA-256 over names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            digest.update(f"{name}.{key}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def assert_same_weights(modules: Mapping[str, nn.Module]) -> None:
    """Compare the weights of all workers.

    Raises:
        TrainingError: the workers do not hold the same weights.
    """
    checksums = gather_objects({name: weights_checksum({name: module}) for name, module in modules.items()})
    different = [name for name in modules if len({checksum[name] for checksum in checksums}) > 1]
    if different:
        raise TrainingError(
            f"the weights of {', '.join(different)} are not the same on all {len(checksums)} workers, so their "
            "gradients were not averaged; resume from the last checkpoint and report this as a defect"
        )


def convert_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make batch normalisation use the statistics of all workers' images together.

    Parameters, buffers and state-dict keys stay the same. On GPUs the layers become SyncBatchNorm, elsewhere
    :class:`WorkersBatchNorm2d`; in one process nothing changes. Calling it twice does no harm.

    Args:
        module: with any number of nn.BatchNorm2d.
        device: where the module will run.

    Returns:
        The module, changed in place; where it is a batch normalisation itself, its replacement.
    """
    if world_size() == 1:
        return module
    return _replace(module, _sync_batch_norm if device.type == "cuda" else _workers_batch_norm)


def _replace(module: nn.Module, convert: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
    if type(module) is nn.BatchNorm2d:
        return convert(module)
    for name, child in module.named_children():
        replacement = _replace(child, convert)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def _sync_batch_norm(layer: nn.BatchNorm2d) -> nn.Module:
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(layer)  # type: ignore[no-untyped-call]
    return converted


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
    """The batch is that many equal parts, normalised as if they came one after the other; whether each one moves the
    running statistics."""

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
                for moves, mean, variance, count in zip(self.parts, means, variances, counts, strict=True):
                    if moves:
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
    (these two over the own images: whoever averages gradients adds the others').
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
        # In evaluation mode this kernel gives sum(g h) and sum(g) for the mean and variance that it is handed.
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
