"""docs/settings.md from the dataclasses of the settings: ``python -m tests.docs.settings_page`` writes it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic.fields import FieldInfo

from mpscl_ray.config import METHOD_CONFIGS, field_docs
from mpscl_ray.config.schema import Config
from mpscl_ray.tune.criteria import CRITERIA
from mpscl_ray.tune.settings import SearchConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"

HEAD = """\
# Settings

<!-- Written by `python -m tests.docs.settings_page` from mpscl_ray/config; edit the docstrings there. -->

Every setting is a word `key=value` on the command line of `train`, `tune` and `compare`, or a key of a YAML preset; the
value is YAML. A default holds where no preset says otherwise: `python -m mpscl_ray.train PRESET --print-config`
prints what a preset resolves to.
"""

SHARED = """\
## method: shared settings

Settings that several methods have, with the same default and meaning.
"""

BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class Setting(NamedTuple):
    """One setting as a row of a table."""

    key: str
    default: str
    limits: str
    meaning: str


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section in dataclasses.fields(Config):
        if section.name != "method":
            parts.append(f"## {section.name}\n\n{table(settings(_kind(section), section.name))}")
    criteria = "".join(f"- `{name}`: {meaning}\n" for name, meaning in CRITERIA.items())
    search = table(settings(SearchConfig, "search"))
    parts.append(
        f"## search\n\nOf `tune` alone.\n\n{search}\nCriteria (`search.metric`), larger is better:\n\n{criteria}"
    )
    methods_of = defaultdict(list)
    for name, kind in METHOD_CONFIGS.items():
        for setting in settings(kind, "method"):
            methods_of[setting].append(name)
    shared = {setting: names for setting, names in methods_of.items() if len(names) > 1}
    parts.append(SHARED + "\n" + table(shared, [", ".join(names) for names in shared.values()]))
    for name, kind in METHOD_CONFIGS.items():
        own = [setting for setting, names in methods_of.items() if names == [name]]
        also = [f"`{setting.key.partition('.')[2]}`" for setting, names in shared.items() if name in names]
        phases = ", ".join(f"`{phase}`" for phase in kind.phases)
        inherited = f" Shared settings: {', '.join(also)}." if also else ""
        text = f"## method.name={name}\n\nPhases: {phases}.{inherited}\n"
        parts.append(text + (f"\n{table(own)}" if own else ""))
    return "\n".join(parts)


def table(rows: Iterable[Setting], methods: Iterable[str] | None = None) -> str:
    """A Markdown table, with a column of methods where they are given."""
    head = ["setting", "default", "limits", *([] if methods is None else ["methods"]), "meaning"]
    lines = [head, ["---"] * len(head)]
    column = [] if methods is None else list(methods)
    for number, row in enumerate(rows):
        lines.append([f"`{row.key}`", f"`{row.default}`", row.limits, *column[number : number + 1], row.meaning])
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def settings(kind: type, prefix: str) -> Iterator[Setting]:
    """All settings of a dataclass, those of dataclasses in it too."""
    hints, docs = typing.get_type_hints(kind, include_extras=True), field_docs(kind)
    for item in dataclasses.fields(kind):
        key, hint = f"{prefix}.{item.name}", hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from settings(typing.cast("type", hint), key)
            continue
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        yield Setting(key, _yaml(default), limits(hint), docs.get(item.name, ""))


def limits(hint: Any) -> str:
    """What a value may be, in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(filter(None, map(limits, parts))))
    if origin is typing.Annotated:
        bounds = [
            f"{BOUNDS[name]} {_number(getattr(bound, name))}"
            for info in parts[1:]
            for bound in (info.metadata if isinstance(info, FieldInfo) else [info])
            for name in BOUNDS
            if hasattr(bound, name)
        ]
        kind, null, _ = limits(parts[0]).partition(", or `null`")
        return ", ".join([kind, *bounds]) + null
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"{len(parts)} values: {limits(parts[0])}" if parts[-1] is not ... else f"values: {limits(parts[0])}"
    if origin is dict:
        return f"mapping from {limits(parts[0])} to {limits(parts[1])}"
    return {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", type(None): "`null`"}.get(
        hint, ""
    )


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _kind(section: Any) -> type:
    return type(section.default_factory())


def _yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return str(yaml.safe_dump(plain, default_flow_style=True, width=10_000)).removesuffix("...\n").strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
