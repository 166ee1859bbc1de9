"""Four training iterations of MPSCL against those of the released code (MR to CT settings)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from mpscl_ray.methods.base import Batch
from mpscl_ray.methods.losses import TARGET_LABEL, domain_loss
from mpscl_ray.methods.mpscl import MPSCL, MPSCLConfig
from mpscl_ray.methods.optim import OptimConfig, PrecisionConfig
from mpscl_ray.networks.deeplab import DeepLabV2
from tests.golden.stored_numbers import fill_from_keys

RELATIVE = 1e-4
# Each loss of the released step, and what it is called here. Its discriminator losses are of the target half alone.
LOSSES = {
    "loss_seg_src_main": "loss_cross_entropy_main",
    "loss_seg_src_aux": "loss_cross_entropy_aux",
    "loss_dice_src_main": "loss_dice_main",
    "loss_dice_src_aux": "loss_dice_aux",
    "loss_mpcl_tr": "loss_contrastive_source",
    "loss_mpcl_tg": "loss_contrastive_target",
    "loss_adv_trg_main": "loss_adversarial_main",
    "loss_adv_trg_aux": "loss_adversarial_aux",
    "loss_d_main": "target_half_main",
    "loss_d_aux": "target_half_aux",
}


def test_four_iterations_equal_the_released_code() -> None:
    golden = np.load(Path(__file__).with_name("trajectory_mr2ct.npz"), allow_pickle=False)
    settings = json.loads(str(golden["settings"]))
    segmenter = DeepLabV2(5, layers=(1, 1, 1, 1))
    segmenter.in_channels = 1  # The stored images are network inputs already, which are left as they are.
    method = MPSCL(
        segmenter,
        MPSCLConfig(
            margin_source=settings["SRC_MARGIN"],
            margin_target=settings["TRG_MARGIN"],
            temperature_source=settings["SRC_TEMP"],
            temperature_target=settings["TRG_TEMP"],
            base_temperature=settings["SRC_BASE_TEMP"],
            delta_th=settings["PIXEL_SEL_TH"],
            alpha=settings["CLASS_CENTER_M"],
            gamma=settings["LAMBDA_MPCL_SRC"],
            beta=settings["LAMBDA_MPCL_TRG"],
            lambda_main=settings["LAMBDA_ADV_MAIN"],
            lambda_aux=settings["LAMBDA_ADV_AUX"],
            segmentation_aux_weight=settings["LAMBDA_SEG_SRC_AUX"],
            margin_form="released",
            discriminator="fc",
        ),
        OptimConfig(
            lr=settings["LEARNING_RATE"],
            momentum=settings["MOMENTUM"],
            weight_decay=settings["WEIGHT_DECAY"],
            lr_discriminator=settings["LEARNING_RATE_D"],
            poly_power=settings["POWER"],
        ),
        5,
        torch.device("cpu"),
        PrecisionConfig(),
        seed=0,
    )
    for network in method.networks.values():
        fill_from_keys(network)
    method.prototypes = torch.from_numpy(golden["prototypes_init"])
    start = {key: tensor.clone() for key, tensor in segmenter.state_dict().items()}
    method.start_phase(settings["MAX_ITERS"])

    losses: dict[str, list[float]] = {name: [] for name in [*LOSSES.values(), "pseudo_label_fraction"]}
    verdicts: dict[str, list[torch.Tensor]] = {"main": [], "aux": []}
    for head, outputs in verdicts.items():
        discriminator = method.networks[f"discriminator_{head}"]
        discriminator.register_forward_hook(lambda module, inputs, output, kept=outputs: kept.append(output.detach()))
    for iteration in range(len(golden["images_source"])):
        metrics = method.step(
            Batch(
                torch.from_numpy(golden["images_source"][iteration]),
                torch.from_numpy(golden["labels_source"][iteration]).long(),
                torch.from_numpy(golden["images_target"][iteration]),
            ),
            iteration,
        )
        for name in losses.keys() & metrics.keys():
            losses[name].append(float(metrics[name]))
    for head, outputs in verdicts.items():
        # In each iteration it gets the target alone, for the segmenter's loss, and then source and target.
        on_target = (both.chunk(2)[1] for both in outputs[1::2])
        losses[f"target_half_{head}"] = [float(domain_loss(x, TARGET_LABEL)) / 2 for x in on_target]

    for released, ours in LOSSES.items():
        np.testing.assert_allclose(losses[ours], golden[f"loss_{released}"], rtol=RELATIVE, err_msg=released)
    np.testing.assert_allclose(losses["pseudo_label_fraction"], golden["selected_fraction"], rtol=RELATIVE)
    np.testing.assert_allclose(method.prototypes, golden["prototypes_final"], rtol=RELATIVE, atol=1e-4)
    state = segmenter.state_dict()
    tensors = {
        "final_conv1_weight": "conv1.weight",
        "final_layer6_bias0": "layer6.conv2d_list.0.bias",
        "final_layer5_weight0": "layer5.conv2d_list.0.weight",
        "final_bn1_running_mean": "bn1.running_mean",
        "final_bn1_running_var": "bn1.running_var",
    }
    for name, key in tensors.items():
        expected = torch.from_numpy(golden[name])
        ours, before = (tensors[key][:, :16] if "layer5" in key else tensors[key] for tensors in (state, start))
        scale = float(expected.abs().max())
        np.testing.assert_allclose(ours, expected, rtol=RELATIVE, atol=RELATIVE * scale, err_msg=name)
        # Weights hardly move in four iterations, so the move is compared too, as far as float32 resolves it.
        move = float((expected - before).abs().max())
        np.testing.assert_allclose(ours - before, expected - before, rtol=0, atol=5e-3 * move, err_msg=name)
    bottleneck = segmenter.layer4[0]
    sums = {
        "final_layer4_abs_sum": [bottleneck.conv1.weight, bottleneck.conv2.weight, bottleneck.conv3.weight],
        "final_d_main_abs_sum": list(method.networks["discriminator_main"].parameters()),
    }
    for name, parameters in sums.items():
        total = sum(float(parameter.detach().double().abs().sum()) for parameter in parameters)
        np.testing.assert_allclose(total, golden[name], rtol=RELATIVE, err_msg=name)
