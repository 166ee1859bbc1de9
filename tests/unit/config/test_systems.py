"""The systems of the comparison: their presets, their budgets, and the phases that they share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mpscl_ray.config import Config, load_config, to_yaml
from mpscl_ray.config.systems import DESCRIPTIONS, SYSTEMS, phase_fingerprint, shared_phase
from mpscl_ray.errors import ConfigError
from mpscl_ray.evaluate.scoring import evaluate_checkpoint
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.fork import fork
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.domains import load_domains, model_description
from tests.tiny import TINY_SIFA, make_pair, tiny_config
from tests.tiny_runs import train


@pytest.mark.parametrize("folder", ["phantom", "small", "mr2ct", "ct2mr"])
def test_every_system_has_a_preset_with_the_same_budget(folder: str) -> None:
    budgets = {}
    for name in SYSTEMS:
        config = load_config(f"{folder}/{name}")
        phases = [(phase, length) for phase, length in config.schedule if name != "adabn" or phase != "adaptation"]
        budgets[name] = sum(length for _, length in phases)
        if "sifa" not in name:
            assert config.data.global_batch_size == load_config(f"{folder}/mpscl").data.global_batch_size
    assert budgets["mpscl"] > 0
    # The bounds have the iterations of the adaptation alone, SIFA those of its release.
    own = {"source_only", "source_randomised", "supervised", "adabn", "sifa_v1", "sifa_v2"}
    without = own if folder in ("mr2ct", "ct2mr") else set()
    assert {name for name in SYSTEMS if budgets[name] != budgets["mpscl"]} == without, budgets


def test_what_is_shared_on_the_phantom() -> None:
    mpscl = load_config("phantom/mpscl")
    shared = {name: shared_phase(load_config(f"phantom/{name}"), mpscl) for name in SYSTEMS}
    assert shared["source_only"] is shared["source_randomised"] is shared["supervised"] is None
    assert shared["adabn"] is shared["sifa_v1"] is shared["sifa_v2"] is shared["mean_teacher"] is None
    warmed_up = {"mpscl", "baseline", "cscl", "cag", "intrada"}
    assert {name for name in SYSTEMS if shared[name] == "warm_up"} == warmed_up
    assert {name for name in SYSTEMS if shared[name] == "source_only"} == {"adaoutput", "advent", "minent", "clan"}
    assert shared_phase(load_config("phantom/adabn"), load_config("phantom/source_only")) == "source_only"
    for change in ("run.seed=2", "optim.momentum=0.5", "data.source=phantom:mr", "network.base_channels=8"):
        assert shared_phase(load_config("phantom/mpscl", [change]), mpscl) is None, change
    for change in ("method.lambda_main=0.1", "phases.warm_up=99", "optim.lr_discriminator=1e-5"):
        other = load_config("phantom/mpscl", [change])
        assert phase_fingerprint(other, "warm_up") != phase_fingerprint(mpscl, "warm_up"), change
    for change in ("method.beta=0", "run.name=other", "scaling.num_workers=1", "phases.adaptation=1"):
        assert shared_phase(load_config("phantom/mpscl", [change]), mpscl) == "warm_up", change


def test_settings_of_sgd_alone_decide_what_the_source_only_phase_learns(tmp_path: Path) -> None:
    base = make_pair(tmp_path)
    length = ["phases.source_only=2", "phases.warm_up=1", "phases.adaptation=1", "phases.source_only_lr=0.01"]
    changes = ["optim.lr=0.3", "optim.lr_discriminator=0.3", "optim.betas=[0.5,0.6]"]
    learnt, configs = [], []
    for name, overrides in (("one", []), ("other", changes)):
        config = tiny_config(base / "mr", base / "ct", [*length, *overrides])
        run = train(config, base / name, stop_after=3)[1]
        learnt.append(checkpoint.load(run.phases / "source_only")["method"]["networks"]["segmenter"])
        configs.append(config)
    assert all(torch.equal(tensor, learnt[1][key]) for key, tensor in learnt[0].items())
    assert shared_phase(*configs) == "source_only"


def test_phases_that_a_method_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.name=sifa has no source-only phase and no warm-up; set phases"):
        load_config("phantom/sifa_v2", ["phases.warm_up=3"])
    with pytest.raises(ConfigError, match=r"method.name=advent has no adaptation; set phases.adaptation=0"):
        load_config("phantom/advent", ["phases.adaptation=1"])
    with pytest.raises(ConfigError, match=r"data.labelled_domain=target .* goes with method.name=segmentation"):
        load_config("phantom/clan", ["data.labelled_domain=target"])


def short_config(base: Path, name: str) -> Config:
    """A system with phases of two iterations."""
    preset = f"small/{name}"
    phases = [f"phases.{phase}=2" for phase in load_config(preset).method_phases]
    return tiny_config(base / "mr", base / "ct", [*phases, *(TINY_SIFA if "sifa" in name else ())], preset)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, RunDirectory]:
    """A tiny run of MPSCL."""
    base = make_pair(tmp_path_factory.mktemp("systems"))
    config = short_config(base, "mpscl")
    return base, config, train(config, base / "mpscl")[1]


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "supervised"])
def test_what_configs_say_is_shared_is_the_same_in_weights(
    parent: tuple[Path, Config, RunDirectory], name: str, tmp_path: Path
) -> None:
    """Trained from scratch or forked from MPSCL's run, a system has the same weights; every phase can be evaluated."""
    base, mpscl, begun = parent
    config = short_config(base, name)
    outcome, whole = train(config, tmp_path / "whole")
    assert outcome.state == "finished"
    common = shared_phase(config, mpscl)
    last = config.schedule[-1][0]
    if common is not None:
        ours, theirs = (checkpoint.load(run.phases / common)["method"]["networks"] for run in (whole, begun))
        assert ours.keys() == theirs.keys()
        for network, weights in ours.items():
            assert all(torch.equal(tensor, theirs[network][key]) for key, tensor in weights.items())
        forked = RunDirectory(tmp_path / "forked")
        fork(forked, begun, common)
        assert train(config, forked.path)[0].state == "finished"
        assert (forked.phases / last / checkpoint.TENSORS).read_bytes() == (
            whole.phases / last / checkpoint.TENSORS
        ).read_bytes()
    domains, _ = load_domains(config)
    whole.write_config(to_yaml(config))
    whole.write_model(model_description(config, domains))
    for phase, _ in config.schedule:
        evaluation = evaluate_checkpoint(whole.path, phase, device="cpu", workers=0, progress=False)
        assert evaluation.weights.phase == phase
        assert len(evaluation.scores) == 2


def test_every_system_has_a_description_that_names_no_data_set_and_no_budget() -> None:
    assert list(DESCRIPTIONS) == list(SYSTEMS)
    assert not [text for text in DESCRIPTIONS.values() if re.search(r"\bMR\b|\bCT\b|iterations", text)]
