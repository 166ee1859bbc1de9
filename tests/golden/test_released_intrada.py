"""IntraDA's ranking against its released script; its training is in test_released_adversarial.py."""

from __future__ import annotations

import torch

from mpscl_ray.methods.base import TrainingSlices
from tests.golden.released_comparison import assert_equal, method_of, released
from tests.golden.released_inputs import RANKED, RANKED_SIZE, fill, ranked_images


def test_scores_split_and_pseudo_labels() -> None:
    """The released script writes the easy slices in order of their scores; here they come in order of their rows."""
    numbers = released("intrada")
    method = method_of("intrada", easy_fraction=0.67)
    fill(method.segmenter, 5)
    images = ranked_images()
    rows = torch.arange(RANKED)
    method.prepare(
        TrainingSlices(
            labelled=list,
            synchronised_source_batches=list,
            synchronised_target_batches=list,
            unlabelled=lambda: [(rows[:4], images[:4]), (rows[4:], images[4:])],
            target_volumes=(range(RANKED),),
            size=(RANKED_SIZE, RANKED_SIZE),
            source_only_weights=method.segmenter.state_dict,
        )
    )
    assert_equal(method.scores, numbers["scores"])
    assert method.split.easy.tolist() == sorted(numbers["easy"].tolist())
    assert method.split.hard.tolist() == sorted(numbers["hard"].tolist())
    assert torch.equal(method.split.pseudo_labels, numbers["pseudo_labels"][method.split.easy])
    assert len(numbers["pseudo_labels"].unique()) >= 4
