"""What ``progress.html`` shows of a training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.config import Config
from mpscl_ray.config.titles import phase_title
from mpscl_ray.runs.control_files import WARNINGS_FILE
from mpscl_ray.runs.curves import curves
from mpscl_ray.runs.live_page import Content, LivePage, LiveTable
from mpscl_ray.runs.plots import save_png
from mpscl_ray.runs.position import Speed
from mpscl_ray.runs.progress import duration
from mpscl_ray.runs.run_directory import RunDirectory

_MOST_PICTURES = 8
_MOST_NOTICES = 20


class TrainingPage:
    """Keeps the page of a run up to date, from the same calls as a callback of the training gets.

    Args:
        folder: of the run.
        config: its settings.
        classes: names, background first.
    """

    def __init__(self, folder: RunDirectory, config: Config, classes: tuple[str, ...]) -> None:
        self._folder, self._config, self._classes = folder, config, classes
        self._records: list[Mapping[str, Any]] = []
        self._notices: list[str] = []
        self._speed = Speed(config.total_iterations)
        self._left: dict[str, float | None] = {}
        self._page = LivePage(folder.progress_page, self._content)

    def start(self, step: int) -> None:
        """Go on from what an earlier start has left up to a step."""
        self._records = list(self._folder.read_metrics())
        file = self._folder.logs / WARNINGS_FILE
        self._notices = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        for picture in self._pictures():
            if _step_of(picture) > step:
                picture.unlink()

    def warn(self, text: str) -> None:
        """Add a notice."""
        self._notices.append(" ".join(text.split()))

    def record(self, record: Mapping[str, Any]) -> None:
        """Add a record of metrics."""
        self._records.append(record)
        self._left = self._speed.read(record["phase"], record["global_step"])
        self._page.update()

    def picture(self, step: int, image: NDArray[np.uint8]) -> None:
        """Add the slices of a validation, RGB (H, W, 3)."""
        self._folder.slices.mkdir(exist_ok=True)
        save_png(self._folder.slices / f"step-{step:07d}.png", image)

    def close(self) -> None:
        """Write the page once more."""
        if self._records:
            self._page.update(at_once=True)

    def _pictures(self) -> list[Path]:
        return sorted(self._folder.slices.glob("step-*.png"))

    def _content(self) -> Content:
        config, last = self._config, self._records[-1]
        step, total = last["global_step"], config.total_iterations
        state = f"{phase_title(last['phase'])}, iteration {last['iteration']} of {last['iterations']}"
        if step >= total:
            state = "All phases are trained; scores are in results/ once they are computed."
        pictures = self._pictures()
        places = np.linspace(len(pictures) - 1, 0, min(len(pictures), _MOST_PICTURES)).round().astype(int)
        shown = [pictures[at] for at in places]
        return Content(
            title=f"{self._folder.name}: {config.method_name}",
            state=state,
            done=min(1.0, step / total),
            facts=self._facts(last),
            notices=self._notices[-_MOST_NOTICES:],
            tables=[self._phases(step)],
            curves=curves(self._records, self._classes),
            pictures=[(f"iteration {_step_of(picture)}", picture.read_bytes()) for picture in shown],
        )

    def _facts(self, last: Mapping[str, Any]) -> list[tuple[str, str]]:
        facts = [("iterations", f"{last['global_step']} of {self._config.total_iterations}")]
        speed, left = self._left.get("iterations_per_s"), self._left.get("eta_s")
        if speed and left is not None:
            facts += [("time left", duration(left)), ("iterations a second", f"{speed:.3g}")]
        scored = [record for record in self._records if "val/selection_score" in record]
        if scored:
            phase = scored[-1]["phase"]
            best = max((r for r in scored if r["phase"] == phase), key=lambda r: float(r["val/selection_score"]))
            value = f"{best['val/selection_score']:.4f} at iteration {best['iteration']}"
            facts.append((f"best of {phase_title(phase)} by {self._config.run.select}", value))
        validated = next((record for record in reversed(self._records) if "val/dice/mean" in record), None)
        if validated is not None:
            facts.append(("target Dice, last validation", f"{validated['val/dice/mean']:.3f}"))
        return facts

    def _phases(self, step: int) -> LiveTable:
        rows = []
        for name, iterations in self._config.schedule:
            done = min(max(step, 0), iterations)
            step -= iterations
            rows.append([phase_title(name), str(iterations), f"{100 * done // max(iterations, 1)} %"])
        return LiveTable(["phase", "iterations", "done"], rows)


def _step_of(picture: Path) -> int:
    found = re.search(r"\d+", picture.stem)
    assert found is not None
    return int(found.group())
