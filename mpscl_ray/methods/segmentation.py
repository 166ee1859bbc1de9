"""Plain segmentation of labelled slices: the source-only and the supervised bound, and a start for adaptation."""

from __future__ import annotations

from torch import Tensor

from mpscl_ray.config import SegmentationConfig
from mpscl_ray.methods import base
from mpscl_ray.methods.base import Batch
from mpscl_ray.methods.segmenter_method import SegmenterMethod


class Segmentation(SegmenterMethod[SegmentationConfig]):
    """Train a segmenter on the labelled stream alone, which the batch calls source even if it is the target.

    Source: rows "W/o adaptation" and "Supervised" of Table III, Liu et al. 2022.
    """

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        self.optimisers.start_iteration(iteration)
        (logits,) = self.forward_logits(batch.source_image)
        loss = self.segmentation_loss(logits, batch.source_label)
        loss.total.backward()  # type: ignore[no-untyped-call]
        flag = self.optimisers.step(loss.parts)
        return base.metrics({"loss_segmentation": loss.total}, loss.parts, non_finite=flag)
