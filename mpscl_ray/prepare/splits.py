"""Assigning cases to training, validation and test by patient: no patient is in two splits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpscl_ray.data import SPLITS
from mpscl_ray.data.volumes.file_names import composed
from mpscl_ray.errors import ConfigError, DataError
from mpscl_ray.prepare.label_table import read_json
from mpscl_ray.runs.wording import counted

PUBLISHED_TEST = {
    "ct": ("1003", "1008", "1014", "1019"),
    "mr": ("1007", "1009", "1018", "1019"),
}
"""Test volumes of MM-WHS that SIFA, MPSCL and their successors report on.

Source: the test lists of the SIFA release.
"""

UNDECIDED = "undecided"
"""The split of a case before patients are drawn: it may become any."""

_VALIDATION_OF_MMWHS = 8
"""One in this many of the remaining patients validates: 2 of 16, as in the CT half of the release."""

_LISTED = 6


@dataclass(frozen=True)
class Member:
    """A case and its patient."""

    case: str
    patient: str


@dataclass(frozen=True)
class Splitting:
    """Cases of each split, in order, and how they were chosen (recorded in the manifest)."""

    cases: dict[str, tuple[str, ...]]
    record: dict[str, Any]
    notices: tuple[str, ...] = ()

    @property
    def drawn(self) -> bool:
        """Whether patients were drawn for more than one split."""
        return self.record["method"] in ("fractions", "folds") and sum(bool(names) for names in self.cases.values()) > 1


def _patients(members: Iterable[Member]) -> list[str]:
    return sorted({member.patient for member in members})


def _by_patient(members: Sequence[Member], patients: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    wanted = {split: set(names) for split, names in patients.items()}
    return {
        split: tuple(sorted(member.case for member in members if member.patient in wanted.get(split, set())))
        for split in SPLITS
    }


def split_published(members: Sequence[Member], modality: str) -> Splitting:
    """The published MM-WHS test volumes; of the rest the last eighth (by id) validates.

    Which patients validate was never published. In the release the MR validation slices come from test patients; here
    no patient is in two splits.

    Raises:
        DataError: the modality has no published list, or none of its test volumes is there.
    """
    if modality not in PUBLISHED_TEST:
        raise DataError(f"--split mmwhs knows ct and mr, not {modality!r}; give fractions or a JSON file")
    numbers = PUBLISHED_TEST[modality]
    patients = _patients(members)
    test = [patient for patient in patients if patient.rpartition("_")[2] in numbers]
    if not test:
        raise DataError(
            f"--split mmwhs: none of the published test volumes {', '.join(numbers)} is among "
            f"{counted(len(patients), f'{modality} patient')} ({', '.join(patients[:5])}, ...); give fractions "
            "or a JSON file"
        )
    notices = []
    missing = sorted(set(numbers) - {patient.rpartition("_")[2] for patient in test})
    if missing:
        notices.append(f"published test volumes that are not there: {', '.join(missing)}")
    rest = [patient for patient in patients if patient not in test]
    validation = max(1, round(len(rest) / _VALIDATION_OF_MMWHS)) if len(rest) > 1 else 0
    cut = len(rest) - validation
    chosen = {"train": rest[:cut], "val": rest[cut:], "test": test}
    return Splitting(_by_patient(members, chosen), {"method": "mmwhs", "patients": chosen}, tuple(notices))


def split_fractions(members: Sequence[Member], fractions: Sequence[float], seed: int) -> Splitting:
    """Patients assigned at random with a seed, ``fractions`` = (train, val, test).

    Every split with a fraction above 0 gets at least one patient; the rest is rounded by largest remainder.

    Raises:
        ConfigError: the fractions are not three numbers >= 0 that sum to 1.
        DataError: there are fewer patients than splits.
    """
    if (
        len(fractions) != 3
        or not all(math.isfinite(fraction) and fraction >= 0 for fraction in fractions)
        or abs(sum(fractions) - 1) > 1e-6
    ):
        raise ConfigError(
            f"--split {','.join(f'{fraction:g}' for fraction in fractions)}: expected three fractions "
            "(train,val,test) that sum to 1, e.g. 0.7,0.1,0.2"
        )
    patients = _patients(members)
    used = [index for index in range(3) if fractions[index] > 0]
    if len(patients) < len(used):
        raise DataError(
            f"{counted(len(patients), 'patient')} cannot fill {counted(len(used), 'split')}; give fewer, e.g. "
            "--split 1,0,0, or a JSON file"
        )
    free = len(patients) - len(used)
    ideal = [max(fractions[index] * len(patients) - 1, 0.0) for index in used]
    share = [free * value / sum(ideal) if sum(ideal) > 0 else free / len(used) for value in ideal]
    counts = [1 + math.floor(value) for value in share]
    by_remainder = sorted(range(len(used)), key=lambda index: (math.floor(share[index]) - share[index], index))
    for index in by_remainder[: len(patients) - sum(counts)]:
        counts[index] += 1
    order = np.random.default_rng(seed).permutation(len(patients))
    shuffled = [patients[index] for index in order]
    chosen: dict[str, list[str]] = {split: [] for split in SPLITS}
    start = 0
    for index, count in zip(used, counts, strict=True):
        chosen[SPLITS[index]] = sorted(shuffled[start : start + count])
        start += count
    record = {"method": "fractions", "fractions": list(fractions), "seed": seed, "patients": chosen}
    return Splitting(_by_patient(members, chosen), record)


def split_folds(members: Sequence[Member], folds: int, fractions: Sequence[float], seed: int) -> list[Splitting]:
    """A split for each fold: its patients are for test, those of the other folds for training and validation.

    Patients are dealt to the folds at random, so that the folds differ by at most one patient, and each patient is for
    test in one of them. The others are divided by ``fractions`` = (train, val, 0) as :func:`split_fractions` does.

    Raises:
        DataError: there are fewer patients than folds, or the others are fewer than their splits.
    """
    patients = _patients(members)
    if len(patients) < folds:
        raise DataError(
            f"--folds {folds}: there are {counted(len(patients), 'patient')}, and each fold needs one to test on; give "
            f"--folds {len(patients)} or less"
        )
    order = np.random.default_rng(seed).permutation(len(patients))
    found = []
    for fold in range(folds):
        test = sorted(patients[index] for index in order[fold::folds])
        rest = split_fractions([member for member in members if member.patient not in test], fractions, seed)
        chosen = {**rest.record["patients"], "test": test}
        about = {"method": "folds", "folds": folds, "fold": fold, "fractions": list(fractions), "seed": seed}
        found.append(Splitting(_by_patient(members, chosen), {**about, "patients": chosen}))
    return found


def read_split_file(
    path: Path, modality: str, fold: int | None = None, notices: list[str] | None = None
) -> dict[str, list[str]]:
    """Patients (or cases) of each split from a JSON file: ``{"train": [...], "val": [...], "test": [...]}``.

    One file may serve several modalities: ``{"ct": {"train": ...}, "mr": {...}}``. A list of splits, as in nnU-Net's
    ``splits_final.json``, has one for each fold; ``fold`` chooses, the first one by default.

    Raises:
        ConfigError: the file is missing or has another content.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise ConfigError(f"--split {path}: cannot be read: {error.strerror}") from error
    except DataError as error:
        raise ConfigError(f"--split {error}") from None
    if isinstance(content, dict) and modality in content:
        content = content[modality]
    if isinstance(content, list) and content:
        if fold is None and len(content) > 1 and notices is not None:
            notices.append(f"--split {path}: the first of {len(content)} folds; --fold chooses another")
        content = _fold(path, content, fold)
    elif fold is not None:
        raise ConfigError(f"--fold {fold}: --split {path} has no folds; it is one split")
    if not isinstance(content, dict) or not content or set(content) - set(SPLITS):
        found = ", ".join(map(repr, content)) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"--split {path}: expected lists under train, val and test for {modality!r}, found {found}")
    for split, names in content.items():
        if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
            raise ConfigError(f"--split {path}: {split!r} must be a list of patient or case ids")
        repeated = sorted(str(name) for name, times in Counter(names).items() if times > 1)
        if repeated:
            raise ConfigError(f"--split {path}: listed twice under {split!r}: {', '.join(repeated)}")
    return {split: [composed(str(name)) for name in content.get(split, [])] for split in SPLITS}


def _fold(path: Path, folds: list[Any], fold: int | None) -> Any:
    if not 0 <= (fold or 0) < len(folds):
        raise ConfigError(f"--fold {fold}: --split {path} has the folds 0 to {len(folds) - 1}")
    return folds[fold or 0]


def split_listed(members: Sequence[Member], listed: Mapping[str, Sequence[str]], origin: str) -> Splitting:
    """Splits by lists of patient ids, or of case ids if no patient has that id.

    Raises:
        DataError: naming every listed id that no case has.
    """
    by_patient: dict[str, list[str]] = {}
    for member in members:
        by_patient.setdefault(member.patient, []).append(member.case)
    cases = {member.case for member in members}
    chosen: dict[str, tuple[str, ...]] = {}
    unknown = []
    for split in SPLITS:
        names: set[str] = set()
        for name in listed.get(split, ()):
            if name in by_patient:
                names.update(by_patient[name])
            elif name in cases:
                names.add(name)
            else:
                unknown.append(f"{split}: {name}")
        chosen[split] = tuple(sorted(names))
    if unknown:
        raise DataError(
            f"{origin}: ids that no case has: {', '.join(unknown)}; known patients: {', '.join(sorted(by_patient)[:8])}"
        )
    left_out = sorted(cases - {case for names in chosen.values() for case in names})
    notices = []
    if left_out:
        notices.append(f"cases in no split, left out, {len(left_out)}: {', '.join(left_out[:8])}")
    return Splitting(chosen, {"method": origin}, tuple(notices))


def overlaps(
    entries: Iterable[tuple[str, str, str, str]], *, transductive: bool = False
) -> tuple[list[str], list[str]]:
    """Find patients and images that are in two splits.

    Args:
        entries: (split, case, patient, SHA-256 of the voxels) of each case.
        transductive: whether patients may be in train (without their labels) and in val or test.

    Returns:
        Problems, and warnings on copies of an image within one split.
    """
    by_patient: dict[str, dict[str, str]] = {}
    by_content: dict[str, list[tuple[str, str, str]]] = {}
    for split, case, patient, content in entries:
        by_patient.setdefault(patient, {}).setdefault(split, case)
        by_content.setdefault(content, []).append((split, case, patient))
    forbidden = []
    for patient, where in sorted(by_patient.items()):
        if _conflict(set(where), transductive):
            forbidden.append(f"patient {patient} is in {_and(sorted(where))}")
    copies = []
    for same in by_content.values():
        if len(same) < 2:
            continue
        names = ", ".join(f"{case} ({split})" for split, case, _ in sorted(same)[:_LISTED])
        names += f" and {len(same) - _LISTED} more" if len(same) > _LISTED else ""
        splits = {split for split, _, _ in same}
        if len({patient for _, _, patient in same}) > 1 and _conflict(splits, transductive):
            forbidden.append(f"the same image under several names: {names}")
        elif len({patient for _, _, patient in same}) > 1 and UNDECIDED in splits and not transductive:
            forbidden.append(
                f"the same image under several names: {names}; they may fall into two splits: keep one, or make them "
                "one patient with --patient-pattern"
            )
        elif len({case for _, case, _ in same}) > 1:
            copies.append(f"the same image under several names: {names}")
    return forbidden, copies


def _conflict(splits: set[str], transductive: bool) -> bool:
    if transductive:
        return {"val", "test"} <= splits
    return len(splits) > 1


def _and(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1]
