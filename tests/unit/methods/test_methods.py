"""The contract that every method keeps, and what is particular to MPSCL."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpscl_ray.config import MPSCLConfig, OptimConfig, PrecisionConfig, SegmentationConfig
from mpscl_ray.distributed.collectives import reduce_metrics
from mpscl_ray.errors import DataError
from mpscl_ray.methods import METHODS, Batch
from mpscl_ray.methods.losses import MASK_EPS, cosine_to_prototypes, margin_contrastive_loss
from mpscl_ray.methods.mpscl import prototype_angles
from mpscl_ray.methods.prototypes import downsample_labels, self_paced_pseudo_labels
from tests.tiny_methods import (
    CLASSES,
    MAKE,
    SIZE,
    assert_equal_states,
    batch,
    labelled_batch,
    leaves,
    make_advent,
    make_mpscl,
    segmenter,
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
    fields = ["source_image", "source_label", "target_image", "target_view"]
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

    def test_nothing_is_updated_after_a_non_finite_step(self, name: str) -> None:
        method = MAKE[name]()
        method.start_phase(10)
        bad = batch(0)
        assert bad.target_image is not None
        bad.source_image[1, 0, 5, 5] = bad.target_image[1, 0, 5, 5] = torch.nan
        saved = copy.deepcopy(method.state_dict())
        before = copy.deepcopy(saved)
        flags = [float(method.step(part, 0)["non_finite"]) for part in (bad, batch(1))]
        assert flags == [1, 1]
        # SIFA's pools count on, and its steps follow the iteration: they are no part of what is trained, and a run that
        # stops here writes no checkpoint.
        after = method.state_dict()
        for state in (after, before):
            state.pop("pools", None)
            for optimiser in state["optimisers"].values() if name == "sifa" else ():
                optimiser.pop("step")
        assert_equal_states(after, before)
        losses = reduce_metrics(method.non_finite_losses())
        assert any(math.isnan(value) for value in losses.values())
        # Training resumes from the state before it.
        method.load_state_dict(saved)
        assert float(method.step(batch(1), 0)["non_finite"]) == 0
        with pytest.raises(AssertionError):
            assert_equal_states(method.state_dict(), before)

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


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("discriminator", ["fc", "patchgan"])
def test_a_class_that_is_nowhere_and_a_batch_of_one_class_are_finite(form: str, discriminator: str) -> None:
    method = make_mpscl(margin_form=form, discriminator=discriminator)
    method.start_phase(10)
    for step in range(4):
        part = batch(step)
        label = part.source_label.clamp(max=1) if step < 3 else torch.zeros_like(part.source_label)
        metrics = method.step(dataclasses.replace(part, source_label=label), step)
        assert all(math.isfinite(float(value)) for value in metrics.values())
    assert torch.equal(method.prototypes[2], torch.zeros(method.prototypes.shape[1]))
    assert float(metrics["non_finite"]) == 0


@pytest.mark.parametrize("form", ["released", "paper"])
def test_no_selected_pixel_is_no_loss(form: str) -> None:
    method = make_mpscl(margin_form=form, delta_th=2.0)
    method.start_phase(10)
    metrics = method.step(batch(0), 0)
    assert float(metrics["pseudo_label_fraction"]) == 0
    assert float(metrics["loss_contrastive_target"]) == 0
    assert float(metrics["non_finite"]) == 0


@pytest.mark.parametrize("form", ["released", "paper"])
def test_target_loss_is_a_mean_over_selected_pixels(form: str) -> None:
    method = make_mpscl(margin_form=form)
    method.start_phase(10)
    network, c = copy.deepcopy(method.segmenter), method.config
    metrics = method.step(batch(0), 0)
    with torch.no_grad():
        cosine = cosine_to_prototypes(network(batch(0).target_image).features, method.prototypes)
    nearest, mask = self_paced_pseudo_labels(cosine, c.delta_th)
    scale = (c.temperature_target, c.base_temperature)
    sums = margin_contrastive_loss(cosine, nearest, c.margin_target, *scale, c.margin_form, weights=mask)
    numerator, denominator = float(sums.numerator), float(sums.denominator)
    assert 0 < denominator < 4 * 9 * 9
    expected = numerator / (denominator + (MASK_EPS if form == "released" else 0))
    assert float(metrics["loss_contrastive_target"]) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["pseudo_label_fraction"]) == pytest.approx(denominator / (4 * 9 * 9))


def test_the_warm_up_is_mpscl_without_contrast() -> None:
    """AdvEnt updates the networks as the adaptation with beta = gamma = 0 does, bit for bit."""
    warm_up, baseline = make_advent(), make_mpscl(beta=0, gamma=0)
    for method in (warm_up, baseline):
        method.start_phase(10)
    for step in range(3):
        ours, theirs = warm_up.step(batch(step), step), baseline.step(batch(step), step)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert_equal_states(warm_up.state_dict()["networks"], baseline.state_dict()["networks"])
    # Nor are prototypes computed, for which a pass over the source would be needed.
    baseline.prepare(None)  # type: ignore[arg-type]
    assert not baseline.prototypes.any()


def test_prototypes_start_as_the_mean_feature_over_all_slices() -> None:
    method = make_mpscl()
    method.start_phase(10)
    method.step(batch(0), 0)
    before = weights_checksum(method.networks)
    parts = [batch(step, size) for step, size in ((1, 4), (2, 1), (3, 3))]
    method.initialise_prototypes((part.source_image, part.source_label) for part in parts)
    assert weights_checksum(method.networks) == before

    network = method.segmenter.eval()
    with torch.no_grad():
        features = network(torch.cat([part.source_image for part in parts])).features
    network.train()
    labels = downsample_labels(torch.cat([part.source_label for part in parts]), (9, 9))
    for number in range(CLASSES):
        expected = features.permute(0, 2, 3, 1)[labels == number].mean(dim=0)
        torch.testing.assert_close(method.prototypes[number], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("domains", ["both", "target"])
def test_which_domains_update_the_running_statistics(domains: str) -> None:
    method = make_mpscl(bn_running_stats=domains)
    method.start_phase(10)
    expected = copy.deepcopy(method.segmenter)
    part = batch(0)
    assert part.target_image is not None
    method.step(part, 0)
    with torch.no_grad():
        if domains == "both":
            expected(part.source_image)
        expected(part.target_image)
    for (key, ours), reference in zip(method.segmenter.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, reference, msg=key)


def test_without_auxiliary_head() -> None:
    method = make_mpscl(network=segmenter(0, multi_level=False))
    assert method.networks.keys() == {"segmenter", "discriminator_main"}
    method.start_phase(10)
    metrics = method.step(batch(0), 0)
    assert not any("aux" in key for key in metrics)


def test_total_loss_weighs_its_terms() -> None:
    """The gradient is linear in each weight of Eq. (11)."""

    def gradient(**weights: float) -> Tensor:
        zero = {"gamma": 1e-30, "beta": 0.0, "lambda_main": 0.0, "lambda_aux": 0.0, "segmentation_aux_weight": 0.0}
        method = make_mpscl(**{**zero, **weights})
        method.start_phase(10)
        method.step(batch(0), 0)
        found = method.segmenter.conv1.weight.grad
        assert found is not None
        return found.double()

    base = gradient()
    for name in ("gamma", "beta", "lambda_main", "lambda_aux", "segmentation_aux_weight"):
        one, three = gradient(**{name: 1.0}) - base, gradient(**{name: 3.0}) - base
        assert one.norm() > 1e-5 * base.norm(), name
        torch.testing.assert_close(three, 3 * one, rtol=0, atol=1e-4 * float(base.norm()), msg=name)


def test_halved_discriminator_loss() -> None:
    losses = []
    for halve in (True, False):
        method = make_mpscl(halve_discriminator_loss=halve)
        method.start_phase(10)
        losses.append(float(method.step(batch(0), 0)["loss_discriminator_main"]))
    assert losses[1] == pytest.approx(2 * losses[0])


@pytest.mark.parametrize(
    ("precision", "tolerance", "angle"),
    [
        (PrecisionConfig(channels_last=True), 1e-4, 0.01),
        (PrecisionConfig(dtype="bf16"), 0.02, 0.6),
        (PrecisionConfig(dtype="bf16", channels_last=True), 0.02, 0.6),
    ],
)
def test_other_precisions_are_near_float32(precision: PrecisionConfig, tolerance: float, angle: float) -> None:
    """Losses, and length and direction of the first step, in radians; the steps after it go ways of their own."""
    plain, other = make_mpscl(), make_mpscl(precision=precision)
    start = torch.cat([parameter.detach().flatten() for parameter in plain.segmenter.parameters()])
    moves = []
    metrics = []
    for method in (plain, other):
        method.start_phase(10)
        metrics.append(method.step(batch(0), 0))
        moves.append(torch.cat([parameter.detach().flatten() for parameter in method.segmenter.parameters()]) - start)
        assert float(method.step(batch(1), 1)["non_finite"]) == 0
    for key, expected in metrics[0].items():
        if key.startswith("loss"):
            assert float(metrics[1][key]) == pytest.approx(float(expected), rel=tolerance), key
    assert float(torch.cosine_similarity(*moves, dim=0)) > math.cos(angle)
    assert float(moves[1].norm()) == pytest.approx(float(moves[0].norm()), rel=10 * tolerance)
    assert all(parameter.dtype == torch.float32 for parameter in other.segmenter.parameters())


def test_prototype_angles() -> None:
    prototypes = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 0.0], [0.0, 3.0]])
    smallest, mean = prototype_angles(prototypes)
    assert float(smallest) == pytest.approx(math.pi / 4, abs=1e-6)
    assert float(mean) == pytest.approx((math.pi / 4 + math.pi / 4 + math.pi / 2) / 3, abs=1e-6)
    assert [float(angle) for angle in prototype_angles(torch.zeros(3, 2))] == [0, 0]


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (MPSCLConfig, {"margin_source": -0.1}),
        (MPSCLConfig, {"margin_target": 1.6}),
        (MPSCLConfig, {"temperature_source": 0.0}),
        (MPSCLConfig, {"alpha": 1.1}),
        (MPSCLConfig, {"delta_th": 2.1}),
        (MPSCLConfig, {"gamma": math.nan}),
        (MPSCLConfig, {"beta": math.inf}),
        (MPSCLConfig, {"margin_source": math.nan}),
        (MPSCLConfig, {"margin_form": "published"}),
        (OptimConfig, {"lr": 0.0}),
        (OptimConfig, {"kind": "adam"}),
        (OptimConfig, {"momentum": 1.0}),
        (OptimConfig, {"weight_decay": -0.1}),
        (OptimConfig, {"betas": [0.9, 1.0]}),
        (OptimConfig, {"legacy_param_repeats": {"stem": 0}}),
        (OptimConfig, {"legacy_param_repeats": {"tail": 1}}),
        (PrecisionConfig, {"dtype": "fp16"}),
        (SegmentationConfig, {"segmentation_aux_weight": -1.0}),
        (SegmentationConfig, {"segmentation_loss": "focal"}),
        (SegmentationConfig, {"class_weight_floor": 1.1}),
    ],
)
def test_settings_out_of_range_are_refused(kind: type, setting: dict[str, Any]) -> None:
    TypeAdapter(kind).validate_python({})
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(setting)
