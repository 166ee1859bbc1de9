"""Runs the released training loops and losses of AdaptSegNet, ADVENT, IntraDA and CLAN."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.golden.generate.patches import Segmenter, load, prepare, recording
from tests.golden.released_inputs import (
    CLASSES,
    DISCRIMINATOR_WIDTH,
    ITERATIONS,
    SEGMENTER,
    SIZE,
    STEPS,
    classes,
    digest,
    fill,
    training_batches,
    values,
)

Results = dict[str, Any]


class Run:
    """Networks with known weights for one released loop, and what it computes with them."""

    def __init__(self, **arguments: Any) -> None:
        self.segmenter = Segmenter(CLASSES, **{**SEGMENTER, **arguments})
        fill(self.segmenter, 1)
        self.discriminators: list[nn.Module] = []
        self.results: Results = defaultdict(list)

    def discriminator(self, kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """A maker of discriminators that are narrow and have known weights."""

        def make(num_classes: int) -> nn.Module:
            network = kind(num_classes, ndf=DISCRIMINATOR_WIDTH)
            self.discriminators.append(network)
            fill(network, 1 + len(self.discriminators))
            return network

        return make

    def note(self, names: dict[str, str], found: dict[str, Any]) -> None:
        """Keep the losses by name, and the gradients."""
        for name, variable in names.items():
            self.results[name].append(float(found[variable]))
        for number, network in enumerate([self.segmenter, *self.discriminators]):
            self.results[f"gradients_{number}"].append(digest(p.grad for p in network.parameters()))

    def finish(self) -> Results:
        """The results, with those of the last weights."""
        assert len(self.results["gradients_0"]) == ITERATIONS
        for number, network in enumerate([self.segmenter, *self.discriminators]):
            self.results[f"final_{number}"] = digest(network.state_dict().values())
        return {name: np.array(value) for name, value in self.results.items()}


def gradient_of(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def advent(folder: Path) -> Results:
    """ADVENT: losses of ``utils``, and ``train_advent`` and ``train_minent`` whole."""
    prepare(folder)
    from advent.domain_adaptation import train_UDA  # type: ignore[import-not-found]
    from advent.utils import func, loss  # type: ignore[import-not-found]

    logits = values(1, 2, CLASSES, 8, 8).mul(3).requires_grad_()
    labels = classes(2, 2, 8, 8)
    probabilities = logits.softmax(dim=1)
    entropy_map = func.prob_2_entropy(probabilities)
    verdict = values(3, 2, 1, 3, 3).requires_grad_()
    results = {
        "loss_cross_entropy": func.loss_calc(logits, labels, "cpu"),
        "loss_entropy": loss.entropy_loss(probabilities),
        "map": entropy_map,
        "map_grad": gradient_of((entropy_map * values(4, *entropy_map.shape)).sum(), logits)[0],
    }
    results["loss_cross_entropy_grad"] = gradient_of(results["loss_cross_entropy"], logits)[0]
    results["loss_entropy_grad"] = gradient_of(loss.entropy_loss(logits.softmax(dim=1)), logits)[0]
    for label in (0, 1):
        results[f"loss_bce_{label}"] = func.bce_loss(verdict, label)
        results[f"loss_bce_{label}_grad"] = gradient_of(results[f"loss_bce_{label}"], verdict)[0]
    results = {f"losses_{name}": value.detach().numpy() for name, value in results.items()}
    results["losses_lr"] = np.array([func.lr_poly(2.5e-4, i, 250_000, 0.9) for i in (0, 1, 119_999)])
    for name in ("advent", "minent"):
        run = advent_loop(train_UDA, name)
        results |= {f"{name}_{key}": value for key, value in run.items()}
    return results


def advent_loop(train: Any, name: str) -> Results:
    """Iterations of ``train_advent`` or ``train_minent``."""
    from advent.domain_adaptation.config import cfg  # type: ignore[import-not-found]
    from advent.model.discriminator import get_fc_discriminator  # type: ignore[import-not-found]
    from advent.utils import func

    run = Run()
    bce_losses: list[float] = []

    def bce_loss(*arguments: Any) -> Tensor:
        loss: Tensor = func.bce_loss(*arguments)
        bce_losses.append(float(loss.detach()))
        return loss

    train.bce_loss = bce_loss
    train.get_fc_discriminator = run.discriminator(get_fc_discriminator)
    names = {f"loss_cross_entropy_{head}": f"loss_seg_src_{head}" for head in ("main", "aux")}
    if name == "minent":
        names |= {f"loss_entropy_{head}": f"loss_target_entp_{head}" for head in ("main", "aux")}
    else:
        names |= {f"loss_adversarial_{head}": f"loss_adv_trg_{head}" for head in ("main", "aux")}
    train.optim = recording(partial(run.note, names))
    train.print_losses = lambda *_: None
    cfg.update(GPU_ID="cpu", NUM_CLASSES=CLASSES)
    cfg.TRAIN.update(
        INPUT_SIZE_SOURCE=(SIZE, SIZE),
        INPUT_SIZE_TARGET=(SIZE, SIZE),
        MAX_ITERS=STEPS,
        EARLY_STOP=ITERATIONS - (name == "advent"),
        LEARNING_RATE=2.5e-3,
    )
    batches = list(training_batches(2, 10))
    source = [(image, label, None, None) for image, label, _ in batches]
    target = [(image, None, None, None) for _, _, image in batches]
    getattr(train, f"train_{'minent' if name == 'minent' else 'advent'}")(run.segmenter, source, target, cfg)
    if bce_losses:
        # Of each iteration: aux and main for the segmenter, then of the discriminators on source and on target.
        halves = np.array(bce_losses).reshape(ITERATIONS, 3, 2)[:, 1:].sum(axis=1) / 2
        run.results["loss_discriminator_aux"], run.results["loss_discriminator_main"] = halves.T
    return run.finish()


def adaptsegnet(folder: Path) -> Results:
    """AdaptSegNet: ``main`` whole, with both objectives, and its loss and network."""
    prepare(folder)
    results: Results = {}
    for gan in ("Vanilla", "LS"):
        with tempfile.TemporaryDirectory() as temporary:
            train = load(
                folder / "pytorch_0.4" / "train_gta2cityscapes_multi.py",
                *f"--cpu --gan {gan} --num-classes {CLASSES} --num-steps {STEPS} --num-steps-stop {ITERATIONS}".split(),
                *f"--learning-rate 2.5e-3 --input-size {SIZE},{SIZE} --input-size-target {SIZE},{SIZE}".split(),
                *f"--snapshot-dir {temporary} --batch-size 2".split(),
            )
            results |= {f"{gan.lower()}_{key}": value for key, value in adaptsegnet_loop(train).items()}
    from model import deeplab_multi  # type: ignore[import-not-found]
    from utils.loss import CrossEntropy2d  # type: ignore[import-not-found]

    logits = values(1, 2, CLASSES, 8, 8).mul(3).requires_grad_()
    loss = CrossEntropy2d()(logits, classes(2, 2, 8, 8))
    results["losses_loss_cross_entropy"] = loss.detach().numpy()
    results["losses_loss_cross_entropy_grad"] = gradient_of(loss, logits)[0].numpy()
    network = deeplab_multi.ResNetMulti(deeplab_multi.Bottleneck, [1, 1, 1, 1], CLASSES)
    return results | network_outputs(network)


def adaptsegnet_loop(train: Any) -> Results:
    """``main`` with known weights and batches."""
    run = Run()
    train.DeeplabMulti = lambda num_classes: run.segmenter
    train.model_zoo.load_url = lambda url: {}
    give_batches(train, list(training_batches(2, 10)), 4, 3)
    train.FCDiscriminator = run.discriminator(train.FCDiscriminator)
    losses = {"cross_entropy": "loss_seg", "adversarial": "loss_adv_target", "discriminator": "loss_D_value"}
    heads = {"aux": 1, "main": 2}
    names = {f"loss_{ours}_{head}": f"{name}{level}" for ours, name in losses.items() for head, level in heads.items()}
    train.optim = recording(partial(run.note, names))
    train.main()
    return run.finish()


def network_outputs(network: nn.Module) -> Results:
    """Logits of a released network with known weights, in training and then in evaluation mode."""
    fill(network, 7)
    image = values(8, 1, 3, SIZE, SIZE)
    results: Results = {}
    with torch.no_grad():
        for mode in ("train", "eval"):
            network.train(mode == "train")
            aux, main = network(image)
            results |= {f"network_{mode}_aux": aux.numpy(), f"network_{mode}_main": main.numpy()}
    return results


def give_batches(train: Any, batches: list[tuple[Tensor, Tensor, Tensor]], source: int, target: int) -> None:
    """Let a released script find these batches, of so many fields, in the place of its data sets."""
    loaders = iter(
        [
            [(image, label, *[None] * (source - 2)) for image, label, _ in batches],
            [(image, *[None] * (target - 1)) for _, _, image in batches],
        ]
    )
    train.data.DataLoader = lambda *_, **__: next(loaders)
    train.GTA5DataSet = train.cityscapesDataSet = lambda *_, **__: None


def clan(folder: Path) -> Results:
    """CLAN: ``main`` whole with batches of one image, and its losses, weight map, schedule and network."""
    prepare(folder)
    with tempfile.TemporaryDirectory() as temporary:
        train = load(
            folder / "CLAN_train.py",
            *f"--num-classes {CLASSES} --num-steps {STEPS} --num-steps-stop {ITERATIONS}".split(),
            *f"--input-size-source {SIZE},{SIZE} --input-size-target {SIZE},{SIZE}".split(),
            *f"--learning-rate 2.5e-3 --snapshot-dir {temporary}".split(),
        )
        released_steps, warm_up = train.NUM_STEPS, train.PREHEAT_STEPS
        train.NUM_STEPS, train.PREHEAT_STEPS, train.NUM_CLASSES = STEPS, 2, CLASSES
        run = Run(twin_heads=True)
        give_batches(train, list(training_batches(1, 10)), 5, 4)
        train.Res_Deeplab = lambda num_classes: run.segmenter
        train.torch.load = lambda file: {}
        train.FCDiscriminator = run.discriminator(train.FCDiscriminator)
        names = {name: f"loss_{name}" for name in ("seg", "adv", "weight", "D_s", "D_t")}
        train.optim = recording(partial(run.note, names))
        train.main()
        results = {f"main_{key}": value for key, value in run.finish().items()}

    train.NUM_STEPS, train.PREHEAT_STEPS = released_steps, warm_up
    train.args.num_steps, train.args.learning_rate = released_steps, 2.5e-4
    results["losses_lr_at"] = np.array([0, 1, warm_up - 1, warm_up, warm_up + 1, 99_999])
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = []
    for iteration in results["losses_lr_at"]:
        train.adjust_learning_rate(optimiser, iteration)
        rates.append(optimiser.param_groups[0]["lr"])
    results["losses_lr"] = np.array(rates)

    one, other = (values(seed, 1, CLASSES, 8, 8).mul(2).requires_grad_() for seed in (1, 2))
    weights = train.weightmap(one.softmax(dim=1), other.softmax(dim=1))
    grads = gradient_of((weights * values(3, *weights.shape)).sum(), one, other)
    verdict, weight = values(4, 1, 1, 8, 8).requires_grad_(), values(5, 1, 1, 8, 8).abs().requires_grad_()
    found = {"map": weights, "map_grad_one": grads[0], "map_grad_other": grads[1]}
    for label in (0, 1):
        loss = train.WeightedBCEWithLogitsLoss()(verdict, torch.full_like(verdict, label), weight, 0.4, 40)
        grads = gradient_of(loss, verdict, weight)
        found |= {f"weighted_{label}": loss, f"weighted_{label}_grad": grads[0], f"weighted_{label}_grad_map": grads[1]}
    results |= {f"losses_{name}": value.detach().numpy() for name, value in found.items()}
    from model import CLAN_G  # type: ignore[import-not-found]

    return results | network_outputs(CLAN_G.ResNet(CLAN_G.Bottleneck, [1, 1, 1, 1], CLASSES))
