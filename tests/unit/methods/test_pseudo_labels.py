"""Self-paced pseudo-labels against Eqs. (6) and (7) written as loops."""

from __future__ import annotations

import pytest
import torch

from mpscl_ray.methods.pseudo_labels import self_paced_pseudo_labels


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("delta_th", [0.0, 0.25, 2.0])
def test_pseudo_labels_are_their_equation(classes: int, delta_th: float) -> None:
    cosine = 2.0 * torch.rand(2, classes, 6, 7, generator=torch.Generator().manual_seed(3)) - 1.0
    labels, mask = self_paced_pseudo_labels(cosine, delta_th)
    assert labels.dtype == torch.int64
    assert mask.dtype == torch.bool
    for b in range(2):
        for y in range(6):
            for x in range(7):
                cosines = cosine[b, :, y, x].tolist()
                first, second = sorted(cosines, reverse=True)[:2]
                assert int(labels[b, y, x]) == cosines.index(first)
                assert bool(mask[b, y, x]) == (first - second > delta_th)


def test_a_tie_is_never_selected() -> None:
    cosine = torch.tensor([0.7, 0.7, 0.1]).reshape(1, 3, 1, 1)
    labels, mask = self_paced_pseudo_labels(cosine, 0.0)
    assert int(labels) in (0, 1)
    assert not bool(mask)


def test_threshold_itself_is_not_selected() -> None:
    cosine = torch.tensor([0.75, 0.5, 0.25]).reshape(1, 3, 1, 1)
    assert not bool(self_paced_pseudo_labels(cosine, 0.25)[1])
    assert bool(self_paced_pseudo_labels(cosine, 0.2499)[1])


def test_no_gradient() -> None:
    cosine = torch.rand(1, 3, 2, 2, requires_grad=True)
    labels, mask = self_paced_pseudo_labels(cosine, 0.25)
    assert not labels.requires_grad
    assert not mask.requires_grad
