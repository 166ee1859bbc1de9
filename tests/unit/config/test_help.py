"""Help of settings: values of the preset, defaults, meaning; and what a shell completes."""

from __future__ import annotations

import pytest

from mpscl_ray.config import METHOD_CONFIGS, load_config, preset_names
from mpscl_ray.config.help import (
    complete_settings,
    config_for_help,
    describe_all,
    describe_common,
    describe_long,
    list_presets,
    section_help,
    settings_help,
)

OF_EACH_METHOD = {load_config(name).method_name: name for name in preset_names()}
"""A preset of every method."""


def test_every_method_has_a_preset() -> None:
    assert OF_EACH_METHOD.keys() == METHOD_CONFIGS.keys()


@pytest.mark.parametrize("preset", OF_EACH_METHOD.values())
def test_every_setting_is_documented(preset: str) -> None:
    for entry in settings_help(load_config(preset)):
        assert entry.meaning.endswith((".", ")")), f"{entry.key} has no description"


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("preset", OF_EACH_METHOD.values())
def test_help_is_short_and_fits(preset: str, width: int) -> None:
    config = load_config(preset)
    common = describe_common(config, width).splitlines()
    assert len(common) <= 30
    assert len(describe_all(config, width).splitlines()) > 2 * len(common)
    for line in (*common, *list_presets(width).splitlines()):
        assert len(line) <= width, line


def test_what_differs_from_the_default_is_marked() -> None:
    lines = {line.split("=")[0]: line for line in describe_common(load_config("phantom"), 100).splitlines()}
    assert lines["* method.gamma"].startswith("* method.gamma=0.3 ")
    assert lines["* method.gamma"].endswith(" (default 1.0)")
    assert "default" not in lines["  method.alpha"]
    (line, *_) = describe_long(
        (entry for entry in settings_help(load_config("mr2ct/mpscl_released")) if "repeats" in entry.key), 100
    )
    assert line.endswith("{block: 3, downsample: 4, head: 1, stem: 1} (default null)")


def test_only_settings_of_the_method_are_shown() -> None:
    text = describe_common(load_config("small/sifa_v2"), 100)
    assert "method.lr_generator=" in text
    assert "optim.lr" not in text, "SIFA does not use it"
    assert "phases.warm_up" not in text, "SIFA has no such phase"
    assert "method.margin" not in describe_all(load_config("small/clan"), 100)


def test_a_section_alone() -> None:
    (first, *_) = section_help(load_config("phantom").scaling, "scaling.")
    assert (first.key, first.value, first.default, first.changed) == ("scaling.num_workers", 2, 1, True)


def test_help_does_not_fail_on_wrong_settings() -> None:
    assert config_for_help("phantom", ["optim.lr=1e-3"]).optim.lr == 1e-3
    assert config_for_help("phantom", ["optim.lr=fast"]) == load_config("phantom")


def test_completion_has_names_and_keys_of_all_methods() -> None:
    complete = complete_settings(preset_names())
    assert complete("mr2ct/mpscl") == ["mr2ct/mpscl", "mr2ct/mpscl_paper", "mr2ct/mpscl_released"]
    assert complete("method.lambda_l") == ["method.lambda_l2=", "method.lambda_local=", "method.lambda_low="]
