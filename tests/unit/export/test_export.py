"""The export command: one file that predicts what the run predicts, bit for bit, and says what it is."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import yaml

from mpscl_ray import export_model, load_segmenter
from mpscl_ray.errors import ConfigError
from mpscl_ray.evaluate.command import main as evaluate
from mpscl_ray.export.command import main as export
from mpscl_ray.predict.command import main as predict
from mpscl_ray.predict.ensemble import Member
from mpscl_ray.predict.image import Job, predict_in_worker
from mpscl_ray.predict.model import Checkpoint
from tests.hearts_run import CLASSES, oblique, write_hearts_run, write_image


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_hearts_run(tmp_path_factory.mktemp("export"))
    settings = {
        "run": {"name": "hearts", "storage": "/home/someone/runs"},
        "data": {"source": "phantom:mr", "target": "s3://hospital/ct"},
        "network": {"pretrained": "weights/resnet.pth"},
        "method": {"name": "mpscl"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def model(run: Path) -> Path:
    file = run.parent / "hearts.mpscl"
    assert export([str(run), "--out", str(file), "--licence", "CC-BY-4.0"]) == 0
    return file


def contents(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("options", [[], ["--label-values", "raw", "--probabilities", "--modality", "mr"]])
def test_label_maps_are_those_of_the_run_bit_for_bit(
    run: Path, model: Path, tmp_path: Path, options: list[str]
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for seed in range(2):
        write_image(scans / f"p{seed}.nii.gz", seed, oblique())
    for name, words in (("run", [str(run), "--checkpoint", "best"]), ("model", [str(model)])):
        given = [words[0], str(scans), "--out", str(tmp_path / name), *words[1:], "--workers", "0", *options]
        assert predict(given) == 0
    files = sorted(path.name for path in (tmp_path / "run").glob("*.nii.gz"))
    assert len(files) == (2 if not options else 2 * len(CLASSES))
    for file in files:
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    if not options:  # what a worker on another node does
        member = Member(str(model), Checkpoint("best", Path("weights")), 0)
        job = Job((member,), "target", tmp_path / "worker")
        assert predict_in_worker(job, scans / "p0.nii.gz").error is None
        assert (tmp_path / "worker" / files[0]).read_bytes() == (tmp_path / "run" / files[0]).read_bytes()
    entry = json.loads((tmp_path / "model" / "volumes.json").read_text(encoding="utf-8"))["predictions"][files[0]]
    assert entry["run"] == str(model)
    assert entry["checkpoint"]["name"] == "best"


def test_the_same_run_gives_the_same_bytes(run: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hearts\.mpscl is there already; give another name, or --overwrite"):
        export([str(run), "--out", str(model)])
    again = tmp_path / "folder" / "again.mpscl"
    again.parent.mkdir()
    again.write_bytes(b"")
    assert export([str(run), "--out", str(again), "--licence", "CC-BY-4.0", "--overwrite"]) == 0
    assert again.read_bytes() == model.read_bytes()
    card = export_model(run, tmp_path / "python.mpscl", "best", licence="CC-BY-4.0")
    assert card == json.loads(contents(model)["card.json"])
    assert (tmp_path / "python.mpscl").read_bytes() == model.read_bytes()
    with pytest.raises(ConfigError, match="no format 'tflite'; choose one of mpscl, onnx"):
        export_model(run, tmp_path / "a.tflite", format="tflite")  # type: ignore[arg-type]
    assert export([str(run), "--out", str(tmp_path / "other.mpscl"), "--checkpoint", "last"]) == 0
    assert (tmp_path / "other.mpscl").read_bytes() != model.read_bytes()


def test_it_holds_no_path_and_no_name_of_a_case(run: Path, model: Path) -> None:
    text = b"\n".join(contents(model).values())
    for word in (str(run), str(run.parent), "/home", "s3://", "weights/resnet", "case40", "case07"):
        assert word.encode() not in text, word
    settings = yaml.safe_load(contents(model)["config.yaml"])
    assert settings["data"] == {"source": "phantom:mr", "target": ""}
    assert settings["run"] == {"name": "hearts", "storage": ""}


def test_the_card_says_what_it_is(run: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = json.loads(contents(model)["card.json"])
    assert card["structures"] == {"MYO": 205, "LAC": 420, "LVC": 500, "AA": 820}
    assert card["data"]["target"]["splits"]["test"] == {"volumes": 4, "labelled": 3, "slices": 89}
    assert (card["data"]["source"]["labels_train"], card["data"]["target"]["labels_train"]) == (True, False)
    assert card["weights"]["checkpoint"] == "best"
    assert card["selection"]["target_labels_chose_the_weights"] is True, "it was chosen by the oracle"
    assert card["selection"]["target_labels_trained_the_weights"] is False
    assert card["licence"] == {"weights": "CC-BY-4.0", "software": "Apache-2.0"}
    capsys.readouterr()
    assert export([str(model), "--show"]) == 0
    shown = capsys.readouterr().out
    assert shown.encode() == contents(model)["card.md"]
    assert "not a medical device" in shown
    assert "| target: ct | no | 1 (0), 6 | 1 (1), 5 | 4 (3), 89 |" in shown
    assert "Did labels of the target choose the weights? yes. Did they train them? no." in shown
    assert export([str(run), "--show", "--licence", "CC-BY-4.0"]) == 0
    assert capsys.readouterr().out == shown


def test_the_card_has_the_scores_of_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_hearts_run(tmp_path / "scored")
    assert export([str(run), "--checkpoint", "source_only", "--out", str(tmp_path / "a.mpscl")]) == 0
    assert "evaluate" in capsys.readouterr().out
    assert json.loads(contents(tmp_path / "a.mpscl")["card.json"])["scores"] is None
    assert evaluate([str(run), "--checkpoint", "source_only", "--workers", "0"]) == 0
    assert evaluate([str(run), "--checkpoint", "source_only", "--workers", "0", "--largest-component"]) == 0
    (folder,) = (path for path in (run / "results").glob("source_only_*") if "largest" not in path.name)
    expected = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["summary"]
    capsys.readouterr()
    assert export([str(run), "--checkpoint", "source_only", "--out", str(tmp_path / "b.mpscl")]) == 0
    assert "note" not in capsys.readouterr().out
    scores = json.loads(contents(tmp_path / "b.mpscl")["card.json"])["scores"]
    assert (scores["split"], scores["protocol"], scores["volumes"]) == ("test", "prepared", 3)
    assert scores["structures"]["MYO"]["dice"] == expected["structures"]["MYO"]["dice"]
    assert scores["structures"].keys() == {*CLASSES[1:], "mean"}
    mean = f"{100 * expected['structures']['mean']['dice']['mean']:.1f}"
    assert f"| mean | {mean} ±" in contents(tmp_path / "b.mpscl")["card.md"].decode()


def test_a_model_is_evaluated_as_its_run(run: Path, model: Path, tmp_path: Path) -> None:
    data = str(run.parent / "ct")
    with pytest.raises(ConfigError, match="a model file, which keeps no results; give a folder for them: --out DIR"):
        evaluate([str(model), "--data", data])
    found = []
    for words in ([str(run), "--checkpoint", "best"], [str(model)]):
        assert evaluate([*words, "--data", data, "--out", str(tmp_path / "scores"), "--workers", "0"]) == 0
        found.append((tmp_path / "scores" / "per_volume.csv").read_bytes())
    assert found[0] == found[1]


def test_one_checkpoint_is_all_it_has(run: Path, model: Path, tmp_path: Path) -> None:
    assert load_segmenter(model, device="cpu").checkpoint.name == "best"
    assert load_segmenter(model, "best", device="cpu").checkpoint.oracle
    with pytest.raises(ConfigError, match="holds the weights 'best' alone, not 'adaptation'; leave out --checkpoint"):
        load_segmenter(model, "adaptation")
    with pytest.raises(ConfigError, match="is a model file already; copy it"):
        export([str(model), "--out", str(tmp_path / "copy.mpscl")])
    with pytest.raises(ConfigError, match="give it when exporting the run"):
        export([str(model), "--show", "--licence", "MIT"])
    (tmp_path / "folder.mpscl").mkdir()
    with pytest.raises(ConfigError, match="is a folder; give the name"):
        export([str(run), "--out", str(tmp_path / "folder.mpscl")])
