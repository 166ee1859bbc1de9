"""Communication between workers: every collective of the product is called from here.

In one process, with or without a process group, each function is the identity, so no other module depends on the
number of workers. Objects are sent as JSON and tensors as they are; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeVar

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
    """Wait until every worker has reached this point."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of a tensor over the workers, without gradient and in its dtype; in one process the tensor itself, detached.

    Args:
        tensor: same shape and dtype on every worker.
    """
    if world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def all_reduce_sums(*tensors: Tensor) -> list[Tensor]:
    """Sum several tensors over the workers in ONE collective.

    They are sent as float64, in which counts are exact and sums of float32 lose no relevant digit.

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


def reduce_metrics(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean over the workers of each 0-dim tensor that ``Method.step`` returned, in one collective, read on the host.

    Every worker calls it at the log interval. Only here does the host wait for the device.

    Args:
        values: the same names, in the same order, on every worker.
    """
    if not values:
        return {}
    stacked = torch.stack([value.detach().double() for value in values.values()])
    return dict(zip(values, (all_reduce_sum(stacked) / world_size()).tolist(), strict=True))


def ddp_ratio(numerator: Tensor, global_denominator: Tensor) -> Tensor:
    """A worker's share of a ratio of sums: ``W * numerator / denominator``.

    The mean of the shares over the W workers, and so the gradient that DistributedDataParallel averages, is
    ``sum_r numerator_r / denominator``.

    Args:
        numerator: this worker's sum, 0-dim, with gradient.
        global_denominator: sum over all workers, 0-dim.
    """
    return (numerator if world_size() == 1 else numerator * world_size()) / global_denominator


def all_reduce_any(flag: Tensor) -> Tensor:
    """1.0 on every worker if the 0-dim ``flag`` is true on one of them, else 0.0 (float32)."""
    return all_reduce_sum(flag.to(torch.float32)).clamp(max=1.0)


def broadcast_object(value: T) -> T:
    """The value (of JSON types) that worker 0 has, on every worker."""
    return value if world_size() == 1 else gather_objects(value)[0]


def gather_objects(value: T) -> list[T]:
    """The values (of JSON types; tuples come back as lists) of all workers, in rank order, on every worker."""
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
    """Pure NCCL can send GPU memory only; every other backend takes CPU tensors."""
    if dist.get_backend_config() in ("nccl", "cuda:nccl"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """Average the gradients of a module over the workers, which start from the weights of worker 0.

    Wrap while every parameter that will ever be trained requires a gradient: the gradient of one that is frozen now is
    never averaged. Buffers are not averaged: batch normalisation keeps them equal
    (:mod:`mpscl_ray.distributed.batch_norm`).

    Returns:
        The module in DistributedDataParallel, or the module itself in one process. It must be on ``device`` already.
    """
    if world_size() == 1:
        return module
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, forward_sync_buffers=False, gradient_as_bucket_view=True)


@torch.no_grad()
def broadcast_parameters(module: nn.Module) -> nn.Module:
    """Give a module that is not wrapped the weights and buffers of worker 0; returns it."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)
    return module


def average_gradients(gradients: Sequence[Tensor]) -> None:
    """Average gradients over the workers in place, in one collective: for networks that are not wrapped.

    They are of one dtype, and of the same parameters in the same order on every worker.
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
    """The parts (B, ...) of all workers as one batch (W B, ...), in rank order, without gradient."""
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def assert_same_weights(modules: Mapping[str, nn.Module]) -> None:
    """Compare the weights of all workers, by weighted sums over their bits that each device makes of its own.

    Raises:
        TrainingError: the workers do not hold the same weights.
    """
    if world_size() == 1:
        return
    sums = torch.stack([_sum_of_bits(module) for module in modules.values()])
    all_sums = gather_batch(sums[None])
    equal = (all_sums == all_sums[0]).all(dim=0).tolist()
    different = [name for name, same in zip(modules, equal, strict=True) if not same]
    if different:
        raise TrainingError(
            f"the weights of {', '.join(different)} are not the same on all {world_size()} workers, so their "
            "gradients were not averaged; resume from the last checkpoint and report this as a defect"
        )


def _sum_of_bits(module: nn.Module) -> Tensor:
    """Sum of all parameters and buffers, their bits taken as whole numbers, each times its position; int64.

    It differs where one number does, or two have changed places.
    """
    total, position = torch.zeros((), dtype=torch.int64), 1
    for tensor in module.state_dict().values():
        words = (
            tensor.detach().contiguous().reshape(-1).view(torch.int32 if tensor.element_size() >= 4 else torch.uint8)
        )
        positions = torch.arange(position, position + len(words), device=words.device)
        total = total.to(words.device) + (positions * words).sum()
        position += len(words)
    return total
