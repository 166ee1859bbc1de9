"""The train command on a real local Ray: to the end, and through everything that comes between."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from tensorboardX.proto.event_pb2 import Event  # noqa: E402

from mpscl_ray import capacity, checkpoint, cli, train  # noqa: E402
from mpscl_ray.cluster_session import connect  # noqa: E402
from mpscl_ray.config import load_config, to_yaml  # noqa: E402
from mpscl_ray.errors import ClusterError, DataError, TrainingError  # noqa: E402
from mpscl_ray.inference import load_segmenter  # noqa: E402
from mpscl_ray.run_folder import RunFolder  # noqa: E402
from tests.tiny import make_dataset, make_pair, tiny_settings  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CPUS = 3
PHASE = 30
EVERY = 7
STEPS = 3 * PHASE
LONG = (
    f"phases.source_only={PHASE}",
    f"phases.warm_up={PHASE}",
    f"phases.adaptation={PHASE}",
    f"run.checkpoint_every={EVERY}",
    f"run.validate_every={PHASE}",
    "run.report_every=1",
    "scaling.workers=2",
)
"""A run that is long enough to be hit in the middle."""
PATIENCE_S = 300
MARK = "MPSCL_RAY_TEST_MARK"


class Command:
    """The train command as a process, alone in its process group and with a folder of its own for temporary files.

    Args:
        arguments: of the command.
        cluster: whether to join the cluster of the tests; else it starts a Ray of its own.
    """

    def __init__(self, arguments: list[str], *, cluster: bool = False) -> None:
        self.mark = secrets.token_hex(8)
        self.temporary = Path(tempfile.mkdtemp(prefix="m", dir="/tmp"))
        environment = {k: v for k, v in os.environ.items() if cluster or not k.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
        if cluster:
            environment |= {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), MARK: self.mark}
        self.output = self.temporary / "output.txt"
        with self.output.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mpscl_ray.train", *arguments],
                env=environment,
                cwd=self.temporary,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text()

    def wait(self) -> int:
        """Its exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the command hangs; it printed:\n{self.text}")

    def wait_for_steps(self, run: RunFolder, steps: int, start: int = 1) -> int:
        """Wait until workers of the run have made so many steps since their ``start``-th start; returns the step."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if len(starts(run)) >= start:
                found = max((record["global_step"] for record in run.read_metrics()), default=0)
                if found >= starts(run)[start - 1] + steps:
                    assert found < STEPS, "too late: the run is done"
                    return int(found)
            time.sleep(0.02)
        pytest.fail(f"{steps} steps did not come; the command printed:\n{self.text}")

    def processes(self) -> list[int]:
        """All processes that it started, and that they started."""
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{MARK}={self.mark}".encode() in environment.read_bytes():
                    found.append(int(environment.parent.name))
            except OSError:
                continue  # ended meanwhile
        return found

    def assert_nothing_left(self, seconds: float = 20.0) -> None:
        """None of its processes lives on."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert self.processes() == []

    def temporary_files(self) -> list[str]:
        """What it has left where temporary files go (torch leaves an empty folder there whoever imports it)."""
        others = {self.output.name, "torchinductor_root"}
        return [path.name for path in self.temporary.iterdir() if path.name not in others]

    def end(self) -> None:
        """Kill what is left."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Command]]:
    """Starts commands, and ends them all at the end."""
    started: list[Command] = []

    def begin(arguments: list[str], *, cluster: bool = False) -> Command:
        started.append(Command(arguments, cluster=cluster))
        return started[-1]

    yield begin
    for command in started:
        command.end()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def arguments(data: Path, storage: Path) -> Callable[..., list[str]]:
    def build(name: str, *overrides: str, preset: str = "small/mpscl") -> list[str]:
        file = storage / f"{preset.replace('/', '-')}.yaml"
        if not file.exists():
            folders = [f"data.source={data / 'mr'}", f"data.target={data / 'ct'}", f"run.storage={storage}"]
            file.write_text(to_yaml(load_config(preset, [*tiny_settings(preset), *folders])))
        return [str(file), f"run.name={name}", *overrides]

    return build


Arguments = Callable[..., list[str]]
Start = Callable[..., Command]


@pytest.fixture(scope="module")
def calm(start: Start, arguments: Arguments, storage: Path) -> tuple[Command, RunFolder]:
    """A run that nothing disturbs, on a Ray of its own with two workers."""
    command = start(arguments("calm", *LONG))
    assert command.wait() == 0, command.text
    return command, RunFolder(storage / "calm")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A small Ray that this process is on, and that commands may join."""
    with connect(CPUS, object_store_memory=200 * 2**20):
        yield


@pytest.fixture
def here(
    cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process, on the cluster: exit code, and all that was printed."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train", *words])
        with pytest.raises(SystemExit) as ended:
            cli.run(train.main)
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return run


Here = Callable[..., tuple[int, str]]


def split(words: list[str]) -> tuple[str, list[str]]:
    return words[0], words[1:]


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of each file: what differs is told in a line, not in a comparison of megabytes."""
    files = sorted(directory.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_same_run(run: RunFolder, other: RunFolder) -> None:
    """All checkpoints of the ends, byte for byte: weights, optimisers, prototypes, random state, position."""
    for phase in ("source_only", "warm_up", "adaptation"):
        assert contents(run.phases / phase) == contents(other.phases / phase), phase
    assert contents(run.best) == contents(other.best)
    ours, theirs = (
        [{**r, "speed/images_per_s": 0, "speed/data_wait_fraction": 0} for r in f.read_metrics()] for f in (run, other)
    )
    assert [record for record in ours if record["global_step"] in range(1, STEPS + 1)] == theirs


def starts(run: RunFolder) -> list[int]:
    """The steps at which worker 0 has started, in turn."""
    file = run.logs / "worker-0.log"
    log = file.read_text() if file.exists() else ""
    return [int(step) for step in re.findall(r"training starts at step (\d+)", log)]


def check_status(run: RunFolder, state: str, exit_code: int, reason: str) -> str:
    """Check status.json; returns the command to resume with."""
    status = run.read_status()
    assert (status["state"], status["exit_code"]) == (state, exit_code)
    assert reason in status["reason"]
    assert status["resume_command"].startswith("python -m mpscl_ray.train ")
    assert f"run.name={run.name}" in status["resume_command"]
    return str(status["resume_command"])


# ------------------------------------------------------------------------------------------------ undisturbed


def test_what_a_run_leaves(calm: tuple[Command, RunFolder], arguments: Arguments, data: Path) -> None:
    _, run = calm
    newest = checkpoint.list_checkpoints(run.checkpoints)
    assert [path.name for path in newest] == [f"step-{STEPS - PHASE % EVERY:07d}", f"step-{STEPS:07d}"]
    for directory in (*newest, run.best, *(run.phases / phase for phase in ("source_only", "warm_up", "adaptation"))):
        checkpoint.verify(directory)
    assert checkpoint.load(run.best)["selected_by"] == "label_free"
    assert load_config(run.config_file) == load_config(*split(arguments("calm", *LONG)))
    model = run.read_model()
    assert model["classes"] == ["background", "ventricle", "wall"]
    assert model["target"]["dataset"] == str(data / "ct")
    environment = json.loads(run.environment_file.read_text())
    assert environment["command"][:3] == ["python", "-m", "mpscl_ray.train"]
    assert run.progress_image.read_bytes().startswith(b"\x89PNG")
    assert (run.results / "phases.png").read_bytes().startswith(b"\x89PNG")
    assert (run.results / "phases.csv").is_file()
    check_status(run, "finished", 0, "")
    status = run.read_status()
    assert (status["phase"], status["iteration"], status["global_step"]) == ("adaptation", PHASE, STEPS)
    assert [record["global_step"] for record in run.read_metrics()] == list(range(1, STEPS + 1))
    assert starts(run) == [0]
    assert not (run.path / "ray").exists()
    predictor = load_segmenter(run.path)
    assert predictor.classes == ("background", "ventricle", "wall")


def test_tensorboard_has_losses_scores_and_panels(calm: tuple[Command, RunFolder]) -> None:
    _, run = calm
    (file,) = run.tensorboard.iterdir()
    tags: dict[str, list[int]] = {}
    for event in read_events(file):
        for value in event.summary.value:
            tags.setdefault(value.tag, []).append(event.step)
    assert tags["train/loss_segmentation"] == list(range(1, STEPS + 1))
    assert tags["train/selected_fraction"] == list(range(2 * PHASE + 1, STEPS + 1))
    for tag in ("train/discriminator_accuracy_main", "train/prototype_angle_min", "speed/images_per_s"):
        assert tag in tags
    for tag in ("val/dice/wall", "val/dice/mean", "panel/target"):
        assert tags[tag] == [PHASE, 2 * PHASE, STEPS]


def read_events(file: Path) -> Iterator[Event]:
    """Events of a TensorBoard file: records of length, its checksum, the message, its checksum."""
    data = file.read_bytes()
    place = 0
    while place < len(data):
        length = int.from_bytes(data[place : place + 8], "little")
        yield Event.FromString(data[place + 12 : place + 12 + length])
        place += 16 + length


def test_what_a_run_says(calm: tuple[Command, RunFolder]) -> None:
    command, run = calm
    text = command.text
    for words in (
        "mr to ct, structures ventricle, wall",
        "18 labelled mr slices and 18 ct slices without labels, 2 CPU workers",
        "the target's labels are not used for training",
        f"warm up {PHASE}: validation target Dice",
        f"adaptation {PHASE}/{PHASE} (100%)",
        "source only",
        f"python -m mpscl_ray.evaluate {run.path}",
    ):
        assert words in text, text
    rows = [line.split()[0] for line in text.splitlines() if re.search(r"\d ± \d", line)]
    assert {"source", "warm", "adaptation"} == set(rows)
    assert "Traceback" not in text


def test_a_ray_of_its_own_is_gone_with_the_command(calm: tuple[Command, RunFolder]) -> None:
    command, _ = calm
    command.assert_nothing_left()
    assert command.temporary_files() == []


def test_a_finished_run_is_not_run_again(calm: tuple[Command, RunFolder], here: Here, arguments: Arguments) -> None:
    _, run = calm
    before = contents(run.phases / "adaptation")
    code, text = here(*arguments("calm", *LONG))
    assert code == 0
    assert "is finished" in text
    assert "adaptation" in text
    assert contents(run.phases / "adaptation") == before


# -------------------------------------------------------------------------------------------------- disturbed


def test_a_killed_worker_is_replaced(
    calm: tuple[Command, RunFolder], cluster: None, start: Start, arguments: Arguments, storage: Path
) -> None:
    run = RunFolder(storage / "killed")
    command = start(arguments("killed", *LONG), cluster=True)
    reached = command.wait_for_steps(run, PHASE + EVERY + 3)
    pid = re.findall(r"pid (\d+) INFO worker starts", (run.logs / "worker-1.log").read_text())[-1]
    os.kill(int(pid), signal.SIGKILL)
    assert command.wait() == 0, command.text
    assert "worker 1 was lost: its process died; the workers are replaced and go on" in command.text
    assert "going on from the checkpoint step-" in command.text
    first, second = starts(run)
    assert first == 0
    assert reached - EVERY <= second <= STEPS, "at most one checkpoint interval is done again"
    check_status(run, "finished", 0, "")
    assert_same_run(run, calm[1])


def test_a_run_that_is_stopped_and_killed_ends_as_if_it_had_not_been(
    calm: tuple[Command, RunFolder], cluster: None, start: Start, arguments: Arguments, storage: Path
) -> None:
    """In turn: Ctrl-C, two SIGTERMs, SIGKILL, undisturbed; two times on a Ray of its own, two times on a cluster."""
    run = RunFolder(storage / "stopped")
    words = arguments("stopped", *LONG)

    command = start(words)
    command.wait_for_steps(run, 3)
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does, to all processes of the command
    assert command.wait() == 130, command.text
    resume = check_status(run, "interrupted", 130, "stopped by SIGINT at iteration")
    assert resume in command.text
    assert "Traceback" not in command.text
    stopped = run.read_metrics()[-1]["global_step"]
    assert checkpoint.list_checkpoints(run.checkpoints)[-1].name == f"step-{stopped:07d}"
    command.assert_nothing_left()
    assert command.temporary_files() == []

    command = start(words)
    command.wait_for_steps(run, 2, start=2)
    command.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 130
    assert run.read_status()["state"] in ("running", "interrupted"), "it may not have had the time to say"
    left_at_once = command

    command = start(words, cluster=True)
    reached = command.wait_for_steps(run, 3, start=3)
    command.process.kill()
    command.wait()
    assert run.read_status()["state"] == "running"

    command = start(words, cluster=True)
    assert command.wait() == 0, command.text
    check_status(run, "finished", 0, "")
    steps = starts(run)
    assert len(steps) == 4
    assert steps[0] == 0
    assert steps[1] == stopped
    assert stopped <= steps[2]
    assert reached - EVERY <= steps[3]
    assert_same_run(run, calm[1])
    left_at_once.assert_nothing_left(seconds=150)  # Agents of a Ray that was left give up only after a minute.


def test_sigterm_writes_a_checkpoint_on_a_cluster_too(
    cluster: None, start: Start, arguments: Arguments, storage: Path
) -> None:
    run = RunFolder(storage / "terminated")
    command = start(arguments("terminated", *LONG, "scaling.workers=1", "phases.source_only=1000"), cluster=True)
    command.wait_for_steps(run, 3)
    command.process.terminate()
    assert command.wait() == 130, command.text
    check_status(run, "interrupted", 130, "stopped by SIGTERM at iteration")
    stopped = run.read_metrics()[-1]["global_step"]
    assert checkpoint.list_checkpoints(run.checkpoints)[-1].name == f"step-{stopped:07d}"
    command.assert_nothing_left()
    wait_for_free_cpus()


def wait_for_free_cpus() -> None:
    """Until the cluster has taken back what the workers held."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < CPUS and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU", 0) == CPUS


def test_a_loss_that_is_not_finite_and_a_damaged_checkpoint(here: Here, arguments: Arguments, storage: Path) -> None:
    """The first phase is sane, the second one is not; then a sane rate, with the newest checkpoint damaged."""
    run = RunFolder(storage / "wild")
    settings = ["phases.source_only_lr=0.01", "run.checkpoint_every=2", "scaling.workers=1"]
    code, text = here(*arguments("wild", *settings, "optim.lr=1e30"))
    assert code == TrainingError.exit_code
    assert "a loss or gradient was not finite, seen at iteration 2 of the phase warm_up" in text
    assert "loss_cross_entropy_main " in text
    assert "nan" in text
    assert "Traceback" not in text
    check_status(run, "failed", TrainingError.exit_code, "the checkpoint step-0000004 is from before it")
    older, newest = checkpoint.list_checkpoints(run.checkpoints)
    state = checkpoint.load(newest)
    assert all(tensor.isfinite().all() for tensor in state["method"]["networks"]["segmenter"].values())

    data = bytearray((newest / checkpoint.TENSORS).read_bytes())
    data[len(data) // 2] ^= 4
    (newest / checkpoint.TENSORS).write_bytes(data)
    code, text = here(*arguments("wild", *settings, "optim.lr=0.01", "--allow-change"))
    assert code == 0, text
    assert "changed for the rest of the run: optim.lr: 1e+30 in the run, 0.01 now" in text
    assert f"skipped: checkpoint {newest} is damaged" in text
    assert f"going on from the checkpoint {older.name}" in text
    assert run.read_metrics()[-1]["global_step"] == 12
    assert starts(run) == [0, checkpoint.step_of(older)]
    check_status(run, "finished", 0, "")
    assert load_config(run.config_file).optim.lr == 0.01


# ---------------------------------------------------------------------------------------------------- refused


def test_what_the_cluster_does_not_have(here: Here, arguments: Arguments, storage: Path) -> None:
    for settings, sentence in (
        (
            ["scaling.workers=4"],
            f"4 workers need 4 CPUs, and the cluster has {CPUS} CPUs ({CPUS} free); use scaling.workers=2",
        ),
        (
            ["scaling.device=gpu", "scaling.workers=1"],
            "need 1 CPUs and 1 GPUs, and the cluster has 3 CPUs (3 free) and 0 GPUs",
        ),
        (["scaling.cpus_per_worker=2"], f"2 workers need 4 CPUs, and the cluster has {CPUS} CPUs"),
    ):
        code, text = here(*arguments("refused", *settings))
        assert code == ClusterError.exit_code
        assert sentence in text
        assert "Traceback" not in text
    check_status(RunFolder(storage / "refused"), "failed", ClusterError.exit_code, "2 workers need 4 CPUs")


def test_what_the_cluster_has_but_others_use(here: Here, arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    @ray.remote(num_cpus=2)
    class Other:
        pass

    other = Other.remote()
    ray.get(other.__ray_ready__.remote())
    begin = time.monotonic()
    code, text = here(*arguments("busy", "scaling.wait_s=7"))
    assert code == ClusterError.exit_code
    assert time.monotonic() - begin >= 7
    shortage = f"2 workers need 2 CPUs, and the cluster has {CPUS} CPUs (1 free); use scaling.workers=1"
    assert shortage in text

    # The others came between the check and the start of the workers.
    monkeypatch.setattr(capacity, "check_cluster", lambda config: False)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    code, text = here(*arguments("busy", "run.restarts=0"))
    assert code == ClusterError.exit_code
    assert f"error: the workers found no place any more: {shortage}" in text
    assert "Traceback" not in text
    ray.kill(other)
    wait_for_free_cpus()


@pytest.mark.parametrize("in_memory", ["true", "false"])
def test_a_dataset_with_a_flipped_bit(here: Here, arguments: Arguments, tmp_path: Path, in_memory: str) -> None:
    """Found when the slices are read, be it before training, or by the workers when they are streamed to them."""
    target = make_dataset(tmp_path / "ct", "ct", seed=1)
    file = target / "train" / "ct_train_1.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 16
    file.write_bytes(data)
    name = f"flipped-{in_memory}"
    code, text = here(*arguments(name, f"data.target={target}", f"data.in_memory={in_memory}"))
    assert code == DataError.exit_code, text
    assert f"error: {file}: damaged" in text
    assert "Traceback" not in text


# ---------------------------------------------------------------------------------------------------- presets


def test_the_upper_bound(here: Here, arguments: Arguments, storage: Path) -> None:
    code, text = here(*arguments("upper", "run.select=oracle", "scaling.workers=1", preset="small/supervised"))
    assert code == 0, text
    assert "trains on 18 labelled ct slices and no other slices, 1 CPU worker\n" in text
    assert "except here: the supervised bound" in text
    assert "best is chosen with target labels (oracle)" in text
    run = RunFolder(storage / "upper")
    assert checkpoint.load(run.best)["selected_by"] == "oracle"
    assert [path.name for path in run.phases.iterdir()] == ["supervised"]


def test_a_target_without_any_label(here: Here, arguments: Arguments, storage: Path, tmp_path: Path) -> None:
    target = make_dataset(tmp_path / "ct", "ct", seed=1, labelled=(), cases={"train": 2})
    words = arguments("bare", f"data.target={target}", "scaling.workers=1", preset="small/source_only")
    code, text = here(*words)
    assert code == 0, text
    assert "no test or validation volume of the target is labelled" in text
    run = RunFolder(storage / "bare")
    assert checkpoint.load(run.best)["selected_by"] == "label_free"
    assert not (run.results / "phases.txt").exists()
