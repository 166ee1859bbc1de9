"""The export command: a checkpoint of a run as one file, or the card of one."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mpscl_ray import __version__
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.export.bundle import bundle_files
from mpscl_ray.export.card import card_of
from mpscl_ray.export.card_text import card_text
from mpscl_ray.export.formats import Format, output_location
from mpscl_ray.predict.model import find_checkpoint, read_model
from mpscl_ray.predict.predictor import Predictor, load_weights
from mpscl_ray.runs import json_output, safe_yaml
from mpscl_ray.runs.atomic_files import storage_errors, write_atomically
from mpscl_ray.runs.checkpoint_format import safetensors_chunks, safetensors_layout
from mpscl_ray.runs.model_file import CARD, CARD_TEXT, CONFIG, FORMAT, MODEL, VERSION, WEIGHTS, pack
from mpscl_ray.runs.model_store import ModelStore, open_model
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.storage import S3Path

_PATHS = {"data": ("source", "target"), "run": ("storage",), "network": ("pretrained", "pretrained_prototypes")}
"""Settings that are paths."""


@dataclass(frozen=True)
class Exported:
    """A segmenter, and what goes with it in every format."""

    home: RunDirectory
    predictor: Predictor
    card: dict[str, Any]

    def members(self) -> dict[str, bytes]:
        """Contents of a model file."""
        header, tensors = safetensors_layout(self.predictor.network.state_dict())
        return {
            MODEL: json_bytes(_description(self.home, self.predictor)),
            CONFIG: _settings(self.home.read_config()).encode(),
            CARD: json_bytes(self.card),
            CARD_TEXT: card_text(self.card).encode(),
            WEIGHTS: b"".join(safetensors_chunks(header, tensors)),
        }


def export(options: argparse.Namespace, out: Path | S3Path | None) -> int:
    """Export by the options of the command, or print the card if ``out`` is None; returns the exit code."""
    home = open_model(options.run)
    if out is None:
        shown = _load(home, options.checkpoint, options.licence).card
        json_output.report(file=None, bytes=None, card=shown)
        text = card_text(shown)
        print("".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text), end="")
        return 0
    card, size = _export(home, out, options.checkpoint, options.format, options.licence, options.overwrite)
    json_output.report(file=out, bytes=size, card=card)
    print(f"{out}: {card['weights']['checkpoint']} of {home.display_path}, {size / 1e6:.1f} MB")
    if card["scores"] is None and not isinstance(home.store, ModelStore):
        print(
            "note: these weights were not scored, so the card has no scores; to have them, run\n"
            f"  python -m mpscl_ray.evaluate {shlex.quote(home.display_path)} "
            f"--checkpoint {card['weights']['checkpoint']}\n"
            "and export again with --overwrite"
        )
    return 0


def export_model(
    run: Path | str,
    out: Path | str,
    checkpoint: str | None = None,
    *,
    format: Format = "mpscl",
    licence: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a trained segmenter as one file, with its model card.

    Args:
        run: folder of the run, a model file, or the URL of either.
        out: file to write, or its URL; of a MONAI bundle its folder.
        checkpoint: see :func:`mpscl_ray.predict.model.find_checkpoint`; None for ``best``, or what a model file has.
        format: ``mpscl``, which :func:`mpscl_ray.load_segmenter` takes like a run, ``onnx``, ``torchscript`` or
            ``monai-bundle``.
        licence: of the weights, for the card.
        overwrite: whether what is there is replaced.

    Returns:
        The model card.

    Raises:
        ConfigError: no such run, checkpoint or format, or a name of ``out`` that is taken or has another ending.
        DataError: the run has no checkpoint yet, or something of it is damaged.
        StorageError: ``out`` cannot be written.
    """
    location = output_location(out, format)
    with torch.random.fork_rng([]):  # a network draws initial weights before it gets its own
        return _export(open_model(run), location, checkpoint, format, licence, overwrite)[0]


def _export(
    home: RunDirectory, out: Path | S3Path, checkpoint: str | None, kind: Format, licence: str | None, overwrite: bool
) -> tuple[dict[str, Any], int]:
    """The card of what was written, and its bytes."""
    if isinstance(home.store, ModelStore) and kind == "mpscl":
        raise ConfigError(f"{home.display_path} is a model file already; copy it, or give another format")
    exported = _load(home, checkpoint, licence)
    _require_free(out, kind, overwrite)
    files = _files(exported, kind)
    _write(out, files)
    return exported.card, sum(map(len, files.values()))


def _load(home: RunDirectory, checkpoint: str | None, licence: str | None) -> Exported:
    if isinstance(home.store, ModelStore) and licence is not None:
        raise ConfigError("a model file has its licence in its card already; give it when exporting the run")
    packed = isinstance(home.store, ModelStore)
    model = read_model(home)
    weights, _ = find_checkpoint(home, checkpoint or ("last" if packed else "best"))
    predictor = load_weights(model, weights, "cpu")
    card = _stored_card(home.store) if isinstance(home.store, ModelStore) else card_of(home, predictor, licence)
    return Exported(home, predictor, card)


def _stored_card(store: ModelStore) -> dict[str, Any]:
    """The card of a model file, which anybody may have written. Raises DataError where it lacks something."""
    try:
        card = store.card
        card_text(card)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(
            f"{store.display_path}: its card is not one that export writes ({type(error).__name__}: {error}); predict "
            "takes it all the same"
        ) from error
    return card


def _files(exported: Exported, kind: Format) -> dict[str, bytes]:
    """Contents by path below the output; the path of a single file is empty."""
    if kind == "mpscl":
        return {"": pack(exported.members())}
    from mpscl_ray.export import network  # needed for these formats alone

    if kind == "onnx":
        return {"": network.onnx(exported.predictor, exported.card)}
    script = network.torchscript(exported.predictor, exported.card)
    return {"": script} if kind == "torchscript" else bundle_files(exported.card, script, pack(exported.members()))


def _require_free(out: Path | S3Path, kind: Format, overwrite: bool) -> None:
    """Find out before the work whether the output may be written."""
    if isinstance(out, S3Path):
        out.require_bucket()
    elif out.is_dir() and kind != "monai-bundle":
        raise ConfigError(f"the file to write, {out}, is a folder; give the name of a file in it")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} is there already; give another name, or --overwrite to replace it")


def _write(out: Path | S3Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        location = out / name if name else out
        if isinstance(location, S3Path):
            location.write_bytes(data)
            continue
        with storage_errors(location):
            location.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(location, data)


def _description(home: RunDirectory, predictor: Predictor) -> dict[str, Any]:
    """What a prediction needs besides weights: model.json of the run without its datasets."""
    model, weights = predictor.model, predictor.weights
    assert model is not None
    assert weights is not None
    described = home.read_model()
    kept = ("modality", "scaling", "recipe", "fingerprint", "training_volumes")
    domains = {
        role: {name: described[role].get(name) for name in kept}
        | {"labels": {"values": described[role].get("labels", {}).get("values", {})}}
        for role in ("source", "target")
    }
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "version": __version__,
        "classes": list(model.classes),
        "size": list(model.size),
        "network": dict(model.network),
        **domains,
        "phases": list(model.phases),
        "labelled": described.get("labelled", "source"),
        "postprocessing": _rules(predictor),
        "quality": {
            digest: one.to_json() for digest, one in model.quality.items() if digest == predictor.weights_digest
        },
        "mirror_axes": list(model.mirror_axes),
        "weights": {
            "name": weights.name,
            "phase": weights.phase,
            "step": weights.step,
            "selected_by": weights.selected_by,
        },
    }


def _rules(predictor: Predictor) -> dict[str, Any]:
    """What was chosen for these weights, by their digest; {} if nothing was."""
    assert predictor.model is not None
    chosen = predictor.model.postprocessing.get(predictor.weights_digest)
    return {} if chosen is None else {predictor.weights_digest: chosen.described()}


def _settings(config: str) -> str:
    """The settings of a run without paths, which say nothing elsewhere and may name a person."""
    settings = safe_yaml.load(config)
    for section, names in _PATHS.items():
        for name in names:
            value = settings.get(section, {}).get(name)
            if isinstance(value, str) and not value.startswith("phantom:"):
                settings[section][name] = ""
    return yaml.safe_dump(settings, sort_keys=True, allow_unicode=True)


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON with a newline at its end; refuses NaN."""
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
