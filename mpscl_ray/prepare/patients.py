"""Which cases are of one patient, by their names: frames, sequences, sides and visits share a patient."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.source_cases import SourceCase
from mpscl_ray.runs.wording import counted

_COUNTED = (
    r"(ses|sess|session|visit|vis|timepoint|time|tp|frame|fr|phase|ph|run|scan|acq|rep|echo|day|week|month|year|"
    r"followup|fu|exam|t|v|f)"
)
_COUNTED_WORD = re.compile(rf"{_COUNTED}\d{{1,4}}[a-z]?|(19|20)\d{{6}}|(19|20)\d\d-?\d\d-?\d\d")
_WORD = re.compile(
    # Heart phases and time; sequences and contrast; sides and views; the kind of file.
    r"ed|es|sys|dia|systole|diastole|systolic|diastolic|baseline|bl|followup|fu|pre|post|before|after|rest|stress|"
    r"t1c?|t1w|t1ce|t1gd|t1map|t2|t2w|t2star|t2map|pd|pdw|flair|adc|dwi|swi|lge|de|c0|bssfp|cine|tagging|perf|mag|phs|"
    r"inphase|outphase|art|arterial|ven|venous|portal|delayed|native|contrast|nc|ce|plain|"
    r"left|right|lt|rt|l|r|lh|rh|sa|la|sax|lax|2ch|3ch|4ch|ax|axial|cor|coronal|sag|sagittal|ap|pa|"
    r"insp|exp|supine|prone|[234]d|img|image|vol|volume|mr|mri|ct|cta"
)
_BIDS = re.compile(r"(?:^|[_/])sub-([A-Za-z0-9]+)")
_LISTED = 3
_MOST_OF_A_PATIENT = 25
_FEWEST_NAMES, _MOST_OF_A_NAME = 3, 5
"""Prefixes without a number are names of patients if there are some of them, of few cases each."""
_NOTABLE_SHARE = 0.2
"""Part of all cases that has to look like repeated patients before a split at random is refused."""


@dataclass(frozen=True)
class Grouping:
    """The cases with their patients, and what was found."""

    cases: tuple[SourceCase, ...]
    notices: tuple[str, ...] = ()
    ambiguous: str = ""
    """Why the patients are uncertain, and what decides; a split at random has to be refused then."""


def group_patients(cases: Sequence[SourceCase], pattern: str | None, problems: list[str]) -> Grouping:
    """The patient of each case: by ``--patient-pattern``, else by the parts of its name that do not name a patient.

    Args:
        cases: of one folder; those whose layout knows the patient keep it.
        pattern: regular expression searched in the case id; its first group that matches (or the match) is the patient.
        problems: gets every case that the pattern does not match.

    Raises:
        ConfigError: the pattern is no regular expression.
    """
    if pattern is not None:
        return Grouping(tuple(_by_pattern(case, pattern, problems) for case in cases))
    named = [case for case in cases if case.patient == case.id and case.kind == "nifti"]
    groups: dict[tuple[str, str], list[SourceCase]] = {}
    for case in named:
        groups.setdefault((case.modality, patient_in(case.id).casefold()), []).append(case)
    shared = {case.id: patient_in(same[0].id) for same in groups.values() if len(same) > 1 for case in same}
    found = tuple(replace(case, patient=shared[case.id]) if case.id in shared else case for case in cases)
    notices = []
    if shared:
        patient, *_ = shared.values()
        members = [case.id for case in found if case.patient == patient]
        notices.append(
            f"{len(shared)} cases are taken for {counted(len(set(shared.values())), 'patient')} by their names, e.g. "
            f"{', '.join(members[:_LISTED])} for {patient}; --patient-pattern REGEX says otherwise ('.+': each case "
            "is a patient)"
        )
    return Grouping(found, tuple(notices), _look_repeated(found))


def _by_pattern(case: SourceCase, pattern: str, problems: list[str]) -> SourceCase:
    try:
        match = re.search(pattern, case.id)
    except re.error as error:
        raise ConfigError(f"--patient-pattern {pattern!r}: not a regular expression: {error}") from None
    patient = "" if match is None else next((group for group in match.groups() if group), match[0])
    if not patient:
        problems.append(f"case {case.id}: --patient-pattern {pattern!r} does not match it")
        return case
    return replace(case, patient=patient)


def patient_in(case: str) -> str:
    """The patient in a case id: what is left without frame, phase, sequence, side, view and visit; else the id itself.

    BIDS: the subject, ``sub-01``.
    """
    subject = _BIDS.search(case)
    if subject:
        return f"sub-{subject[1]}"
    parts = re.split(r"([\W_]+)", case)
    words, gaps = parts[::2], parts[1::2]
    kept = [True] * len(words)
    counted = [False] * len(words)
    for index, word in enumerate(words):
        lowered = word.lower()
        if _WORD.fullmatch(lowered):
            kept[index] = False
        elif _COUNTED_WORD.fullmatch(lowered):
            kept[index], counted[index] = False, True
        elif lowered.isdecimal() and index and re.fullmatch(_COUNTED, words[index - 1].lower()):
            kept[index] = kept[index - 1] = False
            counted[index] = True
    left = [index for index in range(len(words)) if kept[index] and words[index]]
    rest = "".join(words[index] + (gaps[index] if index + 1 in left else "_") for index in left)[:-1] if left else ""
    if not left or (any(counted) and not any(letter.isdecimal() for letter in rest)):
        return case  # scan_1 and scan_2 may be two patients
    return rest


def names_no_patient(word: str) -> bool:
    """Whether a word of a file name is a sequence, phase, side, view or visit."""
    return bool(_WORD.fullmatch(word.lower()) or _COUNTED_WORD.fullmatch(word.lower()))


def _look_repeated(cases: Iterable[SourceCase]) -> str:
    """A sentence if many ids differ from others only in their last part, as those of one patient do; else nothing.

    ``p01_a, p01_b``, ``case12a, case12b`` and ``anna1, anna2, bob1, cleo1`` do; ``case_001, case_002`` do not: what
    they share has no number. More than 25 cases of a prefix are those of a site.
    """
    patients: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        if case.patient == case.id and case.kind == "nifti":
            head = re.fullmatch(r"(.*\d.*?)[\W_]+[^\W_]+", case.id) or re.fullmatch(r"(.*\d)([a-zA-Z]+\d*)", case.id)
            head = head or re.fullmatch(r"(.*[^\W\d_])[\W_]*\d+", case.id)
            patients.setdefault((case.modality, head[1] if head else case.id), []).append(case.id)
    words = [key for key in patients if not any(letter.isdecimal() for letter in key[1])]
    if len(words) < _FEWEST_NAMES or max(len(patients[key]) for key in words) > _MOST_OF_A_NAME:
        for key in words:
            del patients[key]
    repeated = [names for names in patients.values() if len(names) > 1]
    total = sum(map(len, patients.values()))
    if not repeated or sum(map(len, repeated)) < _NOTABLE_SHARE * total:
        return ""
    if len(patients) < 2 or max(map(len, repeated)) > _MOST_OF_A_PATIENT:
        return ""
    examples = "; ".join(", ".join(names[:_LISTED]) for names in repeated[:2])
    return (
        f"cases that may be of one patient by their names, {counted(len(repeated), 'group')}: {examples}; say "
        "which part names "
        "the patient, e.g. --patient-pattern '^([^_]+)', or --patient-pattern '.+' if each case is its own patient"
    )
