"""The settings of a run as frozen dataclasses: defaults, limits and meaning. mpscl_ray.config.load reads them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field

from mpscl_ray.config.methods import (
    ADAPTATION,
    SOURCE_ONLY,
    WARM_UP,
    AdvEntConfig,
    MPSCLConfig,
    SegmentationConfig,
    SegmentationLossName,
    method_name,
)
from mpscl_ray.runs.wording import counted

SUPERVISED = "supervised"
"""Name of the first phase where it trains on labels of the target."""


def reads_target(phase: str) -> bool:
    """Whether a phase takes unlabelled slices of the target."""
    return phase not in (SOURCE_ONLY, SUPERVISED)


def is_adaptation(phase: str) -> bool:
    """Whether a phase is the adaptation, or one of its rounds (``adaptation_1``, ``adaptation_2``...)."""
    return phase.startswith(ADAPTATION)


@dataclass(frozen=True)
class RunConfig:
    """Name, storage and seed of a run, and how often it logs, validates and saves."""

    __pydantic_config__ = ConfigDict(coerce_numbers_to_str=True)  # run.name=2024 is a name

    name: str = "mpscl"
    """Name of the run and its folder, by default that of the preset; the same name again resumes the run."""
    storage: str = "runs"
    """Folder of the run folders, shared by all nodes of a cluster; or s3://BUCKET/FOLDER, gs://BUCKET/FOLDER."""
    storage_retry_minutes: Annotated[float, Field(ge=0)] = 10
    """Minutes that a run in a bucket continues while the bucket does not answer, before it stops (resumable)."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Seed of initial weights, order of slices and augmentation."""
    log_every: Annotated[int, Field(ge=1)] = 20
    """Steps between two logs of the losses (progress line, TensorBoard, metrics.jsonl)."""
    validate_every: Annotated[int, Field(ge=1)] = 200
    """Steps between two validations."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 200
    """Steps between two checkpoints; a killed run repeats at most so many."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Checkpoints kept beside the best one and the end of each phase."""
    select: Literal[
        "label_free", "class_ratio_agreement", "adjacency_agreement", "source_dice_and_class_ratio", "oracle"
    ] = "label_free"
    """What the checkpoint `best` is chosen by: source validation Dice minus target entropy; another label-free
    criterion (see `search.metric`); or target validation Dice ("oracle")."""
    choose_postprocessing: bool = False
    """Whether training ends with `evaluate --choose-postprocessing`: scores are then those with the chosen rules."""
    calibrate_quality: bool = False
    """Whether training ends with `evaluate --calibrate-quality`: `predict` then estimates the Dice of label maps."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures after which the run restarts by itself; the next one ends it (resumable)."""
    progress_page: bool = True
    """Whether `progress.html` in the run's folder is kept up to date: curves, validation slices, notices, time left."""
    images: bool = True
    """Whether slices of patients are kept as pictures: in TensorBoard, `progress.html`, `pseudo_labels/` and
    `results/phases.png`."""
    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """What gets the metrics beside metrics.jsonl: TensorBoard files, MLflow, Weights & Biases (docs/trackers.md)."""
    profile: Annotated[int, Field(ge=0)] = 0
    """Steps of each phase that torch.profiler records in `profile/`: a trace for Perfetto, and a table; 0: none."""


@dataclass(frozen=True)
class AugmentConfig:
    """Ranges of the random changes of the slices; the defaults change nothing."""

    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation in the slice plane, in degrees; drawn uniformly from +-rotation_deg."""
    scale: tuple[Annotated[float, Field(ge=0.1, le=10)], Annotated[float, Field(ge=0.1, le=10)]] = (1.0, 1.0)
    """Smallest and largest magnification of the anatomy; drawn log-uniformly."""
    translation: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift along either side, as a fraction of that side; drawn uniformly from +-translation."""
    random_conv_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that the intensities of a slice are remapped by a random shallow convolution."""
    random_conv_strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Largest weight of the remapped image in the blend with the original; drawn uniformly from 0 to this."""
    random_conv_layers: Annotated[int, Field(ge=1, le=3)] = 3
    """Largest number of convolutions of a mapping; drawn uniformly from 1 to this."""
    mapping_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a slice gets another appearance by one of `mappings`."""
    mappings: Annotated[tuple[Literal["curves", "bands", "gin"], ...], Field(min_length=1)] = ("curves", "bands", "gin")
    """Drawn evenly: a curve for the background and a line per tissue (SLAug); intensity bands of the background with
    levels of their own, tissues as before; a random network (GIN)."""
    degradation_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of each of gamma, bias field, low resolution or blur, and noise (Gaussian or Rician)."""

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale is (smallest, largest), and {self.scale[0]} is larger than {self.scale[1]}")

    @property
    def moves(self) -> bool:
        """Whether the anatomy is moved, turned or scaled."""
        return self.rotation_deg > 0 or self.translation > 0 or tuple(self.scale) != (1.0, 1.0)

    @property
    def changes_appearance(self) -> bool:
        """Whether slices are mapped or degraded, the random convolution apart."""
        return self.mapping_probability > 0 or self.degradation_probability > 0


@dataclass(frozen=True)
class DataConfig:
    """The two prepared datasets and how training reads their slices."""

    source: str = ""
    """Folder or URL of the prepared labelled domain, or phantom:mr / phantom:ct."""
    target: str = ""
    """Folder or URL of the prepared unlabelled domain, or phantom:mr / phantom:ct."""
    labelled_domain: Literal["source", "target"] = "source"
    """Domain with the labels that train the segmenter; "target" is the supervised upper bound."""
    global_batch_size: Annotated[int, Field(ge=1)] = 8
    """Slices that a step takes from each domain, all workers together."""
    foreground_share: Annotated[float | None, Field(gt=0, le=1)] = None
    """Share of the labelled or pseudo-labelled (IntraDA) slices in the batches that show a structure (over 20 pixels);
    null: as in the data."""
    in_memory: Literal["auto"] | bool = "auto"
    """Keep the decoded slices in shared memory; auto: if they fit."""
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the slices, drawn from the seed and the position in the stream."""

    mirror_axes: tuple[Literal["rows", "columns"], ...] = ()
    """Axes of a slice along which the anatomy is its own mirror image, as no heart is; `predict --tta` flips them."""


@dataclass(frozen=True)
class NetworkConfig:
    """The segmenter, a DeepLabV2 with heads on conv4 and conv5."""

    layers: tuple[int, int, int, int] = (3, 4, 23, 3)
    """Bottlenecks per stage; [3, 4, 23, 3] is ResNet-101."""
    base_channels: Annotated[int, Field(ge=4)] = 64
    """Channels of the stem."""
    output_stride: Literal[4, 8] = 8
    """Input pixels per feature pixel."""
    in_channels: Literal[1, 3] = 3
    """3 repeats the slice three times and subtracts the channel means of the ImageNet weights; 1 takes it as it is."""
    train_bn_affine: bool = False
    """Train scale and shift of the batch norms, which the released code freezes (with pretrained weights)."""
    pretrained: str | None = None
    """File with weights to start from (ImageNet (caffe), AdaptSegNet, ADVENT or MPSCL), or the folder of a checkpoint
    such as runs/NAME/phases/source_only."""
    pretrained_heads: bool = True
    """Take the classifier heads from that file too; false where it was trained on other classes."""
    pretrained_prototypes: str | None = None
    """npy file with released class centres that the adaptation starts with, instead of those of Eq. 4."""


@dataclass(frozen=True)
class PhasesConfig:
    """Iterations of the three phases of a run; 0 omits one."""

    source_only: Annotated[int, Field(ge=0)] = 0
    """Iterations of plain segmentation of the labelled domain, which replaces pretrained weights."""
    warm_up: Annotated[int, Field(ge=0)] = 0
    """Iterations of AdvEnt, which is the warm-up of MPSCL (beta = gamma = 0)."""
    adaptation: Annotated[int, Field(ge=0)] = 0
    """Iterations of the method itself, over all its rounds; MPSCL first initialises its prototypes from all source
    slices (Eq. 4)."""
    source_only_lr: Annotated[float | None, Field(gt=0)] = None
    """Learning rate of the first phase; null: optim.lr."""


ParameterKind = Literal["stem", "block", "downsample", "head"]
"""Position of a convolution in the segmenter; decides its sub-steps, see ``OptimConfig.legacy_param_repeats``."""


@dataclass(frozen=True)
class OptimConfig:
    """SGD or AdamW for the segmenter, Adam for the discriminators; polynomial decay, restarted with every phase."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """Optimiser of the segmenter: sgd, as released, or adamw (betas 0.9 and 0.999), for networks trained from scratch;
    its rates are others: set optim.lr and phases.source_only_lr, 1e-3 is a start."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.5e-4
    """Learning rate of the segmenter at the start of a phase."""
    head_lr_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    """Learning rate of the two classifier heads divided by that of the backbone; SGD alone, AdamW has one rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    """Weight decay; null: 5e-4 for SGD, as in the released code (the paper has 1e-4), and 1e-4 for AdamW."""
    lr_discriminator: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Learning rate of the discriminators' Adam at the start of a phase."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Moment decays of the discriminators' Adam."""
    poly_power: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.9
    """Exponent of the decay lr (1 - i / iterations)^power."""
    legacy_param_repeats: dict[ParameterKind, Annotated[int, Field(ge=1)]] | None = None
    """SGD sub-steps of a parameter in one iteration, by its position: {stem: 1, block: 3, downsample: 4, head: 1} is
    what the released code does by listing parameters several times. null: one each."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches in which a worker's batch passes through the networks, for less memory and one more forward pass:
    a step is that of the whole batch, but batch norms use the statistics of a micro-batch."""
    recompute: bool = False
    """Compute the blocks of the DeepLab once more in the backward pass instead of keeping their activations, for less
    memory and one more forward pass: the first to try where memory is short, because no number changes."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 3
    """Steps of a phase that are skipped, without any update, because a loss or gradient is not finite. SIFA skips none:
    its networks are updated one after the other."""
    retry_lr_factor: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    """After one such step more, training goes back to the newest checkpoint and continues, once in a phase, with
    learning rates times this. null, or the second time: the run ends with the losses of that step."""

    @property
    def segmenter_weight_decay(self) -> float:
        """``weight_decay``, or where it is None the default of the optimiser."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 5e-4 if self.kind == "sgd" else 1e-4


@dataclass(frozen=True)
class PrecisionConfig:
    """How networks compute. Cosines, logarithms, margin and Dice are always in float32."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the networks under autocast; weights and optimisers stay float32. Faster on processors with AMX
    (amx_bf16 in /proc/cpuinfo), with precision.channels_last=true."""
    tf32: bool = True
    """Let GPUs use TF32 for products of float32."""
    channels_last: bool = False
    """Keep images and convolution weights in NHWC order. On a GPU source and target then pass one after the other, with
    twice the convolutions of the backbone, because one pass would copy every activation; not timed on one yet."""
    compile: bool = False
    """Compile the networks with torch.compile, which takes a minute at the start."""


@dataclass(frozen=True)
class ScalingConfig:
    """The workers of a run and what each takes of the machine or cluster."""

    num_workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """Processes that share each batch; the result does not depend on their number. With [least, most] a run continues
    with fewer when a node is lost, and takes more when there is room."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """cpu, gpu, or auto: a GPU for each worker if the cluster has any."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that each worker reserves, and threads that it uses."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory in GB (1e9 bytes) that each worker reserves on its node."""
    accelerator_type: str | None = None
    """Kind of GPU that each worker needs, as Ray names it: A100, H100, T4, ..."""
    node_labels: dict[str, str] = field(default_factory=dict)
    """Labels that a worker's node must have: {market-type: spot}, or with Ray's operators {region: "in(a, b)"}."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How workers share nodes, as in Ray: as few nodes as possible or as many, and with STRICT not otherwise."""
    collective_timeout_s: Annotated[float, Field(gt=0)] = 1800
    """Seconds after which a collective that some worker does not join ends the workers, which are then replaced."""
    resource_timeout_s: Annotated[float, Field(ge=0)] = 0
    """Seconds to wait for resources that the cluster lacks, for example while it grows."""
    resize_check_s: Annotated[float, Field(gt=0)] = 30
    """Seconds between two checks whether an elastic run can have more workers; to take them, all workers restart."""

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest number of workers that a run continues with, and the largest."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @property
    def least_workers(self) -> int:
        """The first of :attr:`limits`."""
        return self.limits[0]

    @property
    def most_workers(self) -> int:
        """The second of :attr:`limits`."""
        return self.limits[1]

    def describe(self, use_gpu: bool) -> str:
        """For a sentence: ``1 CPU worker``, ``2 to 4 GPU workers``."""
        least, most = self.limits
        workers = counted(most, f"{'GPU' if use_gpu else 'CPU'} worker")
        return workers if least == most else f"{least} to {workers}"


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: Any = field(default_factory=MPSCLConfig)
    phases: PhasesConfig = field(default_factory=PhasesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)

    @property
    def method_name(self) -> str:
        """Key of the method in :data:`METHOD_CONFIGS`."""
        return method_name(self.method)

    @property
    def method_phases(self) -> tuple[str, ...]:
        """Phases that a run of this method can have."""
        phases: tuple[str, ...] = self.method.phases
        return phases

    @property
    def schedule(self) -> list[tuple[str, int]]:
        """Phases that run, in order, with their iterations."""
        first = SUPERVISED if self.data.labelled_domain == "target" else SOURCE_ONLY
        lengths = [(first, self.phases.source_only), (WARM_UP, self.phases.warm_up)]
        rounds = getattr(self.method, "rounds", 1)
        for number in range(rounds):
            name = ADAPTATION if rounds == 1 else f"{ADAPTATION}_{number + 1}"
            share = self.phases.adaptation * (number + 1) // rounds - self.phases.adaptation * number // rounds
            lengths.append((name, share))
        return [(name, iterations) for name, iterations in lengths if iterations > 0]

    def suits(self, workers: int) -> bool:
        """Whether so many workers can have equal parts of each batch, in micro-batches of equal size."""
        return self.data.global_batch_size % (workers * self.optim.accumulate) == 0

    @property
    def total_iterations(self) -> int:
        """Iterations of all phases."""
        return sum(iterations for _, iterations in self.schedule)


def method_of_phase(config: Config, phase: str) -> Any:
    """Settings of what trains a phase: the method's, or those that plain segmentation or AdvEnt share with it.

    Plain segmentation comes first and AdvEnt is the warm-up, whatever the method.
    """
    if is_adaptation(phase):
        return config.method
    kind = AdvEntConfig if phase == WARM_UP else SegmentationConfig
    own = {item.name for item in fields(config.method)}
    shared = {item.name: getattr(config.method, item.name) for item in fields(kind) if item.name in own}
    if shared.get("segmentation_loss") not in get_args(SegmentationLossName):
        shared.pop("segmentation_loss", None)  # A loss of this method alone.
    return kind(**shared)
