"""Shapes, options and initialisation of the networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mpscl_ray.networks import initialise
from mpscl_ray.networks.deeplab import CAFFE_MEANS, AtrousHead, DeepLabV2, network_input, upsample_logits
from mpscl_ray.networks.discriminators import FCDiscriminator, PatchGANDiscriminator

SMALL = (1, 1, 2, 1)


@pytest.fixture
def small_segmenter() -> DeepLabV2:
    network = DeepLabV2(5, layers=SMALL, base_channels=4, output_stride=4, in_channels=1)
    initialise(network, seed=0)
    return network


@pytest.mark.parametrize(
    ("output_stride", "size", "expected"),
    [(8, (256, 256), (33, 33)), (8, (64, 64), (9, 9)), (4, (64, 64), (17, 17)), (4, (32, 48), (9, 13))],
)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_output_sizes(output_stride: int, size: tuple[int, int], expected: tuple[int, int], in_channels: int) -> None:
    network = DeepLabV2(4, layers=SMALL, base_channels=2, output_stride=output_stride, in_channels=in_channels).eval()
    with torch.no_grad():
        out = network(network_input(torch.zeros(2, 1, *size), in_channels))
    assert out.aux is not None
    assert out.aux.shape == out.main.shape == (2, 4, *expected)
    assert out.features.shape == (2, network.feature_channels, *expected)
    assert network.feature_channels == 64
    assert out.features.min() >= 0


def test_without_the_auxiliary_head() -> None:
    network = DeepLabV2(3, layers=SMALL, base_channels=2, multi_level=False).eval()
    assert not [key for key in network.state_dict() if key.startswith("layer5")]
    assert network(torch.zeros(1, 3, 32, 32)).aux is None


def test_every_trainable_parameter_gets_a_gradient_and_norms_are_frozen(small_segmenter: DeepLabV2) -> None:
    out = small_segmenter(torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert out.aux is not None
    (out.main.square().sum() + out.aux.square().sum()).backward()
    for name, parameter in small_segmenter.named_parameters():
        is_norm = ".bn" in name or name.startswith("bn") or "downsample.1" in name
        assert parameter.requires_grad != is_norm, name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_each_parameter_has_a_gradient_in_its_own_memory(small_segmenter: DeepLabV2) -> None:
    """Optimisers change gradients in place, and a second backward pass adds to them in place."""
    for _ in range(2):
        out = small_segmenter(torch.ones(2, 1, 64, 64))
        (out.main.sum() + out.aux.sum()).backward()
    gradients = [parameter.grad for parameter in small_segmenter.parameters() if parameter.grad is not None]
    assert len({gradient.data_ptr() for gradient in gradients}) == len(gradients)
    bias = small_segmenter.layer6.conv2d_list[3].get_parameter("bias")
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 2.0 * out.main[:, 0].numel()))


def test_train_norm_affine() -> None:
    network = DeepLabV2(3, layers=SMALL, base_channels=2, train_bn_affine=True)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1"),
        ({"layers": (1, 1, 1)}, "four"),
        ({"layers": (1, 0, 1, 1)}, "at least 1"),
        ({"base_channels": 0}, "base_channels"),
        ({"output_stride": 16}, "8 or 4"),
        ({"in_channels": 2}, "1 or 3"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepLabV2(**({"num_classes": 3, "layers": SMALL, "base_channels": 2} | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(3, 3), (9, 9), (17, 17), (13, 30), (33, 33)])
def test_head_is_the_sum_of_its_convolutions(size: tuple[int, int]) -> None:
    """The CPU's matrix product against the four convolutions: value and gradients, whatever rates fit into the map."""
    torch.manual_seed(5)
    head = AtrousHead(7, 4).double()
    reference = copy.deepcopy(head)
    x = torch.randn(2, 7, *size, dtype=torch.float64, requires_grad=True)
    reference_x = x.detach().clone().requires_grad_()
    out = head(x)
    expected = torch.stack([conv(reference_x) for conv in reference.conv2d_list]).sum(dim=0)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, reference_x.grad, rtol=1e-12, atol=1e-12)
    for (name, parameter), other in zip(head.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-12, atol=1e-12, msg=name)


def test_network_input() -> None:
    image = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    assert network_input(image, 1) is image
    released = network_input(image, 3)
    for channel, mean in enumerate(CAFFE_MEANS):
        expected = torch.tensor([0.0, 127.5, 255.0]) - mean
        torch.testing.assert_close(released[0, channel, 0], expected)


def test_upsampled_logits_keep_their_corners() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).reshape(1, 1, 2, 2)
    out = upsample_logits(logits, (3, 5))
    expected = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0], [1.0, 1.25, 1.5, 1.75, 2.0], [2.0, 2.25, 2.5, 2.75, 3.0]])
    torch.testing.assert_close(out[0, 0], expected)


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        (FCDiscriminator, 256, 8),
        (FCDiscriminator, 64, 2),
        (FCDiscriminator, 32, 1),
        (PatchGANDiscriminator, 256, 30),
        (PatchGANDiscriminator, 64, 6),
        (PatchGANDiscriminator, 32, 2),
        (PatchGANDiscriminator, 24, 1),
    ],
)
def test_discriminator_sizes(kind: type[nn.Module], size: int, expected: int) -> None:
    assert kind(5, width=2)(torch.zeros(2, 5, size, size)).shape == (2, 1, expected, expected)


@pytest.mark.parametrize(("kind", "minimum"), [(FCDiscriminator, 32), (PatchGANDiscriminator, 24)])
def test_discriminator_refuses_images_that_leave_no_patch(kind: type[nn.Module], minimum: int) -> None:
    with pytest.raises(ValueError, match=rf"at least {minimum}x{minimum} pixels, got 64x{minimum - 1}"):
        kind(5, width=2)(torch.zeros(2, 5, 64, minimum - 1))


def networks() -> list[DeepLabV2 | FCDiscriminator | PatchGANDiscriminator]:
    return [DeepLabV2(5, layers=SMALL, base_channels=8), FCDiscriminator(5, width=8), PatchGANDiscriminator(5, width=8)]


def equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_initialisation_depends_on_the_seed_alone() -> None:
    for first, second in zip(networks(), networks(), strict=True):
        for tensor in first.state_dict().values():
            tensor.fill_(9)  # nothing of what was there may stay
        torch.manual_seed(1)
        state = torch.get_rng_state()
        initialise(first, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        initialise(second, seed=3)
        assert equal(first, second)
        initialise(second, seed=4)
        assert not equal(first, second)
        initialise(second.double(), seed=3)
        assert equal(first.double(), second)


def std(parameter: Tensor) -> float:
    return float(parameter.detach().std())


def test_initial_values() -> None:
    segmenter, fc, patchgan = networks()
    for network in (segmenter, fc, patchgan):
        initialise(network, seed=0)
    weights = segmenter.state_dict()
    assert std(weights["layer4.0.conv2.weight"]) == pytest.approx(0.01, rel=0.05)
    assert std(weights["layer6.conv2d_list.0.weight"]) == pytest.approx(0.01, rel=0.05)
    assert 0 < weights["layer6.conv2d_list.0.bias"].abs().max() <= (9 * 256) ** -0.5
    assert (weights["bn1.weight"] == 1).all()
    assert (weights["bn1.running_var"] == 1).all()
    assert (weights["bn1.running_mean"] == 0).all()
    # Uniform within 1/sqrt(fan in) has a deviation of that over sqrt(3).
    assert std(fc.state_dict()["6.weight"]) == pytest.approx((16 * 32 * 3) ** -0.5, rel=0.05)
    weights = patchgan.state_dict()
    assert std(weights["model.8.weight"]) == pytest.approx(0.02, rel=0.05)
    assert std(weights["model.9.weight"]) == pytest.approx(0.02, rel=0.3)
    assert float(weights["model.9.weight"].mean()) == pytest.approx(1.0, abs=0.01)
    assert (weights["model.11.bias"] == 0).all()


def test_initialise_refuses_other_modules() -> None:
    with pytest.raises(TypeError, match="Linear"):
        initialise(nn.Linear(2, 2), seed=0)  # type: ignore[arg-type]
