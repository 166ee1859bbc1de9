"""``python -m mpscl_ray.train``: train a method on prepared data, on this machine or on a Ray cluster."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpscl_ray.config import Config, describe_keys, load_config, preset_names, to_yaml
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import cli
from mpscl_ray.runs.storage import is_url

if TYPE_CHECKING:
    from mpscl_ray.train.ray.launch import Fit

_EXAMPLES = """\
examples:
  python -m mpscl_ray.train                                  the phantom hearts, two CPU workers, a few minutes
  python -m mpscl_ray.train mr2ct/mpscl data.source=data/mr data.target=data/ct scaling.workers=2
  python -m mpscl_ray.train small/mpscl data.source=data/bssfp data.target=data/lge run.name=lge
  python -m mpscl_ray.train mr2ct/mpscl method.margin_source=0.3 optim.lr=1e-4 --show
  ray job submit --working-dir . -- python -m mpscl_ray.train mr2ct/mpscl run.storage=/shared/runs

The same command again goes on where the run stopped. Labels of the target's training slices are never read, except by
data.labelled=target, the supervised bound.
"""


def main(arguments: Sequence[str], fit: Fit | None = None) -> int:
    """Train, evaluate every phase on the target's test volumes, and say what to do next.

    Args:
        arguments: of the command line.
        fit: what trains; None is Ray Train.

    Returns:
        The exit code: 0, or 130 when the run was stopped and can go on.
    """
    presets = f"presets: {', '.join(preset_names())}"
    settings = f"settings, with their defaults:\n{describe_keys()}"
    parser = argparse.ArgumentParser(
        prog="python -m mpscl_ray.train",
        description="Train a segmenter on a labelled domain and adapt it to an unlabelled one.",
        epilog=f"{_EXAMPLES}\n{presets}\n\n{settings}\n\n{cli.EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "settings", nargs="*", metavar="PRESET | key=value", help="preset (default: phantom) and settings"
    )
    parser.add_argument(
        "--show", action="store_true", help="print the resolved settings as YAML, which train also reads"
    )
    parser.add_argument("--dashboard", action="store_true", help="serve the Ray dashboard of a Ray started here")
    parser.add_argument(
        "--allow-change", action="store_true", help="go on with a run although settings that matter differ from its own"
    )
    options = parser.parse_intermixed_args(list(arguments))
    config = config_from_arguments(options.settings)
    if options.show:
        print(to_yaml(config), end="")
        return 0
    # Imported here: help and refused arguments need not wait for torch and Ray.
    from mpscl_ray.train.run import train

    return train(config, list(arguments), dashboard=options.dashboard, allow_change=options.allow_change, fit=fit)


def config_from_arguments(settings: Sequence[str]) -> Config:
    """Config of a command line: at most one preset, and overrides.

    Raises:
        ConfigError: two presets, or anything wrong with the settings.
    """
    overrides = [word for word in settings if "=" in word and not is_url(word)]
    presets = [word for word in settings if word not in overrides]
    if len(presets) > 1:
        raise ConfigError(f"{' and '.join(presets)} are two presets, expected one; settings are written key=value")
    return load_config(presets[0] if presets else "phantom", overrides)
