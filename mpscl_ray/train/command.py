"""``python -m mpscl_ray.train``: train a method on prepared data, on this machine or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpscl_ray.config import Config, load_command_line, preset_names, require_datasets, split_words, to_dict, to_yaml
from mpscl_ray.config.help import (
    LEGEND,
    complete_settings,
    config_for_help,
    describe_all,
    describe_common,
    list_presets,
)
from mpscl_ray.config.load import check_no_bare_key, setting_keys
from mpscl_ray.runs import cli, json_output
from mpscl_ray.runs.storage import parse_location

if TYPE_CHECKING:
    from mpscl_ray.train.ray.launch import Fit

_EXAMPLES = """\
examples:
  python -m mpscl_ray.train                             the phantom hearts, two CPU workers, minutes
  python -m mpscl_ray.train mr2ct/mpscl data.source=data/mr data.target=data/ct run.name=mr2ct
  python -m mpscl_ray.train small/mpscl data.source=data/bssfp data.target=data/lge run.name=lge
  python -m mpscl_ray.train mr2ct/mpscl data.source=data/mr data.target=data/ct --plan
  python -m mpscl_ray.train mr2ct/mpscl method.margin_source=0.3 optim.lr=1e-4 --print-config
  ray job submit --working-dir . -- python -m mpscl_ray.train mr2ct/mpscl run.storage=/shared/runs

The same command again resumes a stopped run. Labels of the target's training slices are never read,
except with data.labelled_domain=target, the supervised bound.
"""


def main(arguments: Sequence[str], fit: Fit | None = None) -> int:
    """Train, evaluate every phase, and say what to do next; returns the exit code. ``fit`` trains, None: Ray Train."""
    parser = cli.CommandParser(
        prog="python -m mpscl_ray.train",
        description="Train a segmenter on a labelled domain and adapt it to an unlabelled one.",
        add_help=False,
    )
    add = parser.add_argument
    parser.add_settings("PRESET", "preset (default: phantom) and settings", complete_settings(preset_names()))
    add("--print-config", action="store_true", help="print the resolved settings as YAML, which train also reads")
    add("--plan", action="store_true", help="time a few steps, say what the run will take, train nothing")
    add("--dashboard", action="store_true", help="serve the Ray dashboard of a Ray started here")
    add("--allow-change", action="store_true", help="resume a run although settings that matter differ from its own")
    options = parser.parse_settings(arguments, setting_keys())
    if options.help or options.help_all:
        print(f"{parser.format_help()}\n{_help(options.settings, options.help_all)}\n\n{cli.EXIT_CODES}")
        return 0
    if options.list_presets:
        print(list_presets(cli.help_width()))
        return 0
    config = config_from_arguments(options.settings)
    if options.print_config:
        print(to_yaml(config), end="")
        json_output.report(config=to_dict(config))
        return 0
    parse_location(config.run.storage)
    require_datasets(config)
    if options.plan:
        from mpscl_ray.train.plan import plan

        print(plan(config))
        return 0
    # Imported here: help and refused arguments need not wait for torch and Ray.
    from mpscl_ray.train.run import train

    return train(config, list(arguments), dashboard=options.dashboard, allow_change=options.allow_change, fit=fit)


def config_from_arguments(settings: Sequence[str]) -> Config:
    """Config of a command line: at most one preset, and overrides. Raises ConfigError where anything is wrong."""
    check_no_bare_key(settings)
    return load_command_line(*split_words(settings, "presets"))


def _help(settings: Sequence[str], every: bool) -> str:
    """Examples and the settings of the chosen preset: the common ones, or every one."""
    preset, overrides = split_words(settings, "presets")
    config = config_for_help(preset, overrides)
    describe = describe_all if every else describe_common
    return (
        f"{_EXAMPLES}\nsettings of preset {preset} (method {config.method_name}); {LEGEND}\n"
        f"{describe(config, cli.help_width())}\n\n"
        "PRESET --help shows those of another preset, --help-all every one, --list-presets the presets."
    )
