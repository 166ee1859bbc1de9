"""The files in cluster/: valid by the validators of those who read them, locked, and what they name exists."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.dashboard.modules.metrics.dashboards as ray_dashboards
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from mpscl_ray import __version__
from mpscl_ray.config import load_config
from mpscl_ray.train.ray import prometheus

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
DOCKERFILE = CLUSTER / "Dockerfile"
SCRIPTS = sorted([CLUSTER / "local" / "cluster.sh", CLUSTER / "slurm" / "job.sbatch"])
YAML_FILES = sorted(CLUSTER.rglob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8")))


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod templates of a RayCluster's spec."""
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def cluster_spec(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    return dict(spec.get("rayClusterSpec", spec))


RAY_FILES = ("kubernetes/rayjob.yaml", "kubernetes/raycluster.yaml")
RAY_UP_FILES = ("ray-up/on-premise.yaml", "ray-up/aws.yaml")

# -------------------------------------------------------------------------------------------------- valid


def closed(schema: Any) -> Any:
    """The schema with keys that it does not name refused: the API server would drop them silently."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    part = {key: closed(value) for key, value in schema.items()}
    if isinstance(part.get("properties"), dict) and part.get("type") == "object":
        part.setdefault("additionalProperties", False)
    return part


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return dict(closed(json.loads((ROOT / "tests" / "schemas" / "rayjob-v1.schema.json").read_text(encoding="utf-8"))))


def check(document: dict[str, Any], schema: dict[str, Any]) -> None:
    """Validate a RayJob, or a RayCluster, whose spec is a part of it."""
    if document["kind"] == "RayCluster":
        spec = schema["properties"]["spec"]["properties"]["rayClusterSpec"]
        schema = {**schema, "properties": {**schema["properties"], "spec": spec}}
    jsonschema.Draft202012Validator(schema).validate(document)


def test_every_yaml_is_one_of_those_tested_here() -> None:
    tested = {*RAY_FILES, *RAY_UP_FILES, "kubernetes/network-policy.yaml", "kubernetes/volume.yaml"}
    tested |= {"monitoring/prometheus.yaml", "monitoring/prometheus-kubernetes.yaml", "runtime_env.yaml"}
    tested |= {"monitoring/alerts.yaml", "kubernetes/podmonitor.yaml"}
    assert {str(file.relative_to(CLUSTER)) for file in YAML_FILES} == tested
    for file in YAML_FILES:
        assert yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RAY_FILES)
def test_kuberay_files_fit_its_schema(name: str, schema: dict[str, Any]) -> None:
    check(read(name), schema)
    document = read(name)
    document["spec"].get("rayClusterSpec", document["spec"])["headGroupSpec"]["template"]["spec"]["volume"] = []
    with pytest.raises(jsonschema.ValidationError, match="'volume' was unexpected"):
        check(document, schema)


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_ray_up_files_pass_the_validator_of_ray(name: str) -> None:
    validate_config(prepare_config(read(name)))
    with pytest.raises(jsonschema.ValidationError, match="maximum_workers"):
        validate_config(prepare_config(read(name) | {"maximum_workers": 2}))


def test_the_dockerfile_and_the_scripts_are_clean() -> None:
    tools = Path(sys.executable).parent
    for command in ([tools / "hadolint", DOCKERFILE], [tools / "shellcheck", *SCRIPTS]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert script.stat().st_mode & stat.S_IXUSR or script.suffix == ".sbatch"


def test_what_the_files_name_exists() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    copied = [source for group in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for source in group.split()]
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in (CLUSTER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = setup["options"]["package_dir"].split()[2::3]
    assert set(packages) <= set(copied), "all that is installed is in the image"
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (CLUSTER / "README.md").read_text(encoding="utf-8")):
        assert (CLUSTER / link).exists(), link
    for name in (*RAY_FILES, *RAY_UP_FILES):
        assert f"/mpscl_ray:{__version__}" in (CLUSTER / name).read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in RAY_FILES:
        assert f"ray=={cluster_spec(name)['rayVersion']}\n" in constraints
    _, _, _, preset, *overrides = read("kubernetes/rayjob.yaml")["spec"]["entrypoint"].split()
    assert load_config(preset, overrides).scaling.num_workers == 2
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for name in RAY_FILES
        for pod in pods(cluster_spec(name))
        for volume in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {read("kubernetes/volume.yaml")["metadata"]["name"]}


# -------------------------------------------------------------------------------------------------- locked


@pytest.mark.parametrize("name", RAY_FILES)
def test_pods_are_guarded_by_a_token_and_run_without_rights(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"]["mode"] == "token"
    for pod in pods(spec):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        writable = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        empty = {volume["name"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume}
        assert {writable[name] for name in empty} == {"/tmp", "/home/ray"}
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
        assert not any("token" in entry["name"].lower() for entry in container["env"])


def test_the_network_policy_is_that_of_the_pods() -> None:
    policy = read("kubernetes/network-policy.yaml")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    selected = policy["podSelector"]["matchLabels"]
    ports = set()
    for name in RAY_FILES:
        for pod in pods(cluster_spec(name)):
            assert pod["metadata"]["labels"].items() >= selected.items()
            ports |= {port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    assert all(rule.get("from") for rule in policy["ingress"]), "from anywhere"
    let_in = {port["port"] for rule in policy["ingress"] for port in rule.get("ports", [])}
    assert let_in == {8265, 8080}
    assert let_in <= ports
    submitter = read("kubernetes/rayjob.yaml")["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    assert {"podSelector": {"matchLabels": submitter}} in policy["ingress"][1]["from"]


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_every_node_of_ray_up_is_started_with_the_token(name: str) -> None:
    config = read(name)
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
        assert "--disable-usage-stats" in start
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_the_image_has_no_root_no_token_and_no_telemetry() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000:1000"]
    assert "RAY_AUTH_MODE=token" in text
    assert "RAY_USAGE_STATS_ENABLED=0" in text
    assert "RAY_AUTH_TOKEN" not in text
    assert re.search(r"^ARG BASE=python:\d+\.\d+\.\d+-slim-\w+$", text, re.MULTILINE), "pinned to the patch release"
    assert "-c /opt/mpscl_ray/constraints.txt" in text
    assert read("runtime_env.yaml")["env_vars"]["RAY_USAGE_STATS_ENABLED"] == "0"


# ---------------------------------------------------------------------------------------------- monitoring


ALERTS = CLUSTER / "monitoring" / "alerts.yaml"


def alerts() -> list[dict[str, Any]]:
    (group,) = read("monitoring/alerts.yaml")["groups"]
    return list(group["rules"])


def expressions() -> list[str]:
    dashboard = json.loads((CLUSTER / "monitoring" / "grafana-dashboard.json").read_text(encoding="utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_every_alert_names_metrics_that_are_exported() -> None:
    ours = {f"ray_{name}{'_total' * (name == 'mpscl_restarts')}" for name in prometheus.TAGS}
    for alert in alerts():
        named = re.findall(r"\bray_\w+", alert["expr"])
        assert named
        assert {name for name in named if name.startswith("ray_mpscl")} <= ours
        assert alert["annotations"].keys() == {"summary", "description"}
        assert alert["labels"]["severity"] in ("warning", "critical")
    for name in ("prometheus.yaml", "prometheus-kubernetes.yaml"):
        assert read(f"monitoring/{name}")["rule_files"] == [ALERTS.name]


ALERT_CASES = {
    "CheckpointIsOld": ("ray_mpscl_checkpoint_timestamp_seconds", "0x80", "0+60x80", "70m", 'run="a"'),
    "TrainingStandsStill": ("ray_mpscl_step", "7x80", "0+1x80", "40m", 'run="a"'),
    "WorkersAreReplacedAgainAndAgain": ("ray_mpscl_restarts_total", "0+1x80", "2x80", "60m", 'run="a"'),
    "TrainingWaitsForData": ("ray_mpscl_data_stall_fraction", "0.5x80", "0.1x80", "40m", 'run="a"'),
    "DiscriminatorWins": ("ray_mpscl_discriminator_accuracy", "1x80", "0.8x80", "40m", 'run="a", head="main"'),
}
"""By alert: a metric, its values each minute that fire and that do not, when they are asked, its tags."""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on this machine (apt install prometheus)")
@pytest.mark.parametrize("alert", ALERT_CASES)
def test_an_alert_fires_when_it_should_and_not_else(alert: str, tmp_path: Path) -> None:
    """Promtool is told each time that nothing fires."""
    metric, bad, good, at, tags = ALERT_CASES[alert]
    said = {}
    for values in (bad, good):
        case = {
            "interval": "1m",
            "input_series": [{"series": f"{metric}{{{tags}}}", "values": values}],
            "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": []}],
        }
        content = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [case]}
        (tmp_path / "case.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        done = subprocess.run(["promtool", "test", "rules", tmp_path / "case.yaml"], capture_output=True, text=True)
        said[values] = done.returncode, done.stdout + done.stderr
    assert said[good][0] == 0, said[good][1]
    assert said[bad][0] != 0
    assert f'alertname="{alert}"' in said[bad][1]


def test_the_pod_monitor_finds_the_pods_and_their_port() -> None:
    spec = read("kubernetes/podmonitor.yaml")["spec"]
    (endpoint,) = spec["podMetricsEndpoints"]
    for name in RAY_FILES:
        for pod in pods(cluster_spec(name)):
            assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
            ports = [port["name"] for container in pod["spec"]["containers"] for port in container["ports"]]
            assert endpoint["port"] in ports


def test_every_metric_of_the_dashboard_is_exported_by_the_code_or_by_ray() -> None:
    ours = {f"ray_{name}{'_total' * (name == 'mpscl_restarts')}" for name in prometheus.TAGS}
    rays = "".join(file.read_text(encoding="utf-8") for file in Path(ray_dashboards.__path__[0]).glob("*_panels.py"))
    named = set()
    for expression in expressions():
        bare = re.sub(r"\{[^}]*\}|by \([^)]*\)", "", expression)
        found = set(re.findall(r"\bray_\w+", bare))
        assert found, expression
        named |= found
        for name, labels in re.findall(r"ray_(mpscl_\w+?)(?:_total)?\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)=", labels)) <= {"run", *prometheus.TAGS[name]}
    for name in named - ours:
        assert re.search(rf"\b{name}\b", rays), name
    assert ours <= named, "none is forgotten"


def test_the_metrics_are_documented_with_their_tags() -> None:
    lines = (CLUSTER / "README.md").read_text(encoding="utf-8").splitlines()
    for name, tags in prometheus.TAGS.items():
        (line,) = [line for line in lines if re.match(rf"\W*{name}(_total)?\b", line)]
        for tag in tags:
            assert re.search(rf"\b{tag}\b", line), line


def test_readings_of_a_record() -> None:
    record = {
        "global_step": 12,
        "phase": "adaptation",
        "iteration": 3,
        "iterations": 4,
        "train/loss_contrastive_target": 0.5,
        "train/discriminator_accuracy_main": 0.75,
        "train/learning_rate_segmenter": 0.01,
        "train/gradient_norm": 3.0,
        "train/gradient_norm_encoder": 1.0,
        "train/non_finite": 0,
        "val/dice/wall": 0.25,
        "val/dice/ventricle": float("nan"),
        "val/source/dice/mean": 0.125,
        "val/entropy": 2.0,
    }
    assert sorted(prometheus.readings(record), key=str) == [
        ("mpscl_dice", {"domain": "source", "structure": "mean"}, 0.125),
        ("mpscl_dice", {"domain": "target", "structure": "wall"}, 0.25),
        ("mpscl_discriminator_accuracy", {"head": "main"}, 0.75),
        ("mpscl_entropy", {"domain": "target"}, 2.0),
        ("mpscl_gradient_norm", {"network": "all"}, 3.0),
        ("mpscl_gradient_norm", {"network": "encoder"}, 1.0),
        ("mpscl_learning_rate", {"network": "segmenter"}, 0.01),
        ("mpscl_loss", {"loss": "contrastive_target"}, 0.5),
        ("mpscl_phase_progress", {"phase": "adaptation"}, 0.75),
        ("mpscl_step", {}, 12.0),
    ]
