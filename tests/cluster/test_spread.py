"""Volumes of the final evaluation, and of evaluate and predict, on two nodes of one CPU each."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpscl_ray.errors import DataError, StorageError
from mpscl_ray.evaluate.run import evaluate_phases
from tests.hearts_run import oblique, write_hearts_run, write_image
from tests.nodes import Cluster, cluster, wait_for
from tests.tiny import make_pair, tiny_settings

PATIENCE_S = 600


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    with cluster() as started:
        yield started


def run(head: Cluster, output: Path, *words: str) -> tuple[int, str]:
    code = wait_for(head.command(output, *words), output, PATIENCE_S)
    return code, output.read_text(encoding="utf-8")


def test_the_scores_of_two_nodes_are_those_of_one_process(head: Cluster, tmp_path: Path) -> None:
    node = head.add()
    data = make_pair(tmp_path)
    words = [f"data.source={data / 'mr'}", f"data.target={data / 'ct'}", f"run.storage={tmp_path}", "run.name=run"]
    words = ["mpscl_ray.train", "small/source_only", *tiny_settings("small/source_only"), *words]
    code, text = run(head, tmp_path / "train.txt", *words)
    assert code == 0, text
    of_the_cluster = (tmp_path / "run" / "results" / "phases.csv").read_bytes()
    evaluate_phases(tmp_path / "run", ["source_only"], workers=0, progress=False)
    assert (tmp_path / "run" / "results" / "phases.csv").read_bytes() == of_the_cluster
    head.lose(node)


def test_a_node_without_the_folders_is_named(head: Cluster, tmp_path: Path) -> None:
    folder = write_hearts_run(tmp_path)
    for seed in range(4):
        write_image(tmp_path / "ct" / f"p{seed}.nii.gz", seed, oblique())
    node = head.add(hide=tmp_path / "ct")
    try:
        evaluate = ["mpscl_ray.evaluate", str(folder), "--ray", head.address, "--out", str(tmp_path / "scores")]
        code, text = run(head, tmp_path / "evaluate.txt", *evaluate)
        assert code == DataError.exit_code, text
        assert f"on node {node.address}: " in text, "a volume was there"
        images = [str(tmp_path / "ct" / f"p{seed}.nii.gz") for seed in range(4)]
        predict = ["mpscl_ray.predict", str(folder), *images, "--ray", head.address]
        code, text = run(head, tmp_path / "images.txt", *predict, "--out", str(tmp_path / "maps"))
        assert code == DataError.exit_code, text
        assert f"node {node.address}: {images[0]} is not there; put images in a folder that all nodes share" in text
        code, text = run(head, tmp_path / "maps.txt", *predict, "--out", str(tmp_path / "ct" / "maps"))
        assert code == StorageError.exit_code, text
        assert f"node {node.address}: {tmp_path / 'ct' / 'maps'} is another folder there" in text
    finally:
        head.lose(node)
    for command, written in ((evaluate, "scores"), ([*predict, "--out", str(tmp_path / "maps")], "maps")):
        shutil.rmtree(tmp_path / written, ignore_errors=True)
        code, text = run(head, tmp_path / f"{written}.txt", *command)
        assert code == 0, text
    assert len(list((tmp_path / "maps").glob("p*_prediction.nii.gz"))) == 4
