"""How many trainings a cluster has room for, and that it is asked for more, on a real local Ray."""

from __future__ import annotations

import time

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from mpscl_ray.config import load_config
from mpscl_ray.train.ray import room as room_module
from mpscl_ray.train.ray.room import Room
from tests.ray.conftest import CPUS
from tests.ray_commands import assert_nothing_is_reserved, reserved


def test_a_place_that_is_not_there_is_asked_for_and_given_up_once_it_is(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_module, "_ASK_AGAIN_S", 0)
    room = Room(load_config("phantom", ["scaling.num_workers=1"]), use_gpu=False)
    assert room.places == CPUS
    assert room.shortage() is None
    assert room.has_place(CPUS - 1)
    assert reserved() == set()
    trainings = placement_group([{"CPU": CPUS}])
    ray.get(trainings.ready())
    assert not room.has_place(CPUS)
    (asked,) = reserved() - {trainings.id.hex()}
    assert not room.has_place(CPUS)
    assert asked in reserved(), "it waits for a node"
    remove_placement_group(trainings)
    deadline = time.monotonic() + 60
    while asked in reserved() and time.monotonic() < deadline:
        room.yield_place()  # a search that waits for lost trials to start again asks for no other one
    assert asked not in reserved(), "a training is to have the place"
    room.close()
    assert_nothing_is_reserved()


def test_a_limit_and_a_cluster_that_is_too_small(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "_ASK_AGAIN_S", 0)
    limited = Room(load_config("phantom", ["scaling.num_workers=1"]), use_gpu=False, at_most=2)
    assert limited.places == 2
    assert not limited.has_place(2)
    assert reserved() == set(), "no more than the limit is asked for"
    words = ["scaling.num_workers=2", f"scaling.cpus_per_worker={CPUS}"]
    large = Room(load_config("phantom", words), use_gpu=False)
    assert large.places == 1, "one waits for room"
    assert large.shortage() is None, "the first look"
    assert "2 workers need" in str(large.shortage())
