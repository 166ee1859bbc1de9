"""The training loop without Ray: phases, checkpoints, resuming, no use of target labels."""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpscl_ray.data.loader import SliceStream
from mpscl_ray.data.slices import LocalSlices
from mpscl_ray.errors import ConfigError, DataError, TrainingError
from mpscl_ray.runs import checkpoint
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.train import loop, timing
from mpscl_ray.train.checkpointing import newest_checkpoint
from mpscl_ray.train.feature_log import FeatureRecord
from mpscl_ray.train.outcome import TrainResult
from tests.tiny import SIZE, local_data, make_dataset, make_pair, tiny_config
from tests.tiny_runs import Killed, Killer, RecordingCallback, hashes, train

TEN_STEPS = ("phases.source_only=3", "phases.warm_up=3", "run.log_every=1")
"""Three, three and four iterations."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the datasets mr and ct."""
    return make_pair(tmp_path_factory.mktemp("data"))


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of each file: what differs is reported in a line, not in a comparison of megabytes."""
    files = sorted(directory.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_same_state(one: Path, other: Path) -> None:
    """All of two checkpoints, byte for byte, and that it is all there is to know of MPSCL."""
    state = checkpoint.load(one)
    networks = {"segmenter", "discriminator_main", "discriminator_aux"}
    assert state["method"]["networks"].keys() == networks
    assert state["method"]["optimisers"].keys() == networks
    assert {"momentum_buffer"} == state["method"]["optimisers"]["segmenter"].keys()
    assert {"step", "exp_avg", "exp_avg_sq"} == state["method"]["optimisers"]["discriminator_main"].keys()
    assert state["method"]["prototypes"].abs().sum() > 0
    assert state["random"]["torch"].numel() > 0
    assert contents(one) == contents(other)


def comparable(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without the speed, which no two runs share."""
    return [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in records]


def assert_same_features(one: RunDirectory, other: RunDirectory) -> None:
    """What was recorded of the features and the pseudo-labels."""
    records = [FeatureRecord(folder.path) for folder in (one, other)]
    assert records[0].read() == records[1].read()
    for ours, theirs in zip(*(record.read_panels() for record in records), strict=True):
        assert ours.global_step == theirs.global_step
        for name in ("nearest", "difference", "selected"):
            assert (getattr(ours, name) == getattr(theirs, name)).all(), name


# ------------------------------------------------------------------------------------------------------ resuming


@pytest.fixture(scope="module")
def straight(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, RecordingCallback]:
    """Ten steps in one go, and its callback."""
    watcher = RecordingCallback()
    outcome, run = train(
        tiny_config(pair / "mr", pair / "ct", TEN_STEPS), tmp_path_factory.mktemp("run"), None, watcher
    )
    assert (outcome.state, outcome.step) == ("finished", 10)
    return run, watcher


@pytest.mark.parametrize("cut", [1, 3, 5, 6, 8, 10], ids=lambda cut: f"after step {cut}")
def test_a_run_resumes_from_any_step_as_if_it_had_not_stopped(
    pair: Path, straight: tuple[RunDirectory, RecordingCallback], tmp_path: Path, cut: int
) -> None:
    """Steps 3, 6 and 10 end a phase; the end is saved after the checkpoint, so it is still to be done."""
    config = tiny_config(pair / "mr", pair / "ct", TEN_STEPS)
    before, after = RecordingCallback(), RecordingCallback()
    outcome, run = train(config, tmp_path, cut, before)
    assert (outcome.state, outcome.step) == ("interrupted", cut)
    outcome, _ = train(config, tmp_path, None, after)
    assert (outcome.state, outcome.step) == ("finished", 10)
    assert after.starts == [cut]
    assert "resuming" in after.warnings[0]

    folder, whole = straight
    assert len(before.batches) == cut
    for ours, theirs in zip(before.batches + after.batches, whole.batches, strict=True):
        assert hashes(ours) == hashes(theirs)
    assert_same_state(folder.phases / "adaptation", run.phases / "adaptation")
    for part in ("phases/source_only", "phases/warm_up", "best"):
        assert contents(folder.path / part) == contents(run.path / part)
    assert comparable(folder.read_metrics()) == comparable(run.read_metrics())
    assert [record["iteration"] for record in FeatureRecord(run.path).read()] == [0, 4]
    assert_same_features(folder, run)


@pytest.mark.parametrize(("killed", "kept"), [(7, 6), (10, 8)], ids=["after a start", "after a validation"])
def test_a_killed_run_repeats_what_came_after_its_last_checkpoint(
    pair: Path, straight: tuple[RunDirectory, RecordingCallback], tmp_path: Path, killed: int, kept: int
) -> None:
    """It has recorded features since: at the start of the adaptation, at its last validation."""
    config = tiny_config(pair / "mr", pair / "ct", TEN_STEPS)
    with pytest.raises(Killed):
        train(config, tmp_path, None, Killer(lambda record: record["global_step"] == killed))
    folder, watcher = RunDirectory(tmp_path), RecordingCallback()
    assert folder.read_metrics()[-1]["global_step"] == killed
    train(config, tmp_path, None, watcher)
    assert watcher.starts == [kept]
    assert len(watcher.batches) == 10 - kept
    records = folder.read_metrics()
    assert [record["global_step"] for record in records] == list(range(1, 11))
    assert comparable(records) == comparable(straight[0].read_metrics())
    assert_same_state(straight[0].phases / "adaptation", folder.phases / "adaptation")
    assert_same_features(straight[0], folder)


def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    pair: Path, straight: tuple[RunDirectory, RecordingCallback], tmp_path: Path
) -> None:
    config = tiny_config(pair / "mr", pair / "ct", TEN_STEPS)
    _, run = train(config, tmp_path, stop_after=6)
    older, newest = checkpoint.list_checkpoints(run.checkpoints)
    flip_a_bit(newest / checkpoint.TENSORS)
    callback = RecordingCallback()
    outcome, _ = train(config, tmp_path, callback=callback)
    assert outcome.step == 10
    assert callback.starts == [checkpoint.step_of(older)]
    assert newest.name in callback.warnings[0]
    assert "damaged" in callback.warnings[0]
    assert_same_state(straight[0].phases / "adaptation", run.phases / "adaptation")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_restart(pair: Path, tmp_path: Path) -> None:
    config = tiny_config(pair / "mr", pair / "ct", TEN_STEPS)
    _, run = train(config, tmp_path, stop_after=6)
    for directory in checkpoint.list_checkpoints(run.checkpoints):
        flip_a_bit(directory / checkpoint.TENSORS)
    with pytest.raises(DataError, match=r"every checkpoint in .* is damaged"):
        train(config, tmp_path)
    assert run.read_metrics()[-1]["global_step"] == 6


def test_a_phase_that_was_made_longer_decays_over_its_new_length(pair: Path, tmp_path: Path) -> None:
    short = tiny_config(pair / "mr", pair / "ct", ["phases.warm_up=0", "phases.adaptation=0", "phases.source_only=4"])
    train(short, tmp_path)
    long = tiny_config(pair / "mr", pair / "ct", ["phases.warm_up=0", "phases.adaptation=2", "phases.source_only=8"])
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimiser, *_: rates.append(float(optimiser.param_groups[0]["lr"])))
    outcome, _ = train(long, tmp_path)
    hook.remove()
    assert (outcome.state, outcome.step) == ("finished", 10)
    assert rates[:4] == pytest.approx([0.01 * (1 - iteration / 8) ** 0.9 for iteration in range(4, 8)])


def test_a_phase_that_was_dropped_while_in_it_is_an_error(pair: Path, tmp_path: Path) -> None:
    train(tiny_config(pair / "mr", pair / "ct", TEN_STEPS), tmp_path, stop_after=5)
    without = tiny_config(pair / "mr", pair / "ct", [*TEN_STEPS, "phases.warm_up=0"])
    with pytest.raises(ConfigError, match="of the phase warm_up, and the settings have only source_only, adaptation"):
        train(without, tmp_path)


def test_pretrained_weights_are_read_at_the_start_alone(pair: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    config = tiny_config(
        pair / "mr", pair / "ct", ["optim.lr=1e-30", "data.global_batch_size=2", f"network.pretrained={weights}"]
    )
    _, other = train(tiny_config(pair / "mr", pair / "ct", ["run.seed=5", "phases.warm_up=0"]), tmp_path / "other")
    trained = checkpoint.load(other.phases / "source_only")["method"]["networks"]["segmenter"]
    torch.save(trained, weights)
    callback = RecordingCallback()
    _, run = train(config, tmp_path / "run", stop_after=2, callback=callback)
    started = checkpoint.load(run.checkpoints / "step-0000002")["method"]["networks"]["segmenter"]
    assert torch.equal(started["conv1.weight"], trained["conv1.weight"])
    assert callback.warnings == [f"{len(trained)} tensors loaded from {weights}"]
    weights.unlink()
    assert train(config, tmp_path / "run")[0].state == "finished"


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


# ------------------------------------------------------------------------------------------------------- records


def test_files_and_callbacks_of_a_run(pair: Path, tmp_path: Path) -> None:
    callback = RecordingCallback()
    outcome, run = train(tiny_config(pair / "mr", pair / "ct", ["run.keep_checkpoints=3"]), tmp_path, callback=callback)
    assert outcome == TrainResult("finished", "adaptation", 4, 12)
    records = run.read_metrics()
    assert [record["global_step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert [record["phase"] for record in records] == ["source_only"] * 2 + ["warm_up"] * 2 + ["adaptation"] * 2
    assert [record["iteration"] for record in records] == [2, 4] * 3
    assert callback.starts == [0]
    assert callback.warnings == []
    assert callback.validated == [4, 8, 12]
    assert [path.name for path in checkpoint.list_checkpoints(run.checkpoints)] == [
        "step-0000008",
        "step-0000010",
        "step-0000012",
    ]
    for directory in (run.best, *(run.phases / phase for phase in ("source_only", "warm_up", "adaptation"))):
        checkpoint.verify(directory)
    assert contents(run.phases / "adaptation") == contents(run.checkpoints / "step-0000012")

    adversarial = {"train/loss_adversarial_main", "train/loss_discriminator_aux", "train/discriminator_accuracy_main"}
    adapting = {"train/loss_contrastive_source", "train/loss_contrastive_target", "train/pseudo_label_fraction"}
    assert not (adversarial | adapting) & records[1].keys()
    assert adversarial <= records[3].keys()
    assert not adapting & records[3].keys()
    assert adversarial | adapting | {"train/prototype_angle_min"} <= records[5].keys()
    for record in records[1::2]:
        assert {"val/dice/wall", "val/dice/mean", "val/source/dice/ventricle", "val/entropy"} <= record.keys()
        assert record["val/selection_score"] == pytest.approx(record["val/source/dice/mean"] - record["val/entropy"])
    for record in records:
        assert record["perf/images_per_s"] > 0
        assert 0 <= record["perf/data_stall_fraction"] <= 1
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))

    assert [step for step, *_ in callback.panels] == [4, 8, 12]
    _, images, predictions, labels = callback.panels[-1]
    assert images.shape == predictions.shape == (4, *SIZE)
    assert labels is not None
    assert labels.shape == (4, *SIZE)


def test_each_phase_continues_in_the_data_where_the_one_before_ended(
    pair: Path, straight: tuple[RunDirectory, RecordingCallback]
) -> None:
    config = tiny_config(pair / "mr", pair / "ct", TEN_STEPS)
    source, number = local_data(config).labelled, config.data.global_batch_size
    augmentation = config.data.augmentation
    with SliceStream(
        source, seed=config.run.seed, domain="source", global_batch=number, augment=augmentation
    ) as stream:
        for step, (batch, expected) in enumerate(zip(straight[1].batches, stream, strict=False)):
            assert torch.equal(batch.source_image, expected["image"]), step


def test_each_phase_starts_with_the_weights_of_the_one_before(pair: Path, tmp_path: Path) -> None:
    config = tiny_config(pair / "mr", pair / "ct", ["optim.lr=1e-30", "optim.lr_discriminator=1e-30"])
    _, run = train(config, tmp_path)
    phases = [
        checkpoint.load(run.phases / phase)["method"]["networks"] for phase in ("source_only", "warm_up", "adaptation")
    ]
    for one, other in itertools.pairwise(phases):
        for network in one.keys() & other.keys():
            for name in (name for name in one[network] if name.endswith("weight")):
                assert torch.equal(one[network][name], other[network][name]), f"{network} {name}"
    assert phases[0]["segmenter"].keys() == phases[2]["segmenter"].keys()


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.89 GiB of which 1.00 GiB is free."
)
CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
)


@pytest.mark.parametrize(
    ("error", "settings", "told"),
    [
        (torch.OutOfMemoryError(CUDA_SAYS), [], "(tried to allocate 2.50 GiB); give optim.recompute=true or a larger"),
        (
            RuntimeError(CPU_SAYS),
            ["optim.recompute=true"],
            "(tried to allocate 64 bytes); give a larger scaling.num_wo",
        ),
        (MemoryError(), ["precision.dtype=bf16", "optim.accumulate=2"], "; give optim.recompute=true or a larger"),
    ],
)
def test_a_step_that_does_not_fit_into_memory_says_what_to_change(
    pair: Path, tmp_path: Path, error: Exception, settings: list[str], told: str
) -> None:
    class Full(loop.Callback):
        def on_batch(self, batch: object) -> None:
            if newest_checkpoint(RunDirectory(tmp_path))[0]:
                raise error

    with pytest.raises(TrainingError) as ended:
        train(tiny_config(pair / "mr", pair / "ct", [*TEN_STEPS, *settings]), tmp_path, callback=Full())
    sentence = str(ended.value)
    assert "worker 0 ran out of memory after step" in sentence
    assert told in sentence
    assert "data.global_batch_size=2" in sentence
    assert ("precision.dtype=bf16" in sentence) == ("precision.dtype=bf16" not in settings)
    assert ("optim.accumulate=4" in sentence) == ("optim.accumulate=2" in settings)
    assert train(tiny_config(pair / "mr", pair / "ct", [*TEN_STEPS, *settings]), tmp_path)[0].state == "finished"


def test_a_stop_is_polled_about_twice_a_second() -> None:
    now = [0.0]
    asked: list[int] = []
    step = 0
    poller = timing.Poller(lambda: bool(asked.append(step)), clock=lambda: now[0])
    for step in range(1, 41):
        now[0] += 0.05 if step <= 20 else 5.0
        poller.poll(step)
    assert asked[:3] == [1, 11, 21]
    assert asked[3:] == list(range(22, 41)), "slow steps: after each"
    asked.clear()
    for step in range(41, 1041):
        now[0] += 1e-4
        poller.poll(step)
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert max(gaps) == timing.MAX_STEPS_BETWEEN_POLLS


# ------------------------------------------------------------------------------------------------- target labels


def test_labels_of_target_training_slices_change_nothing(
    pair: Path, straight: tuple[RunDirectory, RecordingCallback], tmp_path: Path
) -> None:
    """Permuted, absent, or damaged bytes in their place: the weights are the same, so they are not even read."""
    run, _ = straight
    permuted = make_dataset(tmp_path / "permuted", "ct", seed=1, permuted=("train",))
    absent = make_dataset(tmp_path / "absent", "ct", seed=1, labelled=("val", "test"))
    damaged = make_dataset(tmp_path / "damaged", "ct", seed=1)
    for file in (damaged / "train").iterdir():
        damage_labels(file)
    with pytest.raises(DataError, match="damaged"):
        LocalSlices(damaged, "train", labels=True)
    for target in (permuted, absent, damaged):
        _, other = train(tiny_config(pair / "mr", target, TEN_STEPS), tmp_path / f"run-{target.name}")
        assert_same_state(run.phases / "adaptation", other.phases / "adaptation")
        assert contents(run.best) == contents(other.best)


def damage_labels(file: Path) -> None:
    """Flip a bit in the middle of the label column of the first row group."""
    import pyarrow.parquet as pq

    group = pq.ParquetFile(file).metadata.row_group(0)
    (column,) = [
        group.column(index)
        for index in range(group.num_columns)
        if group.column(index).path_in_schema.startswith("label")
    ]
    data = bytearray(file.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    file.write_bytes(data)
