"""The documents of the repository: their fenced blocks, commands, links and headings."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster" / "README.md"]
"""Documents whose commands are tested."""

_OTHERS = ("AGENTS.md", "CHANGELOG.md", "CONTRIBUTING.md", "tests/benchmarks/EXPERIMENTS.md")
DOCUMENTS = [*GUIDES, *(ROOT / name for name in _OTHERS)]
"""Documents whose links are tested."""

PRODUCT = ("python -m mpscl_ray", "mpscl-ray", "ray job submit")
"""How a command of the product starts."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command line of a document."""

    file: Path
    text: str
    """One line, without comment and line breaks."""

    @property
    def words(self) -> list[str]:
        """As a shell splits them."""
        return shlex.split(self.text)

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}: {self.text}"


def blocks(file: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [code for found, code in _FENCE.findall(file.read_text(encoding="utf-8")) if found == language]


def commands(file: Path) -> list[Command]:
    """The commands of the product in the bash blocks of a document, in their order."""
    found = []
    for block in blocks(file, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            text = " ".join(re.sub(r"\s#\s.*", "", line).split())
            if text.startswith(PRODUCT):
                found.append(Command(file, text))
    return found


def links(file: Path) -> list[tuple[str, str]]:
    """(path, anchor) of each relative link; the path is empty within the document."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", file.read_text(encoding="utf-8")))
    return [target.partition("#")[::2] for target in targets if "://" not in target]


def anchors(file: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def table_rows(file: Path, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading, without its head."""
    lines = file.read_text(encoding="utf-8").splitlines()
    below = lines[lines.index(heading) + 1 :]
    start = next(number for number, line in enumerate(below) if line.startswith("|"))
    rows = []
    for line in below[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def code(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)
