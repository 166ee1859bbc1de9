"""How a training ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TrainResult:
    """How training ended."""

    state: Literal["finished", "interrupted", "non_finite"]
    """interrupted can be resumed, and non_finite from the checkpoint before it."""
    phase: str
    """Phase it ended in."""
    iteration: int
    """Iterations done in this phase; for non_finite, when it was detected."""
    step: int
    """Iterations done in all phases."""
    losses: dict[str, float] = field(default_factory=dict)
    """Component losses of the step that was not finite; {} for the other states."""
    retried: bool = False
    """Whether the phase had already gone back to a checkpoint with lower learning rates."""

    def describe_non_finite(self) -> str:
        """What was not finite, and where."""
        losses = ", ".join(f"{name} {value:g}" for name, value in self.losses.items())
        return (
            f"a loss or gradient was not finite, seen at iteration {self.iteration} of the phase {self.phase} "
            f"({losses})" + (", also with lower learning rates" if self.retried else "")
        )
