"""Prepared datasets and settings so small that a training takes seconds."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpscl_ray.config import METHOD_CONFIGS, Config, load_config, reads_target
from mpscl_ray.data import NOT_ANNOTATED, SPLITS, TARGET_DOMAIN
from mpscl_ray.data.dataset import Scaling, in_fold, load_manifest
from mpscl_ray.data.parquet_reader import read_case
from mpscl_ray.data.slices import LocalSlices
from mpscl_ray.train.streams import TrainingData
from tests.written_dataset import save_plain_manifest, write_plain_case

CLASSES = ("background", "ventricle", "wall")
SIZE = (32, 32)

SETTINGS = (
    "network.layers=[1,1,1,1]",
    "network.base_channels=4",
    "network.output_stride=4",
    "network.in_channels=1",
    "network.train_bn_affine=true",
    "method.discriminator_width=4",
    "data.global_batch_size=4",
    "phases.source_only=4",
    "phases.warm_up=4",
    "phases.adaptation=4",
    "phases.source_only_lr=null",
    "optim.kind=sgd",
    "optim.lr=0.01",
    "optim.head_lr_factor=1",
    "optim.lr_discriminator=1e-4",
    "method.segmentation_loss=released",
    "method.lambda_main=0.003",
    "method.lambda_aux=2e-5",
    "method.gamma=1",
    "method.beta=0.1",
    "run.log_every=2",
    "run.validate_every=4",
    "run.checkpoint_every=2",
    "data.foreground_share=null",
    "data.augmentation.rotation_deg=10",
    "data.augmentation.mapping_probability=0",
    "data.augmentation.degradation_probability=0",
)
"""Overrides that make any preset tiny: three phases of four iterations."""

STAGES = {
    "intrada": ("phases.source_only=2", "phases.warm_up=2", "phases.adaptation=4"),
    "cag": ("phases.source_only=2", "phases.warm_up=2", "phases.adaptation=6", "method.min_pixels=2"),
    "mean_teacher": (
        *("phases.source_only=4", "phases.adaptation=4", "method.mixing=0.5", "method.share_matching=0.5"),
        *("method.consistency=1", "method.contrast=0.5", "method.delta_th=0.05", "method.adabn=true"),
        "data.augmentation.degradation_probability=0.5",
    ),
}
"""Overrides of the methods with stages, for several short ones."""


TINY_SIFA = (
    *(f"method.{width}=1" for width in ("generator_width", "generator_blocks", "encoder_width", "discriminator_width")),
)
"""Overrides that make the networks of SIFA tiny, which the other settings leave as they are."""


def make_dataset(
    folder: Path,
    modality: str,
    *,
    seed: int = 0,
    slices: int = 6,
    labelled: tuple[str, ...] = ("train", "val", "test"),
    cases: dict[str, int] | None = None,
    classes: tuple[str, ...] = CLASSES,
    shown: tuple[int, ...] = (1, 2),
    permuted: tuple[str, ...] = (),
    size: tuple[int, int] = SIZE,
    hidden: int = 0,
) -> Path:
    """Write a dataset of discs with rings, brighter or darker than the ground by modality; labels on the given splits.

    Args:
        folder: where to.
        modality: mr or ct, which look different.
        seed: of places and noise.
        slices: of each case.
        labelled: splits with labels.
        cases: number of cases by split.
        classes: names of the classes.
        shown: classes that are labelled; the others are background in the label.
        permuted: splits whose labels are wrong: each class has the number of the next.
        size: height and width of a slice.
        hidden: first rows of each slice that are not annotated.
    """
    counts = {"train": 3, "val": 2, "test": 2} if cases is None else cases
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    entries = []
    for split, count in counts.items():
        for number in range(count):
            image = np.empty((slices, *size), np.float32)
            label = np.zeros((slices, *size), np.uint8)
            for index in range(slices):
                centre = rng.uniform(12, 20, 2)
                distance = np.hypot(rows - centre[0], columns - centre[1])
                label[index][distance < 9] = 2
                label[index][distance < 5] = 1
                levels = np.array([-0.5, 0.8, 0.1] if modality == "mr" else [-0.5, 0.5, -0.2])
                image[index] = levels[label[index]] + rng.normal(0, 0.1, size)
            label[~np.isin(label, shown)] = 0
            if split in permuted:
                label = (label + 1) % 3
            label[:, :hidden] = NOT_ANNOTATED
            name = f"{modality}_{split}_{number}"
            entries.append(
                write_plain_case(
                    folder,
                    name,
                    split,
                    image.clip(-1, 1),
                    label if split in labelled else None,
                    classes,
                    content_sha256=hashlib.sha256(f"{name}{seed}".encode()).hexdigest(),
                    spacing_mm=(2.0, 1.5, 1.5),
                )
            )
    save_plain_manifest(folder, modality, classes, size, entries)
    return folder


def make_folds(folder: Path, modality: str, *, folds: int = 2, seed: int = 0) -> Path:
    """Write folds of six cases, each fold with a range of its own; ``seed`` is that of the images and of the folds."""
    plain = load_manifest(make_dataset(folder / "plain", modality, seed=seed, cases={"train": 6}))
    cases = []
    for case in plain.cases:
        arrays = read_case(folder / "plain", case)
        about = {"content_sha256": case.content_sha256, "spacing_mm": case.spacing_mm}
        cases.append(write_plain_case(folder, case.id, "cases", arrays["image"], arrays["label"], CLASSES, **about))
    shutil.rmtree(folder / "plain")
    for fold in range(folds):
        scaling = Scaling(-1.0 - fold / 10, 1.0, "given")
        splits = ["test" if number % folds == fold else "train" for number in range(len(cases))]
        splits[splits.index("train")] = "val"
        own = [in_fold(case, split, scaling) for case, split in zip(cases, splits, strict=True)]
        own.sort(key=lambda case: (SPLITS.index(case.split), case.id))
        (folder / f"fold{fold}").mkdir()
        about = {"method": "folds", "fold": fold, "folds": folds, "seed": seed}
        save_plain_manifest(folder / f"fold{fold}", modality, CLASSES, SIZE, own, scaling, about)
    return folder


def make_pair(folder: Path) -> Path:
    """Write the source ``mr`` and the target ``ct`` below a folder."""
    make_dataset(folder / "mr", "mr")
    make_dataset(folder / "ct", "ct", seed=1)
    return folder


def tiny_settings(preset: str) -> list[str]:
    """Those of SETTINGS that the method of a preset has."""
    name = load_config(preset).method_name
    method = {f"method.{field.name}" for field in dataclasses.fields(METHOD_CONFIGS[name])}
    phases = {f"phases.{phase}" for phase in METHOD_CONFIGS[name].phases} | {"phases.source_only_lr"}
    keys = {setting: setting.partition("=")[0] for setting in SETTINGS}
    return [
        setting for setting, key in keys.items() if key in method | phases or not key.startswith(("method.", "phases."))
    ]


def tiny_config(source: Path, target: Path, overrides: Sequence[str] = (), preset: str = "small/mpscl") -> Config:
    """A preset made tiny."""
    return load_config(preset, [*tiny_settings(preset), f"data.source={source}", f"data.target={target}", *overrides])


def local_data(config: Config) -> TrainingData:
    """The slices of a run in the memory of this process, opened as a run on Ray opens them."""
    folders = {"source": Path(config.data.source), "target": Path(config.data.target)}
    validation = {}
    for domain, folder in folders.items():
        cases = load_manifest(folder).split("val")
        if cases:
            validation[domain] = LocalSlices(folder, "val", labels=all(case.labelled for case in cases))
    adapts = any(reads_target(phase) for phase, _ in config.schedule)
    return TrainingData(
        classes=load_manifest(folders["source"]).classes,
        labelled=LocalSlices(folders[config.data.labelled_domain], "train", labels=True),
        unlabelled=LocalSlices(folders[TARGET_DOMAIN], "train", labels=False) if adapts else None,
        validation=validation,
    )
