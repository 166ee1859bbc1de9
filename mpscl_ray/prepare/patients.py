"""Which cases are of one patient, by their names: frames, sequences, sides and visits share a patient."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
_DAY = r"(0?[1-9]|[12]\d|3[01])"
_DATE = re.compile(
    rf"(?<!\d)((?:19|20)\d\d)([-._]){_DAY}\2{_DAY}(?!\d)|(?<!\d){_DAY}([-._]){_DAY}\6((?:19|20)\d\d)(?!\d)"
)
_BIDS = re.compile(r"(?:^|[_/])sub-([A-Za-z0-9]+)")
_LISTED = 3
_MOST_OF_A_PATIENT = 25
_FEWEST_NAMES, _MOST_OF_A_NAME = 3, 5
"""Prefixes without a number are names of patients if there are some of them, of few cases each."""
_NOTABLE_SHARE = 0.2
"""Part of all cases that has to look like repeated patients before a split at random is refused."""
_SITE = re.compile(
    r"(site|cent(er|re)|hospital|scanner|vendor|fold|batch|part|group|set|split)[\W_]*\d+", re.IGNORECASE
)
_EXAMPLES = (r"^([^_]+)", r"^(\D*\d+)", r"^(.+)[\W_]", r"^(\D+)", r"([^\W_]+)$", r"(\d+)$", r"0*(\d+)")
"""Patterns of which messages show the first that fits the names."""


@dataclass(frozen=True)
class Grouping:
    """The cases with their patients, and what was found."""

    cases: tuple[SourceCase, ...]
    notices: tuple[str, ...] = ()
    ambiguous: str = ""
    """Why the patients are uncertain, and what decides; a split at random has to be refused then."""
    uncertain: tuple[tuple[str, ...], ...] = ()
    """Cases that may be of one patient."""


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
    patients = {key: patient_in(same[0].id) for key, same in groups.items() if len(same) > 1}
    shared = {}
    for case in named:
        stems = [patient_in(case.id), *(case.id[: gap.start()] for gap in re.finditer(r"[\W_]+", case.id))][::-1]
        # p1_MID is of the patient of p1_ED and p1_ES; what has no number may be a word, as in scan_ED, scan_7.
        keys = [(case.modality, stem.casefold()) for stem in stems if stem == stems[-1] or re.search(r"\d", stem)]
        patient = next((patients[key] for key in keys if key in patients), None)
        if patient:
            shared[case.id] = patient
    found = tuple(replace(case, patient=shared[case.id]) if case.id in shared else case for case in cases)
    notices = []
    if shared:
        patient = next(iter(shared.values()))
        members = [case.id for case in found if case.patient == patient]
        notices.append(
            f"{len(shared)} cases are taken for {counted(len(set(shared.values())), 'patient')} by their names, e.g. "
            f"{', '.join(members[:_LISTED])} for {patient}; --patient-pattern REGEX says otherwise ('.+': each case "
            "is a patient)"
        )
    uncertain = _look_repeated(found)
    if not uncertain:
        return Grouping(found, tuple(notices))
    sentence = _uncertainty(uncertain, found)
    if sum(map(len, uncertain)) < _NOTABLE_SHARE * len(found):
        return Grouping(found, (*notices, sentence), "", uncertain)
    return Grouping(found, tuple(notices), sentence, uncertain)


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
    parts = re.split(r"([\W_]+)", _join_dates(case))
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


def apart(uncertain: Iterable[Sequence[str]], splits: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence on cases that may be of one patient and are in several splits, if there are any."""
    where = {case: split for split, cases in splits.items() for case in cases}
    found = []
    for names in uncertain:
        firsts = {where[name]: name for name in reversed(names) if name in where}
        if len(firsts) > 1:
            found.append(", ".join(f"{name} ({split})" for split, name in reversed(firsts.items())))
    if not found:
        return []
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return [
        f"cases that may be of one patient by their names are in several splits: {'; '.join(found[:_LISTED])}{more}"
    ]


def _join_dates(case: str) -> str:
    """The case id with dates as one number: 2019-03-01 and 01.03.2019 as 20190301."""

    def joined(date: re.Match[str]) -> str:
        year, _, month, day, first, _, second, last_year = date.groups()
        numbers = (year, month, day) if year else (last_year, second, first)
        return "".join(number.zfill(2) for number in numbers)

    return _DATE.sub(joined, case)


# ------------------------------------------------------------------------------- names that may be of one patient


def _look_repeated(cases: Iterable[SourceCase]) -> tuple[tuple[str, ...], ...]:
    """Case ids that differ from others only in a part that may name a visit, by what may be their patient."""
    found: list[tuple[str, ...]] = []
    by_modality: dict[str, list[SourceCase]] = {}
    for case in cases:
        if case.patient == case.id and case.kind == "nifti":
            by_modality.setdefault(case.modality, []).append(case)
    for same in by_modality.values():
        found += _in_folders(same) or _repeated_in([case.id for case in same])
    return tuple(found)


def _in_folders(cases: Sequence[SourceCase]) -> list[tuple[str, ...]]:
    """Cases in numbered folders, each of few cases: pat1/x.nii.gz, pat1/y.nii.gz."""
    folders: dict[Path, list[str]] = {}
    for case in cases:
        folders.setdefault(case.images[0].parent if case.images else Path(), []).append(case.id)
    numbered = all(re.search(r"\d", folder.name) and not _SITE.fullmatch(folder.name) for folder in folders)
    if len(folders) < _FEWEST_NAMES or not numbered or max(map(len, folders.values())) > _MOST_OF_A_NAME:
        return []
    return [tuple(ids) for ids in folders.values() if len(ids) > 1]


def _repeated_in(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Names of a cohort that may share a patient.

    ``p01_a, p01_b``, ``case12, case12b``, ``p1, p01``, ``ED1, ES1`` and ``anna1, anna2, bob1, cleo1`` do;
    ``case_001, case_002`` do not: what they share has no number. More than 25 cases of a prefix are those of a site.
    """
    # p1 (2) and p1_35% end in no letter or digit.
    plain = {name: re.sub(r"[\W_]+$", "", _join_dates(name)) or name for name in names}
    forms = {name: re.sub(r"(?<!\d)0+(?=\d)", "", form) for name, form in plain.items()}
    heads = _heads(sorted(set(forms.values())))
    times = Counter(forms.values())
    stems = {head for form, head in heads.items() if head != form} | {form for form in times if times[form] > 1}
    groups: dict[str, list[str]] = {}
    for name, form in forms.items():
        groups.setdefault(form if form in stems else heads[form], []).append(name)
    if len(groups) < 2:
        return []
    words = [key for key in groups if not re.search(r"\d", key)]
    if not _are_patients({key: groups[key] for key in words}):
        groups = {key: group for key, group in groups.items() if key not in words}
    if any(len(group) > _MOST_OF_A_PATIENT for group in groups.values()):
        groups = {key: group for key, group in groups.items() if key in times}
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _are_patients(words: Mapping[str, Sequence[str]]) -> bool:
    """Whether prefixes without a number name patients: some, of few cases each, and not c0, c1, c2, anna, bob."""
    if len(words) < _FEWEST_NAMES or max(map(len, words.values())) > _MOST_OF_A_NAME:
        return False
    longer = [key for key, names in words.items() if key not in names and len(names) > 1]
    series = len(longer) == 1 and all(key in names for key, names in words.items() if key != longer[0])
    return not (series and (len(words[longer[0]]) >= _FEWEST_NAMES or len(longer[0]) == 1))


def _heads(forms: Sequence[str]) -> dict[str, str]:
    """What may be the patient in each form of a name; the form itself if nothing else."""
    ends = Counter(re.split(r"[\W_]+", form)[-1] for form in forms)
    glued = {form: re.fullmatch(r"([a-zA-Z]+)(\d+)", form) for form in forms}
    frames = Counter(match[2] for match in glued.values() if match and _WORD.fullmatch(match[1].lower()))
    visits = {form: re.fullmatch(r"(\d+)[\W_]+((?=.*\d)(?=.*[a-zA-Z])[^\W_]+)", form) for form in forms}
    leading = {match[1] for match in visits.values() if match}
    trailing = {match[2] for match in visits.values() if match}
    visit_first = len(leading) < len(trailing) < sum(match is not None for match in visits.values())
    heads = {}
    for form in forms:
        frame, visit = glued[form], visits[form]
        if frame and frames[frame[2]] > 1 and _WORD.fullmatch(frame[1].lower()):
            heads[form] = frame[2]
        elif visit and visit_first:
            heads[form] = visit[2]
        else:
            heads[form] = _head(form, ends)
    return heads


def _head(form: str, ends: Mapping[str, int]) -> str:
    head = re.fullmatch(r"(.*\d.*?)[\W_]+[^\W_]+", form) or re.fullmatch(r"(.*\d)([a-zA-Z]+\d*)", form)
    head = head or re.fullmatch(r"(.*[^\W\d_])[\W_]*\d+", form)
    if head:
        return head[1]
    # anna_first, bob_first: the same end after several names is none of theirs.
    word = re.fullmatch(r"(.*[^\W\d_])[\W_]+([^\W\d_]+)", form)
    return word[1] if word and ends[word[2]] > 1 else form


def _uncertainty(groups: Sequence[Sequence[str]], cases: Sequence[SourceCase]) -> str:
    examples = "; ".join(", ".join(names[:_LISTED]) for names in groups[:2])
    return (
        f"cases that may be of one patient by their names, {counted(len(groups), 'group')}: {examples}; say which part "
        f"names the patient, {_example(groups, cases)}, or --patient-pattern '.+' if each case is its own patient"
    )


def _example(groups: Sequence[Sequence[str]], cases: Sequence[SourceCase]) -> str:
    """A pattern that finds the same patient in the names of a group and another one in all others."""
    member = {name: f"group {number}" for number, names in enumerate(groups) for name in names}
    wanted = {case.id: member.get(case.id, case.patient) for case in cases}
    for pattern in _EXAMPLES:
        found = {name: re.search(pattern, name) for name in wanted}
        pairs = {(patient, match[1]) for name, patient in wanted.items() if (match := found[name])}
        sizes = {len(pairs), len({patient for patient, _ in pairs}), len({part for _, part in pairs})}
        if all(found.values()) and len(sizes) == 1:
            return f"e.g. --patient-pattern '{pattern}'"
    return "with --patient-pattern REGEX"
