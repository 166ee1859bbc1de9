"""A non-finite number on one rank stops all ranks before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Run = Callable[[str, int], list[dict[str, np.ndarray[Any, Any]]]]


@pytest.mark.parametrize("case", ["non-finite-source", "non-finite-target"])
def test_nothing_moves_on_any_rank(run: Run, case: str) -> None:
    for arrays in run(case, 2):
        np.testing.assert_array_equal(arrays["flags"], [0, 0, 1, 1])
        names = {name.removeprefix("before.") for name in arrays if name.startswith("before.")} - {"phase.skipped"}
        moved = [name for name in names if not np.array_equal(arrays[f"first.{name}"], arrays[f"before.{name}"])]
        for part in ("networks.segmenter.", "networks.discriminator_main.", "optimisers.segmenter.", "prototypes"):
            assert any(name.startswith(part) for name in moved), f"{part} does not move in a good step"
        assert any("running_mean" in name for name in moved)
        for name in names:
            assert np.isfinite(arrays[f"before.{name}"]).all(), name
            np.testing.assert_array_equal(arrays[f"after.{name}"], arrays[f"before.{name}"], err_msg=name)
            np.testing.assert_array_equal(arrays[f"later.{name}"], arrays[f"before.{name}"], err_msg=name)


@pytest.mark.parametrize("case", ["non-finite-source", "non-finite-target"])
def test_the_component_losses_of_the_first_bad_step_are_kept(run: Run, case: str) -> None:
    for arrays in run(case, 2):
        bad = {
            name.removeprefix("loss.") for name in arrays if name.startswith("loss.") and not np.isfinite(arrays[name])
        }
        expected = {"gradient_norm", "loss_contrastive_target", "loss_discriminator_main", "loss_discriminator_aux"}
        if case == "non-finite-source":
            # The prototypes carry the NaN of the source features into the loss on target pixels.
            expected |= {"loss_cross_entropy_main", "loss_cross_entropy_aux", "loss_dice_main", "loss_dice_aux"}
            expected |= {"loss_contrastive_source"}
        else:
            expected |= {"loss_adversarial_main", "loss_adversarial_aux"}
        assert bad == expected
