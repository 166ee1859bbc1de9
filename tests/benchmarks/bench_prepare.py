"""What prepare does beside reading volumes, for many of them: nothing may take more than its share of the time.

    python tests/benchmarks/bench_prepare.py [VOLUMES ...]

For each number of volumes (1,000 and 10,000 without words) the seconds for listing and pairing the files, drawing
patients, splitting by a JSON file, looking for copies and leaks, writing the manifest and reading it. The files are
empty and the staged cases are made up: voxels cost the same for each volume.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from mpscl_ray.data.dataset import Case, Scaling, case_file, load_manifest, save_manifest
from mpscl_ray.prepare import plan
from mpscl_ray.prepare.checks import check_cases, check_staged
from mpscl_ray.prepare.layouts import scan
from mpscl_ray.prepare.options import PrepareOptions
from mpscl_ray.prepare.staged_case import Request, StagedCase

CLASSES = "1=MYO,2=LAC,3=LVC,4=AA"
HASHES = 512


def make_files(folder: Path, number: int) -> None:
    """An image and a label file of each patient, all empty."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            (folder / name / f"patient{i:05d}.nii.gz").touch()


def staged(request: Request, random: np.random.Generator) -> StagedCase:
    """As if the volume had been read."""
    return StagedCase(
        request=request,
        shape=(40, 256, 256),
        class_voxels=(2_000_000, 100_000, 100_000, 100_000, 100_000),
        intensity_range=(-2.0, 4.0),
        scaled_by=None,
        content_sha256=random.bytes(32).hex(),
        sketch=tuple(random.integers(0, 2**63, HASHES).tolist()),
        geometry={"affine": np.eye(4).tolist(), "shape": [256, 256, 40]},
        spacing_mm=(3.0, 1.0, 1.0),
        structure_width=80.0,
        cropped_around_labels=False,
        sources={"image": str(request.source.images[0]), "image_sha256": "0" * 64, "label_sha256": "1" * 64},
        steps=(),
        notices=(),
        picture=None,
    )


def finished(case: StagedCase) -> Case:
    """As if its Parquet file had been written."""
    source, split = case.request.source, case.request.split
    return Case(
        id=source.id,
        patient=source.patient,
        split=split,
        file=case_file(split, source.id),
        slices=case.shape[0],
        labelled=True,
        sha256=case.content_sha256,
        bytes=10**7,
        content_sha256=case.content_sha256,
        geometry=case.geometry,
        spacing_mm=case.spacing_mm,
        class_voxels=case.class_voxels,
        class_centres=((0.5, 0.5),) * 5,
        structure_width=case.structure_width,
        cropped_around_labels=False,
        sources=dict(case.sources, label_sha256=case.content_sha256),
        notices=(),
    )


def measure(folder: Path, number: int) -> dict[str, float]:
    """Seconds of each part."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - begin

    make_files(folder / "in", number)
    options = PrepareOptions(
        input=folder / "in",
        layout="folder",
        out=folder / "out",
        modality="ct",
        image_pattern="images/{case}.nii.gz",
        label_pattern="labels/{case}.nii.gz",
        labels=CLASSES,
        split="0.7,0.1,0.2",
    )
    with timed("listing and pairing files"):
        found = scan(options.input, options.layout, plan.layout_options(options))
    with timed("drawing patients"):
        splitting = plan.split_cases(options, "ct", found.cases)
    with timed("splitting by a JSON file"):
        file = folder / "split.json"
        file.write_text(json.dumps(splitting.cases), encoding="utf-8")
        plan.split_cases(dataclasses.replace(options, split=str(file)), "ct", found.cases)
    table = plan.label_table(options, found.table)
    problems: list[str] = []
    with timed("requests"):
        requests = plan.requests(options, "ct", found.cases, splitting, folder, table, problems)
    random = np.random.default_rng(0)
    cases = [staged(request, random) for request in requests]
    with timed("copies, leaks and classes"):
        wrong, notices = check_staged(cases, table.classes, transductive=False, allow_missing_classes=False)
    done = [finished(case) for case in cases]
    with timed("checks of the finished cases"):
        notices += check_cases(done)
    assert not problems
    assert not wrong
    with timed("writing the manifest"):
        prepared = plan.settings(options, table)
        content = plan.manifest(options, prepared, "ct", splitting, Scaling(-2.0, 4.0, "given"), cases, done, notices)
        (folder / "out").mkdir()
        save_manifest(folder / "out", content)
    with timed("reading the manifest"):
        load_manifest(folder / "out")
    with timed("its fingerprint"):
        assert content.fingerprint
    return seconds


def main() -> None:
    numbers = [int(word) for word in sys.argv[1:]] or [1_000, 10_000]
    results = {}
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            results[number] = measure(Path(folder), number)
    print(f"{'seconds for volumes:':30}" + "".join(f"{number:>10,}" for number in numbers))
    for name in results[numbers[0]]:
        print(f"{name:30}" + "".join(f"{results[number][name]:10.3f}" for number in numbers))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
