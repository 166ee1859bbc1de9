"""What an output folder of predict says of its label maps: volumes.json and label tables. It makes a batch resumable.

An image is entered when its files are complete, so a killed batch lacks no more than what it worked on.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpscl_ray import __version__
from mpscl_ray.data.volumes.dicom import series_sha256
from mpscl_ray.data.volumes.dicom_paths import is_series
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.predict.ensemble import Member
from mpscl_ray.predict.image import Job, Prediction, outputs
from mpscl_ray.predict.label_files import label_values, slicer_table, write_label_tables
from mpscl_ray.predict.output_names import SLICER_LABELS, VOLUMES
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.atomic_files import write_atomically
from mpscl_ray.runs.storage import S3Path, output_directory

_MAPPINGS = ("checkpoint", "settings", "postprocessing")
"""What is a mapping in each entry."""
_DAMAGED = "damaged"


class Record:
    """The entries of an output folder, read when a command starts and written after each image.

    Args:
        job: settings of every image.
        classes: names, background first.
        overwrite: whether what is there may be replaced.

    Raises:
        ConfigError: the folder has a volumes.json that is damaged, or that predict did not write.
    """

    def __init__(self, job: Job, classes: Sequence[str], *, overwrite: bool) -> None:
        self._job, self._classes, self._overwrite = job, classes, overwrite
        self._entries = _read_entries(job.out / VOLUMES, overwrite)
        self._added: dict[str, Any] = {}

    def to_do(self, images: Sequence[Path], *, resume: bool) -> list[Path]:
        """The images to segment; with ``resume`` those that have no complete label map yet.

        Their entries are removed, and half-written files of all images.

        Raises:
            ConfigError: unless files may be overwritten: files of the images are there (with ``resume``: made from
                another image, or by other weights or settings), or the label tables name other labels.
        """
        left = self._not_done(images) if resume else list(images)
        there = [] if resume else [name for image in images for name in self._outputs(image) if self._exists(name)]
        if there and not self._overwrite:
            raise ConfigError(
                f"{self._job.out} has {_some(there)} already; give --resume to keep them and segment the other "
                "images, --overwrite to replace them, or another --out"
            )
        table = self._job.out / SLICER_LABELS
        wanted = slicer_table(label_values(self._classes, self._job.raw_ids)).encode()
        if not self._overwrite and table.exists() and table.read_bytes() != wanted:
            raise ConfigError(
                f"{table} names other labels than this run; give another --out, or --overwrite to replace it"
            )
        # A label map that is replaced has no entry until it is whole, or a kill would leave it with the old one.
        replaced = {self._outputs(image)[0] for image in left}
        kept = {name: entry for name, entry in self._entries.items() if name not in replaced}
        if len(kept) < len(self._entries):
            with output_directory(self._job.out) as folder:
                _write_entries(folder, kept)
        # Of finished images too: a worker may have died in a write, and another one have made the file since.
        for name in (name for image in images for name in self._outputs(image)):
            _remove_unfinished(self._job.out / name)
        return left

    def _not_done(self, images: Sequence[Path]) -> list[Path]:
        """The images without a complete label map."""
        left, others, damaged = [], [], []
        for image in images:
            label_map, *more = self._outputs(image)
            # A label map without an entry was written by a command that was killed before it could enter it.
            if label_map in self._entries and self._exists(label_map) and image.is_file():
                if difference := self._difference(image, self._entries[label_map]):
                    others.append(f"{label_map} ({difference})")
                elif change := self._change(label_map):
                    if change == _DAMAGED:
                        damaged.append(label_map)
                    else:
                        others.append(f"{label_map} ({change})")
                elif all(map(self._exists, more)):
                    continue
            left.append(image)
        if others and not self._overwrite:
            raise ConfigError(
                f"{self._job.out} has label maps that this command would not make: {_some(others)}; give --overwrite "
                "as well to make them again, or another --out"
            )
        if damaged:
            print(f"note: damaged, made again: {_some(damaged)}", file=sys.stderr)
        return left

    def _outputs(self, image: Path) -> tuple[str, ...]:
        return outputs(image, self._job, self._classes)

    def _exists(self, name: str) -> bool:
        return (self._job.out / name).exists()

    def add(self, prediction: Prediction) -> None:
        """Enter an image whose files are written; the first one brings the label tables with it."""
        if prediction.error:
            return
        self._added[prediction.files[0]] = {
            "image": prediction.image.name,
            "image_sha256": prediction.image_sha256,
            "label_map_sha256": prediction.label_map_sha256,
            "files": list(prediction.files),
            "volumes_ml": dict(prediction.volumes_ml or {}),
            "quality": None if prediction.quality is None else asdict(prediction.quality),
            "notices": list(prediction.notices),
            "run": self._job.members[0].run,
            **self._origin(),
            "product_version": __version__,
        }
        # Read again: another command may write to this folder at the same time.
        entries = {**_read_entries(self._job.out / VOLUMES, overwrite=True), **self._added}
        with output_directory(self._job.out) as folder:
            if len(self._added) == 1:
                write_label_tables(folder, self._classes, self._job.raw_ids)
            _write_entries(folder, entries)

    def _origin(self) -> dict[str, Any]:
        """Weights and settings as JSON has them: what decides a label map, besides the image."""
        job, (first, *others) = self._job, self._job.members
        return {
            "checkpoint": _weights(first, job.weights_sha256[0]),
            "ensemble": [
                {"run": other.run, **_weights(other, sha256)}
                for other, sha256 in zip(others, job.weights_sha256[1:], strict=True)
            ],
            "prepared_as": job.domain,
            "postprocessing": job.postprocessing.to_json(),
            "settings": {
                "label_values": None if job.raw_ids is None else dict(job.raw_ids),
                "probabilities": job.probabilities,
                "preview": job.preview,
                "tta": job.tta,
                "disagreement": job.disagreement,
                "assume_spacing": None if job.assume_spacing_mm is None else list(job.assume_spacing_mm),
                "geometry": job.geometry,
                "nan_policy": job.nan_policy,
            },
        }

    def _difference(self, image: Path, entry: Mapping[str, Any]) -> str:
        """What an entry was made from that this command does not have; empty if it is all the same."""
        now = self._origin()
        if not entry.keys() >= {"image_sha256", "label_map_sha256", "prepared_as", "ensemble", *_MAPPINGS}:
            return "entry incomplete"
        if entry["image_sha256"] != _sha256(image):
            return "another image"
        if entry["checkpoint"].get("sha256") != now["checkpoint"]["sha256"]:
            return "other weights"
        if [one["sha256"] for one in entry["ensemble"]] != [one["sha256"] for one in now["ensemble"]]:
            return "another --ensemble"
        if entry["prepared_as"] != now["prepared_as"]:
            return "another --modality"
        if entry["postprocessing"] != now["postprocessing"]:
            return "another postprocessing"
        before = entry["settings"]
        changed = [name for name, value in now["settings"].items() if before.get(name) != value]
        return f"another {', '.join('--' + name.replace('_', '-') for name in changed)}" if changed else ""

    def _change(self, label_map: str) -> str:
        """What became of a label map since it was written; empty if it is the same file."""
        content = (self._job.out / label_map).read_bytes()
        if hashlib.sha256(content).hexdigest() == self._entries[label_map]["label_map_sha256"]:
            return ""
        # In .seg.nrrd the voxels follow the header and an empty line.
        compressed = content.partition(b"\n\n")[2] if content.startswith(b"NRRD") else content
        try:
            with gzip.open(io.BytesIO(compressed)) as stream:
                while stream.read(1 << 20):
                    pass
        except (OSError, EOFError, zlib.error):
            return _DAMAGED
        return "changed since it was written"  # by hand, perhaps: such work is not replaced unasked


def _weights(member: Member, sha256: str) -> dict[str, str]:
    return {"name": member.weights.name, "path": str(member.weights.path), "sha256": sha256}


def _remove_unfinished(path: Path | S3Path) -> None:
    """Remove what a killed command left of a file that it was writing; a bucket has whole files only."""
    if isinstance(path, Path):
        for partial in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
            partial.unlink(missing_ok=True)


def _read_entries(file: Path | S3Path, overwrite: bool) -> dict[str, Any]:
    wrong = "was not written by predict"
    try:
        entries = safe_json.read(file)["predictions"]
        if all(isinstance(entry, dict) for entry in entries.values()):
            bad = [name for name, entry in entries.items() if not _well_formed(entry)]
            if not bad:
                return dict(entries)
            wrong = f"is damaged (the entry of {bad[0]})"
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        wrong = "is damaged (it is not whole JSON)"
    except (OSError, KeyError, TypeError, AttributeError):
        pass
    if overwrite:
        return {}
    raise ConfigError(f"{file} {wrong}; give --overwrite, or move it away")


def _well_formed(entry: Mapping[str, Any]) -> bool:
    """Whether what an entry has is of the right kind; it may lack parts."""
    members = entry.get("ensemble", [])
    return all(isinstance(entry.get(name, {}), dict) for name in _MAPPINGS) and (
        isinstance(members, list) and all(isinstance(one, dict) and "sha256" in one for one in members)
    )


def _write_entries(folder: Path, entries: Mapping[str, Any]) -> None:
    text = json.dumps({"predictions": entries}, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / VOLUMES, (text + "\n").encode())


def _sha256(file: Path) -> str | None:
    try:
        if is_series(file):
            return series_sha256(file)
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, DataError):
        return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
