"""The network in the formats of other programs computes what predict computes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from mpscl_ray import load_segmenter
from mpscl_ray.errors import ConfigError
from mpscl_ray.export.command import main as export
from mpscl_ray.export.network import onnx, torchscript
from mpscl_ray.networks import build, initialise
from mpscl_ray.predict.model import Model
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.runs.model_file import unpack
from tests.untrained_run import CLASSES, NETWORK, save, segmenter, write_run

NETWORKS: dict[str, dict[str, Any]] = {
    "deeplab": NETWORK,
    "three channels, twin heads, stride 8": {
        "layers": [1, 2, 1, 1],
        "base_channels": 4,
        "in_channels": 3,
        "output_stride": 8,
        "twin_heads": True,
    },
    "sifa": {"kind": "sifa", "width": 4, "output_stride": 4},
}
SIZE = (32, 40)


def predictor(name: str) -> Predictor:
    network = build({"num_classes": 3, **NETWORKS[name]})
    initialise(network, 0)
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):  # larger than for training, so that probabilities differ
            torch.nn.init.kaiming_normal_(layer.weight, generator=generator)
    if NETWORKS[name].get("in_channels") == 3:  # whose input is 128 times as large
        with torch.no_grad():
            network.conv1.weight.div_(128)
    return Predictor(network, CLASSES, device="cpu", model=Model(CLASSES, SIZE, {}, {}, ()))


def assert_equal(found: np.ndarray, one: Predictor, slices: np.ndarray) -> None:
    expected = one.predict_probabilities(slices[:, 0]).swapaxes(0, 1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    highest = np.sort(expected, axis=1)
    clear = highest[:, -1] - highest[:, -2] > 1e-3
    assert clear.mean() > 0.99
    assert len(np.unique(found.argmax(1))) > 1
    assert np.array_equal(found.argmax(1)[clear], expected.argmax(1)[clear])


def slices_of(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).uniform(-1, 1, (batch, 1, *SIZE)).astype(np.float32)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_torchscript_gives_the_probabilities_of_predict(name: str) -> None:
    one = predictor(name)
    extra = {"card.json": ""}
    loaded = torch.jit.load(io.BytesIO(torchscript(one, {"name": "hearts"})), _extra_files=extra)
    assert json.loads(extra["card.json"]) == {"name": "hearts"}
    for batch in (1, 5):
        with torch.no_grad():
            assert_equal(loaded(torch.from_numpy(slices_of(batch))).numpy(), one, slices_of(batch))


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_gives_the_probabilities_of_predict_for_any_batch(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    one = predictor(name)
    session = onnxruntime.InferenceSession(onnx(one, {"name": "hearts"}), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["card.json"]) == {"name": "hearts"}
    for batch in (1, 5):
        (found,) = session.run(["probabilities"], {"slices": slices_of(batch)})
        assert_equal(found, one, slices_of(batch))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("formats") / "run").path
    save(run / "best", segmenter())
    return run


def test_what_a_format_needs_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"onnx needs onnxruntime, .*: pip install 'mpscl_ray\[onnx\]'"):
        export([str(run), "--format", "onnx", "--out", str(tmp_path / "a.onnx")])
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_has_the_same_model_from_a_run_and_from_a_model(run: Path, tmp_path: Path) -> None:
    assert export([str(run), "--out", str(tmp_path / "model.mpscl")]) == 0
    for source in (run, tmp_path / "model.mpscl"):
        assert export([str(source), "--format", "monai-bundle", "--out", str(tmp_path / "b"), "--overwrite"]) == 0
        assert (tmp_path / "b/models/model.mpscl").read_bytes() == (tmp_path / "model.mpscl").read_bytes()
    members = unpack((tmp_path / "model.mpscl").read_bytes(), "model")
    assert (tmp_path / "b/docs/README.md").read_bytes() == members["card.md"]
    with pytest.raises(ConfigError, match="is there already"):
        export([str(run), "--format", "monai-bundle", "--out", str(tmp_path / "b")])


SCHEMA = {
    "type": "object",
    "required": "schema version monai_version pytorch_version numpy_version required_packages_version task description "
    "authors copyright network_data_format".split(),
    "properties": {"version": {"type": "string"}, "eval_metrics": {"type": "object"}},
}
"""What MONAI's schema of 2024-07-25 requires at its top; ``verify_metadata`` downloads it where there is no copy."""

MONAI = """
import sys
from monai.bundle import run, verify_metadata, verify_net_in_out
files = {"meta_file": "configs/metadata.json", "config_file": "configs/inference.json"}
verify_metadata(meta_file=files["meta_file"], filepath=sys.argv[1])
verify_net_in_out("network_def", device="cpu", **files)
run(modality="mr", **files)
"""
"""As ``python -m monai.bundle`` does, but importing MONAI once. It is run in the folder of a bundle."""


@pytest.mark.filterwarnings("ignore:.*the header says", "ignore:.*the edge of the crop")
def test_a_bundle_passes_the_checks_of_monai_and_predicts_as_the_run(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("monai")
    bundle = tmp_path / "bundle"
    assert export([str(run), "--format", "monai-bundle", "--out", str(bundle)]) == 0
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
    for seed in range(2):
        image = np.random.default_rng(seed).normal(100, 30, (34, 12, 36)).astype(np.float32)
        (bundle / "images").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(image, np.eye(4)), bundle / "images" / f"p{seed}.nii.gz")
    done = subprocess.run(
        [sys.executable, "-c", MONAI, str(tmp_path / "schema.json")], cwd=bundle, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    trained = load_segmenter(run, "best", device="cpu")
    for seed in range(2):
        label_map = bundle / "predictions" / f"p{seed}_prediction.nii.gz"
        expected = trained.predict_file(bundle / f"images/p{seed}.nii.gz", tmp_path / "own.nii.gz", modality="mr")
        assert label_map.read_bytes() == expected.read_bytes()
