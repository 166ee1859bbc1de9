"""Source and target as one batch on a GPU, each with its own statistics: as two passes, with half the convolutions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpscl_ray.distributed.folded_batch_norm import FoldedBatchNorm2d, fold_batch_norm
from mpscl_ray.methods import METHODS, Batch, optim
from tests.tiny_methods import CLASSES, SIZE, make, segmenter


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.counts[function._schema.name] += 1
        return function(*arguments, **(options or {}))


def batches(number: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            torch.randn(2, 1, SIZE, SIZE, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (2, SIZE, SIZE), generator=generator),
            2 * torch.randn(2, 1, SIZE, SIZE, generator=generator, dtype=torch.float64) + 1,
        )
        for _ in range(number)
    ]


def method(name: str, folded: bool, monkeypatch: pytest.MonkeyPatch, **network: Any) -> Any:
    with monkeypatch.context() as patch:
        if folded:
            patch.setattr(optim, "convert_batch_norm", lambda module, device, fold: fold_batch_norm(module))
        own = getattr(METHODS[name], "segmenter_arguments", {})
        made = make(name, network=segmenter(0, **own, **network).double())
    for module in made.networks.values():
        module.double()
    made.start_phase(10)
    return made


@pytest.mark.parametrize("name", ["mpscl", "advent", "adaoutput", "clan"])
@pytest.mark.parametrize("affine", [True, False])
def test_one_pass_equals_two(name: str, affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (method(name, folded, monkeypatch, train_bn_affine=affine) for folded in (True, False))
    for iteration, batch in enumerate(batches(3)):
        found, expected = (made.step(batch, iteration) for made in (one, two))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for key, network in one.networks.items():
        state, reference = network.state_dict(), two.networks[key].state_dict()
        assert list(state) == list(reference), "checkpoints of one are those of the other"
        for entry, tensor in state.items():
            if not entry.endswith("num_batches_tracked"):
                torch.testing.assert_close(tensor, reference[entry], rtol=1e-9, atol=1e-11)


def test_half_the_convolutions_and_no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for folded in (True, False):
        made = method("mpscl", folded, monkeypatch, train_bn_affine=False)
        first, second = batches(2)
        made.step(first, 0)
        with Operators() as operators:
            made.step(second, 1)
        counts.append(operators.counts)
    layers = sum(isinstance(module, torch.nn.BatchNorm2d) for module in made.networks["segmenter"].modules())
    one, two = counts
    assert two["aten::convolution"] - one["aten::convolution"] == layers, "one before each norm"
    assert one["aten::native_batch_norm"] == layers
    assert two["aten::native_batch_norm"] == 2 * layers
    assert two["aten::add_"] - one["aten::add_"] == 2 * layers, "num_batches_tracked"
    assert sum(one.values()) < sum(two.values())


def test_the_weights_of_frozen_layers_are_repeated_once() -> None:
    layer = FoldedBatchNorm2d(3)
    layer.requires_grad_(False)
    layer.parts = (True, True)
    x = torch.randn(4, 3, 5, 5)
    layer(x)
    with Operators() as operators:
        layer(x)
    assert operators.counts["aten::repeat"] == 0
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.allclose(
        layer(x),
        2 * torch.nn.functional.batch_norm(x.reshape(2, 6, 5, 5), None, None, None, None, True).reshape(x.shape),
        atol=1e-5,
    )


def test_a_folded_layer_is_one_graph_of_the_compiler() -> None:
    layer, x = FoldedBatchNorm2d(3), torch.randn(4, 3, 5, 5)
    layer.parts = (True, True)
    expected = layer(x)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
