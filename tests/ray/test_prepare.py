"""Images to datasets on Ray: the same as without it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.distributed.parallel_map import map_volumes
from mpscl_ray.errors import ClusterError, StorageError
from tests.raw_volumes import made, mmwhs, refusal


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return mmwhs(tmp_path / "in")


def test_workers_make_the_same_files(source: Path, tmp_path: Path, cluster: None) -> None:
    _, alone = made(source)
    folder, together = made(source, workers=2, out=tmp_path / "with ray")
    assert together.fingerprint == alone.fingerprint
    assert together.cases == alone.cases
    for case in together.cases:
        read_case(folder, case)


def test_workers_name_every_bad_file(source: Path, cluster: None) -> None:
    for number in (1002, 1005):
        path = source / f"ct_train_{number}_image.nii.gz"
        path.write_bytes(path.read_bytes()[:-1000])
    problems = refusal(source, workers=2)
    assert [problem.split(" ")[0] for problem in problems] == [
        str(source / "ct_train_1002_image.nii.gz"),
        str(source / "ct_train_1005_image.nii.gz"),
    ]


def _fail_on_three(item: int) -> int:
    if item == 3:
        raise StorageError("the disk is full")
    if item == 30:
        raise ZeroDivisionError("a defect")
    if item == 300:
        os._exit(1)
    return item * item


def test_errors_of_workers_arrive_with_the_name_of_the_volume(cluster: None) -> None:
    seen: list[int] = []
    arguments: dict[str, Any] = {"workers": 2, "name": lambda item: f"volume {item}", "done": seen.append}
    assert map_volumes(_fail_on_three, [1, 2, 4, 5], **arguments) == [1, 4, 16, 25]
    assert seen == [1, 2, 3, 4]
    assert map_volumes(_fail_on_three, list(range(1000, 1100)), **arguments) == [k * k for k in range(1000, 1100)]
    with pytest.raises(StorageError, match="the disk is full"):
        map_volumes(_fail_on_three, [1, 2, 3], **arguments)
    with pytest.raises(RuntimeError, match="volume 30"):
        map_volumes(_fail_on_three, [1, 30], **arguments)
    with pytest.raises(ClusterError, match="the worker that had volume 300 died"):
        map_volumes(_fail_on_three, [300], **arguments)


def _killed_on_three(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is short
    return item * item


def test_a_worker_that_is_killed_costs_its_own_volume_alone(cluster: None) -> None:
    kept: list[int] = []
    found = map_volumes(
        _killed_on_three,
        [1, 2, 3, 4, 5, 6],
        workers=2,
        name=lambda item: f"volume {item}",
        done=lambda count: None,
        keep=kept.append,
        lost=lambda item, reason: -item if "its worker died" in reason else 0,
    )
    assert found == [1, 4, -3, 16, 25, 36]
    assert sorted(kept) == sorted(found)


def test_errors_in_this_process_carry_the_name_too() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        map_volumes(_fail_on_three, [30], workers=0, name=lambda item: f"volume {item}", done=lambda count: None)
    assert caught.value.__notes__ == ["while working on volume 30"]
