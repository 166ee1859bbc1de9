"""What the documents name exists: links, files, functions, tests, systems, settings."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from mpscl_ray.__main__ import COMMANDS
from mpscl_ray.config import load_config
from mpscl_ray.config.systems import SYSTEMS
from mpscl_ray.errors import MpsclError
from tests.docs import settings_page
from tests.docs.markdown import DOCUMENTS, GUIDES, ROOT, anchors, blocks, code, links, table_rows
from tests.unit.test_layers import ORDER

DOCS = ROOT / "docs"


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    for path, anchor in links(file):
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_every_document_is_in_the_index() -> None:
    named = {path for path, _ in links(DOCS / "README.md")}
    assert {file.name for file in DOCS.glob("*.md")} - {"README.md"} <= named


def test_agents_are_told_in_short_what_is_there() -> None:
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    for path in re.findall(r"`((?:tests|docs|mpscl_ray)/[\w/.]+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    for code_, meaning in ((error.exit_code, error.__name__) for error in MpsclError.__subclasses__()):
        assert re.search(rf"\b{code_} \w", text), meaning
    named = re.search(r"order of use: (.*?)\.", text, re.DOTALL)
    assert named is not None
    assert set(code(named[1])) == set(COMMANDS)


def test_the_readme_is_short_and_keeps_the_blocks_of_ci() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    for heading, last in (("## Run it", "python -m mpscl_ray.train"), ("## Test it", "pytest -n 2")):
        block = "\n".join(lines[lines.index(heading) :]).partition("```bash\n")[2].partition("\n```")[0]
        assert block.splitlines()[:2] == ["python3 -m venv .venv", ". .venv/bin/activate"]
        assert block.splitlines()[-1] == last


def test_settings_are_those_of_the_code() -> None:
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page(), (
        "docs/settings.md is out of date: run python -m tests.docs.settings_page"
    )


def named(path: str) -> Any:
    """What a dotted name below mpscl_ray stands for."""
    words = ["mpscl_ray", *path.split(".")]
    for count in range(len(words), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(words[:count]))
        except ModuleNotFoundError:
            continue
        for word in words[count:]:
            found = getattr(found, word)
        return found
    raise AssertionError(path)


EQUATIONS = [
    row
    for heading in ("# Equation, function, test", "## Other methods")
    for row in table_rows(DOCS / "equations.md", heading)
]


@pytest.mark.parametrize("row", EQUATIONS, ids=lambda row: row[0])
def test_functions_and_tests_of_equations_exist(row: list[str]) -> None:
    _, functions, tests = row
    texts = [(ROOT / "tests" / test).read_text(encoding="utf-8") for test in code(tests)]
    for function in code(functions):
        assert named(function) is not None
        # A method's step is tested through the method, a module through what it has.
        word = next(part for part in reversed(function.split(".")) if part not in ("step", "prepare"))
        assert any(re.search(rf"\b{word}\b", text) for text in texts), f"{word} is in none of {tests}"


def test_design_names_all_packages_and_only_files_that_exist() -> None:
    file = DOCS / "design.md"
    assert [code(row[0])[0] for row in table_rows(file, "## Packages")] == list(ORDER)
    text = file.read_text(encoding="utf-8")
    paths = re.findall(r"(?:mpscl_ray|tests)/[\w/]+(?:\.py)?", text)
    assert len(paths) > 30
    for path in paths:
        assert (ROOT / path).exists(), path
    for row in table_rows(file, "## The file to change"):
        path, *names = code(row[1])
        for name in names:
            if "/" not in name and "." not in name:
                files = [ROOT / part for part in code(row[1]) if part.endswith(".py")]
                assert any(name in part.read_text(encoding="utf-8") for part in files), name


def test_methods_are_the_systems_with_their_phases() -> None:
    found = {
        name: re.split(r", ", row[3]) for row in table_rows(DOCS / "methods.md", "# Methods") for name in code(row[0])
    }
    assert set(found) == set(SYSTEMS)
    for system, phases in found.items():
        schedule = dict.fromkeys(re.sub(r"_\d+$", "", name) for name, _ in load_config(f"small/{system}").schedule)
        assert [phase.replace("-", "_") for phase in phases] == list(schedule), system


def test_the_numbers_of_the_readme_are_those_of_the_table_of_methods() -> None:
    table = {
        row[0]: row[5]
        for row in table_rows(DOCS / "methods.md", "## One seed on the phantom hearts, as predict writes")
    }
    rows = table_rows(ROOT / "README.md", "## Which method works on your data")
    assert {name for row in rows for name in code(row[0])} == set(SYSTEMS)
    for names, _, numbers in rows:
        titles = [SYSTEMS[name] for name in code(names)]
        expected = dict.fromkeys(f"{table[title]} %" for title in titles)
        assert numbers == ", ".join(expected)


def test_python_blocks_are_python() -> None:
    for file in GUIDES:
        for block in blocks(file, "python"):
            compile(block, str(file), "exec")
