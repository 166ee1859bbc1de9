"""What each command loads before it accepts its arguments: help and errors come at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpscl_ray.__main__ import MODULES

ROOT = Path(__file__).resolve().parents[2]

HEAVY = "torch ray numpy scipy pandas pyarrow matplotlib tensorboardX safetensors nibabel".split()
"""Packages that take from a tenth of a second to several seconds to import."""

ONE_AFTER_THE_OTHER = f"""
import contextlib, importlib, io, json, sys
from mpscl_ray.runs import cli
main, found = importlib.import_module(sys.argv[1]).main, []
for words in json.loads(sys.argv[2]):
    sys.argv[1:] = words
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            cli.run(main)
        except SystemExit as end:
            code = end.code
    found.append((code, text.getvalue(), [name for name in {HEAVY} if name in sys.modules]))
print(json.dumps(found))
"""
"""Runs a command with several lists of arguments: exit code, output and heavy packages loaded after each."""

CASES = {
    "train": [
        ("--help", 0, "* phases.adaptation=250 "),
        ("--help-all", 0, "method.halve_discriminator_loss=true"),
        ("mr2ct/clan --help", 0, "method.lambda_local=40.0"),
        ("--list-presets", 0, "mr2ct/mpscl_released"),
        ("--version", 0, "torch"),
        ("mr2ct/mpscl --print-config", 0, "name: mr2ct-mpscl"),
        ("--shwo", 2, "unrecognized arguments: --shwo"),
        ("mr2ct/mpsc", 2, "error: there is no preset 'mr2ct/mpsc'"),
        ("optim.lrr=1", 2, "error: 'optim.lrr' on the command line is not a setting"),
        ("method.margin_source=4", 2, "error: method.margin_source=4 on the command line"),
        ("run.name=a/b", 2, "error: run.name='a/b' must be made of"),
        ("small/mpscl", 2, "error: data.source is not set"),
    ],
    "tune": [
        ("--help", 0, "search.reduction_factor=4"),
        ("table_v --help-all", 0, "* search.method=grid (default random)"),
        ("--list-presets", 0, "mr2ct/mpscl_released"),
        ("--version", 0, "torch"),
        ("contrastive --print-config", 0, "# shared by all trials: source_only, warm_up"),
        ("--print-config --warm-up runs/before", 0, "warm_up: runs/before"),
        ("table_v search.num_samples=0 --shwo --help", 0, "* search.evaluate=all"),
        ("--shwo", 2, "unrecognized arguments: --shwo"),
        ("phantm", 2, "error: there is no space 'phantm'"),
        ("phantom optim.lr =3", 2, "error: 'optim.lr' is a setting without a value; write optim.lr=VALUE without"),
        ("preset=phantm", 2, "error: there is no preset 'phantm'"),
        ("optim.lrr=1", 2, "error: 'optim.lrr' on the command line is not a setting"),
        ("search.num_samples=0", 2, "error: search.num_samples=0 on the command line"),
        ("--metric dice", 2, "error: search.metric=dice on the command line is not one of"),
        ("preset=small/mpscl", 2, "error: data.source is not set"),
    ],
    "compare": [
        ("--help", 0, "  source_only        lower bound: the segmenter"),
        ("--version", 0, "torch"),
        ("--shwo", 2, "unrecognized arguments: --shwo"),
        ("mpsc", 2, "error: there is no system mpsc"),
        ("--num-workers 2", 2, "unrecognized arguments: --num-workers; write scaling.num_workers=2"),
        ("optim.lr =3", 2, "error: 'optim.lr' is a setting without a value; write optim.lr=VALUE without"),
        ("--presets nothing", 2, "error: there is no group of presets 'nothing'"),
        ("optim.lrr=1", 2, "error: phantom/source_only: 'optim.lrr' on the command line is not a setting"),
        ("mpscl method.margin_source=4", 2, "error: phantom/mpscl: method.margin_source=4 on the command line"),
        ("mpscl clan method.delta_th=0.1", 2, "error: phantom/clan: 'method.delta_th' on the command line is not a"),
        ("--seeds 0", 2, "error: --seeds is '0'"),
        ("--presets small", 2, "error: no data to compare on"),
    ],
    "check": [
        ("--help", 0, "whether the two can be trained together"),
        ("--version", 0, "torch"),
        ("in --shwo", 2, "unrecognized arguments: --shwo"),
        ("in --layout nothing", 2, "invalid choice: 'nothing'"),
        ("in --layout npy --channel -1", 2, "error: --channel -1: expected 0 or more"),
        ("in --workers -1", 2, "error: --workers is -1"),
        ("in --modality mr", 2, "error: --modality: describes images, and without --layout"),
        ("s3://bucket/data", 2, "error: s3://bucket/data is in a bucket"),
    ],
    "prepare": [
        ("--help", 0, "MM-WHS 2017, as downloaded"),
        ("--version", 0, "torch"),
        ("--shwo", 2, "required: INPUT, --layout, --out"),
        ("in --layout nothing --out out", 2, "invalid choice: 'nothing'"),
        ("in --layout npy --out abfs://bucket", 2, "error: abfs:// is not a storage that can be used directly"),
        ("in --layout npy --out out --channel -1", 2, "error: --channel -1: expected 0 or more"),
        ("in --layout npy --out out --clip-percentile 0", 2, "error: clip_percentile is 0.0"),
        ("in --layout npy --out out --range 3,1", 2, "error: --range '3,1': expected two numbers"),
    ],
    "evaluate": [
        ("--help", 0, "last checkpoint, test split of the target"),
        ("--version", 0, "torch"),
        ("run --shwo", 2, "unrecognized arguments: --shwo"),
        ("run --split nothing", 2, "invalid choice: 'nothing'"),
        ("run --workers -1", 2, "error: --workers is -1"),
    ],
    "predict": [
        ("--help", 0, "not a medical device"),
        ("--version", 0, "torch"),
        ("run image.nii --out out --shwo", 2, "unrecognized arguments: --shwo"),
        ("run image.nii --out out --assume-spacing 1,1", 2, "'1,1' is not three sizes"),
        ("run image.nii --out out --workers -1", 2, "error: --workers is -1"),
        ("run s3://bucket/image.nii --out out", 2, "error: s3://bucket/image.nii is in a bucket"),
    ],
    "export": [
        ("--help", 0, "no path, no name of a case, no pickle"),
        ("--version", 0, "torch"),
        ("run --out model.mpscl --shwo", 2, "unrecognized arguments: --shwo"),
        ("run", 2, "error: --out is missing: the file to write"),
        (
            "run --out model.onnx",
            2,
            "error: the file to write is model.onnx; of the format mpscl its name ends in .mpscl",
        ),
        ("run --out model.mpscl --format torchscript", 2, "of the format torchscript its name ends in .pt or .ts"),
        ("run --out model --format tflite", 2, "invalid choice: 'tflite'"),
        ("run --out abfs://bucket/model.mpscl", 2, "error: abfs:// is not a storage that can be used directly"),
    ],
    "score": [
        ("--help", 0, "names: dataset.json"),
        ("--version", 0, "torch"),
        ("predictions labels --shwo", 2, "unrecognized arguments: --shwo"),
        ("predictions labels --workers -1", 2, "error: --workers is -1"),
        ("predictions labels --labels MYO", 2, "error: --labels: 'MYO' is not ID=NAME"),
        ("predictions labels --labels 1=MYO --prediction-labels 1", 2, "error: --prediction-labels: '1' is not ID"),
        ("predictions labels --labels nothing.json", 3, "error: nothing.json: cannot be read"),
        ("predictions labels --ignore-label x", 2, "invalid int value: 'x'"),
        ("predictions labels --out abfs://bucket", 2, "error: abfs:// is not a storage that can be used directly"),
        ("s3://bucket/predictions labels", 2, "error: s3://bucket/predictions is in a bucket"),
    ],
    "report": [
        ("--help", 0, "one run, phase by phase"),
        ("--version", 0, "torch"),
        ("run --shwo", 2, "unrecognized arguments: --shwo"),
        ("run --out s3://bucket/report", 2, "is a URL, and a report is written to a folder"),
        ("s3://bucket/run", 2, "error: the run s3://bucket/run is in a bucket"),
    ],
}


@pytest.mark.parametrize("command", CASES)
def test_help_and_what_is_refused_need_nothing_that_computes(command: str, tmp_path: Path) -> None:
    words = json.dumps([arguments.split() for arguments, _, _ in CASES[command]])
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, MODULES[command], words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads(done.stdout)
    for (arguments, code, part), (found, text, loaded) in zip(CASES[command], results, strict=True):
        assert (found, loaded) == (code, []), arguments
        assert part in text, arguments
        if "--help" in arguments:
            assert max(map(len, text.splitlines())) <= 100, arguments
            assert "\n\nexit codes: 0 done" in text, arguments
    assert list(tmp_path.iterdir()) == []
