"""What all commands share: the parser, errors as one sentence, documented exit codes, hints for misspelt names."""

from __future__ import annotations

import argparse
import atexit
import difflib
import functools
import gc
import importlib.metadata
import io
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from mpscl_ray import __version__
from mpscl_ray.errors import ConfigError, MpsclError
from mpscl_ray.runs import json_output

EXIT_CODES = (
    "exit codes: 0 done, 2 usage or config, 3 data, 4 cluster or resources, 5 storage,\n"
    "            6 training failed, 130 interrupted and resumable"
)
"""Shown at the end of every --help."""

COMPLETION = "_ARGCOMPLETE"
"""Environment variable by which a shell asks for completions; its value is the position of the program's name."""


def did_you_mean(word: str, candidates: Iterable[str], cutoff: float = 0.5, prefix: str = "") -> str:
    """``did you mean '<prefix><candidate>'?`` with the nearest candidate, "" if none reaches ``cutoff`` (0 to 1)."""
    nearest = difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
    return f"did you mean '{prefix}{nearest[0]}'?" if nearest else ""


def run(main: Callable[[list[str]], int], arguments: list[str] | None = None) -> None:
    """Run a command's ``main(arguments)``, by default with those of the process, and exit with its code.

    An :class:`MpsclError` is printed as one sentence; anything else is a defect and keeps its traceback.
    ``MPSCL_RAY_DEBUG=1`` shows the traceback of the former too. With ``--json`` see
    :mod:`mpscl_ray.runs.json_output`.
    """
    atexit.register(gc.freeze)  # Otherwise Python collects garbage in all of torch and Ray at exit, for seconds.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # File names may have characters that the terminal lacks.
    words = sys.argv[1:] if arguments is None else arguments
    work = functools.partial(_exit_code, main, words)
    sys.exit(json_output.run(work) if json_output.is_asked_for(words) else work())


def _exit_code(main: Callable[[list[str]], int], words: list[str]) -> int:
    """Exit code of a command, whose error is printed."""
    try:
        return main(words)
    except MpsclError as error:
        json_output.report(error=str(error))
        if os.environ.get("MPSCL_RAY_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        json_output.report(error="interrupted")
        print("interrupted", file=sys.stderr, flush=True)
        return 130


def help_width() -> int:
    """Columns of help: those of the terminal, but at least 80 and at most 100 (also where there is no terminal)."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 80), 100)


def version() -> str:
    """Versions of this package and of what decides on its results, without importing them."""

    def installed(name: str) -> str:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{name} not installed"

    return f"mpscl_ray {__version__} (Python {platform.python_version()}, {installed('torch')}, {installed('ray')})"


def _as_setting(option: str, arguments: Sequence[str], keys: Sequence[str]) -> str:
    """How an unknown option is written as a setting, where there is one of that name."""
    word, separator, value = option.partition("=")
    name = word.lstrip("-").replace("-", "_")
    if not separator and option in arguments[:-1]:
        following = arguments[arguments.index(option) + 1]
        value = "" if following.startswith("-") else following
    fitting = [f"{key}={value or 'VALUE'}" for key in keys if name in (key, key.rpartition(".")[2])]
    return f"; write {' or '.join(fitting)}" if fitting else ""


class _VersionAction(argparse.Action):
    """``--version``: read only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version())
        parser.exit()


class _JsonAction(argparse.Action):
    """``--json``: :func:`run` has seen it already; parsers only take it."""

    def __call__(self, *_: Any) -> None:
        pass


class _WorkersAction(argparse.Action):
    """``--workers``: refuses a negative number."""

    def __call__(self, parser: argparse.ArgumentParser, options: argparse.Namespace, number: Any, *_: Any) -> None:
        if number < 0:
            raise ConfigError(f"--workers is {number}; expected 0 or more")
        options.workers = number


class CommandParser(argparse.ArgumentParser):
    """Parser of a command: ``--version``, completion in the shell, and help as it was written."""

    def __init__(self, **options: Any) -> None:
        formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=help_width())
        super().__init__(**({"allow_abbrev": False} | options | {"formatter_class": formatter}))
        none = argparse.SUPPRESS  # It is no attribute of the parsed options.
        add = functools.partial(self.add_argument, nargs=0, dest=none, default=none)
        add("--version", action=_VersionAction, help="print the versions and exit")
        add(json_output.OPTION, action=_JsonAction, help="print one JSON document, and text for people on stderr")
        json_output.report(command=self.prog.rpartition(".")[2])

    def error(self, message: str) -> NoReturn:
        """As argparse does: usage and message on stderr, exit code 2."""
        json_output.report(error=message)
        super().error(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, after answering a shell that completes."""
        self._complete()
        options = super().parse_args(args, namespace)
        if getattr(options, "ray", None) and options.workers == 0:
            raise ConfigError("--workers 0 is for this process and --ray for a cluster; leave one of them out")
        return options

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, after answering a shell that completes."""
        self._complete()
        return super().parse_intermixed_args(args, namespace)

    def parse_settings(self, arguments: Sequence[str], keys: Sequence[str]) -> argparse.Namespace:
        """Parse options and settings in any order; unknown options are an error unless help was asked for.

        For a parser made with ``add_help=False`` and :meth:`add_settings`.

        Args:
            arguments: of the command line.
            keys: of all settings, for a hint where one was written as an option.
        """
        self._complete()
        options, unknown = self.parse_known_intermixed_args(list(arguments))
        if unknown and not (getattr(options, "help", False) or getattr(options, "help_all", False)):
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_as_setting(unknown[0], arguments, keys)}")
        return options

    def add_settings(self, first: str, help: str, completer: Callable[..., list[str]]) -> None:
        """Add the words ``FIRST | key=value`` and the options that show what they may be.

        ``--help`` and ``--help-all`` are plain flags: what they show depends on the settings beside them.
        """
        words = self.add_argument("settings", nargs="*", metavar=f"{first} | key=value", help=help)
        words.completer = completer  # type: ignore[attr-defined]
        add = functools.partial(self.add_argument, action="store_true")
        add("-h", "--help", help="show this help, with the values of the settings given")
        add("--help-all", help="show every setting as well")
        add("--list-presets", help="list the presets, each with what it is")

    def add_workers(self) -> None:
        """Add ``--workers``: an int, or None where it is not given."""
        help = "volumes at a time, on Ray; 0: in this process (default: by their number)"
        self.add_argument("--workers", action=_WorkersAction, type=int, metavar="N", help=help)

    def add_postprocessing(self) -> None:
        """Add ``--no-postprocessing`` and ``--largest-component``: ``postprocessing`` is a PostprocessingChoice."""
        add = functools.partial(
            self.add_mutually_exclusive_group().add_argument,
            action="store_const",
            dest="postprocessing",
            default="chosen",
        )
        add("--no-postprocessing", const="none", help="leave out the rules that were chosen for these weights")
        add(
            "--largest-component",
            const="largest_component",
            help="keep only the largest connected part of each structure, instead of the chosen rules",
        )

    def add_ray(self) -> None:
        """Add ``--ray``: an address, or None where it is not given."""
        help = "spread the volumes over a Ray cluster: its address, or auto (RAY_ADDRESS, or the one running here)"
        self.add_argument("--ray", metavar="ADDRESS", help=help)

    def _complete(self) -> None:
        """Answer a shell that completes, and leave: no command may run for that."""
        if COMPLETION in os.environ:
            import argcomplete  # Optional: the shell asks only where it is installed.

            argcomplete.autocomplete(self)
            self.exit(1)
