"""Do the intensities of an image fit the modality that it is said to have?"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mpscl_ray.data.volumes.recipe import AIR_HU, LOWEST_HU
from mpscl_ray.runs.wording import counted

_SAMPLE = 200_000
_PIECE = 1 << 22
_MOST_LABELS = 12
_PADDING_SHARE = 0.005
_BORDER_SHARE = 0.1
_BRIGHT, _DARKER = 0.75, 0.15
"""Intensity of an inverted border, and how much darker the middle is, from the 1st (0) to the 99th percentile (1)."""
_FAT = 860
"""Where fat begins in a CT plus 1024."""
_MR_NAMES = frozenset(("t1", "t1w", "t2", "t2w", "t2star", "flair", "pd", "lge", "cine", "bssfp", "c0", "dwi", "adc"))
_CT_NAMES = re.compile(r"(cb|c|ce|nc|ld|pet)?cta?")

Kind = Literal["ct", "mr"]


def kind_of(modality: str) -> Kind | None:
    """CT or MR by the name of a modality (``cta``, ``lge``, ``cine_mri``); None for any other name."""
    words = [word for word in re.split(r"[\W_]+", modality.lower()) if word]
    if any(_CT_NAMES.fullmatch(word) for word in words):
        return "ct"
    if any(word.startswith("mr") or word.endswith(("mr", "mri")) or word in _MR_NAMES for word in words):
        return "mr"
    return None


def other_modality(image: NDArray[np.float32], modality: str, scanner: str = "") -> str | None:
    """Why the image cannot be of this modality, as a sentence; None if it can, or if the modality is not known.

    CT is in Hounsfield units: without air, lung or fat below 0 it is another image, or lost its offset of 1024. MR has
    no large part below -500, and not the two peaks of air and soft tissue of a CT that is stored with that offset.
    Images that are scaled or z-scored already are not judged. An image has something above 0, CT aside, and not
    many voxels of one value far from all others, but for the padding of CT.

    Args:
        image: Intensities.
        modality: Name of the modality.
        scanner: The modality in the DICOM header, in capitals, if there is one.
    """
    kind = kind_of(modality)
    if kind and scanner and scanner != kind.upper():
        return f"its DICOM header says {scanner}, not {kind.upper()} (modality {modality!r})"
    sample = image.ravel(order="K")[:: image.size // _SAMPLE + 1]
    real = sample[sample >= LOWEST_HU]
    if found := _far_value(real if kind == "ct" else sample):
        return found
    if kind == "ct":
        return _not_hounsfield(real, modality) if real.size else None
    if kind == "mr" and real.size and (found := _not_mr(real, modality)):
        return found
    low, high = (float(image.min()), float(image.max())) if image.size else (0.0, 0.0)
    if low < high <= 0:
        return f"no intensity is above 0 ({low:.4g} to {high:.4g}), as if their sign was changed"
    return None


def _far_value(sample: NDArray[np.float32]) -> str | None:
    """That many voxels have one value far from all others, as padding has, which would spoil the normalisation."""
    for end in (-1, 1):
        value = (end * sample).max() * end if sample.size else 0
        if end < 0 and value >= 0:
            continue  # a masked image has background of 0
        there = sample == value
        rest = sample[~there]
        if there.mean() < _PADDING_SHARE or rest.size < _PADDING_SHARE * sample.size:
            continue
        low, high = np.percentile(rest, (1, 99))
        if high > low and min(abs(value - low), abs(value - high), np.abs(rest - value).min()) > 3 * (high - low):
            return (
                f"{100 * there.mean():.2g} % of the voxels have the intensity {value:g}, far from all others "
                f"({low:.4g} to {high:.4g}), as padding has; set them to that of the background"
            )
    return None


def _not_hounsfield(real: NDArray[np.float32], modality: str) -> str | None:
    rest = real[real > real.min()]
    if rest.size and rest.min() - real.min() > 300:  # one value far below all others is padding
        real = rest
    low, high = np.percentile(real, (0.1, 99.9))
    if _stored_with_offset(real, _FAT):
        meaning = "as in a CT whose offset of -1024 was lost, or one of -1000"
    elif _in_thousandths(real):
        meaning = "as in a CT that was divided by 1000"
    elif _stored_with_offset(1024 - real, _FAT):
        meaning = "as in a CT whose sign was changed, so that air is brightest"
    elif high > 20 and low > -max(20, min(60, 0.02 * high)):  # noise around air that lost its offset, times a slope
        meaning = f"an MR image among the {modality} ones, or a CT in another unit"
    else:
        return None
    return f"the intensities, {low:.4g} to {high:.4g}, are no Hounsfield units: {meaning}"


def _in_thousandths(real: NDArray[np.float32]) -> bool:
    """Whether the intensities are Hounsfield units by 1000, and not just scaled to [-1, 1] or z-scored."""
    hounsfield = 1000 * real[real >= LOWEST_HU / 1000]
    if not hounsfield.size or abs(real.std() - 1) < 0.02 or (real.min() >= -1.0001 and real.max() <= 1.0001):
        return False
    return _stored_with_offset(hounsfield + 1024, _FAT)


def _not_mr(real: NDArray[np.float32], modality: str) -> str | None:
    low = float(np.percentile(real, 1))
    if low <= -500:
        found = f"the intensities, which begin at {real.min():g}, are Hounsfield units"
        return f"{found}: a CT image among the {modality} ones"
    if _stored_with_offset(real):
        return (
            f"the intensities are those of a CT image that is stored with an offset of 1024, among the {modality} ones"
        )
    return None


def _stored_with_offset(real: NDArray[np.float32], tissue: float = 1000) -> bool:
    """Whether air and lung, then nearly nothing, then soft tissue follow each other as in CT plus 1024.

    ``tissue`` is where soft tissue begins: without fat, or with it where the image is known to be CT.
    """

    def share(low: float, high: float) -> float:
        return float(np.mean((real >= low) & (real < high)))

    soft = share(tissue, 1150)
    return real.min() > -200 and share(-200, 400) > 0.1 and soft > 0.1 and soft > 3 * share(450, 850)


def few_values(image: NDArray[np.float32]) -> str | None:
    """That the image has a few whole numbers only, as a label map has; None if it has more."""
    sample = image.ravel(order="K")[:: image.size // _SAMPLE + 1]
    values = np.unique(sample)
    if values.size > _MOST_LABELS or np.any(values != np.rint(values)):
        return None
    return f"has only {values.size} different values, {', '.join(f'{value:g}' for value in values[:6])}"


def unusual_intensities(image: NDArray[np.float32], modality: str) -> list[str]:
    """Warnings on intensities that a raw volume of this modality does not have."""
    low, high = float(image.min()), float(image.max())
    kind = kind_of(modality)
    notices = []
    if kind == "ct" and low < LOWEST_HU:
        voxels = int(np.count_nonzero(image < LOWEST_HU))
        notices.append(
            f"padding outside the field of view below {LOWEST_HU:g}, down to {low:g}, was set to {AIR_HU:g}: "
            f"{counted(voxels, 'voxel')}"
        )
    elif kind == "mr" and low <= -500:
        notices.append(
            f"intensities from {low:g} to {high:g} look like Hounsfield units: a CT image among the {modality} ones?"
        )
    if kind == "ct":
        notices += _cut_or_padded(image, low, high)
    elif image.ndim == 3:
        notices += _bright_border(image)
    flat = image.ravel(order="K")
    pieces = [flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE)]
    mean = float(image.mean(dtype=np.float64))
    # Piece by piece, so that no double-precision copy of the volume is made.
    squares = sum(float(np.square(np.subtract(piece, mean, dtype=np.float64)).sum()) for piece in pieces)
    deviation = float(np.sqrt(squares / image.size))
    if -1.0001 <= low < 0 and high <= 1.0001:
        notices.append("intensities are within [-1, 1], as if scaled already; they are normalised again")
    elif low >= 0 and high <= 1.0001:
        notices.append("intensities are within [0, 1], as if scaled already; they are normalised again")
    elif abs(mean) < 0.02 and abs(deviation - 1) < 0.02:
        notices.append("intensities have mean 0 and deviation 1, as if z-scored already; they are normalised again")
    elif kind == "ct" and high - low < 20:
        notices.append(
            f"intensities from {low:.3g} to {high:.3g} are no Hounsfield units, as if scaled already; they are "
            "normalised again"
        )
    elif low >= 0 and high <= 255 and all(np.array_equal(piece, np.rint(piece)) for piece in pieces):
        notices.append("intensities are whole numbers within 0..255, as if reduced to 8 bits")
    return notices


def _bright_border(image: NDArray[np.float32]) -> list[str]:
    """A warning on a volume whose border is nearly its brightest part, though air is dark in MR."""
    along = np.argsort(image.shape)[1:]  # the border of its slices: the first and the last one may be within the body
    rim = np.concatenate([image.take(end, axis).ravel() for axis in along for end in (0, -1)])
    inside = image[tuple(slice(length // 4, max(1, 3 * length // 4)) for length in image.shape)]
    low, high = np.percentile(image.ravel(order="K")[:: image.size // _SAMPLE + 1], (1, 99))
    if high <= low:
        return []
    border, middle = (float((np.median(part) - low) / (high - low)) for part in (rim, inside))
    if border < _BRIGHT or middle > border - _DARKER:
        return []
    return [
        "the border of the volume is brighter than its middle, as if black and white were exchanged; if so, invert the "
        "intensities: air is dark"
    ]


def _cut_or_padded(image: NDArray[np.float32], low: float, high: float) -> list[str]:
    """Warnings on a CT that was cut to a window, or has padding around it that is not air."""
    if high - low < 200 or low > -20:  # no Hounsfield units
        return []
    at_low, at_high = (float(np.mean(image == end)) for end in (low, high))
    if low > -800 and at_low > 0.01 and at_high > 0.0005:
        return [
            f"intensities were cut to {low:g} to {high:g}, as by a window: {100 * at_low:.3g} % and "
            f"{100 * at_high:.3g} % of the voxels have just these values; a CT begins with air at about -1000"
        ]
    if image.ndim != 3:
        return []
    border = np.concatenate([image.take(end, axis).ravel() for axis in range(3) for end in (0, -1)])
    values, counts = np.unique(border, return_counts=True)
    value, share = float(values[counts.argmax()]), counts.max() / border.size
    # A uniform tissue has one value often too, but values next to it nearly as often.
    near = int(np.count_nonzero(np.abs(border - value) <= 5)) - int(counts.max())
    if value <= -500 or share < _BORDER_SHARE or near > 0.5 * counts.max():
        return []
    return [
        f"{100 * share:.3g} % of the border and {100 * np.mean(image == value):.3g} % of all voxels have the intensity "
        f"{value:g}, as padding has, but air is at about -1000; set them to {AIR_HU:g}"
    ]
