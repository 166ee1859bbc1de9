"""Texts in headers that may name a person. Only the kind of a text is reported, never the text."""

from __future__ import annotations

import re
from typing import Any

_TEXT_FIELDS = ("descrip", "db_name", "aux_file", "intent_name", "data_type", "unused_str")
_EXTENSIONS = {2: "extension with DICOM tags", 4: "AFNI extension", 6: "comment extension"}
_OF_A_PROGRAM = re.compile(
    r"(?i)(fsl|spm|itk|simpleitk|afni|nibabel|freesurfer|ants|elastix|mricro\w*|dcm2nii\w*|nifti|plastimatch)"
    r"[\s\d.:v_-]*|(te|time|tr|ti|phase|mb|fa)=[\d.]+(;(te|time|tr|ti|phase|mb|fa)=[\d.]+)*|[\d.]+"
)
"""Descriptions by the commonest programs: their name and version, or echo times."""
_PRIVATE_KEY = re.compile(
    r"(?i)patient|birth|institution|physician|operator|comment|address|0010[|_,]?\d{4}|"
    r"0008[|_,]?(0050|008[01]|0090|10[157]0)"
)


def private_fields(header: Any) -> tuple[str, ...]:
    """Kinds of texts in a NIfTI header that may name people or places: names of fields, kinds of extensions."""
    found = []
    for field in (name for name in _TEXT_FIELDS if name in header):
        text = bytes(header[field].item()).strip(b"\0 ").decode("latin-1")
        if text and not _OF_A_PROGRAM.fullmatch(text):
            found.append(field)
    for extension in header.extensions:
        code = int(extension.get_code())
        found.append(_EXTENSIONS.get(code, f"extension of code {code}"))
    return tuple(dict.fromkeys(found))


def is_private_key(key: str) -> bool:
    """Whether a key of an NRRD or MetaImage header, such as a DICOM tag, is one of texts that may name a person."""
    return _PRIVATE_KEY.search(key) is not None
