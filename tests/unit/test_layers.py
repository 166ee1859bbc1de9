"""Packages import one way: each one only those before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mpscl_ray"

ORDER = (
    "errors distributed networks runs config data methods prepare predict evaluate export train compare report "
    "tune".split()
)
"""Packages of mpscl_ray; each may import those that stand before it."""

WITHOUT_FILES = {"distributed", "networks", "methods"}
"""Packages that compute. They import nothing that reads or writes files."""

WITH_RAY = (
    *("distributed.ray_session", "distributed.parallel_map", "distributed.places"),
    *("data.ray_source", "data.preflight", "train.ray", "compare", "tune"),
)
"""Modules and packages that may import Ray."""

COMMANDS_ALONE = {"check": "prepare.check_command", "score": "evaluate.score_command"}
"""Modules at the top that are only ``python -m mpscl_ray.NAME``, and where their command is. Such a command shares the
subject of a package that has one of another name; a package of its own would be a level of imports with nothing in it.
Nothing imports these modules."""

DISPATCHER = "__main__"
"""The console script ``mpscl-ray``, a module that stands above all packages. It imports a command by name once that is
chosen, and before it only what all commands share."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Modules imported anywhere in a file: own ones without the package's name, others by their top-level name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [
                name if (PACKAGE.parent / f"{name.replace('.', '/')}.py").exists() else node.module
                for name in submodules
            ]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            found.add(rest or "__init__" if top == "mpscl_ray" else f"third-party {top}")
    return found


def test_every_package_has_its_place() -> None:
    packages = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert packages - {"__init__", DISPATCHER, *COMMANDS_ALONE} == set(ORDER)
    assert len(ORDER) <= 15


@pytest.mark.parametrize("path", sorted({*PACKAGE.rglob("*.py")} - {PACKAGE / "__init__.py"}), ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    name = module_name(path)
    own = name.partition(".")[0]
    for other in imported(path) - {"__init__"}:
        if other.startswith("third-party"):
            assert other != "third-party ray" or name.startswith(WITH_RAY), f"{name} imports ray"
            continue
        package = other.partition(".")[0]
        if own in COMMANDS_ALONE:
            assert other in ("runs.cli", COMMANDS_ALONE[own]), f"{name} imports {other} and is only a command's name"
            continue
        assert package not in COMMANDS_ALONE, f"{name} imports {other}, which is only a command's name"
        if own == DISPATCHER:
            assert other == "runs.cli", f"{name} imports {other} before a command is chosen"
            continue
        assert ORDER.index(package) <= ORDER.index(own), f"{name} imports {other}, which stands above it"
        assert package != "runs" or own not in WITHOUT_FILES, f"{name} imports {other}"


def test_what_the_controller_of_ray_train_loads_is_little() -> None:
    """It starts no worker before it has it, so what it does not need makes each training start later."""
    loaded, left = {"__init__"}, {"train.ray.failures"}  # the package itself imports a name when it is first used
    while left:
        name = left.pop()
        loaded.add(name)
        file = PACKAGE / f"{name.replace('.', '/')}.py"
        names = imported(file if file.exists() else PACKAGE / name.replace(".", "/") / "__init__.py")
        left |= {other for other in names - loaded if not other.startswith("third-party")}
        assert "third-party matplotlib" not in names, name
    assert "runs.run_directory" in loaded
    assert not loaded & {"train.ray.worker", "train.loop", "runs.plots"}
