"""Fixtures of the tests of scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.nifti_files import rotated
from tests.scored_maps import AFFINE, hearts, save


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Folders ``pred`` and ``truth`` with three cases on grids of different orientation."""
    for number, affine in enumerate((AFFINE, rotated(25.0), np.diag([2.0, 2.0, 2.0, 1.0]))):
        prediction, label = hearts(number)
        save(tmp_path / "pred" / f"c{number}.nii.gz", prediction, affine)
        save(tmp_path / "truth" / f"c{number}.nii.gz", label, affine)
    return tmp_path
