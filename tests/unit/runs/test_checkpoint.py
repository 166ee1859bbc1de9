"""Checkpoints: exact round trips, flipped bits, and which are kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mpscl_ray.errors import DataError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.checkpoint import CheckpointDamaged, checkpoint_name
from tests.checkpoints import assert_same, small_state

# ---- round trips ----


def test_every_kind_of_value_comes_back_exactly(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "numbers": [0, -1, 2**200, True, False, None, 0.1, -0.0, 1e-310, 1 / 3, math.pi * 1e300],
        "not finite": [math.nan, math.inf, -math.inf],
        "text": ["", "äß ", "\ud800", 'quote" \\ \n'],
        "tuples": ((1, 2), (3, (4, [5, (6,)])), ()),
        "int keys": {0: "a", 7: {1: torch.tensor(1.5)}, -3: {}},
        "mixed keys": {"0": 1, 0: 2},
        "$tensor": {"$tensor": "not one"},
        "a.b": {"c": torch.tensor(1)},
        "a": {"b.c": torch.tensor(2)},
        "__metadata__": torch.tensor(3),
        "": {"": torch.tensor(4)},
        "empty": {"dict": {}, "list": [], "tensor": torch.zeros(0, 3)},
        "0-dim": torch.tensor(float("nan")),
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "expanded": torch.tensor([1.0]).expand(5),
        "shared": [base, base, base[1]],
        "complex": torch.complex(base, -base).conj(),
        "rng": torch.get_rng_state(),
        "bool": torch.tensor([True, False]),
    }
    for kind in (
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float16",
        "bfloat16",
        "float64",
        "float8_e5m2",
    ):
        state[kind] = torch.arange(5).to(getattr(torch, kind))
    path = checkpoint.save(tmp_path / "step-0000001", state)
    assert_same(checkpoint.load(path), state)


def test_bits_of_special_floats_survive(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 0x00000001, 0x7F800000], dtype=torch.int32)
    path = checkpoint.save(tmp_path / "one", {"floats": bits.view(torch.float32)})
    assert torch.equal(checkpoint.load(path)["floats"].view(torch.int32), bits)


def test_subclasses_come_back_as_their_base(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    path = checkpoint.save(tmp_path / "one", OrderedDict(parameter=parameter, nested=OrderedDict(b=1, a=2)))
    loaded = checkpoint.load(path)
    assert_same(loaded, {"parameter": torch.ones(2), "nested": {"b": 1, "a": 2}})
    assert type(loaded["parameter"]) is torch.Tensor
    assert not loaded["parameter"].requires_grad


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_optimisers_go_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
        groups = [
            {"params": model[0].parameters()},
            {"params": [*model[1].parameters(), *model[2].parameters()], "lr": 1e-3},
        ]
        if name == "SGD":
            return model, torch.optim.SGD(groups, lr=2.5e-4, momentum=0.9, weight_decay=5e-4)
        return model, torch.optim.Adam(groups, lr=1e-4, betas=(0.9, 0.99))

    def step(model: torch.nn.Module, optimiser: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimiser.zero_grad()
            model(torch.randn(4, 7)).square().sum().backward()
            optimiser.step()

    model, optimiser = build()
    step(model, optimiser, 3)
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "rng": torch.get_rng_state()}
    path = checkpoint.save(tmp_path / "one", state)
    step(model, optimiser, 3)

    restored_model, restored_optimiser = build()
    loaded = checkpoint.load(path)
    restored_model.load_state_dict(loaded["model"])
    restored_optimiser.load_state_dict(loaded["optimiser"])
    torch.set_rng_state(loaded["rng"])
    step(restored_model, restored_optimiser, 3)
    assert_same(restored_model.state_dict(), model.state_dict())
    assert_same(restored_optimiser.state_dict(), optimiser.state_dict())


def test_files_are_plain(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.eye(3), "bias": torch.ones(1, dtype=torch.uint8)}, "iteration": 300}
    path = checkpoint.save(tmp_path / "one", state)
    assert sorted(os.listdir(path)) == ["SHA256SUMS", "state.json", "tensors.safetensors"]
    tensors = safetensors.torch.load_file(path / "tensors.safetensors")
    assert_same(
        dict(sorted(tensors.items())), {"model.bias": state["model"]["bias"], "model.weight": state["model"]["weight"]}
    )
    document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    assert document["format"] == "mpscl_ray checkpoint"
    assert document["state"]["iteration"] == 300
    for line in (path / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (object(), "builtins.object"),
        ({1.5: 1}, "key 1.5"),
        ({True: 1}, "key True"),
        (b"bytes", "builtins.bytes"),
        (torch.eye(2).to_sparse(), "dense"),
        (torch.empty(2, device="meta"), "dense"),
        (sys.float_info, "sys.float_info"),
    ],
)
def test_what_cannot_be_kept_exactly_is_refused(tmp_path: Path, value: Any, found: str) -> None:
    with pytest.raises(TypeError, match=found) as caught:
        checkpoint.save(tmp_path / "one", {"optimiser": [value]})
    assert "optimiser > 0" in str(caught.value)
    assert os.listdir(tmp_path) == []


# ---- choosing and removing ----


def test_latest_and_prune(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoint.latest(folder) == (None, [])
    assert checkpoint.list_checkpoints(folder) == []
    steps = [100, 200, 300, 12_345_678, 400]
    for step in steps:
        checkpoint.save(folder / checkpoint_name(step), small_state(step))
    (folder / "notes").mkdir()
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder)] == sorted(steps)
    assert checkpoint.latest(folder) == (folder / "step-12345678", [])
    checkpoint.prune(folder, 2)
    assert sorted(os.listdir(folder)) == ["notes", "step-0000400", "step-12345678"]
    checkpoint.prune(folder, 3)
    assert len(os.listdir(folder)) == 3


def test_damaged_ones_are_skipped_and_said(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        checkpoint.save(tmp_path / checkpoint_name(step), small_state(step))
    tensors = tmp_path / checkpoint_name(400) / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    (tmp_path / checkpoint_name(300) / "SHA256SUMS").unlink()
    path, warnings = checkpoint.latest(tmp_path)
    assert path == tmp_path / checkpoint_name(200)
    assert len(warnings) == 2
    assert "step-0000400" in warnings[0]
    assert "tensors.safetensors has the SHA-256" in warnings[0]
    assert "step-0000300" in warnings[1]
    assert "SHA256SUMS is missing" in warnings[1]


def test_prune_never_removes_the_last_valid_one(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        checkpoint.save(tmp_path / checkpoint_name(step), small_state(step))
    for step in (300, 400):
        (tmp_path / checkpoint_name(step) / "state.json").write_bytes(b"{}")
    checkpoint.prune(tmp_path, 2)
    assert not (tmp_path / checkpoint_name(100)).exists()
    assert_same(checkpoint.load(tmp_path / checkpoint_name(200)), small_state(200))


def test_bit_flips_are_all_detected(tmp_path: Path) -> None:
    good = checkpoint.save(tmp_path / checkpoint_name(100), small_state(100))
    path = checkpoint.save(tmp_path / checkpoint_name(200), small_state(200))
    random_numbers = random.Random(0)
    files = sorted(path.iterdir())
    for trial in range(150):
        file = files[trial % len(files)]
        data = file.read_bytes()
        position = random_numbers.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        with pytest.raises(CheckpointDamaged, match=str(path)):
            checkpoint.load(path)
        with pytest.raises(CheckpointDamaged):
            checkpoint.verify(path)
        if trial % 10 == 0:
            assert checkpoint.latest(tmp_path)[0] == good
        file.write_bytes(data)
    checkpoint.verify(path)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors", "SHA256SUMS"])
@pytest.mark.parametrize("fault", ["missing", "empty", "longer", "folder"])
def test_damaged_files_are_named(tmp_path: Path, name: str, fault: str) -> None:
    path = checkpoint.save(tmp_path / "one", small_state(1))
    file = path / name
    data = file.read_bytes()
    file.unlink()
    if fault == "empty":
        file.touch()
    elif fault == "longer":
        file.write_bytes(data + b"\n")
    elif fault == "folder":
        file.mkdir()
    with pytest.raises(CheckpointDamaged, match=name):
        checkpoint.load(path)


def test_the_sums_name_every_file_that_the_state_needs(tmp_path: Path) -> None:
    """Whatever line of SHA256SUMS is lost, and though the lines that are left are right."""
    state = {**small_state(1), "fixed": {"split": torch.arange(3)}}
    path = checkpoint.save(tmp_path / checkpoint_name(1), state)
    assert_same(checkpoint.load(path), state)
    lines = (path / "SHA256SUMS").read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 3
    for lost in lines:
        (path / "SHA256SUMS").write_text("".join(line for line in lines if line != lost), encoding="utf-8")
        for read in (checkpoint.load, checkpoint.verify):
            with pytest.raises(CheckpointDamaged, match=lost.split()[1]):
                read(path)
        assert checkpoint.latest(tmp_path)[0] is None


def test_the_sums_name_no_file_that_the_state_does_not_know(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "one", small_state(1))
    (path / "fixed.safetensors").write_bytes((path / "tensors.safetensors").read_bytes())
    text = (path / "SHA256SUMS").read_text(encoding="utf-8")
    more = text.splitlines()[1].replace("tensors.", "fixed.")
    (path / "SHA256SUMS").write_text(f"{text}{more}\n", encoding="utf-8")
    with pytest.raises(CheckpointDamaged, match=r"names fixed\.safetensors, and state\.json does not"):
        checkpoint.load(path)


def test_foreign_and_newer_checkpoints(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / checkpoint_name(100), small_state(100))
    path = checkpoint.save(tmp_path / checkpoint_name(200), small_state(200))

    def rewrite(document: Any) -> None:
        (path / "state.json").write_text(json.dumps(document))
        names = ("state.json", "tensors.safetensors")
        lines = [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (path / "SHA256SUMS").write_text("".join(lines))

    rewrite({"format": "mpscl_ray checkpoint", "version": 2, "state": {}})
    with pytest.raises(DataError, match=r"version 2, this mpscl_ray reads version 1"):
        checkpoint.load(path)
    # Not passed over in favour of step 100: the work is there, in another version.
    with pytest.raises(DataError, match="version 2"):
        checkpoint.latest(tmp_path)
    for document in ({"state": {}}, [], {"format": "other"}):
        rewrite(document)
        with pytest.raises(DataError, match="not a checkpoint of mpscl_ray"):
            checkpoint.load(path)
    with pytest.raises(DataError, match="is a file"):
        checkpoint.load(path / "state.json")
    with pytest.raises(DataError, match="is missing"):
        checkpoint.load(tmp_path / "nowhere")
