"""The formats of an exported segmenter, and the names of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from mpscl_ray.errors import ConfigError
from mpscl_ray.runs.storage import S3Path, parse_location

Format = Literal["mpscl", "onnx", "torchscript", "monai-bundle"]
FORMATS: tuple[Format, ...] = get_args(Format)
_ENDINGS = {"mpscl": (".mpscl",), "onnx": (".onnx",), "torchscript": (".pt", ".ts"), "monai-bundle": ("",)}
"""How the names of files end; a bundle is a folder."""


def output_location(out: Path | str, kind: str) -> Path | S3Path:
    """Where a file of a format is written. Raises ConfigError for another format, URL or ending."""
    if kind not in FORMATS:
        raise ConfigError(f"there is no format {kind!r}; choose one of {', '.join(FORMATS)}")
    location = parse_location(out)
    if not location.name.endswith(_ENDINGS[kind]):
        raise ConfigError(f"the file to write is {out}; of the format {kind} its name ends in {_said(kind)}")
    return location


def _said(kind: str) -> str:
    return " or ".join(_ENDINGS[kind])
