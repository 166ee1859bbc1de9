"""The network alone in formats of other programs: slices in, class probabilities out, as predict computes them."""

from __future__ import annotations

import copy
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.networks import Segmenter
from mpscl_ray.networks.deeplab import AtrousHead
from mpscl_ray.predict.predictor import Predictor

INPUT, OUTPUT = "slices", "probabilities"
"""Names of input (B, 1, H, W), scaled to [-1, 1], and output (B, C, H, W); any B, and H and W of the model."""
OPSET = 18
CARD = "card.json"
_TOLERANCE = 1e-3
"""Largest difference of a probability; other kernels round in another way."""

Floats = npt.NDArray[np.float32]


class Probabilities(nn.Module):
    """Class probabilities (B, C, H, W) of slices (B, 1, H, W) in [-1, 1], by operators that any program has.

    Args:
        network: segmenter; a copy is kept, on the CPU and in evaluation mode.
    """

    def __init__(self, network: Segmenter) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).cpu().eval()
        for module in self.network.modules():
            if isinstance(module, AtrousHead):  # what is faster on a CPU here is not elsewhere
                module.forward = module.convolve  # type: ignore[method-assign]

    def forward(self, slices: Tensor) -> Tensor:
        return torch.softmax(self.network.logits(slices), dim=1)


def torchscript(predictor: Predictor, card: Mapping[str, Any]) -> bytes:
    """A TorchScript file; ``torch.jit.load`` reads it without this package.

    Raises:
        DataError: it does not compute what predict computes.
    """
    with warnings.catch_warnings(), torch.no_grad():
        # torch names torch.export as its successor, whose files MONAI and C++ programs do not read yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        module, example = Probabilities(predictor.network), _example(predictor, 2)
        traced = torch.jit.trace(module, example, check_trace=False)  # type: ignore[no-untyped-call]
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer, _extra_files={CARD: json.dumps(card)})

        def run(slices: Floats) -> Floats:
            found: Floats = traced(torch.from_numpy(slices)).numpy()
            return found

        _check(predictor, run)
    return buffer.getvalue()


def onnx(predictor: Predictor, card: Mapping[str, Any]) -> bytes:
    """An ONNX file with any batch size; the card is in its metadata.

    Raises:
        ConfigError: the packages that write it are not installed.
        DataError: it does not compute what predict computes.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the format onnx needs {error.name}, which is not installed: pip install 'mpscl_ray[onnx]'"
        ) from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says which operators of other packages are missing
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # of its own libraries
        program = torch.onnx.export(
            Probabilities(predictor.network),
            (_example(predictor, 2),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props[CARD] = json.dumps(card)
        program.save(Path(folder) / "model.onnx", external_data=False)
        data = (Path(folder) / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    _check(predictor, lambda slices: session.run([OUTPUT], {INPUT: slices})[0])
    return data


def _example(predictor: Predictor, batch: int) -> Tensor:
    assert predictor.model is not None
    generator = torch.Generator().manual_seed(0)
    return torch.rand((batch, 1, *predictor.model.size), generator=generator) * 2 - 1


def _check(predictor: Predictor, run: Callable[[Floats], Floats]) -> None:
    """Compare with predict on another number of slices than the network was recorded with."""
    slices = _example(predictor, 3).numpy()
    expected = predictor.predict_probabilities(slices[:, 0]).swapaxes(0, 1)
    difference = float(np.abs(run(slices) - expected).max())
    if not difference <= _TOLERANCE:
        raise DataError(
            f"the exported network gives probabilities that differ by {difference:.2g} from predict's, expected at "
            f"most {_TOLERANCE:g}; use the format mpscl, and report this"
        )
