"""A method with the weights and settings of a released run, and its steps against the stored numbers of that run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpscl_ray.config import METHOD_CONFIGS, OptimConfig, PrecisionConfig
from mpscl_ray.methods import METHODS, Batch
from mpscl_ray.methods.base import SegmentationLoss
from mpscl_ray.networks.deeplab import DeepLabV2
from tests.golden.released_inputs import (
    CLASSES,
    DISCRIMINATOR_WIDTH,
    ITERATIONS,
    SEGMENTER,
    STEPS,
    digest,
    fill,
    training_batches,
)
from tests.golden.stored_numbers import load

Numbers = dict[str, Tensor]

RELATIVE = 1e-9
"""Both sides compute in float64."""


def released(name: str) -> Numbers:
    """The numbers of a released repository by name."""
    return load(f"released_{name}")


def part(numbers: Numbers, prefix: str) -> Numbers:
    return {key.removeprefix(prefix): value for key, value in numbers.items() if key.startswith(prefix)}


def assert_equal(found: Any, expected: Tensor, relative: float = RELATIVE) -> None:
    """To ``relative`` of the largest number."""
    found = found.detach() if isinstance(found, Tensor) else torch.tensor(found, dtype=torch.float64)
    assert found.shape == expected.shape
    difference = float((found.double() - expected.double()).abs().max())
    assert difference <= relative * float(expected.abs().max()), f"{difference:.1e} too far"


def assert_gradient(loss: Tensor, inputs: Tensor, expected: Tensor, relative: float = RELATIVE) -> None:
    (gradient,) = torch.autograd.grad(loss, [inputs], retain_graph=True)
    assert expected.abs().max() > 0
    assert_equal(gradient, expected, relative)


def cross_entropy_of(self: Any, logits: dict[str, Tensor], labels: Tensor, counts: Any = None) -> SegmentationLoss:
    """The released segmentation loss, cross-entropy alone, in the place of weighted cross-entropy and Dice."""
    parts = {f"loss_cross_entropy_{head}": F.cross_entropy(x, labels) for head, x in logits.items()}
    total = parts["loss_cross_entropy_main"] + self.config.segmentation_aux_weight * parts["loss_cross_entropy_aux"]
    return SegmentationLoss(total, parts)


AS_RELEASED = {"segmentation_loss": cross_entropy_of}
"""What a method has from its released code in the place of its own, by name."""


def method_of(name: str, own: dict[str, Any] = AS_RELEASED, **settings: Any) -> Any:
    """A method with the weights of the released run, with other settings, and with functions of its own by name."""
    base: Any = METHODS[name]
    network = DeepLabV2(CLASSES, **SEGMENTER, **base.segmenter_arguments).double()
    network.in_channels = 1  # The images are network inputs already, which are left as they are.
    kind: Any = type(base.__name__, (base,), own)
    config = METHOD_CONFIGS[name](discriminator_width=DISCRIMINATOR_WIDTH, **settings)
    optim = OptimConfig(lr=2.5e-3, head_lr_factor=10, weight_decay=5e-4, lr_discriminator=1e-4)
    method = kind(network, config, optim, CLASSES, torch.device("cpu"), PrecisionConfig(), 0)
    for number, trained in enumerate(networks_of(method), start=1):
        fill(trained, number)
    method.start_phase(STEPS)
    return method


def networks_of(method: Any) -> list[torch.nn.Module]:
    """In the order of the released code: the segmenter, discriminators of the auxiliary and of the main head."""
    names = ("segmenter", "discriminator_aux", "discriminator_main")
    return [method.networks[name] for name in names if name in method.networks]


def batches(number: int, seed: int = 10, iterations: int = ITERATIONS) -> Iterator[Batch]:
    for image, label, target in training_batches(number, seed, iterations):
        yield Batch(image, label, target)


def assert_same_training(
    method: Any, parts: Iterable[Batch], numbers: Numbers, relative: float = RELATIVE, first_iteration: int = 0
) -> dict[str, list[float]]:
    """Losses and gradients of each iteration, and weights and running statistics at the end; returns the metrics."""
    metrics: dict[str, list[float]] = {}
    gradients: list[Any] = []
    for iteration, batch in enumerate(parts, start=first_iteration):
        for name, value in method.step(batch, iteration).items():
            metrics.setdefault(name, []).append(float(value))
        gradients.append([digest(p.grad for p in network.parameters()) for network in networks_of(method)])
    for number, found in enumerate(zip(*gradients, strict=True)):
        assert_equal(np.stack(found), numbers[f"gradients_{number}"], relative)
    for name in (name for name in numbers if name.startswith("loss_")):
        assert_equal(metrics[name], numbers[name], relative)
    for number, network in enumerate(networks_of(method)):
        assert_equal(digest(network.state_dict().values()), numbers[f"final_{number}"], relative)
    return metrics
