"""The train command before Ray starts: what it shows, and what it refuses at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mpscl_ray.config import load_config
from mpscl_ray.errors import ClusterError, ConfigError, DataError, StorageError
from mpscl_ray.runs import (
    checkpoint,
    cli,
)
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train import command as train
from mpscl_ray.train import run as train_run
from mpscl_ray.train.domains import load_domains, model_description
from mpscl_ray.train.ray import resources
from tests.tiny import CLASSES, SETTINGS, make_dataset, make_pair, tiny_config

ONE_WORKER = ("scaling.num_workers=1",)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here gets as far as starting Ray."""

    def start(*arguments: object, **options: object) -> None:
        pytest.fail("Ray would have been started")

    monkeypatch.setattr(train_run, "connect", start)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``python -m mpscl_ray.train`` in this process: exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run(train.main)
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def tiny(pair: Path, storage: Path, *overrides: str) -> list[str]:
    folders = [f"data.source={pair / 'mr'}", f"data.target={pair / 'ct'}", f"run.storage={storage}"]
    return ["small/mpscl", *SETTINGS, *ONE_WORKER, *folders, "run.name=run", *overrides]


def only_sentence(error: str) -> str:
    assert error.startswith("error: "), error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1, error
    return error


# --------------------------------------------------------------------------------------------------------- shows


def test_help_shows_options_settings_and_exit_codes(command: Command) -> None:
    code, text, _ = command("--help")
    assert code == 0
    for word in (
        "--allow-change",
        "settings of preset phantom (method mpscl)",
        "data.source=phantom:ct",
        "130 interrupted",
    ):
        assert word in text


def test_help_shows_the_settings_that_are_given(command: Command) -> None:
    _, text, _ = command("mr2ct/mpscl", "run.seed=7", "--help")
    assert "settings of preset mr2ct/mpscl" in text
    assert "* run.seed=7 " in text
    code, text, _ = command("mr2ct/mpscl", "run.sed=7", "--help")
    assert code == 0, "help does not fail on the setting that one looks for"
    assert "  run.seed=1 " in text
    code, _, error = command("mr2ct/mpsl", "--help")
    assert code == 2
    assert "did you mean 'mr2ct/mpscl'" in only_sentence(error)


def test_help_works_as_a_process(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mpscl_ray.train", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "PRESET | key=value" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_show_prints_is_a_preset_with_the_same_settings(command: Command, tmp_path: Path) -> None:
    overrides = ["method.margin_source=0.3", "optim.lr=1e-4", "network.layers=[1,1,1,1]", "run.name=2024"]
    code, text, _ = command("mr2ct/mpscl", *overrides, "--print-config")
    assert code == 0
    file, again = tmp_path / "file.yaml", tmp_path / "again.yaml"
    file.write_text(text)
    assert load_config(file) == load_config("mr2ct/mpscl", overrides)
    code, text, _ = command("--print-config", str(file), "optim.lr=0.5")
    assert code == 0
    again.write_text(text)
    assert load_config(again) == load_config("mr2ct/mpscl", [*overrides, "optim.lr=0.5"])


def test_show_makes_no_folder(command: Command, tmp_path: Path) -> None:
    command("phantom", f"run.storage={tmp_path / 'runs'}", "--print-config")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- refuses


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mr2ct/mpsc"], "did you mean 'mr2ct/mpscl'"),
        (["no_such.yaml"], "no preset file no_such.yaml"),
        (["small/mpscl", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["small/mpscl", "phantom"], "small/mpscl and phantom are two presets"),
        (["phantom", "optim.lr", "=3"], "'optim.lr' is a setting without a value; write optim.lr=VALUE without spaces"),
        (["small/mpscl", "method.margin_source=4"], "method.margin_source=4"),
        (["small/mpscl", "data.global_batch_size=0"], "data.global_batch_size=0"),
        (["small/mpscl", "optim.lr=nan"], "optim.lr"),
        (["small/mpscl", "data.global_batch_size=5", "scaling.num_workers=2"], "cannot be shared equally"),
        (
            ["small/mpscl", "data.global_batch_size=12", "scaling.num_workers=[4,7]"],
            "scaling.num_workers=5, 7; make the batch a",
        ),
        (
            ["small/mpscl", "data.global_batch_size=12", "scaling.num_workers=[2,3]", "optim.accumulate=3"],
            "optim.accumulate=3 does not divide the 4 slices that each of 3 workers has of data.global_batch_size=12",
        ),
        (["small/mpscl", "optim.accumulate=0"], "optim.accumulate=0"),
        (["small/sifa_v2", "optim.recompute=true"], "optim.recompute=true is for DeepLab, which method.name=sifa has"),
        (
            ["small/mpscl", "optim.recompute=true", "precision.compile=true"],
            "optim.recompute=true and precision.compile=true do not go together",
        ),
        (["small/mpscl", "scaling.num_workers=[2,1]"], "scaling.num_workers=[2, 1]: expected the smaller number first"),
        (["small/mpscl", "run.name=a/b"], "run.name"),
        (["small/mpscl", "run.storage=abfs://bucket/runs"], "abfs:// is not a storage that can be used directly"),
        (["small/mpscl", *ONE_WORKER], "data.source is not set"),
    ],
)
def test_settings_that_cannot_be(command: Command, arguments: list[str], expected: str, tmp_path: Path) -> None:
    storage = [] if any("storage" in word for word in arguments) else [f"run.storage={tmp_path}"]
    code, _, error = command(*arguments, *storage)
    assert code == ConfigError.exit_code
    assert expected in only_sentence(error)


def test_all_wrong_settings_are_reported_together(command: Command) -> None:
    code, _, error = command("small/mpscl", "optim.lrr=1", "data.global_batch_size=0", "phases.warm_up=x")
    assert code == ConfigError.exit_code
    assert all(key in error for key in ("optim.lrr", "data.global_batch_size", "phases.warm_up"))
    assert "Traceback" not in error


def test_an_unknown_option_is_usage(command: Command) -> None:
    code, _, error = command("--shwo")
    assert code == 2
    assert error.endswith("unrecognized arguments: --shwo\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--num-workers", "2"], "unrecognized arguments: --num-workers 2; write scaling.num_workers=2"),
        (["--optim.lr=0.1"], "unrecognized arguments: --optim.lr=0.1; write optim.lr=0.1"),
        (["--seed"], "unrecognized arguments: --seed; write run.seed=VALUE"),
        (["--print"], "unrecognized arguments: --print"),  # no abbreviation
    ],
)
def test_an_option_that_is_a_setting(command: Command, arguments: list[str], expected: str) -> None:
    code, _, error = command("phantom", *arguments)
    assert code == 2
    assert error.endswith(f"{expected}\n")


def test_datasets_that_cannot_be_trained_on(command: Command, pair: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", "ct", seed=1, classes=("background", "a", "b"))
    no_train = make_dataset(tmp_path / "no_train", "ct", seed=1, cases={"val": 1, "test": 1})
    unlabelled = make_dataset(tmp_path / "unlabelled", "mr", labelled=("val",))
    edited = make_dataset(tmp_path / "edited", "ct", seed=1)
    manifest = edited / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"low": -1.0', '"low": -2.0'))
    for setting, expected in (
        (f"data.target={tmp_path / 'missing'}", "no such folder; prepare a dataset first"),
        (f"data.target={tmp_path}", "give one of them"),
        (f"data.target={other}", f"the classes are {', '.join(CLASSES)} and background, a, b"),
        (f"data.target={no_train}", "there is no training case"),
        (f"data.source={unlabelled}", "no training case is labelled"),
        (f"data.target={pair / 'mr'}", "the same images are in both"),
        (f"data.target={edited}", "damaged or edited"),
    ):
        code, _, error = command(*tiny(pair, tmp_path / "runs", setting))
        assert code == DataError.exit_code, error
        assert expected in only_sentence(error)
        status = RunDirectory(tmp_path / "runs" / "run").read_status()
        assert (status["state"], status["exit_code"]) == ("failed", DataError.exit_code)
        assert status["reason"] in error
        assert status["resume_command"].startswith("python -m mpscl_ray.train small/mpscl ")


@pytest.mark.parametrize(
    ("setting", "code", "expected"),
    [
        ("data.source=nowhere", DataError.exit_code, "nowhere: no such folder; prepare a dataset first"),
        ("data.target=phantom:pet", ConfigError.exit_code, "data.target=phantom:pet: the phantom has phantom:mr"),
    ],
)
def test_no_phantom_is_made_for_a_run_that_cannot_be(
    command: Command, tmp_path: Path, setting: str, code: int, expected: str
) -> None:
    found, out, error = command("phantom", setting, f"run.storage={tmp_path}")
    assert found == code
    assert expected in only_sentence(error)
    assert "making the phantom" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["phantom"], "the folder of the run"


def test_selection_by_labels_that_the_target_does_not_have(command: Command, tmp_path: Path, pair: Path) -> None:
    target = make_dataset(tmp_path / "ct", "ct", seed=1, labelled=())
    code, _, error = command(*tiny(pair, tmp_path / "runs", f"data.target={target}", "run.select=oracle"))
    assert code == ConfigError.exit_code
    assert "run.select=oracle needs labels" in only_sentence(error)
    target = make_dataset(tmp_path / "train_alone", "ct", seed=1, cases={"train": 2})
    words = tiny(pair, tmp_path / "runs", f"data.target={target}", "run.select=class_ratio_agreement")
    code, _, error = command(*words)
    assert code == ConfigError.exit_code
    assert "judges predictions of validation cases of the target" in only_sentence(error)


def test_slices_too_small_for_the_discriminators(command: Command, tmp_path: Path) -> None:
    for seed, modality in enumerate(("mr", "ct")):
        make_dataset(tmp_path / modality, modality, seed=seed, size=(28, 40))
    code, _, error = command(*tiny(tmp_path, tmp_path / "runs", "method.discriminator=fc"))
    assert code == ConfigError.exit_code
    assert "needs slices of at least 32 x 32 pixels, these datasets have 28 x 40" in only_sentence(error)
    for setting in ("method.discriminator=patchgan", "phases.warm_up=0 phases.adaptation=0"):
        config = train.config_from_arguments(tiny(tmp_path, tmp_path / "runs", *setting.split()))
        assert load_domains(config)[0].source.size == (28, 40)


def test_pretrained_weights_that_do_not_fit(command: Command, tmp_path: Path, pair: Path) -> None:
    file = tmp_path / "weights.pth"
    code, _, error = command(*tiny(pair, tmp_path / "runs", f"network.pretrained={file}"))
    assert code == DataError.exit_code
    assert str(file) in only_sentence(error)


def test_storage_that_cannot_be_written(command: Command, tmp_path: Path, pair: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for storage, name in ((tmp_path / "file", "run"), (tmp_path, "file"), (Path("/proc/no"), "run")):
        code, _, error = command(*tiny(pair, storage, f"run.name={name}"))
        assert code == StorageError.exit_code
        assert str(storage) in only_sentence(error)


def test_a_run_that_another_process_holds(command: Command, tmp_path: Path, pair: Path) -> None:
    folder = RunDirectory(tmp_path / "run")
    folder.create()
    with folder.lock():
        code, _, error = command(*tiny(pair, tmp_path))
    assert code == ConfigError.exit_code
    assert f"in use by process {os.getpid()}" in only_sentence(error)


def test_more_workers_than_the_machine_has(command: Command, tmp_path: Path, pair: Path) -> None:
    settings = ["data.global_batch_size=1000", "scaling.num_workers=1000"]
    code, _, error = command(*tiny(pair, tmp_path, *settings))
    assert code == ClusterError.exit_code
    cpus = len(os.sched_getaffinity(0))
    assert f"1000 workers with 1 CPUs each need 1000 CPUs and this machine has {cpus}" in only_sentence(error)
    assert "use scaling.num_workers=" in error
    assert list(tmp_path.iterdir()) == []


def test_gpus_on_a_machine_without(
    command: Command, tmp_path: Path, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources.torch.cuda, "device_count", lambda: 0)
    code, _, error = command(*tiny(pair, tmp_path, "scaling.device=gpu"))
    assert code == ClusterError.exit_code
    assert "this machine has 0" in only_sentence(error)
    assert "scaling.device=cpu" in error


# ---------------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def begun(pair: Path, tmp_path: Path, command: Command) -> RunDirectory:
    """A run that failed before it began, to which a checkpoint was added."""
    command(*tiny(pair, tmp_path, f"data.target={tmp_path / 'missing'}"))
    folder = RunDirectory(tmp_path / "run")
    checkpoint.save(folder.checkpoints / "step-0000002", {"phase": "source_only"})
    return folder


def test_settings_that_matter_must_not_change(
    begun: RunDirectory, command: Command, pair: Path, tmp_path: Path
) -> None:
    status = begun.read_status()
    code, _, error = command(*tiny(pair, tmp_path, f"data.target={tmp_path / 'missing'}", "optim.lr=0.5"))
    assert code == ConfigError.exit_code
    assert "optim.lr: 0.01 in the run, 0.5 now" in only_sentence(error)
    assert begun.read_status() == status, "the run is as it was"
    assert load_config(begun.config_file).optim.lr == 0.01

    code, text, _ = command(*tiny(pair, tmp_path, "data.target=nowhere", "optim.lr=0.5", "--allow-change"))
    assert code == DataError.exit_code, "resumes, until the dataset that does not exist"
    assert "changed for the rest of the run: optim.lr: 0.01 in the run, 0.5 now" in text
    assert load_config(begun.config_file).optim.lr == 0.5


def test_a_run_without_a_checkpoint_may_restart_with_other_settings(
    command: Command, pair: Path, tmp_path: Path
) -> None:
    command(*tiny(pair, tmp_path, "data.target=nowhere"))
    code, _, error = command(*tiny(pair, tmp_path, "data.target=elsewhere", "optim.lr=0.5"))
    assert code == DataError.exit_code
    assert "elsewhere" in only_sentence(error)
    assert load_config(tmp_path / "run" / "config.yaml").optim.lr == 0.5


def test_a_run_must_resume_with_the_data_it_started_with(
    begun: RunDirectory, command: Command, pair: Path, tmp_path: Path
) -> None:
    config = tiny_config(pair / "mr", pair / "ct", ONE_WORKER)
    domains, _ = load_domains(config)
    begun.write_model(model_description(config, domains))
    changed = make_dataset(tmp_path / "changed", "ct", seed=2)
    code, _, error = command(*tiny(pair, tmp_path, f"data.target={changed}"))
    assert code == ConfigError.exit_code
    assert f"the target dataset {changed} is not the one" in only_sentence(error)

    moved = shutil.copytree(pair / "ct", tmp_path / "moved")
    with pytest.raises(pytest.fail.Exception, match="Ray would have been started"):
        command(*tiny(pair, tmp_path, f"data.target={moved}"))


def test_a_run_whose_checkpoints_are_all_damaged(
    begun: RunDirectory, command: Command, pair: Path, tmp_path: Path
) -> None:
    (begun.checkpoints / "step-0000002" / checkpoint.STATE).write_text("{}")
    code, _, error = command(*tiny(pair, tmp_path, f"data.target={tmp_path / 'missing'}"))
    assert code == DataError.exit_code
    assert "every checkpoint in" in only_sentence(error)
    assert "is damaged" in error


def test_a_finished_run_says_so(begun: RunDirectory, command: Command, pair: Path, tmp_path: Path) -> None:
    begun.write_status("finished", exit_code=0)
    table = begun.results / "phases.txt"
    table.write_text("the table\n")
    code, text, _ = command(*tiny(pair, tmp_path, f"data.target={tmp_path / 'missing'}"))
    assert code == 0
    assert "the run run is finished" in text
    assert "the table" in text


def test_interrupted_before_ray_starts(
    command: Command, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("mpscl_ray.train.run.load_domains", send)
    before = signal.getsignal(signal.SIGTERM)
    code, text, _ = command(*tiny(pair, tmp_path))
    assert code == 130
    status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["exit_code"]) == ("interrupted", 130)
    assert "SIGTERM before training began" in status["reason"]
    assert status["resume_command"] in text
    assert signal.getsignal(signal.SIGTERM) == before
