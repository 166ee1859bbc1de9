"""Settings: presets, overrides, and errors in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpscl_ray.config import (
    METHOD_CONFIGS,
    PRESETS,
    config_from_dict,
    default_settings,
    differences,
    flatten,
    load_config,
    preset_names,
    to_dict,
    to_yaml,
)
from mpscl_ray.errors import ConfigError
from mpscl_ray.methods import METHODS


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config_from_dict(to_dict(config)) == config
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file) == config


def test_methods_and_their_settings_have_the_same_names() -> None:
    assert METHODS.keys() == METHOD_CONFIGS.keys()


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_default_settings_are_those_that_a_config_without_them_has(name: str) -> None:
    defaults = default_settings(name)
    given = {"method": {"name": name}, "phases": {"source_only": 1, "warm_up": 0, "adaptation": 0}}
    if name == "sifa":
        given["phases"] = {"source_only": 0, "warm_up": 0, "adaptation": 1}
    built = dict(flatten(to_dict(config_from_dict(given))))
    assert {key: value for key, value in built.items() if not key.startswith("phases.")} == {
        key: value for key, value in flatten(defaults) if not key.startswith("phases.")
    }


def test_presets_ship_for_both_directions_with_bounds() -> None:
    expected = {
        f"{folder}/{name}" for folder in ("mr2ct", "ct2mr", "small") for name in ("mpscl", "source_only", "supervised")
    }
    assert expected | {"phantom", "phantom/source_only", "phantom/supervised"} <= set(preset_names())


def test_paper_and_released_numbers() -> None:
    released, paper = load_config("mr2ct/mpscl_released"), load_config("mr2ct/mpscl_paper")
    assert (released.method.margin_form, paper.method.margin_form) == ("released", "paper")
    assert (released.optim.weight_decay, paper.optim.weight_decay) == (5e-4, 1e-4)
    assert (released.method.lambda_aux, paper.method.lambda_aux) == (2e-5, 6e-4)
    assert released.optim.legacy_param_repeats == {"stem": 1, "block": 3, "downsample": 4, "head": 1}
    assert load_config("ct2mr/mpscl_released").method.temperature_source == 2.0
    assert load_config("ct2mr/mpscl_paper").method.temperature_source == 1.0
    assert load_config("ct2mr/mpscl").method.discriminator == "patchgan"


def test_overrides_have_the_types_of_their_fields() -> None:
    config = load_config(
        "phantom", ["optim.lr=1e-4", "run.name=2024", "network.layers=[1,2,3,4]", "data.in_memory=false"]
    )
    assert config.optim.lr == 1e-4
    assert config.run.name == "2024"
    assert config.network.layers == (1, 2, 3, 4)
    assert config.data.in_memory is False
    assert differences(config, load_config("phantom")).keys() == {
        "optim.lr",
        "run.name",
        "network.layers",
        "data.in_memory",
    }


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method.margin_sorce=0.2", "did you mean 'method.margin_source'"),
        ("method.min_pixels=2", "'method.min_pixels' in the overrides is not a setting"),  # but of another method
        ("method.margin_source=-0.1", "greater than or equal to 0"),
        ("method.margin_target=4", "less than or equal to"),
        ("method.temperature_source=0", "greater than 0"),
        ("method.alpha=1.5", "less than or equal to 1"),
        ("method.delta_th=nan", "method.delta_th"),
        ("data.global_batch_size=0", "greater than or equal to 1"),
        ("optim.lr=nan", "finite"),
        ("optim.lr=fast", "expected a number"),
        ("scaling.num_workers=3", "scaling.num_workers=3"),
        ("scaling.num_workers=two", "expected a whole number"),
        ("scaling.num_workers=[1]", ": expected a longer list"),
        ("scaling.num_workers=[0, 2]", ": expected a value greater than or equal to 1"),
        ("scaling.num_workers=[1, 2, 3]", ": expected a list of at most 2"),
        ("network.layers=[a, b, c, d]", ": expected a whole number"),
        ("data.in_memory=7", ": expected 'auto', or true or false"),
        ("phases.warm_up=1.5", ": expected a whole number"),
        ("run.storage=[1]", ": expected text"),
        ("scaling.num_workers=[2, 1]", "scaling.num_workers=[2, 1]: expected the smaller number first"),
        ("scaling.num_workers=[1, 3]", "every number of workers from 1 to 3"),
        ("network.layers=1,1,1,1", "a list, such as [1, 2]"),
        ("network.output_stride=16", "expected one of 4, 8"),
        ("data.augmentation.mappings=[curve]", "expected one of 'curves', 'bands', 'gin'"),
        ("data.augmentation.mappings=[]", "expected a list of at least 1"),
        ("data.labelled_domain=target", "supervised"),
        ("method.name=mpslc", "mpscl, segmentation"),
        ("run.name=../elsewhere", "letters, digits"),
        ("nonsense", "not key=value"),
        ("phases={source_only: 0, warm_up: 0, adaptation: 0}", "0 iterations"),
    ],
)
def test_wrong_settings_are_reported_plainly(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("phantom", [override])
    assert sentence in str(error.value)
    assert str(error.value).count(override.split("=")[0] + "=") <= 1, "the same setting is reported twice"
    assert "in the overrides" in str(error.value) or override.split("=")[0].split(".")[0] in str(error.value)


def test_values_just_beyond_their_limits_are_refused() -> None:
    wrong = (
        "run.log_every=0 run.validate_every=0 run.checkpoint_every=0 run.keep_checkpoints=0 run.max_failures=-1 "
        "run.storage_retry_minutes=-1 run.seed=-1 run.seed=2147483648 data.augmentation.translation=0.51 "
        "data.augmentation.random_conv_probability=1.01 data.augmentation.mapping_probability=1.01 "
        "data.augmentation.degradation_probability=-0.1 data.foreground_share=0 data.foreground_share=1.01 "
        "network.base_channels=3 phases.adaptation=-1 "
        "phases.source_only_lr=0 optim.lr=0 optim.momentum=1 optim.betas=[0.9,1] "
        "optim.weight_decay=-1 optim.poly_power=-1 scaling.num_workers=0 scaling.cpus_per_worker=0 "
        "scaling.resource_timeout_s=-1 scaling.resize_check_s=0"
    ).split()
    for setting in wrong:
        with pytest.raises(ConfigError, match=rf"^{setting.partition('=')[0]}=\S+.* in the overrides: expected"):
            load_config("phantom", [setting])


def test_all_errors_are_reported_at_once_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: small/mpscl\noptim:\n  lr: -1\nmethd:\n  margin_source: 0.1\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(file, ["data.global_batch_size=0"])
    text = str(error.value)
    assert "optim.lr=-1 in mine.yaml:3" in text
    assert "'methd.margin_source' in mine.yaml:5" in text
    assert "data.global_batch_size=0 in the overrides" in text


def test_wrong_values_of_several_sections_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_config("phantom", ["optim.lr=-1", "run.name=", "scaling.num_workers=[2, 1]", "phases.warm_up=x"])
    assert all(key in str(error.value) for key in ("optim.lr=-1", "run.name=''", "num_workers=[2, 1]", "warm_up=x"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mr2ct/mpsl", "; did you mean 'mr2ct/mpscl'?"),
        ("smll/mpscl", "; did you mean 'small/mpscl'?"),
        ("phantm", "; did you mean 'phantom'?"),
        ("small/mpscl.yaml", "; did you mean 'small/mpscl'?"),
        ("smll", "; did you mean the family 'small', such as small/mpscl?"),
        ("small", "; it is a family of presets: give one of them, such as small/mpscl"),
        ("nothing-like-it", "families ct2mr, mr2ct, phantom, small, or the path of a YAML file; python -m "),
        ("missing.yaml", "families ct2mr, mr2ct, phantom, small, or the path of a YAML file; python -m "),
    ],
)
def test_unknown_presets_name_the_nearest_and_how_to_list_all(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(name)
    assert hint in str(error.value)
    assert ("--list-presets" in str(error.value)) == ("families" in hint)
    assert len(str(error.value)) < 240


def test_presets_that_build_on_each_other_in_a_circle(tmp_path: Path) -> None:
    file = tmp_path / "circle.yaml"
    file.write_text(f"preset: {file}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="builds on itself"):
        load_config(file)


@pytest.mark.parametrize("content", ["- a list", "key: [unclosed", "just words"])
def test_a_file_that_holds_no_settings(content: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(file)


def test_presets_are_installed_with_the_package() -> None:
    assert {path.suffix for path in PRESETS.rglob("*") if path.is_file()} == {".yaml"}


def test_an_empty_mapping_on_the_command_line_is_a_value() -> None:
    with pytest.raises(ConfigError, match="'network' in the overrides is not a setting"):
        load_config("phantom", ["network={}"])
    assert load_config("phantom", ["optim.legacy_param_repeats={}"]).optim.legacy_param_repeats == {}


def test_a_preset_that_changes_between_two_readings_is_read_again(tmp_path: Path) -> None:
    below, file = tmp_path / "below.yaml", tmp_path / "mine.yaml"
    below.write_text("preset: small/mpscl\noptim: {lr: 0.1}\n", encoding="utf-8")
    file.write_text(f"preset: {below}\nrun: {{seed: 1}}\n", encoding="utf-8")
    assert (load_config(file).optim.lr, load_config(file).run.seed) == (0.1, 1)
    for path, old, new in ((below, "0.1", "0.2"), (file, "seed: 1", "seed: 2")):
        before = path.stat()
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size, "size and time are the same"
    assert (load_config(file).optim.lr, load_config(file).run.seed) == (0.2, 2)


def test_overrides_of_one_reading_are_not_in_the_next(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: small/mpscl\noptim: {kind: sgd, legacy_param_repeats: {}}\n", encoding="utf-8")
    assert load_config(file, ["optim.legacy_param_repeats.stem=2"]).optim.legacy_param_repeats == {"stem": 2}
    assert load_config(file).optim.legacy_param_repeats == {}
