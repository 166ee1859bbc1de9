"""Reading a run's settings from a preset and ``key=value`` overrides; what they are is in mpscl_ray.config.schema.

One :func:`load_config` serves the command line, a search trial and the reload of a run folder. Unknown keys, wrong
types and values out of range are all reported at once, each with the place it came from.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mpscl_ray.config.methods import ADAPTATION, METHOD_CONFIGS, SOURCE_ONLY, WARM_UP
from mpscl_ray.config.overrides import Setting, read_file, read_overrides
from mpscl_ray.config.schema import Config
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs.cli import did_you_mean
from mpscl_ray.runs.config_diff import flatten
from mpscl_ray.runs.storage import S3Path, cache_folder, is_url, parse_location

PRESETS = Path(__file__).parents[1] / "presets"
"""Folder of the presets that ship with the package; a preset's name is its path below it without ``.yaml``."""


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(str(path.relative_to(PRESETS).with_suffix("")) for path in PRESETS.rglob("*.yaml"))


def load_config(preset: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a preset (by name, or a YAML file by path) and apply ``key=value`` overrides.

    Args:
        preset: a name of :func:`preset_names`, or the path or URL of a YAML file with the same keys. A file may name
            the one it builds on under the key ``preset``.
        overrides: ``section.key=value``; the value is YAML, so ``null``, ``[1, 2]`` and ``true`` mean what they say.

    Raises:
        ConfigError: naming every unknown key (with the nearest known one), wrong type and value out of range, each
            with its file and line.
    """
    path = _preset_path(preset)
    settings = _read_preset(path)
    settings.setdefault(
        "run.name",
        Setting(path.stem if path == Path(preset) or is_url(preset) else str(preset).replace("/", "-"), "by default"),
    )
    given, problems = read_overrides(overrides)
    return _build({**settings, **given}, problems)


def config_from_dict(values: Mapping[str, Any], origin: str = "in the given settings") -> Config:
    """Build a config from nested plain values, as :func:`to_dict` gives them."""
    return _build({key: Setting(value, origin) for key, value in flatten(values)}, [])


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values (strings, numbers, lists) from which :func:`config_from_dict` builds the same config."""
    values = typing.cast("dict[str, Any]", _plain(dataclasses.asdict(config)))
    values["method"] = {"name": config.method_name, **values["method"]}
    return values


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML, readable by :func:`load_config`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)


def describe_keys() -> str:
    """Every key with its default and meaning, for ``--help``."""
    lines: list[str] = []
    for key, default, doc in _documented_keys():
        lines.append(f"  {key} = {_yaml_scalar(default)}")
        lines.extend(textwrap.wrap(doc, 106, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


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
    if named.is_file():
        return named
    path = Path(preset)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(f"there is no preset file {path}; give the path of a YAML file or one of {_listing()}")
    hint = did_you_mean(str(preset), preset_names(), cutoff=0.4)
    raise ConfigError(f"there is no preset '{preset}'; {hint}{' ' if hint else ''}The presets are {_listing()}")


def _listing() -> str:
    return ", ".join(preset_names())


def _read_preset(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Setting]:
    """Settings of a preset file laid over those of the file it builds on."""
    if path in seen:
        raise ConfigError(f"{path} builds on itself through its key 'preset'; name another file there")
    own = read_file(path)
    parent = own.pop("preset", None)
    return {**(_read_preset(_preset_path(str(parent.value)), (*seen, path)) if parent else {}), **own}


def _build(settings: dict[str, Setting], problems: list[str]) -> Config:
    """Check keys, types and limits of flat settings; raise one ConfigError with everything that is wrong."""
    settings = dict(settings)
    chosen = settings.pop("method.name", Setting("mpscl", "by default"))
    method = METHOD_CONFIGS.get(str(chosen.value))
    if method is None:
        problems.append(f"method.name={chosen.value!r} {chosen.origin} is not one of {', '.join(METHOD_CONFIGS)}")
        method = METHOD_CONFIGS["mpscl"]
    sections: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    sections["method"] = method
    known, of_any_method = _known_keys(method), set[str]().union(*map(_known_keys, METHOD_CONFIGS.values()))
    free = _free_mappings(method)
    nested: dict[str, Any] = {}
    for key, setting in settings.items():
        if key not in known and not any(key.startswith(f"{name}.") for name in free):
            if key in of_any_method and "command line" not in setting.origin:
                continue  # a key of another method, inherited from the preset this one builds on
            hint = did_you_mean(key, sorted(known)) or "see --help for all keys"
            problems.append(f"'{key}' {setting.origin} is not a setting; {hint}")
            continue
        *parents, last = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = setting.value
    built: dict[str, Any] = {}
    for section, kind in sections.items():
        try:
            built[section] = _adapter(kind).validate_python(nested.get(section, {}))
        except ValidationError as error:
            details = error.errors()
            fields = [detail["loc"][:1] for detail in details]
            for detail in details:
                # Of a field that takes a number or a list, what is wrong with the number says more.
                if detail["type"] != "tuple_type" or fields.count(detail["loc"][:1]) == 1:
                    problems.append(_explain(section, detail, settings))
    if not problems:
        config = Config(**built)
        problems += _inconsistencies(config)
    if problems:
        raise ConfigError(
            "; ".join(problems) if len(problems) == 1 else "\n  ".join(["the settings are wrong:", *problems])
        )
    return config


def _explain(section: str, detail: Any, settings: Mapping[str, Setting]) -> str:
    parts = [section, *(str(part) for part in detail["loc"])]
    key = ".".join(parts)
    while key not in settings and "." in key:  # positions in a tuple and branches of a union are no keys
        key = key.rpartition(".")[0]
    origin = settings[key].origin if key in settings else "by default"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    if detail["type"] == "tuple_type":
        message = "expected a list, such as [1, 2]"
    return f"{key}={_yaml_scalar(settings[key].value if key in settings else detail['input'])} {origin}: {message}"


def _inconsistencies(config: Config) -> list[str]:
    """What each value allows but all of them together do not."""
    found: list[str] = []
    least, most = config.scaling.least_workers, config.scaling.most_workers
    if least > most:
        found.append(f"scaling.workers=[{least}, {most}] has no number in it; give the smaller one first")
    odd = [number for number in range(least, most + 1) if config.data.batch_size % number]
    if odd:
        found.append(
            f"data.batch_size={config.data.batch_size} slices cannot be shared equally by "
            f"scaling.workers={', '.join(map(str, odd))}; make the batch a multiple of "
            + ("the workers" if least == most else f"every number of workers from {least} to {most}")
        )
    absent = [phase for phase in (SOURCE_ONLY, WARM_UP, ADAPTATION) if phase not in config.method_phases]
    if any(getattr(config.phases, phase) for phase in absent):
        words = " and ".join(f"no {_PHASE_WORDS[phase]}" for phase in absent)
        settings = " ".join(f"phases.{phase}=0" for phase in absent)
        found.append(f"method.name={config.method_name} has {words}; set {settings}")
    if config.data.labelled == "target" and config.method_phases != (SOURCE_ONLY,):
        found.append("data.labelled=target is the supervised bound and goes with method.name=segmentation")
    if not config.schedule:
        found.append("phases: all phases have 0 iterations; give at least one of them some")
    if not config.run.name or config.run.name in (".", "..") or not set(config.run.name) <= _NAME_CHARACTERS:
        found.append(f"run.name={config.run.name!r} must be made of letters, digits, '.', '_' and '-'")
    for key, value in flatten(to_dict(config)):
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{key}={value} is not a finite number")
    return found


_PHASE_WORDS = {SOURCE_ONLY: "source-only phase", WARM_UP: "warm-up", ADAPTATION: "adaptation"}
_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@functools.cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # which takes longer than to check a hundred configs with it


@functools.cache
def _known_keys(method: type) -> frozenset[str]:
    return frozenset(key for key, _, _ in _leaves(Config, method))


@functools.cache
def _free_mappings(method: type) -> tuple[str, ...]:
    """Keys whose value is itself a mapping from names that are not settings."""
    return tuple(key for key, _, kind in _leaves(Config, method) if dict in _origins(kind))


def _documented_keys() -> list[tuple[str, Any, str]]:
    """(key, default, meaning) of every setting of all methods."""
    found: dict[str, tuple[str, Any, str]] = {}
    for kind in METHOD_CONFIGS.values():
        for key, (owner, item), _ in _leaves(Config, kind):
            found.setdefault(key, (key, _default(item), field_docs(owner).get(item.name, "")))
    found.setdefault("method.name", ("method.name", "mpscl", f"The method: {', '.join(METHOD_CONFIGS)}."))
    return sorted(found.values(), key=lambda entry: _SECTIONS.index(entry[0].partition(".")[0]))


_SECTIONS = [f.name for f in dataclasses.fields(Config)]


def _leaves(kind: type, method: type, prefix: str = "") -> Iterator[tuple[str, tuple[type, Any], Any]]:
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = method if prefix == "" and item.name == "method" else hints[item.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _leaves(hint, method, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", (kind, item), hint


def _default(item: Any) -> Any:
    if item.default is not dataclasses.MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else None


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """Meaning of each field of a dataclass, inherited ones too: the string below it."""
    docs: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        for node, after in itertools.pairwise(_class_bodies(owner.__module__)[owner.__name__]):
            match node, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


@functools.cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    """Statements of each class of a module."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


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


def _yaml_scalar(value: Any) -> str:
    return yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000).removesuffix("...\n").strip()
