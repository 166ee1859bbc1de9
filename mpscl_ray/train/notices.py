"""Signs, in the records of a training, that the adaptation goes wrong, each with what to try."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mpscl_ray.runs.wording import counted

PATIENCE = 10
"""Readings in a row (run.log_every iterations apart) that show the sign before it is reported."""

WINNING_ACCURACY = 0.99
"""Share of pixels whose domain a discriminator tells; at 0.5 it guesses."""

SMALLEST_ANGLE = math.radians(3)
"""Between two prototypes; trained ones are tens of degrees apart."""

SELECTED_SHARES = (0.001, 0.999)
"""Pseudo-labels of fewer or more of the target's pixels teach next to nothing, or everything alike."""

LOST_STRUCTURE = 0.01
"""A structure is lost whose share of the target's pixels is below this part of its share of the labelled ones."""

_SKIPPED = "skipped steps"


class Notices:
    """Sentences about one training; each is reported once a phase."""

    def __init__(self) -> None:
        self._phase = ""
        self._seen: dict[str, int] = {}

    def of_metrics(self, record: Mapping[str, Any]) -> Iterator[str]:
        """What a record of metrics.jsonl shows, with those before it."""
        self._start(record["phase"])
        skipped = int(record.get("train/skipped_steps", 0))
        if skipped > self._seen.get(_SKIPPED, 0):
            self._seen[_SKIPPED] = skipped
            yield (
                f"by iteration {record['iteration']} of {record['phase']} {counted(skipped, 'step')} had a loss or "
                "gradient that was not finite, and changed nothing; after more than optim.max_skipped_steps training "
                "goes back to a checkpoint: try smaller learning rates"
            )
        for sign, sentence in _signs(record):
            if sentence is None:
                self._seen[sign] = min(self._seen.get(sign, 0), 0)
            elif self._count(sign) == PATIENCE:
                yield f"at iteration {record['iteration']} of {record['phase']} {sentence}"

    def of_shares(self, phase: str, iteration: int, structures: Mapping[str, tuple[float, float]]) -> Iterator[str]:
        """What two validations in a row show.

        Args:
            structures: by name, the share of the target's pixels that is predicted as it, and of the labelled ones.
        """
        self._start(phase)
        for name, (predicted, expected) in structures.items():
            if predicted >= LOST_STRUCTURE * expected:
                self._seen[name] = min(self._seen.get(name, 0), 0)
            elif self._count(name) == 2:
                yield (
                    f"at iteration {iteration} of {phase} hardly any pixel of the target is predicted as {name} "
                    f"({100 * predicted:.2g} %, of the labelled ones are {100 * expected:.2g} %): the adaptation has "
                    "lost it; try smaller adversarial or entropy weights, or fewer iterations"
                )

    def _start(self, phase: str) -> None:
        if phase != self._phase:
            self._phase, self._seen = phase, {}

    def _count(self, sign: str) -> int:
        self._seen[sign] = self._seen.get(sign, 0) + 1
        return self._seen[sign]


def lost_shares(predicted: Tensor, labelled: Tensor, structures: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """The arguments of :meth:`Notices.of_shares` from shares (C,) of all classes, the background first."""
    return dict(zip(structures, zip(predicted[1:].tolist(), labelled[1:].tolist(), strict=True), strict=True))


def _signs(record: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Each sign that the record can show, with the sentence if it does."""
    for key, value in record.items():
        head = key.removeprefix("train/discriminator_accuracy_")
        if head != key:
            told = f"the discriminator {head} tells the domain of {100 * value:.1f} % of the pixels: nothing fools it"
            yield key, f"{told}; try a smaller optim.lr_discriminator" if value > WINNING_ACCURACY else None
    angle = record.get("train/prototype_angle_min")
    if angle is not None:
        told = f"two prototypes are {math.degrees(angle):.1f} degrees apart: their classes are hardly told apart"
        yield "angle", f"{told}; try larger margins or a smaller method.gamma" if angle < SMALLEST_ANGLE else None
    selected = record.get("train/pseudo_label_fraction")
    if selected is not None:
        least, most = SELECTED_SHARES
        told = f"{100 * selected:.3g} % of the target's pixels have a pseudo-label"
        yield "few", f"{told}; with MPSCL a smaller method.delta_th selects more" if selected < least else None
        yield "many", f"{told}; with MPSCL a larger method.delta_th selects fewer" if selected > most else None
