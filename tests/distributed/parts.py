"""Single parts in the distributed tests: batch normalisation, losses of the whole batch, sums and objects."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.batch_norm import PerDomainForward, WorkersBatchNorm2d, convert_batch_norm
from mpscl_ray.errors import TrainingError
from mpscl_ray.methods.base import batch_segmentation_loss
from mpscl_ray.methods.losses import class_counts
from tests.distributed.global_batches import CLASSES, CPU, GLOBAL_BATCH


def batch_norm() -> dict[str, Any]:
    """One layer over the workers, and nn.BatchNorm2d on the union of their batches."""
    results: dict[str, Any] = {}
    rank = collectives.rank()
    cases = {
        "plain": {"dtype": torch.float64},
        "single": {"dtype": torch.float32},
        "channels_last": {"dtype": torch.float32, "memory_format": torch.channels_last},
        "no_affine": {"dtype": torch.float64, "affine": False},
        "two_parts": {"dtype": torch.float64, "inputs": 2},
        "second_moves": {"dtype": torch.float64, "inputs": 2, "moves": (False, True)},
        "uneven": {"dtype": torch.float64, "sizes": [5, 1, 2, 4]},
    }
    for name, case in cases.items():
        dtype = case["dtype"]
        sizes = case.get("sizes", [3] * 4)[: collectives.world_size()]
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        reference = nn.BatchNorm2d(6, affine=case.get("affine", True)).to(dtype)
        generator = torch.Generator().manual_seed(1)
        if reference.affine:
            with torch.no_grad():
                reference.weight.normal_(generator=generator)
                reference.bias.normal_(generator=generator)
        layer = nn.BatchNorm2d(6, affine=reference.affine).to(dtype)
        layer.load_state_dict(reference.state_dict())
        converted = convert_batch_norm(layer, CPU)
        assert isinstance(converted, WorkersBatchNorm2d)
        assert convert_batch_norm(converted, CPU) is converted
        assert list(converted.state_dict()) == list(reference.state_dict())
        ours, plain = (
            PerDomainForward(converted, case.get("moves")),
            PerDomainForward(reference, case.get("moves")),
        )
        for _ in range(2):
            whole = [
                torch.randn(sum(sizes), 6, 5, 4, generator=generator, dtype=dtype) * 3 + 7
                for _ in range(case.get("inputs", 1))
            ]
            weights = [torch.randn(x.shape, generator=generator, dtype=dtype) for x in whole]
            union = [x.clone().requires_grad_() for x in whole]
            part = [
                x[rows].contiguous(memory_format=case.get("memory_format", torch.contiguous_format)).requires_grad_()
                for x in whole
            ]
            expected, output = plain(*union), ours(*part)
            sum((y.tanh() * w).sum() for y, w in zip(expected, weights, strict=True)).backward()
            sum((y.tanh() * w[rows]).sum() for y, w in zip(output, weights, strict=True)).backward()
            for i in range(len(whole)):
                results[f"ours.{name}.output{i}"], results[f"reference.{name}.output{i}"] = output[i], expected[i][rows]
                results[f"ours.{name}.gradient{i}"], results[f"reference.{name}.gradient{i}"] = (
                    part[i].grad,
                    union[i].grad[rows],
                )
        if reference.affine:
            for key in ("weight", "bias"):
                results[f"ours.{name}.{key}"] = collectives.all_reduce_sum(getattr(converted, key).grad)
                results[f"reference.{name}.{key}"] = getattr(reference, key).grad
        results |= {f"ours.{name}.{key}": value for key, value in converted.named_buffers()}
        results |= {f"reference.{name}.{key}": value for key, value in reference.named_buffers()}
        results[f"ours.{name}.evaluated"] = converted.eval()(whole[0])
        results[f"reference.{name}.evaluated"] = reference.eval()(whole[0])
    return {name: value.detach() for name, value in results.items()}


def batch_losses() -> dict[str, Any]:
    """Value of the loss of the batch, and the gradient of its mean over the workers in the logits of all slices."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(GLOBAL_BATCH, CLASSES, 6, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES - 1, (GLOBAL_BATCH, 6, 8), generator=generator)  # one class is nowhere
    labels[0], labels[-1, :3] = 0, NOT_ANNOTATED
    size = GLOBAL_BATCH // collectives.world_size()
    rows = slice(collectives.rank() * size, (collectives.rank() + 1) * size)
    mine = logits[rows].requires_grad_()
    counts = collectives.all_reduce_sum(class_counts(labels[rows], CLASSES))
    loss = batch_segmentation_loss({"main": mine, "aux": mine.flip(1)}, labels[rows], counts, 0.1, 0.4)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert mine.grad is not None
    gradient = collectives.gather_batch(mine.grad) / collectives.world_size()
    return {"loss": np.array(collectives.reduce_metrics(loss.parts | {"total": loss.total})["total"]), "g": gradient}


def objects() -> dict[str, Any]:
    """What every rank gets of objects and sums that differ between the ranks."""
    rank = collectives.rank()
    everything = collectives.gather_objects({"rank": rank, "text": "ä" * (10 * rank)})
    assert [item["rank"] for item in everything] == list(range(collectives.world_size()))
    assert [len(item["text"]) for item in everything] == [10 * r for r in range(collectives.world_size())]
    assert collectives.broadcast_object([rank, None, 0.5]) == [0, None, 0.5]
    counts, halves = collectives.all_reduce_sums(torch.tensor([[rank, 1]]), torch.tensor(0.5))
    assert counts.dtype == torch.int64
    network = nn.Linear(2, 2)
    nn.init.constant_(network.weight, rank)
    try:
        collectives.assert_same_weights({"linear": network})
        message = ""
    except TrainingError as error:
        message = str(error)
    value = torch.tensor(float(rank + 1), requires_grad=True)
    denominator = collectives.all_reduce_sum(torch.tensor(2.0 * rank)) + 1.0
    share = collectives.ddp_ratio(value * value, denominator)
    share.backward()
    collectives.barrier()
    return {
        "counts": counts,
        "halves": halves,
        "drift_was_seen": np.array("linear" in message),
        "any": collectives.all_reduce_any(torch.tensor(rank == 1)),
        "none": collectives.all_reduce_any(torch.tensor(False)),
        "ratio": np.array(collectives.reduce_metrics({"ratio": share})["ratio"]),
        "ratio_gradient": value.grad,
    }
