"""The seam in one process: identities, and one forward for several inputs."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mpscl_ray.distributed import collectives
from mpscl_ray.distributed.batch_norm import PerDomainForward, WorkersBatchNorm2d, convert_batch_norm
from mpscl_ray.distributed.folded_batch_norm import FoldedBatchNorm2d

CPU = torch.device("cpu")


def test_one_process_is_the_identity() -> None:
    assert (collectives.world_size(), collectives.rank()) == (1, 0)
    collectives.barrier()
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.equal(collectives.all_reduce_sum(value), value)
    assert not collectives.all_reduce_sum(value).requires_grad
    assert collectives.broadcast_object({"a": (1, 2)}) == {"a": (1, 2)}
    assert collectives.gather_objects("a") == ["a"]
    assert collectives.reduce_metrics({"a": torch.tensor(0.25), "b": torch.tensor(2)}) == {"a": 0.25, "b": 2.0}
    assert collectives.reduce_metrics({}) == {}
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    assert collectives.wrap(network, CPU) is network
    assert type(convert_batch_norm(network, CPU)[1]) is nn.BatchNorm2d  # type: ignore[index]
    collectives.assert_same_weights({"network": network})


def test_share_of_ratio_keeps_the_gradient_of_the_numerator() -> None:
    numerator = torch.tensor(3.0, requires_grad=True)
    ratio = collectives.ddp_ratio(numerator, torch.tensor(6.0))
    assert float(ratio.detach()) == pytest.approx(0.5)
    ratio.backward()
    assert float(numerator.grad) == pytest.approx(1 / 6)  # type: ignore[arg-type]


def test_the_sum_of_bits_sees_every_tensor() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).to(torch.bfloat16)
    seen = [int(collectives._sum_of_bits(network))]
    with torch.no_grad():
        network[0].bias[1].add_(1.0)
        seen.append(int(collectives._sum_of_bits(network)))
        network[1].running_mean[0].add_(1.0)
        seen.append(int(collectives._sum_of_bits(network)))
        network[1].num_batches_tracked.add_(1)
        seen.append(int(collectives._sum_of_bits(network)))
        network[0].bias.copy_(network[0].bias.flip(0))
        seen.append(int(collectives._sum_of_bits(network)))
        weight = network[1].weight.clone()
        network[1].weight.copy_(network[1].bias)
        network[1].bias.copy_(weight)
        seen.append(int(collectives._sum_of_bits(network)))
    assert len(set(seen)) == 6, "each change, two numbers or two tensors that change places among them, is seen"


class Pair(NamedTuple):
    one: Tensor
    none: None
    two: Tensor


class TwoHeads(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.passes = 0

    def forward(self, x: Tensor) -> Pair:
        self.passes += 1
        y = self.norm(x)
        return Pair(y, None, y.flatten(1) * 2)


@pytest.mark.parametrize(("norm", "passes"), [(nn.BatchNorm2d, 2), (WorkersBatchNorm2d, 1), (FoldedBatchNorm2d, 1)])
@pytest.mark.parametrize("moves", [None, (True, True), (False, True), (True, False), (False, False)])
def test_for_each_keeps_batch_statistics_apart(
    norm: type[nn.BatchNorm2d], passes: int, moves: tuple[bool, bool] | None
) -> None:
    network, reference = TwoHeads(norm(3).double()), nn.BatchNorm2d(3).double()
    inputs = [torch.randn(4, 3, 5, 5, dtype=torch.float64) * scale + scale for scale in (1, 3)]
    outputs = PerDomainForward(network, moves)(*inputs)
    assert network.passes == passes
    for x, output, tracked in zip(inputs, outputs, moves or (True, True), strict=True):
        reference.track_running_stats = tracked
        expected = reference(x)
        torch.testing.assert_close(output.one, expected)
        assert output.none is None
        torch.testing.assert_close(output.two, expected.flatten(1) * 2)
    torch.testing.assert_close(running_stats(network.norm), running_stats(reference))
    # What was set for the two inputs is undone: a later pass of one input moves the statistics.
    network(inputs[0])
    reference.track_running_stats = True
    reference(inputs[0])
    torch.testing.assert_close(running_stats(network.norm), running_stats(reference))


def running_stats(layer: nn.Module) -> list[Tensor | nn.Module]:
    return [layer.running_mean, layer.running_var]


def test_inputs_of_different_size_go_one_after_the_other() -> None:
    network = TwoHeads(WorkersBatchNorm2d(3))
    first, second = PerDomainForward(network)(torch.randn(4, 3, 5, 5), torch.randn(2, 3, 7, 7))
    assert network.passes == 2
    assert first.one.shape == (4, 3, 5, 5)
    assert second.one.shape == (2, 3, 7, 7)


def test_networks_without_batch_norm_take_all_inputs_as_one_batch() -> None:
    first, second = PerDomainForward(nn.Conv2d(1, 1, 1))(torch.zeros(2, 1, 3, 3), torch.ones(2, 1, 3, 3))
    assert torch.equal(second - first, torch.ones_like(first) * (second - first)[0, 0, 0, 0])
