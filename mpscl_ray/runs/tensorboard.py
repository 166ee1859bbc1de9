"""TensorBoard event files of a run.

Tags, the same in metrics.jsonl and in TensorBoard:

===============================  ==================================================================================
train/loss_*                     each loss of the method's step, such as train/loss_contrastive_target
train/pseudo_label_fraction      share of the target pixels that the self-paced mask selects
train/contrast_fraction          share of the target's features that the contrast of the mean teacher takes
train/discriminator_accuracy_*   share of the pixels that the discriminator assigns to the right domain, per head
train/prototype_angle_*          smallest and mean angle between prototypes, radians
val/dice/<structure> and mean    Dice on the target's validation slices
val/source/dice/... and mean     the same on the source
val/entropy, val/source/entropy  mean self-information of the predictions
val/loss_cross_entropy           weighted cross-entropy on the target's validation slices, where they are labelled
val/source/loss_cross_entropy    the same on the source
val/unsupervised/*               criteria of the target's predictions, larger is better
                                 (mpscl_ray.train.unsupervised_criteria)
val/selection_score              the score that decides which checkpoint is the best
train/learning_rate_*            learning rate of each network
train/gradient_norm              L2 norm of all gradients of the step, averaged over the workers; SIFA: of each network
train/skipped_steps              steps of the phase so far that were not finite and changed nothing
perf/step_s                      seconds per step
perf/images_per_s                training images of both domains per second, all workers
perf/data_stall_fraction         share of the time that the step waits for data
panel/<name>                     an image panel (mpscl_ray.runs.plots)
===============================  ==================================================================================
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mpscl_ray.runs.atomic_files import storage_errors
from mpscl_ray.runs.environment import now


class TensorBoard:
    """Event files of a run, in one folder over all its restarts.

    Uses the event writer of tensorboardX, not its SummaryWriter. That one writes from a thread, which a full disk ends
    silently; training then blocks for ever when the queue is full. Two SummaryWriters that start in the same second
    write to one file. Here every record is on the disk when the call returns. If the folder can no longer be written,
    one warning says so and no more events are written: metrics.jsonl has the same numbers.

    Args:
        folder: Where the event files go.
        resume_step: Global step that a run resumes from: TensorBoard then hides what an interrupted start had written
            beyond it, and curves are continuous.
        warn: Called with the warning that no more events are written.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None, warn: Callable[[str], None]) -> None:
        self._warn = warn
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
        """Write the settings, and the tags of the metrics, that the HParams tab of TensorBoard compares."""
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
            self._warn(
                f"{now()}: no more TensorBoard events, {self._folder} cannot be written ({error.strerror}); "
                f"training continues, and metrics.jsonl has the same numbers"
            )
