"""What is done to a label map after the network, structure by structure: which parts stay, and which holes are filled.

A part of a structure is a set of its voxels that are connected by faces, in three dimensions. The rules of a run are
chosen on validation volumes (:mod:`mpscl_ray.evaluate.choose_postprocessing`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from mpscl_ray.errors import ConfigError

Labels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

PostprocessingChoice = Literal["chosen", "none", "largest_component"]
"""``chosen``: the rules that were chosen for the weights, if any were. ``none``: label maps as the network gives them.
``largest_component``: only the largest part of each structure."""
CHOICES: tuple[PostprocessingChoice, ...] = get_args(PostprocessingChoice)


@dataclass(frozen=True)
class Rule:
    """What is done to one structure. Voxels that it loses become background, those that it gains were background."""

    largest_component: bool = False
    """Keep only the largest part."""
    min_ml: float = 0.0
    """Remove parts smaller than this; where the size of voxels is unknown, none is removed for it."""
    fill_holes: bool = False
    """Fill background that the structure encloses in three dimensions."""

    def __post_init__(self) -> None:
        """Raises ValueError for a size that is none."""
        if not 0 <= self.min_ml < math.inf:
            raise ValueError(f"min_ml is {self.min_ml}; expected ml, at least 0")

    def __str__(self) -> str:
        said = ["largest component"] if self.largest_component else []
        said += [f"parts of at least {self.min_ml:g} ml"] if self.min_ml else []
        said += ["holes filled"] if self.fill_holes else []
        return ", ".join(said) or "as predicted"


_NOTHING = Rule()


@dataclass(frozen=True)
class Postprocessing:
    """A rule for each structure, and where the rules come from."""

    rules: Mapping[str, Rule] = field(default_factory=dict)
    """By structure; a structure without one stays as it is."""
    chosen_by: str | None = None
    """What chose the rules: a value of :data:`mpscl_ray.evaluate.choose_postprocessing.Criterion`."""

    @property
    def oracle(self) -> bool:
        """Whether labels of the target chose the rules, which a user without such labels cannot repeat."""
        return self.chosen_by == "oracle"

    def __bool__(self) -> bool:
        return any(rule != _NOTHING for rule in self.rules.values())

    def __str__(self) -> str:
        return "; ".join(f"{name}: {rule}" for name, rule in self.rules.items() if rule != _NOTHING) or "none"

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The rules that do something, by structure."""
        return {
            name: {key: value for key, value in asdict(rule).items() if value}
            for name, rule in self.rules.items()
            if rule != _NOTHING
        }

    def described(self) -> dict[str, Any]:
        """The rules, and what chose them, as JSON values."""
        return {"rules": self.to_json(), "chosen_by": self.chosen_by}

    @classmethod
    def from_json(cls, rules: Mapping[str, Mapping[str, Any]], chosen_by: str | None = None) -> Self:
        """Inverse of :meth:`to_json`. Raises ValueError, TypeError or AttributeError for anything else."""
        known = {field.name for field in fields(Rule)}
        for name, rule in rules.items():
            if unknown := sorted(set(rule) - known):
                raise ValueError(f"the rule of {name} has {unknown[0]!r}; expected {', '.join(sorted(known))}")
        return cls(
            {
                name: Rule(
                    bool(rule.get("largest_component", False)),
                    float(rule.get("min_ml", 0.0)),
                    bool(rule.get("fill_holes", False)),
                )
                for name, rule in rules.items()
            },
            chosen_by,
        )

    def __call__(self, labels: Labels, classes: Sequence[str], voxel_ml: float | None) -> Labels:
        """A label map with the rules applied: parts of all structures are removed, then holes are filled.

        Args:
            labels: (D, H, W) class indices, or (X, Y, Z).
            classes: names, background first.
            voxel_ml: volume of a voxel; None where it is unknown.

        Returns:
            A new array; the same one if no rule does anything.
        """
        found = [(index, self.rules.get(name, _NOTHING)) for index, name in enumerate(classes) if index]
        if all(rule == _NOTHING for _, rule in found):
            return labels
        done = labels.copy()
        boxes = scipy.ndimage.find_objects(labels, max_label=len(classes) - 1)
        for index, rule in found:
            box = boxes[index - 1]
            if box is not None and (rule.largest_component or (rule.min_ml and voxel_ml)):
                here = labels[box] == index
                done[box][here & ~_parts_kept(here, rule, voxel_ml)] = 0
        for index, rule in found:
            box = boxes[index - 1]
            if box is not None and rule.fill_holes:
                here = done[box]
                here[(here == 0) & scipy.ndimage.binary_fill_holes(here == index)] = index
        return done


NO_POSTPROCESSING = Postprocessing()


def largest_component_of_each(classes: Sequence[str]) -> Postprocessing:
    """Keep the largest part of every structure; ``classes`` are names, background first."""
    return Postprocessing({name: Rule(largest_component=True) for name in classes[1:]})


def check_choice(choice: object) -> None:
    """Raises ConfigError for what is no :data:`PostprocessingChoice`."""
    if choice not in CHOICES:
        raise ConfigError(f"postprocessing is {choice!r}; expected {', '.join(map(repr, CHOICES))}")


def largest_component(mask: Mask) -> Mask:
    """The largest part of a mask; of equally large ones the first in memory."""
    return _parts_kept(mask, Rule(largest_component=True), None)


def _parts_kept(mask: Mask, rule: Rule, voxel_ml: float | None) -> Mask:
    parts, _ = scipy.ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept = sizes > 0
    if rule.largest_component:
        kept &= np.arange(len(sizes)) == sizes.argmax()
    if voxel_ml is not None:
        kept &= sizes * voxel_ml >= rule.min_ml
    kept[0] = False
    chosen: Mask = kept[parts]
    return chosen
