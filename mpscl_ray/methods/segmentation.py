"""Plain segmentation of labelled slices: the source-only and the supervised bound, and a start for adaptation."""

from __future__ import annotations

from torch import Tensor

from mpscl_ray.config import SegmentationConfig
from mpscl_ray.distributed import collectives
from mpscl_ray.methods import base
from mpscl_ray.methods.base import Batch
from mpscl_ray.methods.losses import class_counts
from mpscl_ray.methods.segmenter_method import SegmenterMethod


class Segmentation(SegmenterMethod[SegmentationConfig]):
    """Train a segmenter on the labelled stream alone, which the batch calls source even if it is the target.

    Source: rows "W/o adaptation" and "Supervised" of Table III, Liu et al. 2022.
    """

    def step(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        labels = batch.source_label
        self.optimisers.start_iteration(iteration)

        (output,) = self.forward(batch.source_image)
        counts = collectives.all_reduce_sum(class_counts(labels, self.num_classes))
        logits = base.upsampled(output, labels.shape[-2:])
        loss = base.segmentation_loss(logits, labels, counts, self.config.segmentation_aux_weight)
        loss.total.backward()  # type: ignore[no-untyped-call]

        flag = self.optimisers.step(loss.parts)
        return base.metrics({"loss_segmentation": loss.total}, loss.parts, non_finite=flag)
