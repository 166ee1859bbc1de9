"""``python -m mpscl_ray.report RUN...``: the paper's figures from runs, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import cli, json_output
from mpscl_ray.runs.storage import is_url

_EXAMPLES = """\
examples:
  python -m mpscl_ray.report runs/mr2ct
      one run, phase by phase, in runs/mr2ct/report
  python -m mpscl_ray.report runs/lower runs/cscl runs/mpscl runs/upper --out report
      several, in this order
  python -m mpscl_ray.report runs/mr2ct --case ct_1003
      another volume of the target in the figures
  python -m mpscl_ray.report runs/mr2ct --no-volumes
      without the viewer: quicker on a CPU, and no images of other cases

DIR/index.html has everything in one file; DIR/figures/ has each figure as PNG and PDF. A running
run is shown up to its newest checkpoint. Give the runs with and without margin together to compare
their angles.
"""


def main(arguments: Sequence[str]) -> int:
    """Write the report and say where it is; returns the exit code."""
    parser = cli.CommandParser(
        prog="python -m mpscl_ray.report",
        description="The paper's figures from finished or running runs, as one HTML page.",
        epilog=f"{_EXAMPLES}\n{cli.EXIT_CODES}",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders or URLs of runs, in the order of the columns")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the page (default: RUN/report; report beside the first of several runs)",
    )
    add("--case", metavar="ID", help="volume of the target in the figures (default: the first labelled test volume)")
    add("--no-volumes", action="store_true", help="no viewer: the other test cases are not predicted")
    add("--no-images", action="store_true", help="no images of patients: scores and curves alone, at once")
    add(
        "--max-size",
        type=float,
        default=200.0,
        metavar="MB",
        help="size of the volumes on the page; above it those of the best cases are left out (default: 200)",
    )
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    options = parser.parse_args(list(arguments))
    if options.out is not None and is_url(options.out):
        raise ConfigError(
            f"--out {options.out} is a URL, and a report is written to a folder of this machine; give one"
        )
    if options.out is None and is_url(options.runs[0]):
        raise ConfigError(f"the run {options.runs[0]} is in a bucket; give a folder for its report with --out DIR")
    if not options.max_size > 0:
        raise ConfigError(f"--max-size is {options.max_size:g}; expected a number of MB above 0, or --no-volumes")
    # Imported here: help and refused arguments do not wait for torch.
    from mpscl_ray.report.run import report

    file = report(
        options.runs,
        options.out,
        case=options.case,
        device=options.device,
        images=not options.no_images,
        volumes=not options.no_volumes,
        max_size_mb=options.max_size,
    )
    json_output.report(page=file, figures=file.parent / "figures")
    print(
        f"written: {file}\n\nOpen it in any browser; it needs no server. The figures are in {file.parent / 'figures'}"
    )
    return 0
