# PYTHON_ARGCOMPLETE_OK
"""``mpscl-ray COMMAND ...``, which is ``python -m mpscl_ray.COMMAND ...``; only that command is imported."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence

from mpscl_ray.runs import cli

COMMANDS = {
    "check": "list everything wrong with images or datasets; write nothing",
    "prepare": "turn images into a dataset for training",
    "train": "train a method, on this machine or on a Ray cluster",
    "evaluate": "score a trained segmenter on labelled volumes",
    "predict": "write label maps for new images",
    "export": "write a trained segmenter as one file, with its model card",
    "score": "score any folder of label maps against labels",
    "tune": "search for the settings of a method",
    "compare": "train and score a table of methods, seeds and directions",
    "report": "draw the figures of runs on one page",
}
"""Commands, in the order in which one uses them."""

MODULES = {name: f"mpscl_ray.{name}.command" for name in COMMANDS} | {
    "check": "mpscl_ray.prepare.check_command",
    "score": "mpscl_ray.evaluate.score_command",
}
"""Where each has its arguments: in a package of its name; ``check`` shares that of ``prepare``, ``score`` that of
``evaluate``."""


def main() -> None:
    """Entry point of the console script ``mpscl-ray``."""
    cli.run(dispatch)


def dispatch(arguments: Sequence[str]) -> int:
    """Run the command that the first argument names; returns its exit code."""
    words = list(arguments)
    if cli.COMPLETION in os.environ:
        from argcomplete.lexers import split_line

        words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3][1:]
        if words[:1]:
            os.environ[cli.COMPLETION] = "2"  # The command's name takes the position of the program's.
    if words and words[0] in COMMANDS:
        command = importlib.import_module(MODULES[words[0]])
        return int(command.main(words[1:]))
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}s}  {text}" for name, text in COMMANDS.items())
    parser = cli.CommandParser(
        prog="mpscl-ray",
        usage="mpscl-ray [-h] [--version] COMMAND ...",
        description="Unsupervised domain adaptation of medical image segmentation (MPSCL) on Ray.",
        epilog=(
            f"commands:\n{listing}\n\nmpscl-ray COMMAND --help says more of each. mpscl-ray COMMAND ... and\n"
            f"python -m mpscl_ray.COMMAND ... are the same, exit codes too.\n\n{cli.EXIT_CODES}"
        ),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.parse_args(words)
    parser.error("the command comes first")


if __name__ == "__main__":
    main()
