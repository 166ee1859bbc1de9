"""Files from strangers: nothing in the package can run what a file holds, and a small file stays small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpscl_ray.config import load_config
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs import safe_yaml

PACKAGE = Path(__file__).resolve().parents[2] / "mpscl_ray"

UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "json.load",
    "json.loads",  # runs.safe_json has limits beside
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "pd.read_pickle",
    "shutil.unpack_archive",
    "yaml.full_load",
    "yaml.safe_load",  # runs.safe_yaml has limits beside
    "yaml.unsafe_load",
}
UNSAFE_METHODS = {"extract", "extractall"}
REQUIRED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
"""Calls that are safe with this argument alone."""

PARSE_THEIR_OWN_JSON = {
    "compare/runner.py",  # what a cell has reported
    "distributed/collectives.py",  # what the other workers of the training send
    "export/card.py",  # what it has just written
    "runs/safe_json.py",
    "tune/trainable.py",  # what the command has given to its trial
}
"""Modules with a call of json.loads that never sees a file of others."""


def unsafe(text: str) -> Iterator[str]:
    """Imports and calls of a module that could run, or unpack anywhere, what a file holds."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (name for name in names if name.partition(".")[0] in UNSAFE_MODULES)
            yield from (f"{name} without its module" for name in names if name in ("loads", "Unpickler"))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in UNSAFE_CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in UNSAFE_METHODS):
                yield called
            if called in REQUIRED:
                argument, value = REQUIRED[called]
                if given.get(argument) != str(value):
                    yield f"{called} without {argument}={value}"
            if called == "yaml.load" and given.get("Loader") != "SafeLoader":
                yield called
            if given.get("shell") == "True":
                yield f"{called} through a shell"


def test_no_module_can_run_what_a_file_holds() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    found = {str(file.relative_to(PACKAGE)): list(unsafe(file.read_text(encoding="utf-8"))) for file in files}
    assert {file: calls for file, calls in found.items() if calls} == {
        file: ["json.loads"] for file in PARSE_THEIR_OWN_JSON
    }


@pytest.mark.parametrize(
    "text",
    [
        "import dill",
        "from pickle import loads",
        "pickle.load(file)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.safe_load(text)",
        "json.loads(file.read_bytes())",
        "archive.extractall(folder)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
    ],
)
def test_what_would_be_found(text: str) -> None:
    assert list(unsafe(text))


# ------------------------------------------------------------------------------------------------------- YAML

ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"{ALIASES}data: {{source: *a11}}\n", r"found the alias \*a0, expected its value in place"),
        ("data: " + "[" * 100_000, "found more than 32 mappings and lists within each other"),
        ("data: " + "{a: " * 40 + "1" + "}" * 40, "found more than 32 mappings"),
        ("# " + " " * safe_yaml.MAX_BYTES, "larger than 1 MB, so hardly a file of settings"),
        ("run: {seed: 2001-99-99}\n", "month must be in 1..12 in line 1"),
        (f"run: {{seed: {'1' * 5000}}}\n", "Exceeds the limit"),
        ("run: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    ],
)
def test_a_config_that_would_take_all_memory_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence) as refused:
        load_config(str(file))
    assert "config.yaml" in str(refused.value)


def test_plain_yaml_is_read_as_ever(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("preset: small/mpscl\noptim:\n  lr: 1.0e-4\n", encoding="utf-8")
    assert load_config(str(file), ["scaling.num_workers=[1, 2]"]).optim.lr == 1e-4
