"""``python -m mpscl_ray.compare [SYSTEM ...]``: a table of methods, seeds and directions on Ray."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpscl_ray.compare.cells import DIRECTIONS, SET_BY_COMPARISON, Plan, check_presets
from mpscl_ray.config import PRESETS
from mpscl_ray.config.help import complete_settings, listing
from mpscl_ray.config.load import check_no_bare_key, setting_keys
from mpscl_ray.config.systems import DESCRIPTIONS, SYSTEMS
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import cli

if TYPE_CHECKING:
    from mpscl_ray.train.ray.launch import Fit

_EXAMPLES = """\
examples:
  python -m mpscl_ray.compare                 all systems, phantom hearts, both directions, 3 seeds
  python -m mpscl_ray.compare source_only mpscl supervised --seeds 1 --directions forward
  python -m mpscl_ray.compare --data data/bssfp data/lge --directions forward --out runs/lge-table
  python -m mpscl_ray.compare --data data/mr data/ct --presets mr2ct,ct2mr scaling.num_workers=2
  python -m mpscl_ray.compare --folds --data folds/mr folds/ct --seeds 1 --out runs/folds-table
  python -m mpscl_ray.compare --data s3://b/mr s3://b/ct --presets small --out s3://b/runs/table

The same command again resumes a stopped comparison, tries failed runs again, and may be given more
systems or seeds. Phases that runs share are trained once. OUT/comparison.txt, .md, .csv and .tex
are updated after each finished run. python -m mpscl_ray.train GROUP/SYSTEM --help shows the
settings of a system.
"""


def main(arguments: Sequence[str], fit: Fit | None = None) -> int:
    """Run the comparison and print its table; returns the exit code. ``fit`` trains, None: Ray Train."""
    families = sorted({path.parent.name for path in PRESETS.glob("*/*.yaml")})
    systems = listing(DESCRIPTIONS.items(), cli.help_width())
    parser = cli.CommandParser(
        prog="python -m mpscl_ray.compare",
        description="Train and score several systems over seeds and directions; one table of all. Budgets are equal\n"
        "in the presets phantom and small, and each system's own in mr2ct and ct2mr.",
        epilog=f"{_EXAMPLES}\nsystems\n{systems}\n\n{cli.EXIT_CODES}",
    )
    add = parser.add_argument
    words = add("words", nargs="*", metavar="SYSTEM | key=value", help="systems (default: all), settings for all runs")
    words.completer = complete_settings(SYSTEMS)  # type: ignore[attr-defined]
    add("--seeds", default="3", metavar="N", help="number of seeds, from 1 on; or a list such as 1,4,5 (default: 3)")
    add(
        "--directions",
        default="both",
        choices=("both", *DIRECTIONS),
        help="forward is SOURCE to TARGET (default: both)",
    )
    add("--data", nargs=2, metavar=("SOURCE", "TARGET"), help="prepared datasets (default: the phantom hearts)")
    add(
        "--folds",
        action="store_true",
        help="cross-validation: SOURCE and TARGET hold folds, as prepare --folds makes them; mean and sd over folds",
    )
    add(
        "--presets",
        metavar="GROUP",
        help=f"{', '.join(families)} or a folder of your own, or two of them with a comma, by direction "
        "(default: phantom; small with --data)",
    )
    add("--out", metavar="DIR", help="folder of the comparison, or its URL (default: RUN.STORAGE/compare)")
    add("--max-concurrent", type=int, metavar="N", help="runs at a time (default: as many as there is room for)")
    add("--dashboard", action="store_true", help="serve the Ray dashboard of a Ray started here")
    options = parser.parse_settings(arguments, setting_keys())
    plan = _plan(options)
    base = check_presets(plan)
    if not base.data.source or not base.data.target:
        raise ConfigError("no data to compare on: give the folders of two prepared datasets with --data SOURCE TARGET")
    # Imported here: help and refused arguments do not wait for torch and Ray.
    from mpscl_ray.compare.run import compare

    return compare(plan, base, ["python", "-m", "mpscl_ray.compare", *arguments], fit, dashboard=options.dashboard)


def _plan(options: argparse.Namespace) -> Plan:
    named = [word for word in options.words if "=" not in word]
    check_no_bare_key(named)
    overrides = [word for word in options.words if "=" in word]
    unknown = [word for word in named if word not in SYSTEMS]
    if unknown:
        hint = cli.did_you_mean(unknown[0], SYSTEMS) or f"the systems are {', '.join(SYSTEMS)}"
        raise ConfigError(f"there is no system {', '.join(unknown)}; {hint}")
    for word in overrides:
        key = word.partition("=")[0]
        if key in SET_BY_COMPARISON:
            raise ConfigError(f"{key} is not a setting of a comparison, which sets it for each run; leave it out")
    if options.data:
        overrides += [f"data.source={options.data[0]}", f"data.target={options.data[1]}"]
    given = any(word.startswith(("data.source=", "data.target=")) for word in overrides)
    groups = (options.presets or ("small" if given else "phantom")).split(",")
    if len(groups) > 2 or not all(groups):
        raise ConfigError(f"--presets is {options.presets!r}; expected one group of presets, or two: forward,backward")
    directions = DIRECTIONS if options.directions == "both" else (options.directions,)
    if options.max_concurrent is not None and options.max_concurrent < 1:
        raise ConfigError(f"--max-concurrent is {options.max_concurrent}; expected 1 or more")
    return Plan(
        systems=tuple(system for system in SYSTEMS if system in named or not named),
        seeds=_seeds(options.seeds),
        directions=directions,
        preset_groups={"forward": groups[0], "backward": groups[-1]},
        overrides=tuple(overrides),
        out=options.out,
        max_concurrent=options.max_concurrent,
        folds=options.folds,
    )


def _seeds(text: str) -> tuple[int, ...]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if "," not in text and numbers and 1 <= numbers[0] <= 1000:
        return tuple(range(1, numbers[0] + 1))
    if "," in text and numbers and len(set(numbers)) == len(numbers) and min(numbers) >= 0:
        return tuple(numbers)
    raise ConfigError(f"--seeds is {text!r}; expected a number of seeds such as 3, or different seeds such as 1,4,5")
