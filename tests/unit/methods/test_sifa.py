"""SIFA against its formulas: losses and gradients of all seven sub-steps, pools, pixels that nobody annotated."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.errors import DataError
from mpscl_ray.methods.batch_losses import batch_dice_loss
from mpscl_ray.methods.image_pool import ImagePool
from mpscl_ray.methods.losses import class_counts
from mpscl_ray.methods.sifa_losses import clipped_cross_entropy
from mpscl_ray.networks import build
from mpscl_ray.networks.sifa import Decoder, SIFADiscriminator, Translator
from tests.tiny_methods import CLASSES, batch, make_sifa


@pytest.mark.parametrize("unknown", [0, 8])
def test_segmentation_losses(unknown: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(2, CLASSES, 4, 4, generator=generator)
    labels = torch.randint(CLASSES, (2, 4, 4), generator=generator)
    labels[0].view(-1)[:unknown] = NOT_ANNOTATED
    p = logits.double().softmax(dim=1).numpy()
    numbers = [int((labels == kind).sum()) for kind in range(CLASSES)]
    entropy, low = 0.0, 0
    overlap, squares = np.zeros(CLASSES), np.zeros(CLASSES)
    for image, row, column in np.ndindex(2, 4, 4):
        kind = int(labels[image, row, column])
        if kind < CLASSES:
            own = p[image, kind, row, column]
            low += own < 0.005
            entropy += (1 - numbers[kind] / sum(numbers)) * -math.log(min(max(own, 0.005), 1))
            overlap[kind] += own
            squares += p[image, :, row, column] ** 2
    assert low > 0
    ours = clipped_cross_entropy(logits, labels, class_counts(labels, CLASSES))
    assert float(ours) == pytest.approx(entropy / (32 - unknown), rel=1e-5)
    dice = 1 - np.mean([2 * overlap[c] / (squares[c] + numbers[c] + 1e-7) for c in range(CLASSES)])
    assert float(batch_dice_loss(logits, labels)) == pytest.approx(dice, rel=1e-5)


def test_a_hopeless_pixel_has_no_gradient() -> None:
    logits = torch.tensor([[8.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).T.reshape(1, 3, 1, 2).requires_grad_()
    clipped_cross_entropy(logits, torch.ones(1, 1, 2, dtype=torch.int64), torch.tensor([0.0, 2.0, 4.0])).backward()
    assert logits.grad is not None
    assert not logits.grad[..., 0].any()
    assert logits.grad[..., 1].all()


def test_losses_and_gradients_of_all_sub_steps() -> None:
    """Rates so small that every sub-step sees the networks as they began."""
    method = make_sifa(
        lr_generator=1e-12, lr_segmenter=1e-12, lambda_prediction=0.7, lambda_prediction_low=0.4, decoder_dropout=0.0
    )
    networks = copy.deepcopy(method.networks)
    method.start_phase(10)
    part = batch(0)
    a, b, labels = part.source_image, part.target_image, part.source_label
    assert b is not None
    metrics = {name: float(value) for name, value in method.step(part, 0).items()}
    for network in networks.values():
        network.requires_grad_(True).train()
    g, e, de = (networks[name] for name in ("generator", "segmenter", "decoder"))
    d_a, d_b, d_p, d_pl = (networks[f"discriminator_{name}"] for name in ("source", "target", "prediction", "low"))

    fake_b = g(a)
    on_fake, on_real = e(fake_b), e(b)
    fake_a = de(on_real.features, b)
    cycle_a, cycle_b = de(on_fake.features, fake_b), g(fake_a)
    cycle = 10 * (a - cycle_a).abs().mean() + 10 * (b - cycle_b).abs().mean()

    def wants(verdict: Tensor) -> Tensor:
        return ((verdict - 1) ** 2).mean()

    def tells(real: Tensor, fake: Tensor) -> Tensor:
        return (((real - 1) ** 2).mean() + (fake**2).mean()) / 2

    counts = class_counts(labels, CLASSES)

    def segmentation(logits: Tensor) -> Tensor:
        return clipped_cross_entropy(logits, labels, counts) + batch_dice_loss(logits, labels)

    verdict = d_a(fake_a)
    to_source = cycle + wants(verdict[:, 0])
    squared_norm = sum((p**2).sum() for p in e.parameters())
    totals: dict[str, Any] = {
        "generator": cycle + wants(d_b(fake_b)),
        "discriminator_target": tells(d_b(b), d_b(fake_b)),
        "segmenter": segmentation(on_fake.main)
        + 0.1 * segmentation(on_fake.low)
        + 1e-4 * squared_norm / 2
        + 0.1 * to_source
        + 0.7 * wants(d_p(on_real.main))
        + 0.4 * wants(d_pl(on_real.low))
        + 0.1 * wants(verdict[:, 1]),
        "decoder": to_source,
        # "Real" for the auxiliary task is the reconstructed source, not the source itself.
        "discriminator_source": tells(d_a(a)[:, 0], verdict[:, 0]) + tells(d_a(cycle_a)[:, 1], verdict[:, 1]),
        "discriminator_prediction": tells(d_p(on_fake.main), d_p(on_real.main)),
        "discriminator_low": tells(d_pl(on_fake.low), d_pl(on_real.low)),
    }
    assert totals.keys() == method.networks.keys()
    for name, total in totals.items():
        expected = torch.autograd.grad(total, list(networks[name].parameters()), retain_graph=True)
        largest = max(float(gradient.abs().max()) for gradient in expected)
        for ours, gradient in zip(method.networks[name].parameters(), expected, strict=True):
            torch.testing.assert_close(ours.grad, gradient, rtol=1e-2, atol=1e-3 * largest, msg=name)
    for key, value in {
        "loss_segmentation": segmentation(on_fake.main),
        "loss_cycle": cycle,
        "loss_discriminator_source": totals["discriminator_source"],
        "loss_discriminator_prediction": totals["discriminator_prediction"],
    }.items():
        assert metrics[key] == pytest.approx(value.item(), rel=1e-3), key


def test_sub_steps_follow_each_other_with_fresh_weights() -> None:
    """With a rate that counts, the segmenter's sub-step sees images that the generator makes after its own."""
    images: list[Tensor] = []
    method = make_sifa(lr_generator=1e-2)
    method.networks["generator"].register_forward_hook(lambda *arguments: images.append(arguments[2].detach()))
    method.start_phase(10)
    method.step(batch(0), 0)
    first, again = images[0], images[2]
    assert first.shape == again.shape
    assert not torch.allclose(first, again, atol=1e-3)


def test_only_the_segmenters_sub_step_updates_running_statistics() -> None:
    method = make_sifa()
    method.start_phase(10)
    norm = method.segmenter.shallow[2]
    assert isinstance(norm, torch.nn.BatchNorm2d)
    method.step(batch(0), 0)
    assert int(norm.num_batches_tracked) == 2


def test_a_pool_returns_earlier_batches() -> None:
    pool, again = ImagePool(2, key=9), ImagePool(2, key=9)
    kept: list[float] = []
    given = []
    for number in range(60):
        newest = torch.full((1, 1, 1, 1), float(number))
        seen = float(pool.swap(newest))
        given.append(seen)
        if number < 2:
            kept.append(float(number))
            assert seen == number
        elif seen == number:
            pass
        else:
            assert seen in kept
            kept[kept.index(seen)] = float(number)
        assert [float(image) for image in pool.batches] == kept
    earlier = sum(seen != number for number, seen in enumerate(given))
    assert 15 < earlier < 45
    for number in range(30):
        assert float(again.swap(torch.full((1, 1, 1, 1), float(number)))) == given[number]
    other = ImagePool(2, key=9)
    other.load_state_dict(again.state_dict(), torch.device("cpu"))
    rest = [float(other.swap(torch.full((1, 1, 1, 1), float(number)))) for number in range(30, 60)]
    assert rest == given[30:]
    assert ImagePool(2, key=8).draw(5) != pool.draw(5)
    newest = torch.ones(1)
    assert torch.equal(ImagePool(0, key=1).swap(newest), newest)
    with pytest.raises(DataError, match="pool_size=1"):
        ImagePool(1, key=9).load_state_dict(again.state_dict(), torch.device("cpu"))


def test_the_first_version() -> None:
    method = make_sifa(version="v1", dropout=0.25, segmenter_decay_every=2, adversarial_prediction_ramp=(0.2, 0.6))
    assert "discriminator_low" not in method.networks
    method.start_phase(10)
    for iteration in range(5):
        metrics = method.step(batch(iteration), iteration)
        (group,) = method._optimisers["segmenter"]._optimiser.param_groups
        assert group["lr"] == pytest.approx(5e-3 * 0.9 ** (iteration // 2))
    assert not any("low" in name for name in metrics)
    weights = [method._ramped(iteration) for iteration in (0, 2, 4, 6, 9)]
    assert weights == pytest.approx([0, 0, 0.05, 0.1, 0.1])
    one, other = (make_sifa(dropout=rate) for rate in (0.0, 0.25))
    losses = []
    for built in (one, other):
        built.start_phase(10)
        losses.append(float(built.step(batch(0), 0)["loss_segmentation"]))
        torch.testing.assert_close(built.predict(batch(1).source_image), built.predict(batch(1).source_image))
    assert losses[0] != losses[1]


@pytest.mark.parametrize("output_stride", [4, 8])
def test_networks_fit_images_of_any_size(output_stride: int) -> None:
    image = torch.zeros(2, 1, 37, 50)
    segmenter = build({"kind": "sifa", "num_classes": 3, "width": 1, "output_stride": output_stride}).eval()
    output = segmenter(image)
    assert output.main.shape == output.low.shape == (2, 3, 37, 50)
    assert output.features.shape[:2] == (2, 32)
    assert -(-37 // output_stride) == output.features.shape[2]
    assert Translator(2, 1)(image).shape == image.shape
    assert Decoder(32, 2, output_stride, 1)(output.features, image).shape == image.shape
    assert SIFADiscriminator(1, 2, outputs=2)(image).shape[:2] == (2, 2)
    assert segmenter.logits(image).shape == (2, 3, 37, 50)
    with pytest.raises(ValueError, match="no network is of the kind 'unet'"):
        build({"kind": "unet"})
