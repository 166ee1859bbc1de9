"""The commands of README and docs, one after the other in one folder: each finds what those before it left.

Volumes, networks and trainings are tiny: words are added behind those of the document, and the name of a preset is
replaced by a file with the same preset made tiny. What trains is a stub; the rest is real.
"""

from __future__ import annotations

import importlib
import json
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

import mpscl_ray
from mpscl_ray.__main__ import MODULES
from mpscl_ray.config import load_config, preset_names, to_dict
from mpscl_ray.config.systems import SYSTEMS
from mpscl_ray.runs.run_directory import RunDirectory
from tests.docs.markdown import GUIDES, ROOT, blocks, commands
from tests.raw_volumes import RAW_IDS, mmwhs, volume, write
from tests.ray.conftest import Here
from tests.stub_fit import fit
from tests.tiny import tiny_settings

BUCKET = "tests/cluster/test_object_storage.py::test_prepare_evaluate_and_predict_by_url"
JOB = "tests/cluster/test_jobs.py::test_a_job_that_was_stopped_and_then_lost_a_node_succeeds"
SPREAD = "tests/ray/test_places.py::test_commands_spread_volumes_over_a_cluster"
EXPORT = "tests/unit/export/test_export.py::"

ELSEWHERE = {
    "python -m mpscl_ray.train": ".ci/run",
    "python -m mpscl_ray.tune": "tests/ray/test_tune.py::test_two_trials_are_really_trained",
    "python -m mpscl_ray.prepare MMWHS --layout mmwhs --out /shared/data": "tests/unit/prepare/test_command.py",
    "python -m mpscl_ray.prepare MMWHS --layout mmwhs --out s3://*": BUCKET,
    "python -m mpscl_ray.prepare SERIES *": (
        "tests/unit/prepare/test_dicom.py::test_a_series_gives_the_same_data_as_its_nifti_file"
    ),
    "python -m mpscl_ray.train mr2ct/mpscl data.source=s3://*": (
        "tests/cluster/test_object_storage.py::test_a_run_that_is_cut_off_and_killed_ends_as_on_a_disk"
    ),
    "python -m mpscl_ray.tune mpscl data.source=s3://*": (
        "tests/cluster/test_search_in_bucket.py::test_a_killed_search_in_a_bucket_goes_on_and_stops_what_falls_behind"
    ),
    "python -m mpscl_ray.compare --folds *": (
        "tests/ray/test_compare.py::test_folds_are_trained_scored_and_resumed_as_cells"
    ),
    "python -m mpscl_ray.predict s3://*": BUCKET,
    "python -m mpscl_ray.evaluate * --ray *": SPREAD,
    "python -m mpscl_ray.predict * --ray *": SPREAD,
    "python -m mpscl_ray.score totalsegmentator *": (
        "tests/unit/evaluate/test_score_labels.py::test_swapped_ids_are_told_apart_by_the_tables"
    ),
    "python -m mpscl_ray.evaluate runs/mr2ct --checkpoint best": EXPORT + "test_the_card_has_the_scores_of_evaluate",
    "python -m mpscl_ray.evaluate runs/mr2ct --calibrate-quality": (
        "tests/unit/evaluate/test_calibrate_quality.py::"
        "test_every_phase_is_calibrated_and_predict_takes_it_from_the_run_and_its_model_file"
    ),
    "python -m mpscl_ray.export *": EXPORT + "test_the_card_says_what_it_is",
    "python -m mpscl_ray.predict runs/seed1 *": (
        "tests/unit/predict/test_ensemble.py::test_the_command_the_worker_and_the_api_give_the_same"
    ),
    "python -m mpscl_ray.predict mr2ct.mpscl *": EXPORT + "test_label_maps_are_those_of_the_run_bit_for_bit",
    "ray job submit *": JOB,
}
"""Patterns of commands that are not run here, and what runs such a command."""

ADDED = {
    "check": ["--workers", "0"],
    "prepare": ["--crop", "24,24", "--size", "32,32", "--workers", "0"],
    "train": ["scaling.num_workers=1"],
    "tune": ["search.num_samples=1", "scaling.num_workers=1"],
    "compare": ["source_only", "mpscl", "--seeds", "1", "scaling.num_workers=1"],
    "evaluate": ["--workers", "0"],
    "predict": ["--workers", "0"],
    "score": ["--workers", "0"],
    "report": [],
}
"""Words that make a command short, by its name."""

STRUCTURES = ("heart_myocardium", "heart_atrium_left", "heart_ventricle_left", "aorta")
"""Names that TotalSegmentator gives to the structures of RAW_IDS."""

ALL = list(dict.fromkeys(command.text for file in GUIDES for command in commands(file)))
HERE = [text for text in ALL if not any(fnmatchcase(text, pattern) for pattern in ELSEWHERE)]


def test_what_is_run_elsewhere_is_run_there() -> None:
    names = {text.split()[2].removeprefix("mpscl_ray.") for text in HERE}
    assert names == {"check", "prepare", "train", "evaluate", "predict", "score", "compare", "report", "tune"}
    for pattern, test in ELSEWHERE.items():
        assert any(fnmatchcase(text, pattern) for text in ALL), f"{pattern} is in no document any more"
        file, _, name = test.partition("::")
        assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), test
    assert 'readme "Run it"' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def make_volumes(folder: Path) -> None:
    """What the documents expect: MM-WHS, two hospitals, masks by structure, nnU-Net, short-axis stacks, a patient."""
    for modality in ("mr", "ct"):
        mmwhs(folder / "MMWHS", modality, range(1002, 1010))
    values = dict(zip(RAW_IDS, (1, 2, 1, 2), strict=True))
    axis = dict(zip(RAW_IDS, (200, 500, 600, 200), strict=True))
    for number in range(5):
        image, raw = volume(number)
        ct, _ = volume(100 + number, low=-1000.0)

        def label(table: dict[int, int], raw: object = raw) -> np.ndarray:
            return np.vectorize(lambda value: table.get(value, 0))(raw).astype(np.int16)  # type: ignore[no-any-return]

        write(folder / "HOSPITAL_A" / f"a{number}_image.nii.gz", image)
        write(folder / "HOSPITAL_A" / f"a{number}_label.nii.gz", label(values))
        write(folder / "HOSPITAL_B" / f"b{number}.nii.gz", ct)
        write(folder / "LGE" / f"{number}_LGE.nii.gz", image)
        write(folder / "LGE" / f"{number}_LGE_manual.nii.gz", label(axis))
        write(folder / "TOTAL" / f"t{number}" / "ct.nii.gz", ct)
        masks = folder / "TOTAL" / f"t{number}" / "segmentations"
        for name, raw_id in zip(STRUCTURES, RAW_IDS, strict=True):
            write(masks / f"{name}.nii.gz", label({raw_id: 1}))
        nnunet = folder / "Dataset042_Heart"
        write(nnunet / "imagesTr" / f"heart_{number}_0000.nii.gz", image)
        write(nnunet / "labelsTr" / f"heart_{number}.nii.gz", label(values))
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "MYO": 1, "LV": 2}, "numTraining": 5}
    (nnunet / "dataset.json").write_text(json.dumps({**about, "file_ending": ".nii.gz"}))
    indices = {raw_id: index for index, raw_id in enumerate(RAW_IDS, 1)}
    write(folder / "patient.nii.gz", volume(7)[0])
    write(folder / "label.nii.gz", np.vectorize(lambda value: indices.get(value, 0))(volume(7)[1]).astype(np.int16))


def make_presets(folder: Path, data: Path) -> None:
    """Every preset that is not a file of another name, made tiny, on ``data`` instead of the phantom hearts."""
    for name in preset_names():
        if name.rpartition("/")[2] not in (*SYSTEMS, "phantom"):
            continue
        plain = to_dict(load_config(name, tiny_settings(name)))
        del plain["run"]["name"], plain["run"]["storage"]
        if name.startswith("phantom"):
            plain["data"] |= {"source": str(data / "ct"), "target": str(data / "mr")}
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(plain))


def tiny_words(text: str, presets: Path) -> tuple[str, list[str]]:
    """Name of the command, and its words with tiny presets and those of ADDED."""
    _, _, module, *words = shlex.split(text)
    name = module.rpartition(".")[2]
    if name == "train":
        words = [f"{presets / word}.yaml" if word in preset_names() else word for word in words]
    if name == "tune":
        words.append(f"preset={presets / ('mr2ct/mpscl' if words else 'phantom')}.yaml")
    if name == "compare":
        given = words[words.index("--presets") + 1] if "--presets" in words else "phantom"
        words += ["--presets", ",".join(str(presets / family) for family in given.split(","))]
    return name, [*words, *ADDED[name]]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    make_volumes(folder)
    make_presets(folder / "presets", folder / "mmwhs")
    return folder


def test_the_commands_fit_together(here: Here, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for text in HERE:
        name, words = tiny_words(text, workplace / "presets")
        options = {"fit": fit} if name in ("train", "tune", "compare") else {}
        code, output = here(importlib.import_module(MODULES[name]), *words, **options)
        assert code == 0, f"{text}\n{output}"
    for run in ("hospital", "mr2ct", "tune-contrastive/trials/001"):
        assert RunDirectory(Path("runs") / run).read_status()["state"] == "finished"
    for file in (
        "data/mr/manifest.json",
        "mmwhs/ct/manifest.json",
        "runs/compare/comparison.md",
        "runs/tune-contrastive/best.yaml",
        "report/index.html",
        "scores/scores.csv",
    ):
        assert Path(file).is_file(), file
    assert len(list(Path("predictions").glob("b*_prediction.nii.gz"))) == 5
    for image in Path("HOSPITAL_B").glob("*.nii.gz"):
        prediction = nib.load(Path("predictions") / image.name.replace(".nii.gz", "_prediction.nii.gz"))
        assert np.array_equal(prediction.affine, nib.load(image).affine)


@pytest.mark.skipif(not hasattr(mpscl_ray, "load_segmenter"), reason="there is no Python API")
@pytest.mark.filterwarnings("ignore:.*no structure was found")  # after a few steps of training
def test_the_python_of_the_readme_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the commands, whose datasets it takes instead of the phantom hearts."""
    monkeypatch.chdir(workplace)
    (block,) = blocks(ROOT / "README.md", "python")
    exec(block.replace('"phantom"', repr(str(workplace / "presets" / "phantom.yaml"))), {})
