"""Metrics of jobs that train: as the node shows them, and as a Prometheus that collects them gives them out."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.ray.prometheus import TAGS
from tests.local_cluster import ROOT, LocalCluster, wait_until
from tests.tiny import SETTINGS, make_pair
from tests.tiny_presets import write_presets
from tests.tiny_search import write_space

MONITORING = ROOT / "cluster" / "monitoring"
OF_MANY = ("mpscl_trial", "mpscl_best", "mpscl_cells", "mpscl_eta")
"""Metrics of a search or a comparison start so."""
ENDLESS = ("phases.source_only=3", "phases.warm_up=3", "phases.adaptation=1000000", "run.validate_every=50")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(nodes=1, cpus=4) as started:
        yield started


@pytest.fixture(scope="module")
def run(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDirectory]:
    """A run that is in its adaptation."""
    data, storage = make_pair(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("runs")
    folders = [f"data.source={data / 'mr'}", f"data.target={data / 'ct'}", f"run.storage={storage}"]
    settings = [*SETTINGS, *folders, *ENDLESS, "run.name=watched", "scaling.num_workers=1"]
    submitted = cluster.submit("watched", "python", "-m", "mpscl_ray.train", "small/mpscl", *settings, wait=False)
    assert submitted.returncode == 0, submitted.stdout
    folder = RunDirectory(storage / "watched")

    def step() -> int:
        assert cluster.job("watched")["status"] in ("PENDING", "RUNNING"), cluster.logs("watched")
        return max((record["global_step"] for record in folder.read_metrics()), default=0)

    wait_until(lambda: step() > 6, "adaptation")
    yield folder
    assert cluster.command("ray", "job", "stop", "watched").returncode == 0


@pytest.fixture(scope="module")
def many(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A search and a comparison, each with one training."""
    data = make_pair(tmp_path_factory.mktemp("many"))
    space = write_space(data, "searched", {"optim.lr": {"choice": [0.01]}}, method="grid", scheduler="fifo")
    words = ("phases.warm_up=0", "phases.source_only=0", "phases.adaptation=1000000", "run.validate_every=10")
    jobs = {"searched": ["python", "-m", "mpscl_ray.tune", space, *words]}
    presets = write_presets(data / "presets", phase=100_000)
    compare = f"python -m mpscl_ray.compare --data {data}/mr {data}/ct --presets {presets} --out {data}/compared"
    jobs["compared"] = [*compare.split(), "--seeds", "1", "--directions", "forward", "source_only"]
    for name, job in jobs.items():
        submitted = cluster.submit(name, *job, wait=False)
        assert submitted.returncode == 0, submitted.stdout
    yield
    for name in jobs:
        assert cluster.command("ray", "job", "stop", name).returncode == 0


def exposed(cluster: LocalCluster) -> str:
    """What Prometheus reads of the node."""
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.metrics_port(0)}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def test_the_node_shows_every_documented_metric(run: RunDirectory, cluster: LocalCluster) -> None:
    absent = {name for name in TAGS if not name.startswith(OF_MANY)} - {"mpscl_restarts"}  # none so far

    def all_there() -> bool:
        page = exposed(cluster)
        for name in sorted(absent):
            shown = rf"^ray_{name}\{{(.*)\}} (\S+)$"
            lines = re.findall(shown, page, re.MULTILINE)
            if lines:
                absent.remove(name)
            for labels, value in lines:
                tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
                assert tags["run"] == run.name
                assert {"run", *TAGS[name]} <= tags.keys()
                assert math.isfinite(float(value))
        return not absent

    try:
        wait_until(all_there, "every metric")
    finally:
        assert absent == set()
    page = exposed(cluster)
    for structure in ("ventricle", "wall", "mean"):
        assert f'structure="{structure}"' in page


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus on this machine (apt install prometheus)")
def test_every_expression_of_the_dashboard_has_data(
    run: RunDirectory, many: None, cluster: LocalCluster, tmp_path: Path
) -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text(encoding="utf-8"))
    (files,) = config["scrape_configs"][0]["file_sd_configs"]
    files["files"] = [str(cluster.folder / "ray" / Path(files["files"][0]).name)]
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = cluster.base + 99
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp_path / 'prometheus.yaml'}",
                f"--web.listen-address=127.0.0.1:{port}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text(encoding="utf-8"))
        silent = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
        assert len(silent) > 15

        def answered() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
            silent[:] = [expression for expression in silent if not ask(port, expression.replace("$run", ".*"))]
            return not silent

        try:
            wait_until(answered, "data", seconds=600)
        finally:
            assert silent == []
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/rules", timeout=60) as answer:
            (group,) = json.loads(answer.read())["data"]["groups"]
        assert len(group["rules"]) > 5
        assert [rule["name"] for rule in group["rules"] if rule["health"] == "err"] == []
    finally:
        server.terminate()
        server.wait()


def ask(port: int, expression: str) -> list[object]:
    """The series that Prometheus has for an expression; none while it starts."""
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=60) as answer:
            return list(json.loads(answer.read())["data"]["result"])
    except ConnectionError:
        return []
    except OSError as error:
        if isinstance(getattr(error, "reason", None), ConnectionError) or getattr(error, "code", None) == 503:
            return []
        raise


ENDS_A_RUN = """
import time, ray
from mpscl_ray.train.ray.prometheus import Gauges
ray.init()
gauges = Gauges("ended")
for second in range(600):
    shown = [("mpscl_best_score", {}, 0.25)]
    gauges.replace(shown + ([("mpscl_trial_score", {"trial": "001"}, 0.5)] if second < 30 else []))
    time.sleep(1)
"""


def test_what_has_ended_disappears_though_its_process_goes_on(cluster: LocalCluster) -> None:
    submitted = cluster.submit("ended", "python", "-c", ENDS_A_RUN, wait=False)
    assert submitted.returncode == 0, submitted.stdout

    def shown() -> dict[str, str]:
        return dict(re.findall(r'^ray_(mpscl_\w+)\{.*run="ended".*\} (\S+)$', exposed(cluster), re.MULTILINE))

    wait_until(lambda: shown() == {"mpscl_best_score": "0.25", "mpscl_trial_score": "0.5"}, "both gauges")
    wait_until(lambda: shown() == {"mpscl_best_score": "0.25"}, "the end of one")
    assert cluster.command("ray", "job", "stop", "ended").returncode == 0
