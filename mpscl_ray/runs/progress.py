"""What a run shows while it runs: a progress line for a person, event files for TensorBoard.

Tags, the same in metrics.jsonl and in TensorBoard:

===============================  ==================================================================================
train/loss_*                     each loss of the method's step, such as train/loss_contrastive_target
train/pseudo_label_fraction          share of the target pixels that the self-paced mask selects
train/discriminator_accuracy_*   share of the pixels whose domain the discriminator tells, per head
train/prototype_angle_*          smallest and mean angle between prototypes, radians
val/dice/<structure> and mean    Dice on the target's validation slices
val/source/dice/... and mean     the same on the source
val/entropy, val/source/entropy  mean self-information of the predictions
val/loss_cross_entropy           weighted cross-entropy on the target's validation slices, where they are labelled
val/source/loss_cross_entropy    the same on the source
val/unsupervised/*                 criteria of the target's predictions, larger is better
                                 (mpscl_ray.train.unsupervised_criteria)
val/selection_score                    the score that decides which checkpoint is the best
perf/images_per_s               training images of both domains per second, all workers
perf/data_stall_fraction         share of the time that the step waits for data
panel/<name>                     an image panel (mpscl_ray.runs.plots)
===============================  ==================================================================================
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from numpy.typing import NDArray
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mpscl_ray.runs.atomic_files import storage_errors
from mpscl_ray.runs.environment import now

_WINDOW_S = 30.0
_SHORTEST_S = 0.5
"""A speed over less time says nothing: readings of a short phase may come all at once."""
_REDRAW_S = 0.1
_BAR = 20


class ProgressLine:
    """How far a phase is: one line that is redrawn on a terminal, a plain line now and then elsewhere.

    Without colours and other escape codes, so that it reads the same in a log. It never ends a run: when the stream
    is gone (a closed pipe), it falls silent.

    Args:
        total: Iterations of the phase.
        label: Name of the phase.
        images_per_iteration: Over all workers, for images/s.
        start: Iterations done before, by a run that is resumed; they do not count for the speed.
        stream: Standard error when not given.
        every_s: Seconds between plain lines.
        clock: Seconds, from any origin.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        images_per_iteration: int = 0,
        start: int = 0,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._label = label
        self._images = images_per_iteration
        self._iteration = start
        self._loss: float | None = None
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._every_s = every_s
        self._clock = clock
        self._window: deque[tuple[float, int]] = deque([(clock(), start)])
        self._last = clock()
        self._width = 0
        self._shown: tuple[int, float | None] | None = None

    @property
    def images_per_s(self) -> float:
        """Over the last half minute; 0 before the second iteration."""
        return self._rate() * self._images

    def update(self, iteration: int, *, loss: float | None = None) -> None:
        """Tell how many iterations are done, and a loss where one was read; the last loss stays in the line."""
        self._iteration = iteration
        self._loss = self._loss if loss is None else loss
        time_now = self._clock()
        self._window.append((time_now, iteration))
        while len(self._window) > 2 and self._window[0][0] < time_now - _WINDOW_S:
            self._window.popleft()
        if time_now - self._last >= (_REDRAW_S if self._terminal else self._every_s):
            self._show()

    def report(self) -> None:
        """Show the line now: at the points where results are reported."""
        self._show()

    def message(self, text: str) -> None:
        """Print a line of its own, above the progress line."""
        self._write(f"\r{' ' * self._width}\r{text}\n" if self._terminal and self._width else f"{text}\n")
        if self._terminal and self._width:
            self._show()

    def close(self) -> None:
        """Show the last state and leave the line."""
        if self._shown != (self._iteration, self._loss):
            self._show()
        if self._terminal and self._width:
            self._write("\n")
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rate(self) -> float:
        (first, start), (last, end) = self._window[0], self._window[-1]
        return (end - start) / (last - first) if last - first >= _SHORTEST_S else 0.0

    def _show(self) -> None:
        self._last = self._clock()
        self._shown = (self._iteration, self._loss)
        if not self._terminal:
            self._write(", ".join(self._parts()) + "\n")
            return
        # One column less than there is: some terminals wrap when the last one is filled.
        room = max(self._columns() - 1, 1)
        parts = self._parts()
        done = round(_BAR * min(self._iteration / max(self._total, 1), 1.0))
        line = "  ".join([parts[0], f"[{'#' * done}{'-' * (_BAR - done)}]", *parts[1:]])
        if len(line) > room:
            while len(parts) > 1 and len("  ".join(parts)) > room:
                parts.pop()
            line = "  ".join(parts)[:room]
        self._write("\r" + line.ljust(min(self._width, room)))
        self._width = len(line)

    def _parts(self) -> list[str]:
        percent = 100 * self._iteration // max(self._total, 1)
        parts = [f"{self._label} {self._iteration}/{self._total} ({percent}%)"]
        rate = self._rate()
        if rate > 0:
            parts.append(f"ETA {_duration((self._total - self._iteration) / rate)}")
            if self._images:
                parts.append(f"{rate * self._images:.1f} images/s")
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        return parts

    def _columns(self) -> int:
        try:
            assert self._stream is not None
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The terminal or the pipe is closed; training is worth more than its progress line.
            self._stream = None


class TensorBoard:
    """Event files of a run, in one folder over all its restarts.

    Built on the event writer inside tensorboardX, not on its SummaryWriter: that one writes from a thread, which a full
    disk ends silently and then blocks training for good when its queue is full; and two of them started in the same
    second write to one file. Here every record is on the disk when the call returns, and a folder that cannot be
    written any more is said once and then left alone: metrics.jsonl has the same numbers.

    Args:
        folder: Where the event files go.
        resume_step: Global step that a resumed run goes on from: TensorBoard then hides what an interrupted start
            had written beyond it, and curves are continuous.
        notice: Called with the sentence that tells that writing has stopped.
    """

    def __init__(
        self, folder: Path, *, resume_step: int | None = None, notice: Callable[[str], None] | None = None
    ) -> None:
        self._notice = notice or _to_stderr
        self._folder = folder
        self._writer: EventsWriter | None = None
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads files in the order of their names.
            self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if resume_step is not None:
            self._add(resume_step + 1, session_log=SessionLog(status=SessionLog.START))
            self._flush()

    def record(self, record: Mapping[str, Any]) -> None:
        """Write the values of a record of metrics.jsonl whose keys are tags; NaN means no value and is left out."""
        for tag, value in record.items():
            if "/" in tag and not math.isnan(float(value)):
                self._add(record["global_step"], summary=summary.scalar(tag, float(value)))
        self._flush()

    def hyperparameters(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Write what the HParams tab of TensorBoard compares runs by.

        Args:
            settings: Value of each setting.
            metrics: Tags of the scalars that are shown beside them.
        """
        plain = {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in settings.items()}
        for part in summary.hparams(plain, dict.fromkeys(metrics, 0.0)):
            self._add(0, summary=part)
        self._flush()

    def panel(self, global_step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Write an RGB image (H, W, 3) under ``panel/<name>``."""
        self._add(global_step, summary=summary.image(f"panel/{name}", image, dataformats="HWC"))
        self._flush()

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._writer is not None:
            self._guard(self._writer.close)
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, step: int, **content: Any) -> None:
        if self._writer is not None:
            event = Event(step=step, wall_time=time.time(), **content)
            writer = self._writer
            self._guard(lambda: writer.write_event(event))

    def _flush(self) -> None:
        if self._writer is not None:
            self._guard(self._writer.flush)

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._writer = None
            self._notice(
                f"{now()}: no more TensorBoard events, {self._folder} cannot be written ({error.strerror}); "
                f"training goes on and metrics.jsonl has the same numbers"
            )


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
