"""Phantom hearts as NIfTI files, laid out like the training data of MM-WHS 2017."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from mpscl_ray.data.phantom.case import Modality, PhantomCase, make_case
from mpscl_ray.data.phantom.imaging import CtScan, MrScan
from mpscl_ray.errors import StorageError

FIRST_CASE = 1001
"""Number of the first case of each modality, as in MM-WHS."""


def make_phantom(
    folder: Path,
    cases_mr: int,
    cases_ct: int,
    seed: int,
    mr_scan: MrScan | None = None,
    ct_scan: CtScan | None = None,
) -> list[Path]:
    """Write random phantom hearts as ``{mr,ct}_train_10NN_{image,label}.nii.gz``.

    MR and CT cases of the same number are different patients. Shapes, voxel sizes and array orientations differ from
    case to case; the affine tells.

    Args:
        folder: made if it does not exist; files of the same names are replaced.
        cases_mr: number of MR cases, numbered from 1001 on.
        cases_ct: number of CT cases, likewise.
        seed: of all cases; a case does not depend on how many there are.
        mr_scan: ranges of the MR acquisition; None for the defaults.
        ct_scan: ranges of the CT acquisition; None for the defaults.

    Returns:
        The files, image before label, MR before CT.

    Raises:
        StorageError: the folder cannot be made or written.
    """
    wanted: list[tuple[Modality, int, MrScan | CtScan | None]] = [
        *(("mr", FIRST_CASE + i, mr_scan) for i in range(cases_mr)),
        *(("ct", FIRST_CASE + i, ct_scan) for i in range(cases_ct)),
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [
            path
            for modality, number, scan in wanted
            for path in _write(folder, make_case(modality, number, seed, scan))
        ]
    except OSError as error:
        raise StorageError(
            f"the phantom cannot be written to {folder}: {error}; give a folder with free space"
        ) from error


def _write(folder: Path, case: PhantomCase) -> tuple[Path, Path]:
    """Write image and label of one case."""
    stem = f"{case.modality}_train_{case.number}"
    paths = folder / f"{stem}_image.nii.gz", folder / f"{stem}_label.nii.gz"
    for path, array in zip(paths, (case.image, case.label.astype(np.int16)), strict=True):
        volume = nib.Nifti1Image(array, case.affine)  # type: ignore[no-untyped-call]
        volume.set_qform(case.affine, code=1)  # type: ignore[no-untyped-call]
        volume.set_sform(case.affine, code=1)  # type: ignore[no-untyped-call]
        volume.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
        nib.save(volume, path)
    return paths
