"""The cases that are shown together: those of one modality, in one dataset or folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mpscl_ray.data.dataset import Case
from mpscl_ray.prepare.pictures.case import CasePicture
from mpscl_ray.prepare.staged_case import StagedCase


@dataclass(frozen=True)
class PicturedCase:
    """A case with its picture."""

    id: str
    patient: str
    split: str
    shape: tuple[int, int, int]
    """Of the prepared volume, (D, H, W)."""
    spacing_mm: tuple[float, float, float] | None
    """Of the prepared volume."""
    class_voxels: tuple[int, ...] | None
    notices: tuple[str, ...]
    picture: CasePicture

    @property
    def volumes(self) -> list[float]:
        """Size of each class in ml, in voxels where the size of a voxel is not known."""
        d_mm, h_mm, w_mm = self.spacing_mm or (10.0, 10.0, 10.0)
        return [voxels * d_mm * h_mm * w_mm / 1000 for voxels in self.class_voxels or ()]


@dataclass
class Album:
    """All cases of a modality."""

    title: str
    """Modality, and where the cases come from."""
    classes: tuple[str, ...]
    cases: list[PicturedCase]
    findings: list[tuple[str, str]] = field(default_factory=list)
    """Level (problem or note) and sentence of each."""


def short(number: float) -> str:
    """A number with about three digits."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def product(sizes: Iterable[float]) -> str:
    """Sizes along the axes, such as 2 x 1.5 x 1.5."""
    return " x ".join(short(size) for size in sizes)


def staged_cases(staged: Sequence[StagedCase]) -> list[PicturedCase]:
    """The cases that have a picture."""
    return [
        PicturedCase(
            id=case.request.source.id,
            patient=case.request.source.patient,
            split=case.request.split,
            shape=case.shape,
            spacing_mm=case.spacing_mm,
            class_voxels=case.class_voxels,
            notices=case.notices,
            picture=case.picture,
        )
        for case in staged
        if case.picture is not None
    ]


def prepared_case(case: Case, size: tuple[int, int], picture: CasePicture) -> PicturedCase:
    """A case of a finished dataset with slices of this height and width."""
    return PicturedCase(
        id=case.id,
        patient=case.patient,
        split=case.split,
        shape=(case.slices, *size),
        spacing_mm=case.spacing_mm,
        class_voxels=case.class_voxels,
        notices=case.notices,
        picture=picture,
    )
