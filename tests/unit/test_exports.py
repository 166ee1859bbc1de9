"""What packages export: where ``__init__`` has names, ``__all__`` lists them, and others use them by it."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mpscl_ray"

INITS = [path for path in sorted(PACKAGE.rglob("__init__.py")) if path.parent != PACKAGE]


def names_bound(path: Path) -> set[str]:
    """Names that statements of a module bind, but for its ``__all__``."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mpscl_ray"):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found - {"__all__"}


@pytest.mark.parametrize("path", INITS, ids=lambda path: path.parent.relative_to(PACKAGE).as_posix())
def test_a_package_lists_what_it_exports(path: Path) -> None:
    package = importlib.import_module(".".join(path.parent.relative_to(PACKAGE.parent).parts))
    exported = getattr(package, "__all__", [])
    assert {name for name in names_bound(path) if not name.startswith("_")} == set(exported)
    for name in exported:
        assert hasattr(package, name)
    assert package.__doc__
