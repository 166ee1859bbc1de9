"""Settings out of range are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from mpscl_ray.config import MPSCLConfig, OptimConfig, PrecisionConfig, SegmentationConfig


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (MPSCLConfig, {"margin_source": -0.1}),
        (MPSCLConfig, {"margin_target": 1.6}),
        (MPSCLConfig, {"temperature_source": 0.0}),
        (MPSCLConfig, {"alpha": 1.1}),
        (MPSCLConfig, {"delta_th": 2.1}),
        (MPSCLConfig, {"gamma": math.nan}),
        (MPSCLConfig, {"beta": math.inf}),
        (MPSCLConfig, {"margin_source": math.nan}),
        (MPSCLConfig, {"margin_form": "published"}),
        (OptimConfig, {"lr": 0.0}),
        (OptimConfig, {"kind": "adam"}),
        (OptimConfig, {"momentum": 1.0}),
        (OptimConfig, {"weight_decay": -0.1}),
        (OptimConfig, {"betas": [0.9, 1.0]}),
        (OptimConfig, {"legacy_param_repeats": {"stem": 0}}),
        (OptimConfig, {"legacy_param_repeats": {"tail": 1}}),
        (PrecisionConfig, {"dtype": "fp16"}),
        (SegmentationConfig, {"segmentation_aux_weight": -1.0}),
        (SegmentationConfig, {"segmentation_loss": "focal"}),
        (SegmentationConfig, {"class_weight_floor": 1.1}),
    ],
)
def test_settings_out_of_range_are_refused(kind: type, setting: dict[str, Any]) -> None:
    TypeAdapter(kind).validate_python({})
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(setting)
