"""The wheel and the sdist have everything that the package needs, and its commands work where they are installed."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

from mpscl_ray import __version__

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "mpscl_ray tune_spaces setup.cfg pyproject.toml MANIFEST.in README.md CHANGELOG.md LICENSE CITATION.cff "
    "constraints.txt constraints-hashes.txt"
)

pytest.importorskip("setuptools", minversion="77")  # Builds here, without an isolated environment from the network.


def test_the_citation_has_what_its_format_requires() -> None:
    """Keys of the schema of Citation File Format 1.2.0; ``cffconvert --validate`` checks all of it."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert {"type", "title", "authors"} <= citation["preferred-citation"].keys()
    for author in (*citation["authors"], *citation["preferred-citation"]["authors"]):
        assert author.keys() in ({"name"}, {"family-names", "given-names"})
    assert citation["version"] == __version__


def pin(line: str) -> tuple[str, str]:
    """Name as pip compares it, and version."""
    name, _, version = line.partition(";")[0].strip(" \\").partition("==")
    return re.sub(r"[-_.]+", "-", name.lower()), version


def test_the_versions_with_hashes_are_those_of_the_constraints() -> None:
    """What ``pip install --require-hashes`` takes: for each package a version and at least one hash."""
    first, *rest = (ROOT / "constraints-hashes.txt").read_text(encoding="utf-8").splitlines()
    assert first.startswith("#")
    name, hashes = "", dict[str, int]()
    versions: dict[str, str] = {}
    for line in rest:
        if line.startswith("    --hash=sha256:"):
            hashes[name] = hashes.get(name, 0) + 1
        else:
            name, version = pin(line)
            versions[name] = version
    assert hashes.keys() == versions.keys()
    plain = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(pin(line) for line in plain if not line.startswith("#"))
    assert {name: version for name, version in versions.items() if pinned.get(name, version) != version} == {}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = [re.split(r"[\[><=]", line)[0] for line in setup["options"]["install_requires"].split()]
    assert {pin(name)[0] for name in needed} <= versions.keys()


def build(source: Path, kind: str, out: Path) -> Path:
    """A wheel or sdist, made as pip makes it."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def content(wheel: Path) -> dict[str, int]:
    """Name and checksum of every file but the record of them."""
    with zipfile.ZipFile(wheel) as file:
        return {item.filename: item.CRC for item in file.infolist() if not item.filename.endswith("/RECORD")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: a build leaves folders behind."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES.split():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_every_file_of_the_package(source: Path, wheel: Path) -> None:
    package = {str(path.relative_to(source)) for path in (source / "mpscl_ray").rglob("*.*") if path.is_file()}
    spaces = {f"mpscl_ray/{path.relative_to(source)}" for path in (source / "tune_spaces").glob("*.yaml")}
    assert {"mpscl_ray/py.typed", "mpscl_ray/presets/small/mpscl.yaml"} <= package
    assert {name for name in content(wheel) if name.startswith("mpscl_ray/")} == package | spaces


def test_the_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(build(source, "sdist", tmp_path), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert {"CITATION.cff", "CHANGELOG.md", "constraints.txt", "LICENSE"} <= {path.name for path in unpacked.iterdir()}
    assert content(build(unpacked, "wheel", tmp_path)) == content(wheel)


def test_the_commands_work_where_the_wheel_is_installed(wheel: Path, tmp_path: Path) -> None:
    """The new environment takes what the package depends on from the present one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", purelib], capture_output=True, text=True, check=True).stdout.strip())
    (packages / "present.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", "--no-compile"]
    # A checkout in the present environment must not pass for the wheel.
    subprocess.run([*pip, "--ignore-installed", wheel], check=True, env=environment)

    def run(*words: str) -> str:
        program = tmp_path / "venv/bin/mpscl-ray"
        return subprocess.run(
            [program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert run("--version").startswith("mpscl_ray ")
    assert "mr2ct/mpscl_released" in run("train", "--list-presets")
    assert "settings of preset small/clan (method clan)" in run("train", "small/clan", "--help")
    assert "table_v" in run("tune", "--help")
