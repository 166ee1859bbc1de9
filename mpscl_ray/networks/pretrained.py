"""Released weights and prototypes, read without unpickling objects.

It reads the files of MPSCL, ADVENT and AdaptSegNet (the same keys as ours), ImageNet weights with the caffe key
prefix ``Scale.``, files saved from a wrapped network (prefix ``module.``), and safetensors.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mpscl_ray.errors import DataError

_WRAPPER_PREFIX = "module."
_CAFFE_PREFIX = "Scale."
_HEADS = ("layer5.", "layer6.")
_COUNTER = "num_batches_tracked"
_SHOWN = 4


@dataclass(frozen=True)
class PretrainedReport:
    """What happened to the keys."""

    loaded: tuple[str, ...]
    """Keys of the network that were loaded from the file."""
    skipped: tuple[str, ...]
    """Keys of the file that were left out on purpose, as they are written there."""
    untouched: tuple[str, ...]
    """Keys of the network without a value in the file; they keep theirs."""


def load_pretrained(network: nn.Module, path: Path, heads: bool = True) -> PretrainedReport:
    """Load released weights into a network, all or nothing.

    Args:
        network: unwrapped segmenter or discriminator.
        path: ``.safetensors``, or a file that ``torch.save`` wrote, holding a state dict or a dict with one under
            ``state_dict``.
        heads: False leaves the segmentation heads ``layer5`` and ``layer6`` as they are, for a file made for other
            classes. In a file with the caffe prefix they are always left out, since it comes from a classifier.

    Raises:
        DataError: the file is missing, damaged, holds anything but plain weights, or does not fit the network. The
            network is then as it was.
    """
    return load_tensors(network, _read_state_dict(path), path, heads)


def load_tensors(network: nn.Module, weights: Mapping[str, Tensor], path: Path, heads: bool = True) -> PretrainedReport:
    """Load weights that were read from ``path``, as :func:`load_pretrained` does."""
    own = network.state_dict()
    matched: dict[str, Tensor] = {}
    skipped: list[str] = []
    is_caffe = any(key.removeprefix(_WRAPPER_PREFIX).startswith(_CAFFE_PREFIX) for key in weights)
    left_out = _HEADS if is_caffe or not heads else ()
    for stored, value in weights.items():
        key = stored.removeprefix(_WRAPPER_PREFIX).removeprefix(_CAFFE_PREFIX)
        if key.startswith(left_out):
            skipped.append(stored)
        elif key in matched:
            raise DataError(f"{path} holds {key!r} twice, with and without a prefix; keep one of the two")
        else:
            matched[key] = value

    untouched = tuple(key for key in own if key not in matched)
    missing = [key for key in untouched if not key.endswith(_COUNTER) and not key.startswith(left_out)]
    unexpected = [key for key in matched if key not in own]
    wrong = [key for key in matched if key in own and matched[key].shape != own[key].shape]
    if wrong:
        shown = _list([f"{key} {list(matched[key].shape)} (network: {list(own[key].shape)})" for key in wrong])
        advice = (
            "it was made for other classes or levels: leave the heads out (network.pretrained_heads=false)"
            if all(key.startswith(_HEADS) for key in wrong)
            else "set blocks, width, in_channels and num_classes of the network as in the file"
        )
        raise DataError(f"{path} does not fit the network in the shape of {shown}; {advice}")
    if missing or unexpected:
        parts = [f"lacks {_list(missing)}"] if missing else []
        parts += [f"holds {_list(unexpected)}, which the network does not have"] if unexpected else []
        raise DataError(
            f"{path} is not a state dict of this network: it {' and '.join(parts)}; "
            "set blocks and multi_level as in the file, or choose a file of the same network"
        )
    non_finite = [key for key, value in matched.items() if not bool(torch.isfinite(value).all())]
    if non_finite:
        raise DataError(f"{path} has NaN or infinite values in {_list(non_finite)}; get the file again")

    with torch.no_grad():
        for key, value in matched.items():
            own[key].copy_(value)
    return PretrainedReport(tuple(key for key in own if key in matched), tuple(skipped), untouched)


def load_prototypes(path: Path, num_classes: int, channels: int) -> Tensor:
    """Read released class centres (C, d) float32, from an npy file that may have more axes of length one.

    Raises:
        DataError: the file is missing, no plain array of numbers, not finite, or of another shape.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # an absurd shape is found before memory is taken
    except (OSError, ValueError, EOFError, OverflowError, SyntaxError, TokenError) as error:
        raise DataError(f"{path} cannot be read as an npy file of numbers ({_first_line(error)})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise DataError(f"{path} must hold one array of floating-point numbers, the class centres")
    shape = tuple(size for size in array.shape if size != 1)
    if shape != (num_classes, channels):
        raise DataError(
            f"{path} holds class centres of shape {list(array.shape)}, but {num_classes} classes with {channels} "
            "feature channels are configured; leave the file out to compute them from the source set"
        )
    if not np.isfinite(array).all():
        raise DataError(f"{path} has NaN or infinite values; leave it out to compute the centres from the source set")
    return torch.from_numpy(array.reshape(shape).astype(np.float32))


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"no weights file at {path}; give the path of a .safetensors, .pth or .pt file")
    try:
        with warnings.catch_warnings():
            # torch.load warns of unusual pickles, which are refused below.
            warnings.simplefilter("ignore", UserWarning)
            content: object = load_file(path) if path.suffix == ".safetensors" else _torch_load(path)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is damaged or holds Python objects besides weights, which could run code and are refused; "
            "save its state dict alone, best as .safetensors"
        ) from error
    except Exception as error:  # a file that is truncated, overwritten or of another kind raises nearly anything
        raise DataError(f"{path} cannot be read as a file of weights ({_first_line(error)}); get it again") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise DataError(f"{path} holds a {type(content).__name__}, expected a state dict of named tensors")
    weights: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise DataError(f"{path} holds {key!r} of type {type(value).__name__}, expected named dense tensors alone")
        weights[key] = value
    return weights


def _torch_load(path: Path) -> object:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:  # torch.save compresses nothing
            raise ValueError(f"it unpacks to {unpacked} bytes, more than it has")
    return torch.load(path, "cpu", weights_only=True)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
