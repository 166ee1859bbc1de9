"""``python -m mpscl_ray.export RUN --out FILE``: a trained segmenter as one file, with its model card."""

from __future__ import annotations

from collections.abc import Sequence

from mpscl_ray.errors import ConfigError
from mpscl_ray.export.formats import FORMATS, output_location
from mpscl_ray.runs import cli

_EXAMPLES = """\
examples:
  python -m mpscl_ray.export runs/mpscl --out hearts.mpscl
  python -m mpscl_ray.predict hearts.mpscl SCANS --out predictions
  python -m mpscl_ray.export hearts.mpscl --show
  python -m mpscl_ray.export runs/mpscl --checkpoint last --licence CC-BY-4.0 --out last.mpscl
  python -m mpscl_ray.export hearts.mpscl --format onnx --out hearts.onnx
  python -m mpscl_ray.export s3://hearts/runs/mpscl --out s3://hearts/hearts.mpscl

The file has the weights, how volumes are prepared, the label table, the settings, a model card and
SHA-256 sums; no path, no name of a case, no pickle. The same run gives the same bytes. The card has
the scores that train or evaluate wrote: for the checkpoint best, evaluate it first.
"""


def main(arguments: Sequence[str]) -> int:
    """Export one checkpoint, or show the card; returns the exit code."""
    options = _parser().parse_args(list(arguments))
    if options.out is None and not options.show:
        raise ConfigError("--out is missing: the file to write, such as hearts.mpscl; or give --show to see the card")
    out = None if options.show else output_location(options.out, options.format)
    # Imported here: help and refused arguments need no torch.
    from mpscl_ray.export.run import export

    return export(options, out)


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(
        prog="python -m mpscl_ray.export",
        description="Write a trained segmenter as one file, with its model card.\nFor research, not a medical device.",
        epilog=f"{_EXAMPLES}\n{cli.EXIT_CODES}",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of the run, a model file, or the URL of either")
    add("--out", metavar="FILE", help="file to write, or its URL; of a MONAI bundle its folder")
    add("--show", action="store_true", help="print the model card and write nothing")
    add(
        "--checkpoint",
        metavar="NAME",
        help="best (default), last, a phase, a name in RUN/checkpoints, or a path; of a model file what it has",
    )
    add("--format", choices=FORMATS, default="mpscl", help="mpscl (default) is what predict and evaluate take")
    add("--licence", metavar="TEXT", help="licence of the weights, for the card (default: not stated)")
    add("--overwrite", action="store_true", help="replace what is there")
    return parser
