"""Steps whose losses or gradients are not finite: skipped, then tried again with lower rates, then the end of a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mpscl_ray.runs import checkpoint
from mpscl_ray.train.checkpointing import newest_checkpoint
from tests.tiny import make_pair, tiny_config
from tests.tiny_runs import Spoilt, train
from tests.train_command import contents

TEN_STEPS = ("phases.source_only=3", "phases.warm_up=3", "run.log_every=1")
"""Three, three and four iterations."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the datasets mr and ct."""
    return make_pair(tmp_path_factory.mktemp("data"))


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_moves(pair: Path, tmp_path: Path) -> None:
    """The first phase has a sane learning rate, the second one that no network survives."""
    settings = [*TEN_STEPS, "phases.source_only_lr=0.01", "run.checkpoint_every=3"]
    settings += ["optim.max_skipped_steps=0", "optim.retry_lr_factor=null"]
    wild = tiny_config(pair / "mr", pair / "ct", [*settings, "optim.lr=1e30"])
    outcome, run = train(wild, tmp_path / "wild")
    assert (outcome.state, outcome.phase, outcome.iteration) == ("non_finite", "warm_up", 2)
    losses = {"loss_cross_entropy_main", "loss_dice_main", "loss_adversarial_main", "gradient_norm"}
    assert losses <= outcome.losses.keys()
    assert any(not math.isfinite(value) for value in outcome.losses.values())
    found, notices = newest_checkpoint(run)
    assert found == run.checkpoints / "step-0000003"
    assert notices == []
    for network in checkpoint.load(found)["method"]["networks"].values():
        assert all(tensor.isfinite().all() for tensor in network.values())
    assert all(not record["train/non_finite"] for record in run.read_metrics())

    calm = tiny_config(pair / "mr", pair / "ct", [*settings, "optim.lr=0.01"])
    assert train(calm, tmp_path / "wild")[0].state == "finished"
    _, other = train(calm, tmp_path / "calm")
    assert contents(run.phases / "adaptation") == contents(other.phases / "adaptation")


def test_steps_that_are_not_finite_are_skipped_then_training_goes_back_once_then_it_ends(
    pair: Path, tmp_path: Path
) -> None:
    _, straight = train(tiny_config(pair / "mr", pair / "ct", TEN_STEPS), tmp_path / "straight")
    settings = [*TEN_STEPS, "run.checkpoint_every=2", "optim.max_skipped_steps=1", "optim.retry_lr_factor=0.25"]
    config = tiny_config(pair / "mr", pair / "ct", settings)

    skipping = Spoilt(8)
    outcome, run = train(config, tmp_path / "skipping", None, skipping)
    assert (outcome.state, skipping.starts) == ("finished", [0])
    assert [record["train/skipped_steps"] for record in run.read_metrics()] == [0] * 7 + [1] * 3
    assert "by iteration 2 of adaptation 1 step had a loss or gradient that was not finite" in skipping.warnings[0]

    for checkpoints, starts, lowered in (("2", [0, 8], range(9, 11)), ("1000", [0, 6], range(7, 11))):
        returning = Spoilt(9, 10)
        overrides = [*settings, f"run.checkpoint_every={checkpoints}"]
        outcome, run = train(
            tiny_config(pair / "mr", pair / "ct", overrides), tmp_path / f"returning-{checkpoints}", None, returning
        )
        assert (outcome.state, outcome.step, returning.starts) == ("finished", 10, starts)
        told = "seen at iteration 4 of the phase adaptation"
        assert any(told in text and "times optim.retry_lr_factor=0.25" in text for text in returning.warnings)
        records = run.read_metrics()
        assert [record["global_step"] for record in records] == list(range(1, 11))
        for ours, theirs in zip(records, straight.read_metrics(), strict=True):
            factor = 0.25 if ours["global_step"] in lowered else 1
            for network in ("segmenter", "discriminator_main"):
                rate = f"train/learning_rate_{network}"
                assert ours.get(rate) == pytest.approx(None if rate not in theirs else factor * theirs[rate])
    assert checkpoint.load(run.phases / "adaptation")["position"]["lr_factor"] == 0.25

    ending = Spoilt(9, 10, 9, 10)
    outcome, run = train(config, tmp_path / "ending", None, ending)
    assert (outcome.state, outcome.retried, outcome.iteration) == ("non_finite", True, 4)
    assert "also with lower learning rates" in outcome.describe_non_finite()
    assert ending.starts == [0, 8]


def test_a_phase_does_not_end_with_a_step_that_is_not_finite(pair: Path, tmp_path: Path) -> None:
    """The rate ruins the weights in the first step, and the phase is over before too many steps are skipped."""
    settings = [*TEN_STEPS, "run.validate_every=1", "run.checkpoint_every=1", "phases.source_only_lr=1e30"]
    config = tiny_config(pair / "mr", pair / "ct", [*settings, "optim.retry_lr_factor=null"])
    outcome, run = train(config, tmp_path)
    assert (outcome.state, outcome.phase, outcome.iteration) == ("non_finite", "source_only", 3)
    assert run.store.checkpoint_names() == ["step-0000001"], "of steps that were not finite there is none"
    assert not run.best.exists()
    assert math.isnan(run.read_metrics()[-1]["val/unsupervised/nuclear_norm"])
