"""Imports go downwards only: settings < maths < seam < methods < files < orchestration."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mpscl_ray"

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "__init__", "data.__init__"}),
    frozenset({"durable_files", "storage", "config"}),
    frozenset(
        "networks losses label_free prototypes pseudo_labels metrics data.order data.recipe data.geometry data.slices "
        "data.phantom data.phantom_shapes data.phantom_imaging data.augment".split()
    ),
    frozenset({"distributed", "batch_statistics"}),
    frozenset({"optimisation", "methods"}),
    frozenset(
        "checkpoint checkpoint_format environment run_folder metrics_log progress run_lock bucket_run lease mirror "
        "plots interruption inference score_table prediction panels data.schema data.agreement data.dataset_checks "
        "data.nifti data.nifti_file data.nifti_output data.file_listing data.label_maps data.label_table data.layouts "
        "data.source_cases data.slice_layouts data.volume_layouts "
        "data.chosen data.reading data.released_slices data.source_volumes data.splits data.stream data.tfrecord "
        "data.phantom_files cli "
        "search.__init__ search.settings search.space search.ledger search.draws search.criteria "
        "search.agreement search.outcome search.figures search.terminal search.sharing systems".split()
    ),
    frozenset("validation feature_record construction pace training training_data fork figures titles".split()),
    frozenset(
        "cluster_session parallel data.pipeline prepare prepare_options prepare_plan prepare_run phantom_dataset "
        "monitoring worker lost_workers capacity places launch preflight trial train train_run evaluation evaluate "
        "evaluate_run predict predict_run report report_run report_groups report_page report_runs report_sections "
        "compare compare_run comparison_cells comparison_run comparison_table published_scores search.beginning "
        "search.early_stopping search.task search.study search.results tune tune_run".split()
    ),
)
ONLY_THESE_IMPORT_RAY = LAYERS[-1]
FILES = frozenset({"durable_files", "storage"})
"""They stand below the settings, of which some are in files; nothing from the maths to the methods touches a file."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def layer_of(name: str) -> int:
    for number, names in enumerate(LAYERS):
        if name in names or any(name.startswith(f"{prefix}.") for prefix in names - {"__init__"}):
            return number
    pytest.fail(f"mpscl_ray/{name.replace('.', '/')}.py stands in no layer: add it to LAYERS")


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


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_go_downwards(path: Path) -> None:
    name = module_name(path)
    own = layer_of(name)
    for other in imported(path):
        if other.startswith("third-party"):
            assert other != "third-party ray" or name in ONLY_THESE_IMPORT_RAY, f"{name} imports ray"
        else:
            target = other if (PACKAGE / f"{other.replace('.', '/')}.py").exists() else f"{other}.__init__"
            assert layer_of(target) <= own, f"{name} (layer {own}) imports {other} (layer {layer_of(target)})"
            assert target not in FILES or not layer_of("losses") <= own <= layer_of("methods"), f"{name}: {other}"


def test_what_the_controller_of_ray_train_loads_is_little() -> None:
    """It starts no worker before it has it, so what it does not need makes each training start later."""
    loaded, left = set(), {"lost_workers"}
    while left:
        name = left.pop()
        loaded.add(name)
        file = PACKAGE / f"{name.replace('.', '/')}.py"
        names = imported(file if file.exists() else PACKAGE / name.replace(".", "/") / "__init__.py")
        left |= {other for other in names - loaded if not other.startswith("third-party")}
        assert "third-party matplotlib" not in names, name
    assert "run_folder" in loaded
    assert not loaded & {"worker", "training", "plots"}
