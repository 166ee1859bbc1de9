"""``python -m mpscl_ray.check DATA ...``: everything wrong with images or datasets at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.arguments import add_input, from_values, with_negative_values
from mpscl_ray.prepare.layouts import LAYOUTS
from mpscl_ray.runs import cli, json_output
from mpscl_ray.runs.storage import is_url

_EXAMPLES = """\
examples:
  images, before they are prepared:
    python -m mpscl_ray.check MMWHS --layout mmwhs --fix-label 421=420
    python -m mpscl_ray.check HOSPITAL_A --layout folder --modality mr --labels 1=MYO,2=LV \\
        --image-pattern '{case}_image.nii.gz' --label-pattern '{case}_label.nii.gz'
  prepared datasets, and whether the two can be trained together (source first):
    python -m mpscl_ray.check data/mr data/ct
  a page of pictures, unusual cases first:
    python -m mpscl_ray.check data --pictures look.html

With --layout, DATA are folders with images, and each gets the checks that prepare makes. No
split is drawn: a case whose split the layout does not give is undecided. Without --layout,
DATA are prepared datasets or folders of them. All cases are read, and all findings are listed:
a problem is what prepare or train would refuse, a note is what they would only say. Exit code
0 means that there is no problem, 3 that there are some.
"""

_ALWAYS = ("data", "layout", "workers", "pictures")
"""Arguments that go with images and with datasets."""


def main(arguments: Sequence[str]) -> int:
    """Check the data and print what was found; returns the exit code."""
    parser = _parser()
    values = vars(parser.parse_intermixed_args(with_negative_values(arguments)))
    folders = [local_folder(location) for location in dict.fromkeys(values.pop("data"))]
    pictures: Path | None = values["pictures"]
    if values["layout"] is None:
        given = [name for name, value in values.items() if name not in _ALWAYS and value != parser.get_default(name)]
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ConfigError(f"{flags}: describes images, and without --layout DATA are prepared datasets")
        # Imported here: help and refused arguments need no scipy and no pyarrow.
        from mpscl_ray.prepare.check_run import check_datasets, report, write_pictures

        checked = check_datasets(folders, values["workers"], pictures=pictures is not None)
    else:
        wanted = {"out": None, "pictures": pictures is not None}
        options = [from_values({**values, **wanted, "input": folder}) for folder in folders]
        from mpscl_ray.prepare.check_run import check_images, report, write_pictures

        checked = [check_images(one) for one in options]
    code = report(checked)
    json_output.report(pictures=pictures)
    if pictures is not None:
        write_pictures(checked, pictures)
        print(f"pictures: {pictures}")
    return code


def local_folder(location: str) -> Path:
    """The folder of data to check.

    Raises:
        ConfigError: it is in a bucket.
    """
    if is_url(location):
        raise ConfigError(f"{location} is in a bucket, and check reads from a disk; copy it to a folder")
    return Path(location)


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(
        prog="python -m mpscl_ray.check",
        description="List everything that is wrong with images, before they are prepared, or with prepared datasets.\n"
        "Nothing is written but the page of --pictures.",
        epilog=f"{_EXAMPLES}\n{cli.EXIT_CODES}",
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help="folder with images, or a prepared dataset")
    parser.add_argument("--layout", choices=LAYOUTS, help="how image files are named; without it: prepared datasets")
    parser.add_argument("--pictures", type=Path, metavar="FILE", help="also write a page of pictures, e.g. look.html")
    parser.add_workers()
    add_input(parser)
    return parser
