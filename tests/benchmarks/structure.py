"""How the package is built, counted from its imports.

    python tests/benchmarks/structure.py [CHECKOUT]

Units are the modules and packages at the top of mpscl_ray. An arrow is "one unit imports from another"; levels are the
length of the longest chain of arrows; a circle is a set of units that import each other. The files are parsed, not
imported, so any older checkout can be counted.
"""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path


def unit_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported_units(tree: ast.AST, package: Path) -> set[str]:
    """Units that a file imports from, by absolute imports as everywhere in the package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith(f"{package.name}.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package.name:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    units = {unit_of(name) for name in found}
    return {unit for unit in units if (package / unit).is_dir() or (package / f"{unit}.py").exists()} - {"", "__init__"}


def arrows_of(package: Path) -> dict[str, set[str]]:
    """Unit -> units that it imports from."""
    arrows: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        relative = file.relative_to(package)
        unit = relative.parts[0].removesuffix(".py")
        if len(relative.parts) == 1 and unit.startswith("__"):
            continue  # the package's own front doors
        arrows.setdefault(unit, set()).update(imported_units(ast.parse(file.read_text(encoding="utf-8")), package))
    return {unit: others - {unit} for unit, others in arrows.items()}


def levels_of(arrows: dict[str, set[str]]) -> dict[str, int] | None:
    """Unit -> length of the longest chain of imports below it; None where units import each other."""
    try:
        order = list(TopologicalSorter(arrows).static_order())
    except CycleError:
        return None
    levels: dict[str, int] = {}
    for unit in order:
        levels[unit] = 1 + max((levels[other] for other in arrows.get(unit, ())), default=0)
    return levels


def longest(
    package: Path, kinds: tuple[type[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef], ...]
) -> tuple[int, str]:
    """Lines and name of the longest function or class."""
    return max(
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{file.relative_to(package)}: {node.name}")
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, kinds)
    )


def main() -> None:
    checkout = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[2])
    package = checkout / "mpscl_ray"
    arrows = arrows_of(package)
    levels = levels_of(arrows)
    lines = {
        str(file.relative_to(package)): len(file.read_text(encoding="utf-8").splitlines())
        for file in package.rglob("*.py")
    }
    module = max(lines, key=lines.__getitem__)
    print(f"units     {len(arrows)}")
    print(f"arrows    {sum(map(len, arrows.values()))}")
    print(f"levels    {max(levels.values()) if levels else 'none: units import each other'}")
    print(f"lines     {sum(lines.values())} in {len(lines)} files")
    print(f"module    {lines[module]} {module}")
    print("function  {} {}".format(*longest(package, (ast.FunctionDef, ast.AsyncFunctionDef))))
    print("class     {} {}".format(*longest(package, (ast.ClassDef,))))
    if levels:
        for unit in sorted(arrows, key=lambda unit: (levels[unit], unit)):
            print(f"  {levels[unit]}  {unit:12s} <- {', '.join(sorted(arrows[unit])) or 'nothing'}")


if __name__ == "__main__":
    main()
