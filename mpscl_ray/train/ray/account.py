"""Ray Train's own account of a run: the checkpoints of the run folder, by reference.

Ray Train takes a checkpoint that was not copied only from its experiment folder, so that is the run folder itself, on a
disk or in a bucket. ``Result.checkpoint``, ``ray.train.get_checkpoint()`` and Ray's callbacks then know each checkpoint
that a run can resume from, with the metrics of its step or of the last validation before. Ray Train copies none, and
deletes none: ``CheckpointConfig.num_to_keep`` stays unset, as ``run.keep_checkpoints`` decides. A run resumes from its
newest checkpoint whose hashes verify, whatever Ray Train was told.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
from pyarrow import fs
from ray.train import Checkpoint, CheckpointUploadMode

from mpscl_ray.runs.checkpoint import checkpoint_name
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.storage import S3Path, delete_file, parse_location

_FILES = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")
"""What Ray Train writes into its experiment folder."""


def experiment(folder: RunDirectory, display_name: str) -> dict[str, Any]:
    """Arguments of ``ray.train.RunConfig`` that make the run folder the experiment folder of Ray Train.

    Its name is that of the run; of a run in a search the path from the search on, such as ``search/trials/001``.
    """
    location = parse_location(folder.uri)
    path, filesystem = str(location), fs.LocalFileSystem()
    if isinstance(location, S3Path):
        path, filesystem = location.key, location.filesystem
    parts = path.split("/")
    length = next((n for n, part in enumerate(reversed(parts), 1) if part and display_name.startswith(part)), 1)
    return {
        "name": "/".join(parts[-length:]),
        "storage_path": "/".join(parts[:-length]) or "/",
        "storage_filesystem": filesystem,
    }


def remove_account(folder: RunDirectory) -> None:
    """Remove Ray Train's files from a run folder: they may list checkpoints that are gone. Raises StorageError."""
    for name in _FILES:
        delete_file(parse_location(folder.uri) / name)


class CheckpointReports:
    """Reports of one worker. Each worker calls the same methods at the same steps, as Ray Train waits for all.

    Args:
        rank: of the worker; the report of worker 0 is the one that counts.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._validated: dict[str, Any] = {}
        self._before: dict[str, Any] = {}

    def validated(self, record: Mapping[str, Any]) -> None:
        """Keep the metrics of a validation for the next report."""
        self._before, self._validated = self._validated, dict(record)

    def resumed(self, step: int) -> None:
        """Report the checkpoint that training resumes from, unless Ray Train knows it."""
        known = ray.train.get_checkpoint()
        if known is None or Path(known.path).name != checkpoint_name(step):
            self.completed(step)

    def completed(self, step: int, stored: bool = True) -> None:
        """Report a checkpoint; only its metrics where it is not ``stored`` yet because the storage does not answer."""
        name = checkpoint_name(step)
        newest = self._validated
        metrics = newest if newest.get("global_step", 0) <= step else self._before
        checkpoint = None
        if self._rank == 0 and stored:
            storage = ray.train.get_context().get_storage()
            path = Path(storage.experiment_fs_path, "checkpoints", name).as_posix()
            checkpoint = Checkpoint(path, storage.storage_filesystem)
        ray.train.report(
            {**metrics, "checkpoint": name}, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD
        )
