"""Reading a run's settings from a preset and ``key=value`` overrides; what they are is in mpscl_ray.config.schema.

One :func:`load_config` serves the command line, a search trial and the reload of a run folder. Unknown keys, wrong
types and values out of range are all reported at once, each with its file and line.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mpscl_ray.config.methods import ADAPTATION, METHOD_CONFIGS, SOURCE_ONLY, WARM_UP, MeanTeacherConfig
from mpscl_ray.config.overrides import GIVEN, ON_COMMAND_LINE, Setting, read_file, read_overrides
from mpscl_ray.config.schema import Config
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs.cli import did_you_mean
from mpscl_ray.runs.config_diff import flatten
from mpscl_ray.runs.storage import S3Path, cache_folder, is_url, parse_location
from mpscl_ray.runs.wording import counted

PRESETS = Path(__file__).parents[1] / "presets"
"""Folder of the presets that ship with the package; a preset's name is its path below it without ``.yaml``."""


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(str(path.relative_to(PRESETS).with_suffix("")) for path in PRESETS.rglob("*.yaml"))


def load_config(preset: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Read a preset (by name, or a YAML file by path) and apply overrides.

    Args:
        preset: a name of :func:`preset_names`, or the path or URL of a YAML file with the same keys. A file may name
            the one it builds on under the key ``preset``.
        overrides: ``section.key=value`` words with YAML values, such as ``null``, ``[1, 2]`` or ``true``; or
            ``{"section.key": value}``.

    Raises:
        ConfigError: naming every unknown key (with the nearest known one), wrong type and value out of range, each
            with its file and line.
    """
    return _load(preset, *read_overrides(overrides))


def load_command_line(preset: str | Path, words: Sequence[str]) -> Config:
    """As :func:`load_config`, with words of a command line."""
    return _load(preset, *read_overrides(words, ON_COMMAND_LINE))


def _load(preset: str | Path, given: Mapping[str, Setting], problems: list[str]) -> Config:
    path = _preset_path(preset)
    settings = _read_preset(path)
    settings.setdefault(
        "run.name",
        Setting(path.stem if path == Path(preset) or is_url(preset) else str(preset).replace("/", "-"), "by default"),
    )
    return _build({**settings, **given}, problems)


def override(config: Config, overrides: Sequence[str] | Mapping[str, Any]) -> Config:
    """The config with some settings changed; overrides and errors as in :func:`load_config`."""
    given, problems = read_overrides(overrides)
    own = {key: Setting(value, "in the given config") for key, value in flatten(to_dict(config))}
    return _build({**own, **given}, problems)


def config_from_dict(values: Mapping[str, Any], origin: str = "in the given settings") -> Config:
    """Build a config from nested plain values, as :func:`to_dict` gives them."""
    return _build({key: Setting(value, origin) for key, value in flatten(values)}, [])


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values (strings, numbers, lists) from which :func:`config_from_dict` builds the same config."""
    values = typing.cast("dict[str, Any]", _plain(dataclasses.asdict(config)))
    values["method"] = {"name": config.method_name, **values["method"]}
    return values


def default_settings(method: str) -> dict[str, Any]:
    """Nested plain values of all settings of a method, as they are where nothing sets them."""
    return to_dict(Config(method=METHOD_CONFIGS[method]()))


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML, readable by :func:`load_config`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Keys in which two configs differ, with both values."""
    left, right = dict(flatten(to_dict(one))), dict(flatten(to_dict(other)))
    return {key: (left.get(key), right.get(key)) for key in sorted({*left, *right}) if left.get(key) != right.get(key)}


def _preset_path(preset: str | Path) -> Path:
    remote = parse_location(preset)
    if isinstance(remote, S3Path):
        copy = cache_folder() / "presets" / remote.name
        try:
            remote.download(copy)
        except FileNotFoundError:
            raise ConfigError(f"there is no preset file {remote}; look at the folder {remote.parent}") from None
        return copy
    named = PRESETS / f"{preset}.yaml"
    if os.path.isfile(named):  # False also where the system takes no such name
        return named
    path = Path(preset)
    if path.suffix in (".yaml", ".yml"):
        if os.path.isfile(path):
            return path
        raise ConfigError(f"there is no preset file {path}; {_near_preset(preset)}")
    raise ConfigError(f"there is no preset '{preset}'; {_near_preset(preset)}")


def _near_preset(preset: str | Path) -> str:
    word = str(preset).removesuffix(".yaml").removesuffix(".yml")
    families = sorted({path.parent.name for path in PRESETS.glob("*/*.yaml")})
    if word in families and word not in preset_names():
        return f"it is a family of presets: give one of them, such as {word}/mpscl"
    family = difflib.get_close_matches(word, families, n=1, cutoff=0.7)
    if family and family[0] not in preset_names():
        return f"did you mean the family '{family[0]}', such as {family[0]}/mpscl?"
    return did_you_mean(word, preset_names()) or (
        f"expected phantom, or FAMILY/METHOD with one of the families {', '.join(families)}, or the path of a YAML "
        "file; python -m mpscl_ray.train --list-presets lists them"
    )


def _read_preset(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Setting]:
    """Settings of a preset file laid over those of the file it builds on."""
    if path in seen:
        raise ConfigError(f"{path} builds on itself through its key 'preset'; name another file there")
    own = read_file(path)
    parent = own.pop("preset", None)
    return {**(_read_preset(_preset_path(str(parent.value)), (*seen, path)) if parent else {}), **own}


def require_datasets(config: Config) -> None:
    """Raises ConfigError where data.source or data.target is not set."""
    for key, value in (("data.source", config.data.source), ("data.target", config.data.target)):
        if not value:
            raise ConfigError(
                f"{key} is not set: give the folder of a prepared dataset ({key}=FOLDER); "
                "python -m mpscl_ray.prepare --help says how to make one"
            )


def _build(settings: Mapping[str, Setting], problems: list[str]) -> Config:
    """Check keys, types and limits of flat settings; raise one ConfigError with everything that is wrong."""
    chosen = settings.get("method.name", Setting("mpscl", "by default"))
    method = METHOD_CONFIGS.get(str(chosen.value))
    if method is None:
        problems.append(f"method.name={chosen.value!r} {chosen.origin} is not one of {', '.join(METHOD_CONFIGS)}")
        method = METHOD_CONFIGS["mpscl"]
    settings = {key: setting for key, setting in settings.items() if key != "method.name"}
    nested = _nest(settings, method, problems)
    sections: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)} | {"method": method}
    built: dict[str, Any] = {}
    for section, kind in sections.items():
        try:
            built[section] = _adapter(kind).validate_python(nested.get(section, {}))
        except ValidationError as error:
            wrong: dict[str, list[Any]] = {}
            for detail in error.errors():
                wrong.setdefault(_key(section, detail, settings), []).append(detail)
            problems += [_explain(key, details, settings) for key, details in wrong.items()]
    problems += _wrong_values(built)
    if not problems:
        config = Config(**built)
        problems += _inconsistencies(config)
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else "\n  ".join(["the settings are wrong:", *problems]))
    return config


def _nest(settings: Mapping[str, Setting], method: type, problems: list[str]) -> dict[str, Any]:
    """Nested values of the settings that a method has, and a problem for each unknown key."""
    known, of_any_method = _known_keys(method), set[str]().union(*map(_known_keys, METHOD_CONFIGS.values()))
    free = _free_mappings(method)
    nested: dict[str, Any] = {}
    for key, setting in settings.items():
        if key not in known and not any(key.startswith(f"{name}.") for name in free):
            if key in of_any_method and setting.origin not in GIVEN:
                continue  # A key of another method, inherited from the preset that this one builds on.
            hint = did_you_mean(key, sorted(known)) or "--help-all lists all keys"
            problems.append(f"'{key}' {setting.origin} is not a setting; {hint}")
            continue
        *parents, last = key.split(".")
        section = nested
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = setting.value
    return nested


def _key(section: str, detail: Any, settings: Mapping[str, Setting]) -> str:
    """The key of the setting that an error of pydantic is about."""
    parts = [section, *(str(part) for part in detail["loc"])]
    key = ".".join(parts)
    while key not in settings and "." in key:  # Positions in a tuple and branches of a union are no keys.
        key = key.rpartition(".")[0]
    return key


def _explain(key: str, details: Sequence[Any], settings: Mapping[str, Setting]) -> str:
    """What is wrong with a setting; where it takes a number or a list, with the one that was given."""
    fitting = [
        detail
        for detail in details
        if detail["type"] != "tuple_type"
        and not (isinstance(detail["input"], list | tuple) and detail["type"].endswith("_type"))
    ]
    messages = dict.fromkeys(expected(detail) for detail in fitting or details)
    origin = settings[key].origin if key in settings else "by default"
    value = yaml_scalar(settings[key].value if key in settings else details[0]["input"])
    return f"{key}={value} {origin}: {', or '.join(messages).replace(', or expected', ', or')}"


def expected(detail: Any) -> str:
    """What was expected instead of a value, by an error of pydantic."""
    kind = detail["type"]
    if kind.startswith("int_"):
        return "expected a whole number"
    if kind.startswith("float_"):
        return "expected a number"
    if kind.startswith("bool_"):
        return "expected true or false"
    if kind == "literal_error":
        choices = detail["ctx"]["expected"].replace(" or ", ", ")
        return f"expected {'one of ' if ', ' in choices else ''}{choices}"
    if kind == "string_type":
        return "expected text"
    if kind == "tuple_type":
        return "expected a list, such as [1, 2]"
    if kind == "missing":
        return "expected a longer list"
    if kind == "too_short":
        return f"expected a list of at least {detail['ctx']['min_length']}"
    if kind == "too_long":
        return f"expected a list of at most {detail['ctx']['max_length']}"
    message: str = detail["msg"][0].lower() + detail["msg"][1:]
    return message.replace("input should be a ", "expected a ").replace("input should be", "expected a value")


def _wrong_values(sections: Mapping[str, Any]) -> list[str]:
    """Sentences for values of the right types that are wrong in every config."""
    found: list[str] = []
    scaling, run = sections.get("scaling"), sections.get("run")
    if scaling and scaling.least_workers > scaling.most_workers:
        found.append(f"scaling.num_workers={list(scaling.num_workers)}: expected the smaller number first")
    if run and (run.name in (".", "..") or not re.fullmatch(r"[A-Za-z0-9._-]+", run.name)):
        found.append(f"run.name={run.name!r} must be made of letters, digits, '.', '_' and '-'")
    for key, value in flatten({name: dataclasses.asdict(section) for name, section in sections.items()}):
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{key}={value} is not a finite number")
    return found


def _inconsistencies(config: Config) -> list[str]:
    """Sentences for values that are each valid, but not together."""
    found: list[str] = []
    least, most = config.scaling.least_workers, config.scaling.most_workers
    odd = [number for number in range(least, most + 1) if config.data.global_batch_size % number]
    if odd:
        found.append(
            f"data.global_batch_size={config.data.global_batch_size} slices cannot be shared equally by "
            f"scaling.num_workers={', '.join(map(str, odd))}; make the batch a multiple of "
            + ("the workers" if least == most else f"every number of workers from {least} to {most}")
        )
    shares = {number: config.data.global_batch_size // number for number in range(least, most + 1) if not odd}
    uneven = [number for number, share in shares.items() if share % config.optim.accumulate]
    if uneven:
        found.append(
            f"optim.accumulate={config.optim.accumulate} does not divide the {shares[uneven[0]]} slices that each of "
            f"{counted(uneven[0], 'worker')} has of data.global_batch_size={config.data.global_batch_size}; choose a "
            "divisor"
        )
    if config.optim.recompute and config.method_name == "sifa":
        found.append("optim.recompute=true is for DeepLab, which method.name=sifa has not; use optim.accumulate=2")
    if config.optim.recompute and config.precision.compile:
        found.append("optim.recompute=true and precision.compile=true do not go together; choose one of them")
    absent = [phase for phase in (SOURCE_ONLY, WARM_UP, ADAPTATION) if phase not in config.method_phases]
    if any(getattr(config.phases, phase) for phase in absent):
        words = " and ".join(f"no {_PHASE_WORDS[phase]}" for phase in absent)
        settings = " ".join(f"phases.{phase}=0" for phase in absent)
        found.append(f"method.name={config.method_name} has {words}; set {settings}")
    if config.data.labelled_domain == "target" and config.method_phases != (SOURCE_ONLY,):
        found.append("data.labelled_domain=target is the supervised bound and goes with method.name=segmentation")
    if config.optim.kind != "sgd" and config.optim.legacy_param_repeats is not None:
        found.append(
            f"optim.legacy_param_repeats are sub-steps of SGD, and optim.kind={config.optim.kind} has none; set "
            "optim.legacy_param_repeats=null"
        )
    if config.scaling.accelerator_type and config.scaling.device == "cpu":
        found.append(
            f"scaling.accelerator_type={config.scaling.accelerator_type} is a kind of GPU, and scaling.device=cpu uses "
            "none; set one of them otherwise"
        )
    augmentation = config.data.augmentation
    second_view = augmentation.mapping_probability > 0 or augmentation.degradation_probability > 0
    if isinstance(config.method, MeanTeacherConfig) and config.method.consistency > 0 and not second_view:
        found.append(
            f"method.consistency={config.method.consistency:g} compares two appearances of a slice, and "
            "data.augmentation gives it one; set data.augmentation.mapping_probability or "
            "data.augmentation.degradation_probability, or method.consistency=0"
        )
    if not config.schedule:
        found.append("phases: all phases have 0 iterations; give at least one of them some")
    return found


_PHASE_WORDS = {SOURCE_ONLY: "source-only phase", WARM_UP: "warm-up", ADAPTATION: "adaptation"}


@functools.cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # Making one takes longer than checking a hundred configs with it.


@functools.cache
def _known_keys(method: type) -> frozenset[str]:
    return frozenset(key for key, _, _ in setting_fields(Config, method))


@functools.cache
def _free_mappings(method: type) -> tuple[str, ...]:
    """Keys with a mapping as value, from names that are not settings."""
    return tuple(key for key, _, kind in setting_fields(Config, method) if dict in _origins(kind))


def setting_keys() -> list[str]:
    """Keys of all settings, with those of every method."""
    return sorted(set[str]().union(*map(_known_keys, METHOD_CONFIGS.values())))


def check_no_bare_key(words: Sequence[str]) -> None:
    """Refuse words of a command line that are a key without a value, as in ``optim.lr =3``."""
    for word in words:
        if word in setting_keys():
            raise ConfigError(f"'{word}' is a setting without a value; write {word}=VALUE without spaces")


def setting_fields(kind: type, method: type, prefix: str = "") -> Iterator[tuple[str, tuple[type, Any], Any]]:
    """Every setting of ``Config`` or of one of its sections: its key, the class and field that it is, and its type.

    ``method`` is the class of the section of that name; ``prefix`` is that of the keys.
    """
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = method if prefix == "" and item.name == "method" else hints[item.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from setting_fields(hint, method, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", (kind, item), hint


def _origins(hint: Any) -> set[Any]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) in (typing.Union, Annotated):
        return set().union(*(_origins(part) for part in typing.get_args(hint)))
    return {typing.get_origin(hint) or hint}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def yaml_scalar(value: Any) -> str:
    """A value as YAML on one line, as it is written after ``key=``."""
    try:
        return yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    except yaml.representer.RepresenterError:  # An object that was given from Python.
        return repr(value)
