"""``python -m mpscl_ray.tune``: search for the settings of a method, on this machine or on a Ray cluster."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpscl_ray.config import preset_names, require_datasets, split_words
from mpscl_ray.config.help import (
    LEGEND,
    complete_settings,
    describe_all,
    describe_long,
    describe_short,
    list_presets,
    listing,
    section_help,
)
from mpscl_ray.config.load import check_no_bare_key, setting_keys
from mpscl_ray.config.systems import common_phases
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import cli, json_output, safe_yaml
from mpscl_ray.runs.storage import parse_location
from mpscl_ray.tune.criteria import CRITERIA, LABEL_FREE
from mpscl_ray.tune.space import EXAMPLE, describe_spaces, load_space, space_names

if TYPE_CHECKING:
    from mpscl_ray.train.ray.launch import Fit

_EXAMPLES = """\
examples:
  python -m mpscl_ray.tune                                   a small space on the phantom hearts
  python -m mpscl_ray.tune mpscl data.source=data/mr data.target=data/ct search.num_samples=32
  python -m mpscl_ray.tune mpscl preset=small/mpscl data.source=data/bssfp data.target=data/lge
  python -m mpscl_ray.tune mpscl data.source=data/mr data.target=data/ct --warm-up runs/mr2ct
  python -m mpscl_ray.tune my_space.yaml --metric information --print-config
  ray job submit --working-dir . -- python -m mpscl_ray.tune mpscl run.storage=/shared/runs

The same command again resumes a stopped search: no trial is run twice. Trials run concurrently,
as many as the cluster has room for, more when a node joins; scaling.num_workers is what one of
them takes. search.scheduler=asha stops trials early, pausing_asha makes them wait, fifo neither.
"""


def main(arguments: Sequence[str], fit: Fit | None = None) -> int:
    """Search, and write the best settings as a preset; returns the exit code. ``fit`` trains, None: Ray Train."""
    parser = cli.CommandParser(
        prog="python -m mpscl_ray.tune",
        description="Search for the settings of a method; the best trials continue, others are stopped (ASHA).",
        add_help=False,
    )
    add = parser.add_argument
    names = [*space_names(), *(f"preset={name}" for name in preset_names())]
    parser.add_settings("SPACE", "space (default: phantom), preset=NAME and settings", complete_settings(names))
    add("--metric", help="what trials are compared by, short for search.metric")
    add("--warm-up", metavar="RUN", help="folder, or URL, of a run whose first phases all trials start from")
    add("--print-config", action="store_true", help="print the checked search as YAML and what trials share, and stop")
    add("--dashboard", action="store_true", help="serve the Ray dashboard of a Ray started here")
    options = parser.parse_settings(arguments, setting_keys())
    if options.list_presets:
        print(list_presets(cli.help_width()))
        return 0
    check_no_bare_key(options.settings)
    name, overrides = split_words(options.settings, "spaces")
    if options.help or options.help_all:
        print(f"{parser.format_help()}\n{_help(name, overrides, options.help_all)}\n\n{cli.EXIT_CODES}")
        return 0
    if options.metric is not None:
        overrides.append(f"search.metric={options.metric}")
    space = load_space(name, overrides)
    given = None if options.warm_up is None else parse_location(options.warm_up)
    if options.print_config:
        shared = ", ".join(name for name, _ in common_phases(space.base, space.keys)) or "nothing"
        text = space.to_yaml(given)
        print(f"# shared by all trials: {shared}\n{text}", end="")
        json_output.report(search=safe_yaml.load(text))
        return 0
    require_datasets(space.base)
    # Imported here: help and refused arguments need not wait for torch and Ray.
    from mpscl_ray.tune.run import search

    return search(space, list(arguments), warm_up=given, dashboard=options.dashboard, fit=fit)


def _help(name: str, overrides: Sequence[str], every: bool) -> str:
    """Examples, spaces, and the settings of the chosen space: the common ones, or every one."""
    width = cli.help_width()
    try:
        space = load_space(name, overrides)
    except ConfigError:
        space = load_space(name)  # Help must not fail on wrong overrides.
    varied = listing(((part.name, f"{part.kind} {list(part.values)}") for part in space.distributions), width)
    searched = (describe_long if every else describe_short)(section_help(space.search, "search."), width)
    trials = f":\n{describe_all(space.base, width)}" if every else ": python -m mpscl_ray.train PRESET --help"
    criteria = (
        listing(CRITERIA.items(), width)
        if every
        else textwrap.fill(", ".join(CRITERIA), width, initial_indent="  ", subsequent_indent="  ")
    )
    parts = [
        _EXAMPLES,
        f"spaces:\n{listing(describe_spaces(), width)}\n",
        f"your own space is a YAML file such as\n{EXAMPLE}" if every else "",
        f"settings that the space {name} varies\n{varied}\n",
        f"criteria (search.metric), larger is better; label-free default: {LABEL_FREE}\n{criteria}\n",
        f"settings of the search; {LEGEND}\n" + "\n".join(searched) + "\n",
        f"settings of the trials (method {space.base.method_name}){trials}\n",
        "SPACE --help shows those of another space, --help-all every one and how to write a space.",
    ]
    return "\n".join(part for part in parts if part)
