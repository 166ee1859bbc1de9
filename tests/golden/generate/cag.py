"""Runs the released parts of CAG-UDA: anchors, pseudo-labels, the distance term, and its training step whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpscl_ray.networks.deeplab import DeepLabV2
from tests.golden.generate.patches import load, prepare
from tests.golden.released_inputs import (
    ANCHORED_CLASSES,
    ANCHORED_SEGMENTER,
    FAR_ANCHORS,
    ITERATIONS,
    OTHER_ANCHORS,
    STEPS,
    anchored_batches,
    class_vectors,
    digest,
    fill,
)

THRESHOLDS = {"probability": 0.5, "distance": 0.5}


class FourOutputs(DeepLabV2):
    """The network of this package with the interface of the released one: features and logits come last."""

    def forward(self, x: Tensor) -> Any:
        output = super().forward(x)
        return None, None, output.features, output.main


def network(seed: int) -> FourOutputs:
    made = FourOutputs(ANCHORED_CLASSES, **ANCHORED_SEGMENTER)
    fill(made, seed)
    return made


def cag(folder: Path) -> dict[str, Any]:
    """The parts that its scripts ``cac.py`` and ``train.py`` call, with a small network."""
    prepare(folder, folder / "utils")
    from loss import get_loss_function  # type: ignore[import-not-found]
    from models import adaptation_model  # type: ignore[import-not-found]
    from schedulers import get_scheduler  # type: ignore[import-not-found]

    model = object.__new__(adaptation_model.CustomModel)
    student, teacher = network(2), network(2)
    teacher.eval()
    settings = {"loss": {"name": "cross_entropy", "size_average": True}}
    settings |= dict.fromkeys(("loss_L2_cls", "loss_pseudo_label", "loss_source_seg"), True)  # type: ignore[arg-type]
    optimiser = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, weight_decay=2e-4)
    model.__dict__.update(
        cfg={"training": settings},
        class_numbers=ANCHORED_CLASSES,
        valid_classes=list(range(ANCHORED_CLASSES)),
        class_threshold=np.full(ANCHORED_CLASSES, THRESHOLDS["probability"]),
        metrics=adaptation_model.CustomMetrics(ANCHORED_CLASSES),
        cls_feature_weight=0.7,
        G_train=True,
        split_gpu=0,
        default_gpu=0,
        BaseNet_DP=student,
        PredNet=teacher,
        PredNet_DP=teacher,
        BaseOpti=optimiser,
        optimizers=[optimiser],
        schedulers=[get_scheduler(optimiser, {"name": "poly_lr", "gamma": 0.9, "max_iter": STEPS})],
        loss_fn=get_loss_function({"training": settings}),
        smoothloss=nn.SmoothL1Loss(),
    )
    model.metrics.clu_threshold = np.full(ANCHORED_CLASSES, THRESHOLDS["distance"])
    model.reset_objective_SingleVector()
    fit_released_sizes()

    results: dict[str, Any] = distances(model)
    results |= anchors(load(folder / "cac.py"), model)
    model.objective_vectors[model.objective_vectors_num == 0] = OTHER_ANCHORS
    with torch.no_grad():
        _, _, features, logits = model.PredNet_Forward(next(anchored_batches(lambda x: teacher(x)[3]))[2])
        by_probability, by_anchor = model.metrics.update(features, logits, torch.zeros(2, 129, 129), model)
    results |= {"by_probability": by_probability[:, 0].numpy(), "by_anchor": by_anchor[:, 0].numpy()}
    return results | training(model, student)


def fit_released_sizes() -> None:
    """The released monitor expands an anchor to maps of 128 x 224 pixels, and takes no distance to be above 100."""
    expand, scatter = torch.Tensor.expand, torch.Tensor.scatter_
    changed: Any = torch.Tensor
    changed.expand = lambda x, *sizes: expand(x, -1, 17, 17) if sizes == (-1, 128, 224) else expand(x, *sizes)
    changed.scatter_ = lambda x, axis, places, value: scatter(x, axis, places, 1e6 if value == 100 else value)


def distances(model: Any) -> dict[str, Any]:
    """``class_vectors_alignment`` on vectors near to and far from their anchors, and its gradient."""
    ids, vectors, anchors = class_vectors()
    vectors.requires_grad_()
    model.objective_vectors = anchors.numpy()
    loss = model.class_vectors_alignment(ids, list(vectors))
    (gradient,) = torch.autograd.grad(loss.sum(), [vectors])
    return {"distance": loss.detach().numpy()[0], "distance_gradient": digest(gradient)}


def anchors(script: Any, model: Any) -> dict[str, Any]:
    """The anchors, as the loop of ``cac.py`` adds one vector after the other; none is moved yet."""
    model.reset_objective_SingleVector()
    class_features = script.Class_Features(numbers=ANCHORED_CLASSES)
    for image, label, _ in anchored_batches(lambda x: model.PredNet(x)[3]):
        with torch.no_grad():
            _, _, features, logits = model.PredNet_Forward(image)
        small = nn.functional.interpolate(label[:, None].float(), size=features.shape[2:], mode="nearest")
        vectors, ids = class_features.calculate_mean_vector(features, logits, small, model)
        for number, vector in zip(ids, vectors, strict=True):
            model.update_objective_SingleVector(number, vector.detach().cpu().numpy(), "mean")
    return {"anchors": digest(torch.from_numpy(model.objective_vectors)), "counts": model.objective_vectors_num.copy()}


def training(model: Any, student: nn.Module) -> dict[str, Any]:
    """``scheduler_step`` and ``step``, in the order of the loop of ``train.py``."""
    for number, offset in FAR_ANCHORS.items():
        model.objective_vectors[number] += offset
    results: dict[str, list[Any]] = {name: [] for name in ("loss", "distance", "pseudo", "gradients_0")}
    update = model.BaseOpti.step

    def step() -> None:
        results["gradients_0"].append(digest(p.grad for p in student.parameters()))
        update()

    model.BaseOpti.step = step
    for image, label, target in anchored_batches(lambda x: model.PredNet(x)[3]):
        model.scheduler_step()
        student.train()
        model.optimizer_zerograd()
        found = model.step(image, label, target, torch.zeros_like(label))
        for name, value in zip(("loss", "distance", "pseudo"), found, strict=True):
            results[name].append(float(value))
    assert len(results["loss"]) == ITERATIONS
    arrays = {f"train_{name}": np.array(value) for name, value in results.items()}
    return arrays | {"train_final_0": digest(student.state_dict().values())}
