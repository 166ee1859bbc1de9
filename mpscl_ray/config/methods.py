"""The settings of every method as frozen dataclasses: defaults, limits and meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

SOURCE_ONLY, WARM_UP, ADAPTATION = "source_only", "warm_up", "adaptation"
"""The phases that a run can have, in this order: plain segmentation, AdvEnt, and the method itself."""

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Weight of a term of a loss."""

Margin = Annotated[float, Field(ge=0, le=math.pi / 2)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Width = Annotated[int, Field(ge=1)]

SegmentationLossName = Literal["released", "plain"]
"""Losses of plain segmentation; some methods have others besides."""


@dataclass(frozen=True)
class SegmentationConfig:
    """Settings of plain segmentation, which the first phase of every method with a DeepLab is."""

    phases: ClassVar[tuple[str, ...]] = (SOURCE_ONLY,)
    """Phases that a run of this method can have."""
    main_settings: ClassVar[tuple[str, ...]] = (
        "optim.kind",
        "optim.lr",
        "method.segmentation_loss",
        "network.pretrained",
    )
    """Settings that the short help shows beside those that all methods have."""

    segmentation_aux_weight: Weight = 0.1
    """Weight of cross-entropy and Dice on the auxiliary head; 0.1 in the released code, unnamed in the paper."""
    segmentation_loss: SegmentationLossName = "released"
    """Loss on labelled slices: released, that of MPSCL's code, in which a class weighs 1 - its share of the pixels and
    Dice is of each slice; or plain, cross-entropy and Dice of the whole batch, for structures that fill little of a
    slice."""
    class_weight_floor: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Least weight of a class in the cross-entropy of the loss plain, max(1 - its share of the pixels, this); 1: all
    classes weigh the same."""


@dataclass(frozen=True)
class AdaBNConfig(SegmentationConfig):
    """Settings of AdaBN: it adds none."""

    phases: ClassVar[tuple[str, ...]] = (SOURCE_ONLY, ADAPTATION)


@dataclass(frozen=True)
class DiscriminatorConfig(SegmentationConfig):
    """Settings of a method with discriminators."""

    main_settings: ClassVar[tuple[str, ...]] = (
        *SegmentationConfig.main_settings,
        "method.discriminator",
        "method.bn_running_stats",
    )

    discriminator: Literal["fc", "patchgan"] = "fc"
    """Discriminator fc (AdaptSegNet) or patchgan (pix2pix); the paper has fc for MR to CT, patchgan for CT to MR and
    in Table III."""
    discriminator_width: Annotated[int, Field(ge=1)] = 64
    """Channels of a discriminator's first convolution."""
    bn_running_stats: Literal["both", "target"] = "both"
    """Domains behind the batch statistics of evaluation: both (as released) or the target alone."""


@dataclass(frozen=True)
class AdversarialConfig(DiscriminatorConfig):
    """Settings of a method that aligns the outputs of both heads by discriminators."""

    main_settings: ClassVar[tuple[str, ...]] = (*DiscriminatorConfig.main_settings, "method.lambda_main")

    lambda_main: Weight = 0.003
    """Weight of the adversarial loss of the main head, lambda in Eq. 11."""
    lambda_aux: Weight = 2e-5
    """Weight of the adversarial loss of the auxiliary head; 2e-5 in the released code, a fifth of the main one in
    AdaptSegNet."""
    halve_discriminator_loss: bool = True
    """Halve the discriminators' loss on each domain, as released."""


@dataclass(frozen=True)
class ContrastConfig:
    """Settings of the contrast with prototypes; the defaults are those of the released MR to CT run of MPSCL."""

    margin_source: Margin = 0.4
    """Margin m on source pixels, in radians (Eq. 8)."""
    margin_target: Margin = 0.2
    """Margin m on selected target pixels, in radians (Eq. 8)."""
    temperature_source: Temperature = 1.0
    """Temperature tau on source pixels (Eq. 8)."""
    temperature_target: Temperature = 1.0
    """Temperature tau on selected target pixels (Eq. 8)."""
    base_temperature: Temperature = 1.0
    """tau_b: the released form multiplies its loss by tau / tau_b; not in the paper."""
    delta_th: Annotated[float, Field(ge=0, le=2)] = 0.25
    """Least gap in cosine of a selected pixel's two nearest prototypes (Eq. 7); of the mean teacher, by which the
    prototype of its label is nearer than all others."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the old prototype that one update keeps (Eq. 5)."""
    margin_form: Literal["released", "paper"] = "released"
    """Form of the margin loss: as released, with two maxima, or Eq. 8."""


@dataclass(frozen=True)
class MPSCLConfig(ContrastConfig, AdversarialConfig):
    """Settings of MPSCL; the defaults are those of the released MR to CT run."""

    phases: ClassVar[tuple[str, ...]] = (SOURCE_ONLY, WARM_UP, ADAPTATION)
    main_settings: ClassVar[tuple[str, ...]] = (
        *AdversarialConfig.main_settings,
        *"method.margin_source method.margin_target method.delta_th method.gamma method.beta method.alpha".split(),
    )

    gamma: Weight = 1.0
    """Weight of the contrastive loss on source pixels (Eq. 11)."""
    beta: Weight = 0.1
    """Weight of the contrastive loss on selected target pixels (Eq. 11)."""
    normalised_self_information: bool = True
    """Divide the self-information maps by log C, as released; false is the paper's."""


@dataclass(frozen=True)
class AdaOutputConfig(AdversarialConfig):
    """Settings of AdaOutput; its own adversarial weights are 0.001 and 0.0002, those of MPSCL's fork the default."""

    phases: ClassVar[tuple[str, ...]] = (SOURCE_ONLY, ADAPTATION)
    main_settings: ClassVar[tuple[str, ...]] = (*AdversarialConfig.main_settings, "method.adversarial_loss")

    adversarial_loss: Literal["bce", "least_squares"] = "bce"
    """bce (cross-entropy of the discriminators' logits), or least_squares (squared distance of their plain outputs)."""


@dataclass(frozen=True)
class AdvEntConfig(AdversarialConfig):
    """Settings of AdvEnt, which is also the warm-up of the methods that need one."""

    phases: ClassVar[tuple[str, ...]] = (SOURCE_ONLY, WARM_UP)
    main_settings: ClassVar[tuple[str, ...]] = (*AdversarialConfig.main_settings, "method.variant")

    normalised_self_information: bool = True
    """Divide the self-information maps by log C, as released; false is the paper's."""
    variant: Literal["adversarial", "minent"] = "adversarial"
    """adversarial (AdvEnt): discriminators on self-information maps; minent: the loss is the mean entropy itself."""


@dataclass(frozen=True)
class CLANConfig(DiscriminatorConfig):
    """Settings of CLAN; the defaults are those of its released GTA5 run, but for the segmentation loss."""

    phases: ClassVar[tuple[str, ...]] = (SOURCE_ONLY, ADAPTATION)
    main_settings: ClassVar[tuple[str, ...]] = (
        *DiscriminatorConfig.main_settings,
        *"method.lambda_adversarial method.lambda_weight method.lambda_local method.epsilon".split(),
    )

    lambda_adversarial: Weight = 0.001
    """Weight of the adversarial loss."""
    lambda_weight: Weight = 0.01
    """Weight of the cosine similarity of the two heads' weights; doubled, as released."""
    lambda_local: Weight = 40.0
    """Factor of the disagreement of the heads in a pixel's weight; 40 for GTA5, 10 for SYNTHIA."""
    epsilon: Weight = 0.4
    """Weight of a pixel on which the heads agree."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """First fraction of the iterations, in which pixels count alike and the learning rate rises from 0."""
    segmentation_loss: Literal["focal", "ce", "released", "plain"] = "released"  # type: ignore[assignment]
    """Loss of both heads: focal, that of CLAN's code, ce, that of its paper, or one of those that all methods here
    share. The source-only phase has released where this is focal or ce."""
    detach_weight_map: bool = False
    """Keep the gradient of the adversarial loss out of the map of disagreement; the released code does not."""


@dataclass(frozen=True)
class IntraDAConfig(AdvEntConfig):
    """Settings of IntraDA: those of AdvEnt, which trains both stages, and of the sorting between them."""

    phases: ClassVar[tuple[str, ...]] = (SOURCE_ONLY, WARM_UP, ADAPTATION)
    main_settings: ClassVar[tuple[str, ...]] = (
        *AdvEntConfig.main_settings,
        "method.easy_fraction",
        "method.unit",
        "method.score",
    )

    easy_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.67
    """Fraction lambda of the target that is easy; the number is rounded down."""
    unit: Literal["slice", "volume"] = "slice"
    """What is sorted: slices (nearly empty ones count as easy), or whole volumes by the mean of their slices."""
    score: Literal["entropy", "foreground_entropy"] = "entropy"
    """What it is sorted by: mean self-information over all pixels, as released, or over those predicted as foreground,
    where a slice without any counts as most uncertain."""


@dataclass(frozen=True)
class CAGConfig(AdvEntConfig):
    """Settings of CAG-UDA, after a warm-up with the settings of AdvEnt."""

    phases: ClassVar[tuple[str, ...]] = (SOURCE_ONLY, WARM_UP, ADAPTATION)
    main_settings: ClassVar[tuple[str, ...]] = (
        *AdvEntConfig.main_settings,
        *"method.rounds method.probability_threshold method.distance_quantile method.lambda_distance".split(),
    )

    rounds: Annotated[int, Field(ge=1, le=9)] = 3
    """Rounds that share the iterations of the adaptation; the network of each is the teacher of the next."""
    probability_threshold: Annotated[float, Field(ge=0, le=1)] = 0.95
    """A pixel's most probable class is its pseudo-label P where the teacher's probability exceeds this."""
    distance_quantile: Annotated[float, Field(ge=0, le=1)] | None = 0.5
    """Fraction of the target's pixels without a pseudo-label A in a round: those with the least difference between the
    distances to the nearest and the second nearest anchor; null uses distance_threshold."""
    distance_threshold: Annotated[float, Field(ge=0)] = 2.5
    """The nearest anchor is the pseudo-label A where it is nearer than the second by this; 2.5 as released, for
    features of another network and scale."""
    lambda_distance: Weight = 0.7
    """Weight of the distances of class features to anchors."""
    min_pixels: Annotated[int, Field(ge=1)] = 10
    """Fewest pixels of a class from which an image has a feature of it."""
    segmentation_loss: Literal["ce", "released", "plain"] = "released"  # type: ignore[assignment]
    """Loss on the source: ce, that of CAG's code, or one of those that all methods here share. The phases before the
    adaptation have released where this is ce."""


@dataclass(frozen=True)
class MeanTeacherConfig(ContrastConfig, SegmentationConfig):
    """Settings of the mean teacher; those of the contrast act where method.contrast is above 0."""

    phases: ClassVar[tuple[str, ...]] = (SOURCE_ONLY, ADAPTATION)
    main_settings: ClassVar[tuple[str, ...]] = (
        *SegmentationConfig.main_settings,
        *"method.ema method.alignment method.target_weight method.histogram_matching method.mixing".split(),
        *"method.consistency method.contrast method.share_matching method.adabn".split(),
    )

    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share m of its weights that the teacher keeps at a step; less in the first steps, 1 - 1 / (t + 10)."""
    alignment: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Exponent of the distribution alignment: 1 draws the class shares of the teacher's predictions to those of the
    source labels, 0 leaves them."""
    target_weight: Weight = 0.5
    """Weight of the loss on pseudo-labels."""
    ramp: Annotated[int, Field(ge=0)] = 50
    """Iterations over which the weights of all losses on the target grow from 0."""
    mixing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a structure of a source slice is pasted, with its label, into the target slice beside it; for
    each structure and pair by itself."""
    histogram_matching: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the source slices that take, instead of a random appearance, the intensities that each class has in the
    target slice beside it, by the teacher's labels."""
    share_matching: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Exponent s of a correction of the teacher at the end, posterior x (source share / target's mean posterior)^s; 0:
    none."""
    consistency: Weight = 0.0
    """Weight of the Jensen-Shannon divergence between the student's predictions of a target slice as it is and with
    another appearance, over pixels that are not pasted; it needs data.augmentation with mappings or degradations."""
    contrast: Weight = 0.0
    """Weight of each of MPSCL's two contrastive losses: on source pixels, and on target pixels with a pseudo-label of
    the teacher whose prototype is nearer than all others by delta_th."""
    adabn: bool = False
    """Whether the teacher's batch statistics are estimated once more at the end, from one pass over the target."""
    bn_running_stats: Literal["both", "target"] = "both"
    """Domains behind the batch statistics of evaluation: both (as released) or the target alone."""
    guard: Annotated[float, Field(ge=0)] | None = 0.05
    """The state before the adaptation competes for `best`, and the adaptation ends, and goes back to `best`, when the
    class-ratio agreement of the target's validation volumes is lower than in that state by more than this; null:
    neither."""


@dataclass(frozen=True)
class SIFAConfig:
    """Settings of SIFA, which has its own networks and optimisers and does not use the sections ``network`` and
    ``optim``. The defaults are those of the second version as released."""

    phases: ClassVar[tuple[str, ...]] = (ADAPTATION,)
    main_settings: ClassVar[tuple[str, ...]] = tuple(
        "method.version method.lr_generator method.lr_segmenter method.lambda_cycle method.lambda_prediction "
        "method.lambda_features method.generator_width method.encoder_width".split()
    )

    version: Literal["v1", "v2"] = "v2"
    """Version of the paper: v2 (TMI) has a second classifier on earlier features, v1 (AAAI) has not."""
    generator_width: Width = 32
    """Channels of the first convolution of the image translators."""
    generator_blocks: Width = 9
    """Residual blocks of the translator from source to target."""
    decoder_blocks: Width = 4
    """Residual blocks of the decoder, which translates from target to source."""
    encoder_width: Width = 16
    """Channels of the first convolution of the encoder."""
    output_stride: Literal[4, 8] = 8
    """Image pixels per pixel of the encoder's features."""
    discriminator_width: Width = 64
    """Channels of the first convolution of a discriminator."""
    lr_generator: Rate = 2e-4
    """Learning rate of Adam for translators and discriminators (beta1 0.5)."""
    lr_segmenter: Rate = 2e-4
    """Learning rate of Adam for encoder and classifiers (beta1 0.9): 2e-4 in v2, 1e-3 in v1."""
    segmenter_decay_every: Annotated[int, Field(ge=0)] = 0
    """Iterations between two decays of lr_segmenter to nine tenths; 0: none (v2)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction that is dropped of the outputs of the encoder's and classifiers' convolutions; 0.25 in v1."""
    decoder_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """The same in the residual blocks of the decoder; the papers have none, the released code of both versions has."""
    lambda_cycle: Weight = 10.0
    """Weight of the cycle loss, the mean absolute difference of an image and its reconstruction."""
    lambda_low: Weight = 0.1
    """Weight of the segmentation loss of the second classifier (v2)."""
    lambda_decoder: Weight = 0.1
    """Weight of the decoder's losses in those of the encoder."""
    lambda_prediction: Weight = 0.1
    """Weight of the adversarial loss on predictions."""
    lambda_prediction_low: Weight = 0.01
    """Weight of the adversarial loss on predictions of the second classifier (v2)."""
    lambda_features: Weight = 0.1
    """Weight of the adversarial loss on features, through the images decoded from them."""
    adversarial_prediction_ramp: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (
        0.0,
        0.0,
    )
    """Fractions of the phase between which lambda_prediction grows from 0; v1 grows it from epoch 5 to 7."""
    lambda_l2: Weight = 1e-4
    """Weight of half the squared norm of all parameters of encoder and classifiers."""
    pool_size: Annotated[int, Field(ge=0)] = 0
    """Global batches of earlier translated images that discriminators may take instead of the newest: 50 is what the
    release sets, 0 what it does, as its pool overwrites an image before it is given back."""

    def network_arguments(self) -> dict[str, Any]:
        """The segmenter, as model.json and checkpoints describe it."""
        return {
            "kind": "sifa",
            "width": self.encoder_width,
            "output_stride": self.output_stride,
            "low_level": self.version == "v2",
            "dropout": self.dropout,
            "in_channels": 3 if self.version == "v1" else 1,
        }


METHOD_CONFIGS: dict[str, type] = {
    "mpscl": MPSCLConfig,
    "segmentation": SegmentationConfig,
    "adabn": AdaBNConfig,
    "adaoutput": AdaOutputConfig,
    "advent": AdvEntConfig,
    "clan": CLANConfig,
    "intrada": IntraDAConfig,
    "cag": CAGConfig,
    "mean_teacher": MeanTeacherConfig,
    "sifa": SIFAConfig,
}
"""The settings of every method by its name in a config."""


def method_name(settings: Any) -> str:
    """Key of a method in :data:`METHOD_CONFIGS` by its settings."""
    return next(name for name, kind in METHOD_CONFIGS.items() if type(settings) is kind)
