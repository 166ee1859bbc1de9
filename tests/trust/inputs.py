"""Kinds of files that anyone may have written: for each, good ones to begin with, and how the product reads one.

What a fuzzer changes are the bytes behind the checksums: where a format has one, it is made to fit again, because a
changed file that its checksum gives away tests nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK
import torch
import yaml

from mpscl_ray.config import load_config
from mpscl_ray.data import dataset
from mpscl_ray.data.dataset import MANIFEST, load_manifest
from mpscl_ray.data.parquet_reader import SplitFiles, read_case
from mpscl_ray.data.volumes.nifti import read_image, read_label
from mpscl_ray.prepare.tfrecord import read_slices
from mpscl_ray.runs import checkpoint, model_file, safe_npz
from mpscl_ray.runs.json_lines import MetricsLog
from tests.checkpoints import small_state
from tests.nifti_files import AFFINE, ramp, save
from tests.unit.prepare.test_tfrecord import frame, sample, triplet
from tests.untrained_run import write_run
from tests.written_dataset import save_plain_manifest, write_plain_case

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("background", "LV")
DEEP = json.loads("[" * 90 + "]" * 90)
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 255, 2**31, 2**63, 10**40, 10**150, 0.5, -0.0, float("nan"), float("inf"), -1e308),
    *("", "a", "../x", "/etc/passwd", "a/b", "\0", "\ud800", "ä" * 300, "$tensor", "<script>", "1e5", "1" * 5000),
    *([], {}, [[]], {"": None}, {"$tensor": "x"}, {"$dict": 1}, {"$dict": [["a", 1]]}, {"$tuple": 3}, {"$float": "x"}),
    *([1, 2, 3], ["train"], DEEP),
)
"""Values that may take the place of any other."""


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    seeds: Callable[[Path], list[bytes]]
    """Good ones; the argument is an empty folder."""
    read: Callable[[Path, bytes], object]
    """Write a changed one into a folder and read it as the product does."""


class Choices:
    """Numbers that the bytes of an input stand for; zeros at its end."""

    def __init__(self, data: bytes) -> None:
        self._bytes = iter(data)

    def below(self, limit: int) -> int:
        return (next(self._bytes, 0) | next(self._bytes, 0) << 8) % limit


def changed(document: Any, data: bytes) -> Any:
    """A document with a few values replaced or removed, chosen by the bytes."""
    document, choices = copy.deepcopy(document), Choices(data)
    for _ in range(1 + choices.below(4)):
        places = list(_places(document))
        if not places:
            break
        parent, key = places[choices.below(len(places))]
        action = choices.below(8)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, dict):
            parent[str(ODD[choices.below(len(ODD))])] = parent.pop(key)
        else:
            parent[key] = copy.deepcopy(ODD[choices.below(len(ODD))])
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def as_text(data: bytes, document: Any) -> bytes:
    """JSON from an input: the bytes themselves, or the document changed as they say."""
    if not data or data[0] % 2 == 0:
        return data[1:]
    return json.dumps(changed(document, data[1:])).encode()


def texts(document: Any) -> list[bytes]:
    """Inputs to begin with, for :func:`as_text`."""
    instructions = [bytes([1, n % 4, 0, n * 6, 0, 2, 0, n, 0]) for n in range(40)]
    return [b"\0" + json.dumps(document, indent=1).encode(), *instructions]


# ----------------------------------------------------------------------------------------------------- volumes


def nifti_seeds(folder: Path) -> list[bytes]:
    image = nib.Nifti2Image(ramp(), AFFINE)
    extended = nib.Nifti1Image(ramp("f4"), AFFINE)
    extended.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment of somebody"))
    big = nib.Nifti1Image(ramp(), AFFINE, nib.Nifti1Header(endianness=">"))
    return [save(folder / "v.nii").read_bytes(), image.to_bytes(), extended.to_bytes(), big.to_bytes()]


def read_nifti(folder: Path, data: bytes) -> None:
    """As an image or a label map, compressed or not."""
    kind = zlib.crc32(data)
    path = folder / ("v.nii.gz" if kind & 1 else "v.nii")
    path.write_bytes(gzip.compress(data, 1) if kind & 1 else data)
    (read_label if kind & 2 else read_image)(path)


def itk_seeds(folder: Path) -> list[bytes]:
    image = SimpleITK.GetImageFromArray(ramp())
    for ending in ("nrrd", "mha"):
        SimpleITK.WriteImage(image, str(folder / f"v.{ending}"), ending == "mha")
    return [(folder / f"v.{ending}").read_bytes() for ending in ("nrrd", "mha")]


def read_itk(folder: Path, data: bytes) -> None:
    path = folder / ("v.nrrd" if data.startswith(b"NRRD") else "v.mha")
    path.write_bytes(data)
    read_image(path)


def npz_seeds(_: Path) -> list[bytes]:
    buffer = io.BytesIO()
    np.save(buffer, ramp())
    return [buffer.getvalue()]


def read_npz(folder: Path, data: bytes) -> None:
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", data)
    with suppress(ValueError):  # those who call it add the file's name
        safe_npz.read(folder / "a.npz")


def tfrecord_seeds(_: Path) -> list[bytes]:
    image, label = triplet()
    return [sample(image, label), sample(image, None, extra=False)]


def read_tfrecord(folder: Path, data: bytes) -> None:
    path = folder / "a.tfrecords"
    path.write_bytes(frame(data))
    read_slices(path)


# ---------------------------------------------------------------------------------------------------- settings


def yaml_seeds(_: Path) -> list[bytes]:
    presets = sorted((ROOT / "mpscl_ray" / "presets").rglob("*.yaml"))
    return [b"\0" + preset.read_bytes() for preset in presets[:4]] + texts({})[1:]


def read_yaml(folder: Path, data: bytes) -> None:
    text = data[1:]
    if data and data[0] % 2:
        settings = {"preset": "small/mpscl", "optim": {"lr": 1e-4}, "method": {"name": "mpscl", "margin_source": 0.3}}
        settings |= {"run": {"seed": 3, "name": "a"}, "scaling": {"num_workers": 2}, "data": {"global_batch_size": 4}}
        text = yaml.safe_dump(changed(settings, text)).encode()
    (folder / "c.yaml").write_bytes(text)
    load_config(str(folder / "c.yaml"))


# ---------------------------------------------------------------------------------------------------- datasets

IMAGE = np.linspace(-1, 1, 3 * 8 * 8, dtype=np.float32).reshape(3, 8, 8)
LABEL = (IMAGE > 0).astype(np.uint8)


def write_dataset(folder: Path) -> None:
    case = write_plain_case(folder, "p1", "train", IMAGE, LABEL, CLASSES, spacing_mm=(3.0, 1.0, 1.0))
    save_plain_manifest(folder, "mr", CLASSES, (8, 8), [case])


def manifest_seeds(folder: Path) -> list[bytes]:
    write_dataset(folder)
    return texts(json.loads((folder / MANIFEST).read_bytes()))


def read_manifest(folder: Path, data: bytes) -> None:
    if not (folder / "good.json").exists():
        write_dataset(folder)
        (folder / MANIFEST).rename(folder / "good.json")
    text = as_text(data, json.loads((folder / "good.json").read_bytes()))
    with suppress(ValueError, RecursionError, TypeError):  # else its checksum cannot be made to fit
        content = json.loads(text)
        if isinstance(content, dict):
            content.pop("checksum", None)
            text = json.dumps({**content, "checksum": dataset._checksum(content)}).encode()
    (folder / MANIFEST).write_bytes(text)
    manifest = load_manifest(folder)
    assert manifest.fingerprint
    for case in manifest.cases:
        read_case(folder, case)
    SplitFiles.find(folder, "train", labels=True).read(np.arange(1))


def parquet_seeds(folder: Path) -> list[bytes]:
    write_dataset(folder)
    return [(folder / "train" / "p1.parquet").read_bytes()]


def read_parquet(folder: Path, data: bytes) -> None:
    if not (folder / MANIFEST).exists():
        write_dataset(folder)
    case = load_manifest(folder).cases[0]
    (folder / case.file).write_bytes(data)
    case = dataclasses.replace(case, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    read_case(folder, case)
    SplitFiles(folder, "train", (case,), (8, 8), CLASSES, True).read(np.arange(3))


# -------------------------------------------------------------------------------------------------------- runs


def state_seeds(folder: Path) -> list[bytes]:
    return texts(json.loads((checkpoint.save(folder / "step-0000001", _state()) / checkpoint.STATE).read_bytes()))


def _state() -> dict[str, Any]:
    weights = {"tuple": (1, 2.5, float("nan")), "by number": {3: torch.ones(2)}, "fixed": {"split": torch.arange(3)}}
    return {**small_state(1), **weights, "position": {"step": 1}}


def read_state(folder: Path, data: bytes) -> None:
    path = folder / "step-0000001"
    if not path.exists():
        checkpoint.save(path, _state())
        (folder / "good.json").write_bytes((path / checkpoint.STATE).read_bytes())
    text = as_text(data, json.loads((folder / "good.json").read_bytes()))
    (path / checkpoint.STATE).write_bytes(text)
    names = (checkpoint.STATE, checkpoint.TENSORS, checkpoint.FIXED)
    lines = [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (path / checkpoint.SUMS).write_text("".join(lines))
    checkpoint.verify(path)
    checkpoint.load(path)


def model_members() -> dict[str, bytes]:
    """Members of a small model file."""
    import tempfile

    from mpscl_ray.export.command import main
    from tests.untrained_run import save as save_weights
    from tests.untrained_run import segmenter

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_weights(write_run(folder / "run").path / "best", segmenter())
        assert main([str(folder / "run"), "--out", str(folder / "model.mpscl")]) == 0
        return model_file.unpack((folder / "model.mpscl").read_bytes(), "model.mpscl")


_MEMBERS: dict[str, bytes] = {}


def model_seeds(_: Path) -> list[bytes]:
    _MEMBERS.update(_MEMBERS or model_members())
    return texts(json.loads(_MEMBERS[model_file.MODEL]))


def read_model(_: Path, data: bytes) -> None:
    _MEMBERS.update(_MEMBERS or model_members())
    text = as_text(data, json.loads(_MEMBERS[model_file.MODEL]))
    model_file.unpack(model_file.pack({**_MEMBERS, model_file.MODEL: text}), "model.mpscl")


def metrics_seeds(_: Path) -> list[bytes]:
    return [b'{"global_step": 1, "train/loss": 0.5, "phase": "adaptation"}\n{"global_step": 2, "train/loss": "nan"}\n']


def read_metrics(folder: Path, data: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(data)
    MetricsLog(folder / "metrics.jsonl").read()


KINDS = {
    "nifti": Kind(nifti_seeds, read_nifti),
    "tfrecord": Kind(tfrecord_seeds, read_tfrecord),
    "yaml": Kind(yaml_seeds, read_yaml),
    "manifest": Kind(manifest_seeds, read_manifest),
    "state": Kind(state_seeds, read_state),
    "itk": Kind(itk_seeds, read_itk),
    "npz": Kind(npz_seeds, read_npz),
    "parquet": Kind(parquet_seeds, read_parquet),
    "model": Kind(model_seeds, read_model),
    "metrics": Kind(metrics_seeds, read_metrics),
}
