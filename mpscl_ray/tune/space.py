"""Spaces: which settings a search varies, and over which values. Each is a YAML file such as :data:`EXAMPLE`.

A space is checked before the search starts: the settings must allow both limits of a distribution, and each choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mpscl_ray.config import Config, config_from_dict, flatten, load_config, read_file, read_overrides, to_dict
from mpscl_ray.config.help import leading_comment
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs.cli import did_you_mean
from mpscl_ray.runs.storage import S3Path
from mpscl_ray.tune.settings import SearchConfig, search_config

T = TypeVar("T")

PACKAGE = Path(__file__).resolve().parents[1]

EXAMPLE = """\
  preset: phantom                                # all other settings of a trial
  phases: {adaptation: 120}                      # any setting, as in a preset
  search: {method: random, num_samples: 12}      # how to search
  space:
    method.margin_source: {uniform: [0, 0.6]}
    method.gamma: {loguniform: [0.1, 3]}
    data.global_batch_size: {integer: [4, 16]}
    method.discriminator: {choice: [fc, patchgan]}
    method.temperature_source, method.temperature_target: {uniform: [0.5, 2]}   # one draw for both
"""

KINDS = ("uniform", "loguniform", "integer", "choice")

NO_RESULT = ("run.", "scaling.", "data.source", "data.target", "data.labelled_domain", "data.in_memory", "method.name")
"""Keys, or beginnings of keys, that cannot be searched: they say where and how a run works, not how well it learns."""


@dataclass(frozen=True)
class Distribution:
    """Values that one setting, or several that share a draw, may have."""

    keys: tuple[str, ...]
    """Settings that get the value."""
    kind: str
    """uniform, loguniform or integer between two limits, both included; or choice."""
    values: tuple[Any, ...]
    """The two limits, or the choices."""
    origin: str
    """Where it was written, such as ``in small.yaml:4``."""

    @property
    def name(self) -> str:
        """The keys, as the title of a column."""
        return ", ".join(self.keys)

    def contains(self, value: Any) -> bool:
        """Whether a draw can give this value."""
        if self.kind == "choice":
            return value in self.values
        low, high = self.values
        return isinstance(value, (int, float)) and low <= value <= high and (self.kind != "integer" or value % 1 == 0)


@dataclass(frozen=True)
class Space:
    """A checked space."""

    name: str
    """Of the file, without its ending."""
    base: Config
    """Settings of a trial except those that are searched; ``run.name`` is that of the search."""
    search: SearchConfig
    """How to search."""
    distributions: tuple[Distribution, ...]
    """What to vary, in the order of the file."""

    @property
    def keys(self) -> list[str]:
        """All settings that are varied."""
        return [key for distribution in self.distributions for key in distribution.keys]

    def config(self, values: Mapping[str, Any]) -> Config:
        """Settings of a trial from the values of its keys."""
        return config_from_dict(_merged(to_dict(self.base), values), "of the trial")

    def default(self) -> dict[str, Any] | None:
        """The base's values of the keys; None where they lie outside the space."""
        plain = dict(flatten(to_dict(self.base)))
        values = {key: plain.get(key) for key in self.keys}
        inside = all(
            distribution.contains(values[key]) and values[key] == values[distribution.keys[0]]
            for distribution in self.distributions
            for key in distribution.keys
        )
        return values if inside else None

    def to_yaml(self, warm_up: Path | S3Path | None) -> str:
        """Every setting that the trials depend on; ``warm_up`` is the run whose first phases all trials start from."""
        content = {
            **to_dict(self.base),
            "search": dict(vars(self.search)),
            "space": {entry.name: {entry.kind: list(entry.values)} for entry in self.distributions},
            "warm_up": None if warm_up is None else str(warm_up),
        }
        return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)


def space_names() -> list[str]:
    """Names of the spaces that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def describe_spaces() -> list[tuple[str, str]]:
    """Name and first comment of each space that comes with the package."""
    return [(name, leading_comment(_folder() / f"{name}.yaml")) for name in space_names()]


def _folder() -> Path:
    """The folder is beside the package in a checkout, and inside an installed package."""
    inside = PACKAGE / "tune_spaces"
    return inside if inside.is_dir() else PACKAGE.parent / "tune_spaces"


def load_space(space: str | Path, overrides: Sequence[str] = ()) -> Space:
    """Read a space, by name or a YAML file by path, apply overrides, and check it.

    Args:
        space: a name of :func:`space_names`, or the path of a YAML file.
        overrides: ``key=value`` for settings of the trials, ``search.key=value`` for the search, ``preset=NAME``.

    Raises:
        ConfigError: names every problem with where it was written: unknown keys with the nearest known one, limits that
            a setting does not allow, no distribution at all.
    """
    path = _path(space)
    entries = read_file(path)
    problems = [
        f"'{key}' {origin} has the value {value!r}, expected keys and values below it"
        for key, (value, origin) in entries.items()
        if key in ("space", "search") and value != {}
    ]
    written, wrong = read_overrides(overrides, "on the command line")
    problems += wrong
    given = {key: value for key, (value, _) in written.items()}
    on_the_command_line = {key: (value, "on the command line") for key, value in _below("search", given).items()}
    search, wrong = search_config(_below("search", entries) | on_the_command_line)
    problems += wrong
    base, wrong = _base(path, {key: value for key, (value, _) in entries.items()}, given)
    problems += wrong
    distributions, wrong = _distributions(_below("space", entries), base or load_config("phantom"))
    problems += wrong
    if not distributions and not wrong:
        problems.append(f"{path.name} has no distribution: give at least one setting below the key 'space'")
    if search.method == "grid":
        problems += [
            f"{entry.name} {entry.origin} is {entry.kind}, and a grid has only choices: write "
            f"{{choice: [VALUE, ...]}}, or set search.method=random"
            for entry in distributions
            if entry.kind != "choice"
        ]
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else "\n  ".join(["the search is wrong:", *problems]))
    assert base is not None
    return Space(path.stem, base, search, tuple(distributions))


def _below(section: str, entries: Mapping[str, T]) -> dict[str, T]:
    """Entries of a section, by their keys without it."""
    prefix = f"{section}."
    return {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}


def _base(path: Path, entries: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """Settings of a trial: the preset, the file over it, the command line over both; None with its problems."""
    in_file = {
        key: value for key, value in entries.items() if key.partition(".")[0] not in ("preset", "search", "space")
    }
    on_top = {key: value for key, value in given.items() if key != "preset" and not key.startswith("search.")}
    preset = given.get("preset", entries.get("preset", "phantom"))
    try:
        plain = _merged(to_dict(load_config(str(preset))), {"run.name": f"tune-{path.stem}"})
        plain = _merged(plain, in_file)
        config_from_dict(plain, f"in {path.name}")
        return config_from_dict(_merged(plain, on_top), "on the command line"), []
    except ConfigError as error:
        return None, _sentences(error)


def _path(space: str | Path) -> Path:
    named = _folder() / f"{space}.yaml"
    if named.is_file():
        return named
    path, known = Path(space), ", ".join(space_names())
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(f"there is no space file {path}; give the path of a YAML file or one of {known}")
    hint = did_you_mean(str(space), space_names(), cutoff=0.4)
    raise ConfigError(
        f"there is no space '{space}'; "
        + (hint or f"expected one of {known}, or the path of a YAML file, with its ending .yaml")
    )


def _distributions(entries: Mapping[str, tuple[Any, str]], base: Config) -> tuple[list[Distribution], list[str]]:
    """Read and check the distributions; a sentence for each problem."""
    found: list[Distribution] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    for path, (values, origin) in entries.items():
        name, _, kind = path.rpartition(".")
        if kind not in KINDS:
            problems.append(_no_distribution(path, kind, values, origin))
            continue
        keys = tuple(key.strip() for key in name.split(","))
        problem = _wrong_values(kind, values)
        if problem:
            problems.append(f"{name} {origin}: {problem}")
            continue
        for key in keys:
            if key in seen:
                problems.append(f"{key} {origin} has a distribution already, {seen[key]}")
            seen[key] = origin
        wrong = [
            f"{key} {origin} cannot be searched: it says what a run is or where it works, not how well it learns; set "
            "it outside 'space'"
            for key in keys
            if key.startswith(NO_RESULT) and key != "run.seed"
        ]
        wrong = wrong or _out_of_range(keys, values, origin, base)
        problems += wrong
        if not wrong:
            found.append(Distribution(keys, kind, tuple(values), origin))
    return found, problems


def _no_distribution(path: str, kind: str, values: Any, origin: str) -> str:
    hint = did_you_mean(kind, KINDS, cutoff=0.6)
    if hint:
        return f"'{kind}' {origin} is not a distribution; {hint}"
    return (
        f"{path} {origin} has the value {values!r}, expected a distribution such as {{uniform: [0, 1]}} "
        f"({', '.join(KINDS)}); a setting with one value goes outside 'space'"
    )


def _wrong_values(kind: str, values: Any) -> str | None:
    if not isinstance(values, list) or not values:
        return f"{kind} has {values!r}, expected a list"
    if kind == "choice":
        return None if len(values) == len(set(map(repr, values))) else "a choice is given twice"
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
    if len(values) != 2 or len(numbers) != 2:
        return f"{kind} has {values!r}, expected two numbers, the limits (YAML wants 1.0e-5, not 1e-5)"
    if not values[0] < values[1]:
        return f"{kind} has the limits {values[0]} and {values[1]}, expected the lower one first"
    if kind == "loguniform" and values[0] <= 0:
        return f"loguniform begins at {values[0]}, expected a limit above 0"
    if kind == "integer" and any(value % 1 for value in values):
        return f"integer has {values!r}, expected whole numbers"
    return None


def _out_of_range(keys: tuple[str, ...], values: list[Any], origin: str, base: Config) -> list[str]:
    """The problems that the settings have with the limits of a distribution, or with its choices."""
    problems: list[str] = []
    for value in values:
        try:
            config_from_dict(_merged(to_dict(base), dict.fromkeys(keys, value)), origin)
        except ConfigError as error:
            problems += _sentences(error)
    return list(dict.fromkeys(problems))


def _sentences(error: ConfigError) -> list[str]:
    """The problems that a ConfigError lists."""
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[1:] if len(lines) > 1 else lines


def _merged(nested: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, some of them replaced by flat ones."""
    merged = {key: _merged(value, {}) if isinstance(value, Mapping) else value for key, value in nested.items()}
    for key, value in flat.items():
        *parents, last = key.split(".")
        section = merged
        for parent in parents:
            below = section.get(parent)
            section[parent] = section = below if isinstance(below, dict) else {}
        section[last] = value
    return merged
