"""``python -m mpscl_ray.tune``: search for the settings of a method, on this machine or on a Ray cluster."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpscl_ray.config import describe_keys, preset_names
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import cli
from mpscl_ray.runs.storage import parse_location
from mpscl_ray.tune.criteria import CRITERIA, LABEL_FREE
from mpscl_ray.tune.settings import describe_search
from mpscl_ray.tune.shared_phases import shared_phases
from mpscl_ray.tune.space import EXAMPLE, describe_spaces, load_space

if TYPE_CHECKING:
    from mpscl_ray.train.ray.launch import Fit

_EXAMPLES = """\
examples:
  python -m mpscl_ray.tune                                   a small space on the phantom hearts
  python -m mpscl_ray.tune mpscl data.source=data/mr data.target=data/ct search.trials=32
  python -m mpscl_ray.tune contrastive preset=small/mpscl data.source=data/bssfp data.target=data/lge
  python -m mpscl_ray.tune contrastive data.source=data/mr data.target=data/ct --warm-up runs/mr2ct
  python -m mpscl_ray.tune my_space.yaml --metric information --show
  ray job submit --working-dir . -- python -m mpscl_ray.tune mpscl run.storage=/shared/runs
  python -m mpscl_ray.tune mpscl data.source=s3://hearts/mr data.target=s3://hearts/ct run.storage=s3://hearts/runs

The same command again goes on with a search that was stopped: no trial is run twice. Trials run side by side as far as
the cluster goes; scaling.workers is what one of them takes.
"""


def main(arguments: Sequence[str], fit: Fit | None = None) -> int:
    """Search, and leave the best settings as a preset, with tables and pictures.

    Args:
        arguments: of the command line.
        fit: what trains; None is Ray Train.

    Returns:
        The exit code: 0, or 130 when the search was stopped and can go on.
    """
    spaces = "spaces:\n" + "\n".join(f"  {name:14s} {text}" for name, text in describe_spaces())
    criteria = "\n".join(f"  {name:24s} {text}" for name, text in CRITERIA.items())
    parser = argparse.ArgumentParser(
        prog="python -m mpscl_ray.tune",
        description="Search for the settings of a method; the best trials go on, others are stopped (ASHA).",
        epilog=(
            f"{_EXAMPLES}\n{spaces}\n\na space is a YAML file such as\n{EXAMPLE}\n"
            f"criteria (search.metric), larger is better; label-free default: {LABEL_FREE}\n{criteria}\n\n"
            f"settings of a search, with their defaults:\n{describe_search()}\n\n"
            f"presets: {', '.join(preset_names())}\n\n"
            f"settings of the trials, with their defaults:\n{describe_keys()}\n\n{cli.EXIT_CODES}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="SPACE | key=value", help="space (default: phantom), preset=NAME and settings")
    add("--metric", help="what trials are compared by, short for search.metric")
    add("--warm-up", metavar="RUN", help="folder, or URL, of a run whose first phases all trials go on from")
    add("--show", action="store_true", help="print the checked search as YAML and what trials share, and stop")
    add("--dashboard", action="store_true", help="serve the Ray dashboard of a Ray started here")
    options = parser.parse_intermixed_args(list(arguments))
    words = list(options.settings)
    spaces_given = [word for word in words if "=" not in word]
    if len(spaces_given) > 1:
        raise ConfigError(f"{' and '.join(spaces_given)} are two spaces, expected one; settings are written key=value")
    overrides = [word for word in words if "=" in word]
    if options.metric is not None:
        overrides.append(f"search.metric={options.metric}")
    space = load_space(spaces_given[0] if spaces_given else "phantom", overrides)
    given = None if options.warm_up is None else parse_location(options.warm_up)
    if options.show:
        shared = ", ".join(name for name, _ in shared_phases(space.base, space.keys)) or "nothing"
        print(f"# shared by all trials: {shared}\n{space.to_yaml(given)}", end="")
        return 0
    # Imported here: help and refused arguments need not wait for torch and Ray.
    from mpscl_ray.tune.run import search

    return search(space, list(arguments), warm_up=given, dashboard=options.dashboard, fit=fit)
