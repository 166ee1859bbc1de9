"""What ``--help`` and shell completion say of settings and presets."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpscl_ray.config.load import PRESETS, load_config, preset_names, setting_fields, setting_keys, yaml_scalar
from mpscl_ray.config.methods import ADAPTATION, METHOD_CONFIGS, SOURCE_ONLY, WARM_UP
from mpscl_ray.config.schema import Config
from mpscl_ray.errors import ConfigError

COMMON = tuple(
    "data.source data.target data.global_batch_size run.name run.storage run.seed scaling.num_workers scaling.device "
    "phases.source_only phases.warm_up phases.adaptation".split()
)
"""Settings that are changed most often, whatever the method; ``main_settings`` of a method come after them."""

LEGEND = "* differs from the default"
"""Explains the mark that help sets before a setting."""


class SettingHelp(NamedTuple):
    """One setting as help shows it."""

    key: str
    value: Any
    default: Any
    meaning: str

    @property
    def changed(self) -> bool:
        """Whether the value is not the default."""
        return bool(yaml_scalar(self.value) != yaml_scalar(self.default))


def settings_help(config: Config) -> list[SettingHelp]:
    """Every setting that a config's method has, in the order of the sections."""
    found = section_help(config)
    first = next(number for number, entry in enumerate(found) if entry.key.startswith("method."))
    names = f"Name of the method, which a preset chooses with its settings; one of {', '.join(METHOD_CONFIGS)}."
    found.insert(first, SettingHelp("method.name", config.method_name, "mpscl", names))
    return found


def section_help(values: Any, prefix: str = "") -> list[SettingHelp]:
    """Every setting of a config, or of one section whose keys have a prefix such as ``search.``, with its value."""
    found = []
    for key, (owner, item), _ in setting_fields(type(values), type(getattr(values, "method", None)), prefix):
        value = functools.reduce(getattr, key.removeprefix(prefix).split("."), values)
        default = value if key == "run.name" else _default(item)  # Its default is the name of the preset.
        found.append(SettingHelp(key, value, default, field_docs(owner).get(item.name, "")))
    return found


def describe_common(config: Config, width: int) -> str:
    """The common settings of a config and the main ones of its method: values and short meaning, a line each."""
    by_key = {entry.key: entry for entry in settings_help(config)}
    absent = [f"phases.{name}" for name in (SOURCE_ONLY, WARM_UP, ADAPTATION) if name not in config.method_phases]
    keys = [key for key in (*COMMON, "method.name", *config.method.main_settings) if key not in absent]
    return "\n".join(describe_short([by_key[key] for key in keys], width))


def describe_all(config: Config, width: int) -> str:
    """Every setting of a config with its value and whole meaning, by section."""
    sections = {item.name: type(getattr(config, item.name)) for item in dataclasses.fields(Config)}
    lines: list[str] = []
    for section, entries in itertools.groupby(settings_help(config), lambda entry: entry.key.partition(".")[0]):
        about = " ".join((inspect.getdoc(sections[section]) or "").split())
        lines += ["", *textwrap.wrap(f"{section}: {about}", width), *describe_long(entries, width)]
    return "\n".join(lines[1:])


def describe_short(entries: Sequence[SettingHelp], width: int) -> list[str]:
    """A line for each setting: mark, ``key=value``, and as much of its meaning as fits."""
    words = [_assignment(entry) for entry in entries]
    column = min(max(map(len, words)) + 2, 42)
    lines = []
    for word, entry in zip(words, entries, strict=True):
        default = _default_note(entry)
        room = width - max(column, len(word) + 2) - len(default)
        lines.append(f"{word:{column - 2}s}  {_brief(entry.meaning, room)}{default}")
    return lines


def describe_long(entries: Iterable[SettingHelp], width: int) -> list[str]:
    """For each setting a line with its value, and below it its whole meaning."""
    lines = []
    for entry in entries:
        lines.append(_assignment(entry) + _default_note(entry))
        lines += textwrap.wrap(entry.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _assignment(entry: SettingHelp) -> str:
    return f"{'*' if entry.changed else ' '} {entry.key}={yaml_scalar(entry.value)}"


def _default_note(entry: SettingHelp) -> str:
    return f" (default {yaml_scalar(entry.default)})" if entry.changed and entry.default != "" else ""


def _brief(meaning: str, room: int) -> str:
    """The meaning; where it is too long, its longest beginning that fits and ends with a sentence or clause."""
    if len(meaning.rstrip(".")) <= room:
        return meaning.rstrip(".")
    heads = [meaning[: place.start()] for place in re.finditer(r"[.;:,] | \(", meaning) if place.start() <= room]
    heads = [
        head
        for head in heads
        if head.count(" ") > 1 and head.count("(") == head.count(")") and not re.search(r"[.;:,] \w+$", head)
    ]
    return heads[-1] if heads else textwrap.shorten(meaning, room, placeholder=" ...")


def list_presets(width: int) -> str:
    """Every preset that ships with the package, a line each."""
    return listing(((name, leading_comment(PRESETS / f"{name}.yaml")) for name in preset_names()), width)


def listing(entries: Iterable[tuple[str, str]], width: int) -> str:
    """Names and what each is, a line each."""
    known = list(entries)
    column = max(len(name) for name, _ in known) + 4
    return "\n".join(f"  {name:{column - 2}s}{_brief(text, width - column)}" for name, text in known)


def leading_comment(file: Path) -> str:
    """The comment that a YAML file begins with, as one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def config_for_help(preset: str, overrides: Sequence[str]) -> Config:
    """The preset with overrides, or the preset alone where they are wrong: help must not fail on those."""
    try:
        return load_config(preset, overrides)
    except ConfigError:
        return load_config(preset)


def complete_settings(names: Iterable[str]) -> Callable[..., list[str]]:
    """The completer of a word in a shell: to one of some names, or to the key of a setting."""

    def complete(prefix: str, **_: Any) -> list[str]:
        return [word for word in (*names, *(f"{key}=" for key in setting_keys())) if word.startswith(prefix)]

    return complete


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


def _default(item: Any) -> Any:
    if item.default is not dataclasses.MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else None
