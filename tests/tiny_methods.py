"""Every method so small that a step takes milliseconds, and discs of two classes to train it on."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpscl_ray.config import METHOD_CONFIGS, MPSCLConfig, OptimConfig, PrecisionConfig, SIFAConfig
from mpscl_ray.methods import METHODS, MPSCL, SIFA, AdaBN, AdaOutput, AdvEnt, Batch, Method, Segmentation
from mpscl_ray.networks import build, initialise
from mpscl_ray.networks.deeplab import DeepLabV2
from mpscl_ray.networks.sifa import SIFASegmenter

CLASSES = 3
SIZE = 32
CPU = torch.device("cpu")
OPTIM = OptimConfig(lr=0.02, head_lr_factor=1.0, lr_discriminator=1e-3)


def segmenter(seed: int, *, multi_level: bool = True, **arguments: Any) -> DeepLabV2:
    arguments = {"base_channels": 4, "output_stride": 4, "in_channels": 1, "train_bn_affine": True, **arguments}
    layers = arguments.pop("layers", (1, 1, 1, 1))
    network = DeepLabV2(CLASSES, layers, multi_level=multi_level, **arguments)
    initialise(network, seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.mul_(10)
    return network


def make_mpscl(
    seed: int = 0,
    *,
    network: DeepLabV2 | None = None,
    optim: OptimConfig = OPTIM,
    precision: PrecisionConfig | None = None,
    **settings: Any,
) -> MPSCL:
    config = MPSCLConfig(**{"discriminator_width": 4, "delta_th": 0.05, **settings})
    return MPSCL(network or segmenter(seed), config, optim, CLASSES, CPU, precision or PrecisionConfig(), seed)


def make(
    name: str, seed: int = 0, *, network: DeepLabV2 | None = None, optim: OptimConfig = OPTIM, **settings: Any
) -> Any:
    """A tiny method by its name, with other settings than its small ones."""
    if name == "sifa":
        return make_sifa(seed, optim=optim, **settings)
    small: dict[str, Any] = {} if name in ("segmentation", "adabn", "mean_teacher") else {"discriminator_width": 4}
    small |= {"min_pixels": 2} if name == "cag" else {}
    config = METHOD_CONFIGS[name](**(small | settings))
    network = network or segmenter(seed, **getattr(METHODS[name], "segmenter_arguments", {}))
    return METHODS[name](network, config, optim, CLASSES, CPU, PrecisionConfig(), seed)


def make_segmentation(seed: int = 0) -> Segmentation:
    return make("segmentation", seed)  # type: ignore[no-any-return]


def make_advent(seed: int = 0, **settings: Any) -> AdvEnt:
    return make("advent", seed, **settings)  # type: ignore[no-any-return]


def make_adaoutput(seed: int = 0, **settings: Any) -> AdaOutput:
    return make("adaoutput", seed, **settings)  # type: ignore[no-any-return]


def make_adabn(seed: int = 0) -> AdaBN:
    return make("adabn", seed)  # type: ignore[no-any-return]


def make_sifa(
    seed: int = 0, *, optim: OptimConfig = OPTIM, dtype: torch.dtype = torch.float32, **settings: Any
) -> SIFA:
    sizes = {
        "generator_width": 4,
        "generator_blocks": 1,
        "decoder_blocks": 1,
        "encoder_width": 2,
        "discriminator_width": 4,
    }
    config = SIFAConfig(**{**sizes, "output_stride": 4, "pool_size": 3, "lr_segmenter": 5e-3, **settings})
    network = build({"num_classes": CLASSES, **config.network_arguments()})
    assert isinstance(network, SIFASegmenter)
    initialise(network, seed)
    return SIFA(network.to(dtype), config, optim, CLASSES, CPU, PrecisionConfig(), 3)


MAKE: dict[str, Callable[..., Method]] = {name: functools.partial(make, name) for name in METHODS} | {
    "mpscl": make_mpscl
}


def batch(step: int, size: int = 4) -> Batch:
    """Discs of two classes on dark ground; the target is less bright and its contrast is weaker."""
    return labelled_batch(step, size)[0]


def labelled_batch(step: int, size: int = 4) -> tuple[Batch, Tensor]:
    """The same with the labels of the target, which no method sees."""
    rng = np.random.default_rng(step)
    rows, columns = np.mgrid[:SIZE, :SIZE]

    def domain(levels: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
        label = np.zeros((size, SIZE, SIZE), np.int64)
        for image in label:
            for disc in (1, 2):
                centre = rng.uniform((6, 6), (26, 12)) + np.array([0, 14 * (disc - 1)])
                image[np.hypot(rows - centre[0], columns - centre[1]) < 5] = disc
        noise = rng.normal(0, 0.05, label.shape)
        image = (np.asarray(levels)[label] + noise)[:, None].astype(np.float32)
        return torch.from_numpy(image), torch.from_numpy(label)

    source_image, source_label = domain((-0.6, 0.1, 0.7))
    target_image, target_label = domain((-0.5, 0.1, 0.5))
    return Batch(source_image, source_label, target_image), target_label


def leaves(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in state.items():
        assert isinstance(name, str)
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def assert_equal_states(one: dict[str, Any], other: dict[str, Any]) -> None:
    left, right = leaves(one), leaves(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, right[name]), name
        else:
            assert value == right[name], name


def weights_checksum(modules: Mapping[str, nn.Module]) -> str:
    """SHA-256 over names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            digest.update(f"{name}.{key}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
