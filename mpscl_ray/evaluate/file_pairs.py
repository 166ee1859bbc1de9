"""Which prediction belongs to which label, by the names of the files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpscl_ray.data.volumes.dicom_paths import is_dicom
from mpscl_ray.data.volumes.file_names import VOLUME_ENDINGS, composed, has_ending, stem_before
from mpscl_ray.errors import DataError
from mpscl_ray.predict.output_names import is_probability_map
from mpscl_ray.prepare.file_listing import LABEL_ENDINGS, Listing, list_files
from mpscl_ray.prepare.volume_layouts import case_pattern
from mpscl_ray.runs.wording import counted

_TRUE_ENDINGS = (*LABEL_ENDINGS, "_truth", "_groundtruth")
_PREDICTION_ENDINGS = (*_TRUE_ENDINGS, "_prediction", "_predicted", "_pred", "_image", "_img", "_0000")
"""Predictions may be named after the image."""
_VOLUMES = (*VOLUME_ENDINGS, ".mhd", ".nhdr", ".dcm", ".hdr", ".img", ".mgz")
_LISTED = f"{', '.join(VOLUME_ENDINGS[:-1])} or {VOLUME_ENDINGS[-1]}"
_NAMED = 20
"""Number of files named in an error."""


@dataclass(frozen=True)
class Pair:
    """A prediction and its label."""

    case: str
    prediction: Path
    label: Path


@dataclass(frozen=True)
class Pairs:
    """All pairs, and the files without a counterpart."""

    pairs: tuple[Pair, ...]
    predictions_alone: tuple[Path, ...]
    labels_alone: tuple[Path, ...]
    passed_over: tuple[str, ...] = ()
    """What else the folders hold that may be a label map, a sentence for each folder."""


def find_pairs(
    predictions: Path,
    labels: Path,
    prediction_pattern: str | None = None,
    label_pattern: str | None = None,
    allow_missing: bool = False,
) -> Pairs:
    """Pair the label maps of two folders.

    A file belongs to the file of the same name on the other side, without ``.nii.gz`` or another ending of a format;
    where there is none, known endings are taken off one after the other. Probability maps of predict are left out. With
    a pattern the name is what ``{case}`` stands for.

    Args:
        predictions: folder, or a file.
        labels: folder, or a file.
        prediction_pattern: path below the folder with ``{case}`` and ``*``; None for the label maps in it.
        label_pattern: the same for labels.
        allow_missing: whether files without a counterpart are left out.

    Raises:
        ConfigError: a pattern without ``{case}``.
        DataError: files without a counterpart, two that belong to the same case, no pair at all, or no files.
    """
    if predictions.is_file() and labels.is_file():
        return Pairs((Pair(_stem(labels), predictions, labels),), (), ())
    predicted, true = list_files(predictions), list_files(labels)
    by_prediction = _files(predicted, prediction_pattern, "--prediction-pattern")
    by_label = _files(true, label_pattern, "--label-pattern")
    label_names: dict[str, list[Path]] = {}
    for stem, path in by_label.items():
        for name in _names(stem, () if label_pattern else _TRUE_ENDINGS):
            label_names.setdefault(name, []).append(path)
    pairs: dict[Path, Pair] = {}
    alone: list[Path] = []
    for stem, path in by_prediction.items():
        endings = () if prediction_pattern else _PREDICTION_ENDINGS
        case = next((name for name in _names(stem, endings) if name in label_names), None)
        if case is None:
            alone.append(path)
            continue
        label = by_label.get(case, label_names[case][0])
        if len(label_names[case]) > 1 and case not in by_label:
            raise DataError(f"{path} belongs to {label} and {label_names[case][1]} alike; give --label-pattern")
        if label.samefile(path):
            raise DataError(f"{path} is prediction and label at once; give two folders, or patterns")
        if label in pairs:
            raise DataError(f"{label} belongs to {pairs[label].prediction} and {path} alike; give --prediction-pattern")
        pairs[label] = Pair(case, path, label)
    found = Pairs(
        tuple(sorted(pairs.values(), key=lambda pair: pair.case)),
        tuple(alone),
        tuple(path for path in by_label.values() if path not in pairs),
        tuple(
            filter(
                None,
                (
                    _passed_over(predicted, prediction_pattern, by_prediction.values(), "--prediction-pattern"),
                    _passed_over(true, label_pattern, by_label.values(), "--label-pattern"),
                ),
            )
        ),
    )
    if not found.pairs or (not allow_missing and (found.predictions_alone or found.labels_alone)):
        raise DataError(_unpaired(found, predicted, true))
    return found


def _unpaired(found: Pairs, predicted: Listing, true: Listing) -> str:
    parts = []
    if found.predictions_alone:
        alone = found.predictions_alone
        parts.append(f"predictions without a label, {len(alone)}: {predicted.some(alone, _NAMED)}")
    if found.labels_alone:
        alone = found.labels_alone
        parts.append(f"labels without a prediction, {len(alone)}: {true.some(alone, _NAMED)}")
    parts += found.passed_over
    advice = "correct the names or give --prediction-pattern and --label-pattern"
    if found.pairs:
        advice += f"; with --allow-missing {counted(len(found.pairs), 'pair')} alone would be scored"
    return f"{predicted.root} and {true.root}: {'; '.join(parts)}; {advice}"


def _files(listing: Listing, pattern: str | None, option: str) -> dict[str, Path]:
    """The label maps of a folder by case or name."""
    if listing.problems:
        raise DataError("; ".join(listing.problems))
    found: dict[str, Path] = {}
    expression = None if pattern is None else case_pattern(pattern, option)
    beside = {path.name for path in listing.files if path.parent == listing.root}
    for path in listing.files:
        name = stem_before(composed(path.name), VOLUME_ENDINGS)
        if expression is not None and name is not None:
            match = expression.fullmatch(composed(listing.relative(path)))
            name = match["case"] if match else None
        elif path.parent != listing.root or is_probability_map(path.name, beside):
            name = None
        if name is None:
            continue
        if name in found:
            raise DataError(f"{found[name]} and {path} are both of the case {name}; keep one, or give {option}")
        found[name] = path
    if not found:
        raise DataError(_nothing(listing, pattern, option))
    return found


def _passed_over(listing: Listing, pattern: str | None, taken: Collection[Path], option: str) -> str:
    """Files that may be label maps and are not read, as a sentence; empty with a pattern, which chooses files."""
    if pattern is not None:
        return ""
    beside = {path.name for path in listing.files}
    left = [
        path
        for path in listing.files
        if path not in taken and has_ending(path.name, _VOLUMES) and not is_probability_map(path.name, beside)
    ]
    if not left:
        return ""
    reasons = [f"only files in the folder itself that end in {_LISTED} are"]
    if any(path.parent != listing.root for path in left):
        reasons.append(f"for those in folders give {option}")
    return f"not read in {listing.root}, {len(left)}: {listing.some(left, _NAMED)} ({'; '.join(reasons)})"


def _nothing(listing: Listing, pattern: str | None, option: str) -> str:
    if pattern is not None:
        return (
            f"{listing.root}: none of {counted(len(listing.files), 'file')} matches {option} {pattern!r}: "
            f"{listing.some(listing.files)}"
        )
    deeper = [path for path in listing.files if has_ending(path.name, VOLUME_ENDINGS)]
    if deeper:
        return (
            f"{listing.root}: no label map in the folder itself, but below it: {listing.some(deeper, 3)}; give "
            f"{option}, e.g. '{{case}}/{deeper[0].name}'"
        )
    hint = "; convert DICOM to NIfTI first" if any(map(is_dicom, listing.files)) else ""
    return f"{listing.root}: no file that ends in {_LISTED} among {counted(len(listing.files), 'file')}{hint}"


def _stem(path: Path) -> str:
    return stem_before(path.name, VOLUME_ENDINGS) or path.name


def _names(stem: str, endings: Sequence[str]) -> Iterator[str]:
    """The stem, and what is left when known endings are taken off one after the other."""
    yield stem
    ending = next((ending for ending in endings if stem.lower().endswith(ending) and len(stem) > len(ending)), None)
    if ending is not None:
        yield from _names(stem[: -len(ending)], endings)
