"""Spaces: what is read, what is refused before the search starts, and what the trials get and share."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpscl_ray.config import config_from_dict
from mpscl_ray.config.systems import acts_on, common_phases, limiting_keys, phase_fingerprint
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train import loop
from mpscl_ray.tune.asha import rungs
from mpscl_ray.tune.criteria import LABEL_FREE, WITHOUT_SOURCE
from mpscl_ray.tune.samplers import grid, make_sampler
from mpscl_ray.tune.space import EXAMPLE, Space, load_space, space_names
from mpscl_ray.tune.warm_start import choose_metric
from tests.tiny import local_data, make_pair, tiny_config

ROOT = Path(__file__).resolve().parents[3]
BOTH = "method.margin_source, method.margin_target"


def space_of(folder: Path, text: str, *overrides: str) -> Space:
    file = folder / "own.yaml"
    file.write_text(text)
    return load_space(file, overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        space_of(folder, text, *overrides)
    return str(error.value)


@pytest.mark.parametrize("name", space_names())
def test_spaces_of_the_package_are_valid_and_named_after_their_file(name: str) -> None:
    space = load_space(name, ["data.source=s", "data.target=t"])
    assert (ROOT / "tune_spaces" / f"{name}.yaml").is_file()
    assert space.base.run.name == f"tune-{name}"
    for settings in grid(space) if space.search.method == "grid" else [make_sampler(space, {}, {}).settings(2)]:
        assert space.config(settings).run == space.base.run


def test_the_example_of_the_help_is_a_space(tmp_path: Path) -> None:
    space = space_of(tmp_path, EXAMPLE)
    assert space.search.num_samples == 12
    assert len(space.distributions) == 5


def test_all_subpackages_and_the_folder_of_spaces_are_installed() -> None:
    listed = re.findall(r"^    (mpscl_ray[\w.]*)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    folders = {path.parent for path in (ROOT / "mpscl_ray").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == found | {"mpscl_ray.tune_spaces"}


def test_all_problems_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """\
preset: phantom
phases: {adaptatoin: 3}
search: {methid: grid, num_samples: 0}
space:
  method.margin_sorce: {uniform: [0, 0.6]}
  method.margin_target: {uniform: [0, 3.6]}
  method.gamma: {logunifrom: [1, 2]}
  method.beta: {loguniform: [0, 2]}
  method.alpha: 3
  run.name: {choice: [a, b]}
  method.discriminator: {choice: [fc, fcc]}
  method.delta_th: {uniform: [1.0e-1, 1e-5]}
"""
    message = refusal(tmp_path, text, "optim.lrr=1", "search.metric=dice")
    for sentence in (
        "'search.methid' in own.yaml:3 is not a setting of a search; did you mean 'search.method'?",
        "search.num_samples=0 in own.yaml:3: expected a value greater than or equal to 1",
        "'phases.adaptatoin' in own.yaml is not a setting; did you mean 'phases.adaptation'?",
        "'method.margin_sorce' in own.yaml:5 is not a setting; did you mean 'method.margin_source'?",
        "method.margin_target=3.6 in own.yaml:6: expected a value less than or equal to 1.57",
        "'logunifrom' in own.yaml:7 is not a distribution; did you mean 'loguniform'?",
        "method.beta in own.yaml:8: loguniform begins at 0",
        "method.alpha in own.yaml:9 has the value 3, expected a distribution",
        "run.name in own.yaml:10 cannot be searched",
        "method.discriminator=fcc in own.yaml:11: expected one of 'fc', 'patchgan'",
        "method.delta_th in own.yaml:12: uniform has [0.1, '1e-5'], expected two numbers",
    ):
        assert sentence in message


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("preset: phantom", [], "own.yaml has no distribution"),
        ("preset: phantom\nspace: {}", [], "own.yaml has no distribution"),
        ("preset: phantm\nspace: {method.alpha: {choice: [0]}}", [], "did you mean 'phantom'"),
        ("space: {method.alpha: {choice: [0]}}", ["optim.lrr=1"], "'optim.lrr' on the command line is not a setting"),
        (
            "space: {method.alpha: {choice: [0]}}",
            ["search.metric=dice"],
            "search.metric=dice on the command line is not",
        ),
        ("space: {method.alpha: {choice: [0, 0]}}", [], "a choice is given twice"),
        ("space: {method.alpha: {uniform: [0.5, 0.1]}}", [], "the lower one first"),
        ("space: {data.global_batch_size: {integer: [1.5, 4]}}", [], "expected whole numbers"),
        (f"space: {{method.alpha: {{choice: [0]}}, '{BOTH}, method.alpha': {{choice: [0]}}}}", [], "already"),
        ("space: {method.alpha: {uniform: [0, 1]}}", ["search.method=grid"], "a grid has only choices"),
        ("space: [1]", [], "'space' in own.yaml:1 has the value [1], expected keys"),
        ("- 1", [], "holds a seq"),
        ("a: [", [], "is not YAML"),
    ],
)
def test_refused(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    assert message in refusal(tmp_path, text, *overrides)


def test_an_unknown_space_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"no space 'phantm'; did you mean 'phantom'\?$"):
        load_space("phantm")
    with pytest.raises(
        ConfigError, match=r"no space 'nothing'; expected one of contrastive, .*, or the path of a YAML"
    ):
        load_space("nothing")
    with pytest.raises(ConfigError, match=r"there is no space file nowhere\.yaml"):
        load_space("nowhere.yaml")


def test_the_file_overrides_the_preset_and_the_command_line_both(tmp_path: Path) -> None:
    text = "preset: phantom\nphases: {adaptation: 9, warm_up: 8}\nspace: {method.alpha: {choice: [0.5]}}"
    space = space_of(tmp_path, text, "phases.warm_up=7", "run.name=mine", "search.num_samples=3", "preset=small/mpscl")
    assert (space.base.phases.source_only, space.base.phases.warm_up, space.base.phases.adaptation) == (850, 7, 9)
    assert (space.base.run.name, space.search.num_samples) == ("mine", 3)
    assert space.config({"method.alpha": 0.5}).method.alpha == 0.5  # type: ignore[union-attr]


def test_random_trials_depend_on_the_seed_and_their_number_alone(tmp_path: Path) -> None:
    text = f"""\
space:
  {BOTH}: {{uniform: [0.3, 0.6]}}
  method.gamma: {{loguniform: [0.01, 100]}}
  data.global_batch_size: {{integer: [4, 6]}}
  method.margin_form: {{choice: [released, paper]}}
"""
    few, many, other = (
        make_sampler(space_of(tmp_path, text, s), {}, {})
        for s in ("run.seed=1", "search.num_samples=400", "search.seed=2")
    )
    assert few.settings(7) == many.settings(7) != other.settings(7)
    drawn = [many.settings(number) for number in range(1, 401)]
    assert all(trial["method.margin_source"] == trial["method.margin_target"] for trial in drawn)
    assert all(0.3 <= trial["method.margin_source"] <= 0.6 for trial in drawn)
    assert {trial["data.global_batch_size"] for trial in drawn} == {4, 5, 6}
    assert {trial["method.margin_form"] for trial in drawn} == {"released", "paper"}
    assert 0.4 < sum(trial["method.gamma"] < 1 for trial in drawn) / 400 < 0.6


def test_the_first_random_trial_has_the_values_of_the_preset_if_they_lie_in_the_space(tmp_path: Path) -> None:
    inside = space_of(tmp_path, "space: {method.alpha: {uniform: [0, 1]}, method.gamma: {choice: [0.3, 1]}}")
    assert make_sampler(inside, {}, {}).settings(1) == {"method.alpha": 0.2, "method.gamma": 0.3}
    outside = space_of(tmp_path, "space: {method.alpha: {uniform: [0.3, 1]}}")
    assert make_sampler(outside, {}, {}).settings(1)["method.alpha"] >= 0.3


def test_a_grid_has_every_combination_once(tmp_path: Path) -> None:
    text = f"space: {{{BOTH}: {{choice: [0, 0.2]}}, method.margin_form: {{choice: [released, paper]}}}}".replace(
        BOTH, f"'{BOTH}'"
    )
    found = make_sampler(space_of(tmp_path, text, "search.method=grid"), {}, {})
    points = [tuple(found.settings(number).values()) for number in range(1, found.total + 1)]
    assert points == [(m, m, form) for m in (0, 0.2) for form in ("released", "paper")]


@pytest.mark.parametrize(
    ("keys", "shared", "limiting"),
    [
        (["method.margin_source", "method.gamma"], ["source_only", "warm_up"], []),
        (["phases.adaptation"], ["source_only", "warm_up"], []),
        (["method.gamma", "method.lambda_main"], ["source_only"], ["method.lambda_main"]),
        (["method.discriminator"], ["source_only"], ["method.discriminator"]),
        (["optim.lr"], ["source_only"], ["optim.lr"]),
        (["method.segmentation_aux_weight"], [], ["method.segmentation_aux_weight"]),
        (["data.global_batch_size"], [], ["data.global_batch_size"]),
        (["run.seed"], [], ["run.seed"]),
    ],
)
def test_trials_share_the_phases_in_which_no_key_acts(keys: list[str], shared: list[str], limiting: list[str]) -> None:
    config = load_space("phantom").base
    assert [name for name, _ in common_phases(config, keys)] == shared
    assert limiting_keys(config, keys) == limiting


def test_the_learning_rate_acts_in_the_first_phase_unless_that_has_its_own(tmp_path: Path) -> None:
    config = config_from_dict({"phases": {"source_only": 1, "warm_up": 1, "adaptation": 1}})
    assert common_phases(config, ["optim.lr"]) == []
    alone = config_from_dict({"phases": {"warm_up": 5}})
    assert common_phases(alone, ["method.gamma"]) == [], "the last phase is a trial's own"


def test_settings_of_the_adaptation_change_no_weight_before_it(tmp_path: Path) -> None:
    make_pair(tmp_path)
    values = {"margin_form": "paper", "alpha": 0.7, "delta_th": 0.4, "gamma": 0, "beta": 3, "base_temperature": 2}
    values |= {f"{kind}_{domain}": 1.3 for kind in ("margin", "temperature") for domain in ("source", "target")}
    config = tiny_config(tmp_path / "mr", tmp_path / "ct")
    names = [field.name for field in dataclasses.fields(config.method)]
    before = phase_fingerprint(config, "warm_up")
    late = {name for name in names if not acts_on(f"method.{name}", before)}
    assert late == values.keys()
    changed = [f"method.{name}={value}" for name, value in values.items()]
    ends = []
    for name, overrides in (("one", []), ("other", changed)):
        config = tiny_config(tmp_path / "mr", tmp_path / "ct", ["phases.source_only=1", *overrides])
        run = RunDirectory(tmp_path / name)
        run.create()
        loop.train(config, local_data(config), run, torch.device("cpu"))
        ends.append([checkpoint.load(run.phases / phase)["method"]["networks"] for phase in ("warm_up", "adaptation")])
    (one_before, one_after), (other_before, other_after) = ends
    for network, weights in one_before.items():
        assert all(torch.equal(weights[key], other_before[network][key]) for key in weights), "acts in the warm-up"
    assert not torch.equal(*(next(iter(after["segmenter"].values())) for after in (one_after, other_after)))


def test_rungs_start_at_the_grace_and_end_before_the_last_iteration() -> None:
    assert rungs(120, 12, 3) == [12, 36, 108]
    assert rungs(36, 12, 3) == [12]
    assert rungs(12, 12, 3) == []


def domains(target: str, source: str) -> Any:
    """Manifests with validation cases that have labels (y) or not (n), each a letter."""

    def manifest(cases: str) -> Any:
        return SimpleNamespace(split=lambda name: [SimpleNamespace(labelled=case == "y") for case in cases])

    return SimpleNamespace(target=manifest(target), source=manifest(source), target_folder="T", source_folder="S")


@pytest.mark.parametrize(
    ("metric", "target", "source", "expected"),
    [
        ("auto", "yy", "yy", "oracle"),
        ("auto", "yn", "yy", LABEL_FREE),
        ("auto", "nn", "nn", WITHOUT_SOURCE),
        ("auto", "nn", "", WITHOUT_SOURCE),
        ("oracle", "yn", "yy", "search.metric=oracle needs labels .* target T, and 1 of its 2 have any"),
        ("auto", "", "yy", "needs validation cases of the target T, which has none"),
        ("source_dice", "", "yy", "source_dice"),
        ("source_dice", "nn", "yn", "needs labelled validation cases of the source S"),
        ("class_ratio_agreement", "nn", "", "needs labelled validation cases of the source S"),
        ("adjacency_agreement", "nn", "", "needs labelled validation cases of the source S"),
        ("information", "nn", "", "information"),
    ],
)
def test_a_criterion_needs_the_validation_cases_that_it_is_computed_on(
    metric: str, target: str, source: str, expected: str
) -> None:
    if " " in expected:
        with pytest.raises(ConfigError, match=expected):
            choose_metric(metric, domains(target, source))
    else:
        assert choose_metric(metric, domains(target, source)) == expected
