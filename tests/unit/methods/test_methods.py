"""The contract that every method keeps."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpscl_ray.distributed.collectives import reduce_metrics
from mpscl_ray.errors import DataError
from mpscl_ray.methods import METHODS, Batch
from tests.tiny_methods import (
    CLASSES,
    MAKE,
    SIZE,
    assert_equal_states,
    batch,
    labelled_batch,
    leaves,
    weights_checksum,
)

TRAINED = [name for name in METHODS if name != "adabn"]
"""Methods with optimisers."""
DEEPLAB = [name for name in TRAINED if name != "sifa"]
"""Those whose segmenter is a DeepLab trained by decaying SGD."""


def test_every_method_is_tested() -> None:
    assert MAKE.keys() == METHODS.keys()
    for name, make in MAKE.items():
        assert type(make()) is METHODS[name]


def test_a_batch_cannot_carry_target_labels() -> None:
    fields = ["source_image", "source_label", "target_image", "target_view", "source_original"]
    assert [field.name for field in dataclasses.fields(Batch)] == fields


@pytest.mark.parametrize("name", METHODS)
class TestContract:
    def test_step_gives_detached_numbers_and_trains_every_network(self, name: str) -> None:
        method = MAKE[name]()
        method.start_phase(10)
        before = {key: weights_checksum({key: network}) for key, network in method.networks.items()}
        metrics = method.step(batch(0), 0)
        assert "non_finite" in metrics
        assert ("loss_segmentation" in metrics) == (name in TRAINED)
        for key, value in metrics.items():
            assert value.shape == (), key
            assert not value.requires_grad, key
            assert math.isfinite(float(value)), key
        assert float(metrics["non_finite"]) == 0
        for key, network in method.networks.items():
            assert weights_checksum({key: network}) != before[key]

    def test_predict_gives_probabilities_and_changes_nothing(self, name: str) -> None:
        method = MAKE[name]()
        method.start_phase(10)
        method.step(batch(0), 0)
        before = copy.deepcopy(method.state_dict())
        probabilities = method.predict(batch(1).source_image)
        assert probabilities.shape == (4, CLASSES, SIZE, SIZE)
        assert not probabilities.requires_grad
        torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(4, SIZE, SIZE))
        one_by_one = torch.cat([method.predict(image[None]) for image in batch(1).source_image])
        torch.testing.assert_close(one_by_one, probabilities)
        assert_equal_states(method.state_dict(), before)
        assert all(network.training for network in method.networks.values())

    def test_five_steps_saved_and_five_more_are_ten(self, name: str) -> None:
        straight = MAKE[name](seed=0)
        straight.start_phase(10)
        losses = [straight.step(batch(step), step).get("loss_segmentation") for step in range(10)]
        if name in TRAINED:
            assert float(losses[-1]) < 0.6 * float(losses[0]), "it learns"

        first = MAKE[name](seed=0)
        first.start_phase(10)
        for step in range(5):
            first.step(batch(step), step)
        saved = copy.deepcopy(first.state_dict())
        second = MAKE[name](seed=7)
        second.load_state_dict(saved)
        assert_equal_states(second.state_dict(), saved)
        for step in range(5, 10):
            second.step(batch(step), step)
        assert_equal_states(second.state_dict(), straight.state_dict())

    def test_state_is_of_tensors_and_plain_values(self, name: str) -> None:
        method = MAKE[name]()
        assert method.state_dict()["optimisers"] == {}
        method.start_phase(10)
        for key, value in leaves(method.state_dict()).items():
            assert isinstance(value, Tensor | int | float | str), key

    def test_loading_does_not_share_memory(self, name: str) -> None:
        one, other = MAKE[name](seed=0), MAKE[name](seed=1)
        one.start_phase(10)
        other.load_state_dict(one.state_dict())
        before = copy.deepcopy(one.state_dict())
        other.step(batch(0), 0)
        assert_equal_states(one.state_dict(), before)

    def test_a_new_phase_starts_fresh_optimisers_and_keeps_weights(self, name: str) -> None:
        method = MAKE[name]()
        method.start_phase(10)
        method.step(batch(0), 0)
        before = copy.deepcopy(method.state_dict())
        method.start_phase(20)
        after = method.state_dict()
        assert_equal_states({"networks": after["networks"]}, {"networks": before["networks"]})
        assert all(not value.any() for value in leaves(after["optimisers"]).values())

    def test_steps_that_are_not_finite_change_nothing(self, name: str) -> None:
        """The first ones are skipped, and after one too many no step changes anything; SIFA skips none."""
        method, spared = MAKE[name](), MAKE[name]()
        assert method.may_skip == (0 if name == "sifa" else 3)
        bad = batch(0)
        assert bad.target_image is not None
        bad.source_image[1, 0, 5, 5] = bad.target_image[1, 0, 5, 5] = torch.nan
        for one in (method, spared):
            one.start_phase(10)
        saved = copy.deepcopy(method.state_dict())
        for _ in range(method.may_skip):
            assert float(method.step(bad, 0)["non_finite"]) == 1
        assert float(method.diagnostics()["skipped_steps"]) == method.may_skip
        for one in (method, spared):
            assert float(one.step(batch(1), 0)["non_finite"]) == 0
        before = copy.deepcopy(method.state_dict())
        if name != "sifa":
            assert float(before["phase"].pop("skipped")) == 3
            others = spared.state_dict()
            others["phase"].pop("skipped")
            assert_equal_states(before, others)

        flags = [float(method.step(part, 1)["non_finite"]) for part in (bad, batch(2), batch(3))]
        assert flags == [1, 1, 1]
        assert float(method.diagnostics()["skipped_steps"]) > method.may_skip
        after = method.state_dict()
        after["phase"].pop("skipped", None)
        # SIFA's pools count on, and its steps follow the iteration: they are no part of what is trained, and a run that
        # stops here writes no checkpoint.
        for state in (after, before):
            state.pop("pools", None)
            for optimiser in state["optimisers"].values() if name == "sifa" else ():
                optimiser.pop("step")
        assert_equal_states(after, before)
        losses = reduce_metrics(method.non_finite_losses())
        assert any(math.isnan(value) for value in losses.values())
        # Training resumes from the state before it.
        method.load_state_dict(saved)
        assert float(method.diagnostics()["skipped_steps"]) == 0
        assert float(method.step(batch(1), 0)["non_finite"]) == 0

    def test_a_step_reads_nothing_back_from_the_device(self, name: str) -> None:
        read: list[str] = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"):
                    read.append(str(func))
                return func(*args, **(kwargs or {}))

        method = MAKE[name]()
        method.start_phase(10)
        with Watch():
            method.step(batch(0), 0)
            assert read == []
            method.step(batch(0), 0)["non_finite"].item()
        assert len(read) == 1


@pytest.mark.parametrize("name", DEEPLAB)
class TestDeepLab:
    def test_the_decay_reaches_zero_at_the_end_of_the_phase(self, name: str) -> None:
        method = MAKE[name]()
        method.start_phase(4)
        method.step(batch(0), 0)
        before = copy.deepcopy(dict(method.segmenter.named_parameters()))
        method.step(batch(1), 4)
        for key, parameter in method.segmenter.named_parameters():
            assert torch.equal(parameter, before[key]), key

    def test_a_checkpoint_that_does_not_fit_is_named(self, name: str) -> None:
        method = MAKE[name]()
        method.start_phase(10)
        state = method.state_dict()
        wrong = copy.deepcopy(state)
        wrong["networks"]["segmenter"]["conv1.weight"] = torch.zeros(2, 1, 7, 7)
        with pytest.raises(DataError, match=r"segmenter: conv1\.weight is \(2, 1, 7, 7\), expected \(4, 1, 7, 7\)"):
            method.load_state_dict(wrong)
        wrong = copy.deepcopy(state)
        trained = "student" if name == "mean_teacher" else "segmenter"
        del wrong["optimisers"][trained]["momentum_buffer"]["conv1.weight"]
        with pytest.raises(DataError, match=r"momentum_buffer' of conv1\.weight"):
            method.load_state_dict(wrong)
        with pytest.raises(DataError, match="no network 'segmenter'"):
            method.load_state_dict({**state, "networks": {}})


@pytest.mark.parametrize("name", ["advent", "mpscl", "sifa"])
def test_learns_discs(name: str) -> None:
    """With adversaries, with contrast, with its own networks; ten steps of the contract show that the others learn."""
    method = MAKE[name]()
    method.start_phase(30)
    for step in range(30):
        metrics = method.step(batch(step), step)
    assert float(metrics["loss_segmentation"]) < 0.7
    test, target_label = labelled_batch(1000, size=16)
    assert test.target_image is not None
    for image, label in ((test.source_image, test.source_label), (test.target_image, target_label)):
        predicted = method.predict(image).argmax(dim=1)
        for disc in (1, 2):
            ours, truth = predicted == disc, label == disc
            assert 2 * (ours & truth).sum() / (ours.sum() + truth.sum()) > 0.7
