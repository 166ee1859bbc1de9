"""``python -m mpscl_ray.report RUN...``: the paper's figures from runs, on one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml

from mpscl_ray import cli
from mpscl_ray.durable_files import storage_errors, write_atomically
from mpscl_ray.errors import ConfigError
from mpscl_ray.figures.style import DPI, class_colour
from mpscl_ray.inference import choose_device
from mpscl_ray.report_groups import group_runs, look_at_group
from mpscl_ray.report_page import page
from mpscl_ray.report_runs import read_runs
from mpscl_ray.report_sections import overview, sections
from mpscl_ray.storage import is_url

__all__ = ["main", "report"]

_EXAMPLES = """\
examples:
  python -m mpscl_ray.report runs/mr2ct                            one run, phase by phase, in runs/mr2ct/report
  python -m mpscl_ray.report runs/lower runs/cscl runs/mpscl runs/upper --out report
                                                                   several side by side, in this order
  python -m mpscl_ray.report runs/mr2ct --case ct_1003             another volume of the target

DIR/index.html has everything in one file; DIR/figures/ has each figure as PNG and PDF. A run that still trains is shown
as far as it is. Give the runs with and without margin together to compare their angles.
"""


def main(arguments: Sequence[str]) -> int:
    """Write the report and say where it is; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mpscl_ray.report",
        description="The paper's figures from finished or running runs, as one HTML page.",
        epilog=f"{_EXAMPLES}\n{cli.EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders or URLs of runs, in the order of the columns")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the page (default: RUN/report; of several: beside the first)",
    )
    add("--case", metavar="ID", help="volume of the target to show (default: the first labelled test volume)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    options = parser.parse_args(list(arguments))
    choose_device(options.device)
    file = report(options.runs, options.out, case=options.case, device=options.device)
    print(
        f"written: {file}\n\nOpen it in any browser; it needs no server. The figures are in {file.parent / 'figures'}"
    )
    return 0


def report(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    case: str | None = None,
    device: str | None = None,
    dpi: float = DPI,
    pdf: bool = True,
) -> Path:
    """Make the page and the figures.

    Args:
        runs: folders of runs.
        out: folder for the report; None for ``RUN/report`` of one run, ``report`` beside the first of several.
        case: volume of the target to show; None for the first labelled test volume.
        device: where to predict; None takes a GPU where there is one.
        dpi: pixels of the figures per inch.
        pdf: whether to write each figure as PDF too, which takes longer than all the rest.

    Returns:
        The page.

    Raises:
        ConfigError: no such run or case.
        DataError: a run or a dataset is damaged.
        StorageError: the folder cannot be written.
    """
    if out is not None and is_url(out):
        raise ConfigError(f"--out {out} is a URL, and a report is written to a folder of this machine; give one")
    found = read_runs(runs)
    if out is None and is_url(runs[0]):
        raise ConfigError(f"the run {runs[0]} is in a bucket; give a folder for its report with --out DIR")
    first = Path(runs[0])
    folder = out or (first / "report" if len(runs) == 1 else first.absolute().parent / "report")
    with storage_errors(folder):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    groups = group_runs(found)
    for group in groups:
        look_at_group(group, case, device, lambda text: print(text, flush=True))
    print("drawing", flush=True)
    directions = list(dict.fromkeys(run.direction for run in found))
    names = ", ".join(f"{run.title} ({run.folder.name}, {run.state})" for run in found)
    structures = {name: class_colour(index) for group in groups for index, name in enumerate(group.classes) if index}
    text = page(
        title=f"Adaptation {' and '.join(directions)}",
        summary=f"{len(found)} run{'s' * (len(found) > 1)}: {names}.",
        sections=[overview(groups), *sections(groups, folder / "figures", dpi, pdf)],
        structures=list(structures.items()),
        settings=[(run.folder.name, yaml.safe_dump(dict(run.config), sort_keys=False)) for run in found],
    )
    file = folder / "index.html"
    write_atomically(file, text.encode())
    return file


if __name__ == "__main__":
    cli.run(main)
