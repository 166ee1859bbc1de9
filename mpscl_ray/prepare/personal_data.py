"""Warnings on personal data: texts in headers, and names of files and folders. What they say is never repeated."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mpscl_ray.prepare.patients import names_no_patient
from mpscl_ray.prepare.staged_case import StagedCase
from mpscl_ray.runs.wording import counted

_DATE = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d(?P<a>[-_.]?)(?:0[1-9]|1[0-2])(?P=a)(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0[1-9]|[12]\d|3[01])(?P<b>[-_.])(?:0[1-9]|1[0-2])(?P=b)(?:19|20)\d\d)(?!\d)"
)
_NAME = re.compile(
    r"([A-ZÀ-Þ](?:[A-ZÀ-Þ]{2,}|[a-zß-ÿ]{2,}))[_^, ]+([A-ZÀ-Þ](?:[A-ZÀ-Þ]{2,}|[a-zß-ÿ]{2,}))(?![A-Za-zÀ-ÿ])"
)
_NO_NAMES = frozenset(
    "image images label labels manual mask masks seg segmentation gt heart cardiac case patient subject study series "
    "scan scans hospital site center centre phantom train test val data dataset control normal healthy volume nifti "
    "dicom short long axis view stack cine lge bssfp ground truth raw final new old group cohort batch session visit "
    "anat func month year day week left right front back".split()
)
_EXAMPLES = 2


def personal_notices(staged: Sequence[StagedCase], root: Path) -> list[str]:
    """What may name a person in the cases of a dataset, by kind and with counts.

    Args:
        staged: the cases.
        root: the folder that holds them.
    """
    texts = Counter(kind for case in staged for kind in case.private)
    notices = []
    if texts:
        kinds = ", ".join(f"{kind} ({counted(count, 'case')})" for kind, count in texts.most_common())
        notices.append(f"headers have texts that may name a person, and are not copied: {kinds}")
    dates: dict[str, None] = {}
    names: dict[str, set[str]] = {}
    for case in staged:
        source = case.request.source
        for part in {part for path in source.images for part in path.relative_to(root).parts}:
            if found := _DATE.search(part):
                dates[found[0]] = None
            if (found := _NAME.match(part)) and not any(_is_common(word) for word in found.groups()):
                names.setdefault(found[0], set()).add(source.patient)
    # What several patients share is the name of a study.
    persons = [name for name, patients in names.items() if len(patients) == 1]
    for kind, values in (("a person", persons), ("a date, perhaps of birth", list(dates))):
        if values:
            notices.append(
                f"names of files or folders that may tell {kind}, {len(values)}, e.g. "
                f"{', '.join(map(_masked, values[:_EXAMPLES]))}; names of cases and files are copied into the dataset: "
                "rename them first"
            )
    return notices


def _is_common(word: str) -> bool:
    return word.lower() in _NO_NAMES or names_no_patient(word)


def _masked(text: str) -> str:
    """The text with most of its letters and digits replaced by stars."""
    return re.sub(r"(?<=[^\W_])[^\W_]", "*", text)
