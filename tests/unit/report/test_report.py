"""The report command on tiny runs: what is on the page, what it names as missing, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from mpscl_ray.data.dataset import load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.evaluate.run import evaluate_phases
from mpscl_ray.evaluate.scoring import evaluate_checkpoint
from mpscl_ray.methods.losses import class_counts, weighted_cross_entropy
from mpscl_ray.predict.model import find_checkpoint
from mpscl_ray.predict.predictor import load_weights
from mpscl_ray.report import command as report
from mpscl_ray.report import groups as report_groups
from mpscl_ray.report import run as report_run
from mpscl_ray.report.runs import choose_case, predict_case, read_runs
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train.feature_log import FeatureRecord
from mpscl_ray.train.phase_images import draw_phases
from tests.s3 import serve, upload_folder
from tests.tiny import CLASSES, make_dataset, make_pair
from tests.tiny_runs import tiny_run

FIGURES = {"segmentations", "surfaces", "overconfident", "losses", "features"}
"""Of any run with labels in its target's test split."""


def quick(runs: Sequence[Path], out: Path) -> Path:
    """A report with coarse figures, without PDF and without volumes, which the test of two runs asks for."""
    return report_run.report(runs, out, dpi=20, pdf=False, volumes=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def margin(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "margin", data / "mr", data / "ct")


class Page(HTMLParser):
    """What a page refers to, its pictures, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.references: list[str] = []
        self.pictures: list[tuple[str, str]] = []
        self.text = ""
        self.tags: set[str] = set()
        self.inside = ""
        self.feed(file.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.inside = tag
        values = {name: value or "" for name, value in attrs}
        self.references += [values[name] for name in ("src", "href", "data", "action") if name in values]
        if tag == "img":
            self.pictures.append((values["src"], values["alt"]))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, text: str) -> None:
        if self.inside == "style":
            assert "url(" not in text
        elif self.inside != "script":
            self.text += text


def assert_whole(file: Path, names: set[str]) -> Page:
    """The page needs no other file, and contains each figure, which is also a file."""
    page = Page(file)
    assert page.tags.isdisjoint({"link", "iframe"})
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.references)
    assert len(page.pictures) == len(names)
    assert all(alternative for _, alternative in page.pictures)
    for name in names:
        assert (file.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return page


def test_two_runs_side_by_side(data: Path, margin: Path, tmp_path: Path) -> None:
    overrides = ["method.margin_source=0", "method.margin_target=0"]
    without = tiny_run(tmp_path / "without", data / "mr", data / "ct", overrides)
    file = report_run.report([without, margin], tmp_path / "report", dpi=20)
    own = {f"{kind}-{name}" for kind in ("angles", "pseudo-labels") for name in ("margin", "without")}
    names = FIGURES | own | {"margin", "selection", "cases"}
    page = assert_whole(file, names)
    for name in names:
        assert (file.parent / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    for text in ("CSCL", "MPSCL", "source-only (CSCL)", "MR to CT", "ct_test_0", *CLASSES[1:]):
        assert text in page.text, text
    assert "No scores yet for without, margin" in page.text


def test_without_images_the_page_has_scores_and_curves_and_predicts_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path / "run", data / "mr", data / "ct")
    evaluate_phases(run, ["adaptation"], workers=0, progress=False)
    monkeypatch.setattr(report_groups, "load_weights", lambda *_: pytest.fail("nothing may be predicted"))
    file = report_run.report([run], tmp_path / "report", dpi=20, pdf=False, images=False)
    page = assert_whole(file, {"losses", "angles-run", "selection", "cases"})
    assert "There are no images of patients" in page.text
    assert "ct_test_0" in page.text
    assert "viewer-data" not in file.read_text(encoding="utf-8")


def test_a_target_without_labels_gives_fewer_figures_and_says_so(data: Path, tmp_path: Path) -> None:
    target = make_dataset(tmp_path / "ct", "ct", seed=1, labelled=())
    run = tiny_run(tmp_path / "run", data / "mr", target)
    names = FIGURES | {"angles-run", "pseudo-labels-run", "selection"}
    file = quick([run], tmp_path / "report")
    # So short a training may predict nothing but background, which gives a sentence instead of a figure.
    if "No surfaces are drawn" in Page(file).text:
        names.remove("surfaces")
    page = assert_whole(file, names)
    for text in ("shown without ground truth", "errors are not marked", "no curve on the target", "by prediction"):
        assert text in page.text, text
    assert "image, source-only, warm-up, adaptation." in page.text


def test_an_unfinished_run_is_shown_up_to_its_newest_checkpoint(data: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", data / "mr", data / "ct", stop_after=6)
    page = assert_whole(quick([run], tmp_path / "report"), FIGURES)
    assert "image, source-only, so far, ground truth" in page.text
    assert "interrupted (iteration 2 of warm_up)" in page.text
    assert "No pseudo-labels from MPSCL" in page.text


def test_a_run_without_checkpoint_is_shown_by_its_metrics(data: Path, tmp_path: Path) -> None:
    run = RunDirectory(tiny_run(tmp_path / "run", data / "mr", data / "ct", stop_after=1))
    for checkpoint in run.checkpoints.iterdir():
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    page = assert_whole(quick([run.path], tmp_path / "report"), {"losses"})
    assert "MPSCL has no checkpoint yet" in page.text


def test_runs_with_different_targets_have_separate_figures_phase_by_phase(
    data: Path, margin: Path, tmp_path: Path
) -> None:
    other = tiny_run(tmp_path / "other", data / "ct", data / "mr")
    file = quick([margin, other], tmp_path / "report")
    names = {f"{name}-{target}" for name in (*FIGURES, "selection") for target in ("mr", "ct")}
    page = assert_whole(file, names | {f"{k}-{n}" for k in ("angles", "pseudo-labels") for n in ("margin", "other")})
    assert "MPSCL (margin)" in page.text
    for target in ("mr", "ct"):
        assert f"Target {target.upper()}. Case {target}_test_0" in page.text
    assert page.text.count("image, source-only, warm-up, adaptation, ground truth") == 2
    assert "needs two runs with prototypes" in page.text


def test_a_run_in_a_bucket_is_read_by_its_url(margin: Path, tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        upload_folder(margin, server.folder("runs/margin"))
        url = server.url("runs/margin")
        (run,) = read_runs([url])
        (local,) = read_runs([margin])
        assert [saved.name for saved in run.checkpoints] == [saved.name for saved in local.checkpoints]
        assert (run.feature_records, run.records) == (local.feature_records, local.records)
        assert len(FeatureRecord(run.folder.path).read_panels()) == 2
        assert load_weights(run.model, run.checkpoints[-1], "cpu").weights.step == 12  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match="is in a bucket; give a folder for its report with --out"):
            report.main([url])


def test_training_labels_of_the_target_are_never_read(margin: Path) -> None:
    (run,) = read_runs([margin])
    assert choose_case(run, "ct_train_0").label is None
    assert choose_case(run, "ct_val_1").label is not None
    assert choose_case(run, None).case.id == "ct_test_0"


def test_entropy_and_loss_of_the_shown_case(data: Path, margin: Path) -> None:
    (run,) = read_runs([margin])
    shown = choose_case(run, None)
    predictor = load_weights(run.model, find_checkpoint(margin, "adaptation")[0], "cpu")
    prediction = predict_case(predictor, shown, "adaptation")
    folder = data / "ct"
    arrays = read_case(folder, load_manifest(folder).split("test")[0])
    probabilities = torch.from_numpy(predictor.predict_probabilities(arrays["image"])).transpose(0, 1).double()
    entropy = torch.special.entr(probabilities).sum(1) / math.log(3)
    assert prediction.entropy == pytest.approx(entropy.numpy(), abs=1e-5)
    assert (prediction.labels == probabilities.argmax(1).numpy()).all()
    labels = torch.tensor(arrays["label"].astype(np.int64))
    sums = weighted_cross_entropy(probabilities.log(), labels, class_counts(labels, 3))
    assert prediction.cross_entropy == pytest.approx(float(sums.numerator / sums.denominator), rel=1e-5)
    assert prediction.step == 12
    assert np.isfinite(prediction.entropy).all()


def test_partly_annotated_data_are_trained_scored_and_drawn(tmp_path: Path) -> None:
    """Of each label map a part, into which structures reach, is not annotated; in both domains and all splits."""
    for modality in ("mr", "ct"):
        make_dataset(tmp_path / modality, modality, hidden=15)
    run = tiny_run(tmp_path / "run", tmp_path / "mr", tmp_path / "ct")
    records = RunDirectory(run).read_metrics()
    for tag in ("train/loss_segmentation", "val/dice/mean", "val/loss_cross_entropy", "val/source/dice/mean"):
        assert math.isfinite(records[-1][tag]), tag
    evaluation = evaluate_checkpoint(run, "adaptation", device="cpu", workers=0, progress=False)
    predictor = load_weights(read_runs([run])[0].model, find_checkpoint(run, "adaptation")[0], "cpu")
    for case in load_manifest(tmp_path / "ct").split("test"):
        arrays = read_case(tmp_path / "ct", case)
        below = predictor.predict_slices(arrays["image"])[:, 15:]
        for index, row in enumerate(evaluation.scores[case.id], start=1):
            assert row.truth_voxels == (arrays["label"][:, 15:] == index).sum() > 0
            assert row.predicted_voxels == (below == index).sum()
    page = assert_whole(
        quick([run], tmp_path / "report"), FIGURES | {"cases", "angles-run", "pseudo-labels-run", "selection"}
    )
    assert "ct_test_0" in page.text
    assert draw_phases(run, ["source_only", "adaptation"]) is not None


def test_a_report_that_cannot_be_made_is_refused_in_one_sentence(margin: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a run"):
        report_run.report([tmp_path])
    with pytest.raises(ConfigError, match="given twice"):
        report_run.report([margin, margin / ".." / "margin"])
    with pytest.raises(ConfigError, match=r"has no case 'ct_9'.*ct_test_0, ct_test_1"):
        report_run.report([margin], tmp_path, case="ct_9")


def test_without_the_dataset_the_curves_are_drawn(tmp_path: Path) -> None:
    data = make_pair(tmp_path / "data")
    run = tiny_run(tmp_path / "run", data / "mr", data / "ct")
    (data / "ct").rename(tmp_path / "moved")
    names = {"losses", "angles-run", "pseudo-labels-run", "selection"}
    page = assert_whole(quick([run], tmp_path / "report"), names)
    assert "No segmentations are shown: the target dataset" in page.text


def test_damaged_scores_are_named(margin: Path, tmp_path: Path) -> None:
    table = RunDirectory(margin).results / "phases.json"
    table.write_text("{")
    try:
        with pytest.raises(DataError, match=r"phases\.json is damaged"):
            report_run.report([margin], tmp_path)
    finally:
        table.unlink()
