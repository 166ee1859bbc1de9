"""Check before the first step, or the first volume, that every node of the cluster can reach what a command needs.

A worker, or a task that reads slices, may run on any node. So all nodes at once read a random word that the command
wrote into the folder of the run, write, read and delete their own file there, and read the manifests of both datasets.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import ray

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.errors import ClusterError, ConfigError, DataError, MpsclError, StorageError
from mpscl_ray.runs.atomic_files import storage_errors
from mpscl_ray.runs.storage import S3Path, delete_file, parse_location

WORD = ".preflight"
"""Name of the file in the run folder by which a node shows that it sees the same folder as the command."""

PATIENCE_S = 120.0
"""Seconds that a node may take to answer; most of it is starting a process there."""

_NAMED = 5
"""Maximum number of nodes that an error names."""

_KINDS: dict[int, type[MpsclError]] = {kind.exit_code: kind for kind in (ConfigError, DataError, StorageError)}


def check_nodes(run: str, datasets: dict[str, str], image: Path | None = None) -> None:
    """Let every node do what a worker will do.

    Args:
        run: address of the folder that workers write to.
        datasets: address -> fingerprint.
        image: a file that must be there.

    Raises:
        StorageError: names the nodes, by their addresses, that do not see the run's folder or cannot write there.
        DataError: names the nodes that do not see a dataset, or the image.
        ClusterError: a node does not answer.
    """
    word = secrets.token_hex(8)
    file = parse_location(run) / f"{WORD}-{word}"
    _write(file, word.encode())
    try:
        failures = _ask_all(run, word, datasets, image)
    finally:
        delete_file(file)
    if failures:
        kind = _KINDS.get(failures[0][1], ClusterError)
        named = "; ".join(f"node {node}: {reason}" for node, _, reason in failures[:_NAMED])
        raise kind(named + (f"; and {len(failures) - _NAMED} more nodes" if len(failures) > _NAMED else ""))


def _ask_all(run: str, word: str, datasets: dict[str, str], image: Path | None) -> list[tuple[str, int, str]]:
    """(address, exit code, reason) of each node that failed."""
    listed: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in listed if node["Alive"]}
    task = ray.remote(num_cpus=0, max_retries=1)(_try_here)
    answers = {
        task.options(label_selector={"ray.io/node-id": node}).remote(run, word, datasets, image): name
        for node, name in nodes.items()
    }
    ready, late = ray.wait(list(answers), num_returns=len(answers), timeout=PATIENCE_S)
    failures = [
        (answers[answer], ClusterError.exit_code, f"no answer within {PATIENCE_S:g} s; check whether it is overloaded")
        for answer in late
    ]
    for answer in ready:
        try:
            failure = ray.get(answer)
        except ray.exceptions.RayError as error:
            failure = (ClusterError.exit_code, " ".join(str(error).split())[:300])
        if failure is not None:
            failures.append((answers[answer], *failure))
    return failures


def _try_here(run: str, word: str, datasets: dict[str, str], image: Path | None) -> tuple[int, str] | None:
    """Exit code and reason, if this node fails."""
    folder = parse_location(run)
    try:
        try:
            shared = (folder / f"{WORD}-{word}").read_bytes() == word.encode()
        except FileNotFoundError:
            shared = False
        except OSError as error:
            raise StorageError(f"cannot read {folder}: {error.strerror}") from error
        if not shared:
            raise StorageError(
                f"{folder} is another folder there than where the command runs, or none; mount one that all nodes "
                "share and name it in run.storage or --out, or use a bucket"
            )
        _try_file(folder / f"{WORD}-{word}-{os.uname().nodename}-{os.getpid()}")
        for dataset, fingerprint in datasets.items():
            if load_manifest(dataset).fingerprint != fingerprint:
                raise DataError(f"{dataset} is another dataset there than where the command runs; use a shared one")
        if image is not None and not image.exists():
            raise DataError(f"{image} is not there; put images in a folder that all nodes share")
    except MpsclError as error:
        return error.exit_code, str(error)
    return None


def _try_file(file: Path | S3Path) -> None:
    """Write, read and delete it."""
    _write(file, b"written")
    try:
        if file.read_bytes() != b"written":
            raise StorageError(f"{file} does not read as it was written; check the storage")
    except FileNotFoundError:
        raise StorageError(f"{file} was written and is not there; check the storage") from None
    finally:
        delete_file(file)


def _write(file: Path | S3Path, data: bytes) -> None:
    if isinstance(file, S3Path):
        file.write_bytes(data)
    else:
        with storage_errors(file):
            file.write_bytes(data)
