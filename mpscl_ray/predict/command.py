"""``python -m mpscl_ray.predict RUN INPUT... --out DIR``: label maps for images, in the geometry of the images."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from mpscl_ray.data.volumes.recipe import GEOMETRIES, NAN_POLICIES
from mpscl_ray.errors import ConfigError
from mpscl_ray.predict.output_names import FORMATS
from mpscl_ray.runs import cli
from mpscl_ray.runs.signals import first_signal_ends
from mpscl_ray.runs.storage import S3Path, is_url, parse_location

_EXAMPLES = """\
examples:
  python -m mpscl_ray.predict runs/mpscl patient7.nii.gz --out predictions
  python -m mpscl_ray.predict runs/mpscl SCANS --pattern '*_LGE.nii.gz' --out predictions --preview
  python -m mpscl_ray.predict runs/mpscl BIDS --pattern '**/anat/*.nii.gz' --out maps --resume
  python -m mpscl_ray.predict runs/mpscl mr_1001.nii.gz --modality source --out predictions
  python -m mpscl_ray.predict runs/mpscl patient8_dicom --format seg.nrrd --out predictions
  python -m mpscl_ray.predict hearts.mpscl SCANS --out predictions
  python -m mpscl_ray.predict runs/seed1 SCANS --ensemble runs/seed2 --tta --out predictions
  python -m mpscl_ray.predict s3://hearts/runs/mpscl patient7.nii.gz --out s3://hearts/predictions

For patient7.nii.gz the folder gets patient7_prediction.nii.gz (same grid, affine and orientation),
volumes.json, itksnap_labels.txt and slicer_labels.ctbl. A file that cannot be read is reported and
does not stop the others. Add --resume to the same command to go on where it was interrupted.
"""


def main(arguments: Sequence[str]) -> int:
    """Segment images; returns the exit code, 3 if some failed."""
    options = _parser().parse_args(list(arguments))
    out = _output_location(options.inputs, options.out)
    if options.disagreement and not (options.ensemble or options.tta):
        raise ConfigError("--disagreement needs --ensemble or --tta: one prediction has nothing to disagree with")
    # Imported here: help and refused arguments need no torch and no Ray.
    from mpscl_ray.predict.run import predict

    with first_signal_ends("before all images were segmented; to go on, give the same command with --resume"):
        return predict(options, out)


def _parser() -> argparse.ArgumentParser:
    parser = cli.CommandParser(
        prog="python -m mpscl_ray.predict",
        description="Segment images with a trained run; label maps have the geometry of the images.\n"
        "For research, not a medical device.",
        epilog=f"{_EXAMPLES}\n{cli.EXIT_CODES}",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of the run, a model file that export wrote, or the URL of either")
    add("inputs", type=Path, nargs="+", metavar="INPUT", help="images, or folders: of images, or of a DICOM series")
    add("--out", required=True, metavar="DIR", help="folder for the label maps, or its URL")
    add(
        "--pattern",
        metavar="GLOB",
        help="which files of a folder (default: all NIfTI files in it that are no label maps); '**/' is any folders: "
        "label maps keep these",
    )
    add("--modality", default="target", help="target (default), source, or the name of one of the run's modalities")
    add("--checkpoint", default="last", help="last (default), best, a phase, a name in RUN/checkpoints, or a path")
    add(
        "--label-values",
        choices=("index", "raw"),
        default="index",
        help="class indices, or the label ids of the original files",
    )
    parser.add_postprocessing()
    add(
        "--ensemble",
        action="append",
        default=[],
        metavar="RUN",
        help="average the probabilities of this run with those of RUN, such as another seed; give it for each run",
    )
    add("--tta", action="store_true", help="average over slices that are moved a little (five times as long)")
    add("--disagreement", action="store_true", help="also write a map of how much runs and moved slices disagree")
    add(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="of the label maps: nii.gz (default), or seg.nrrd, which 3D Slicer opens with names and colours",
    )
    add("--probabilities", action="store_true", help="also write a probability map of each structure")
    add("--preview", action="store_true", help="also write a picture of some slices with their labels")
    add("--assume-spacing", type=spacing, metavar="X,Y,Z", help="voxel size in mm for files without a usable geometry")
    add(
        "--geometry",
        choices=GEOMETRIES,
        help="which part of a header is right where they contradict each other, as in prepare",
    )
    add("--nan-policy", choices=NAN_POLICIES, default="error", help="voxels that are NaN or infinite, as in prepare")
    add("--any-modality", action="store_true", help="segment images whose intensities do not fit the model as well")
    parser.add_workers()
    parser.add_ray()
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--resume", action="store_true", help="keep label maps that an interrupted batch completed; make the others")
    add(
        "--overwrite",
        action="store_true",
        help="replace files of an earlier prediction; with --resume those of other images or settings",
    )
    return parser


def spacing(text: str) -> tuple[float, float, float]:
    """Voxel size of ``1,1,5``; an ArgumentTypeError for anything else."""
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError:
        x = y = z = math.nan
    if not all(0 < size < math.inf for size in (x, y, z)):
        raise argparse.ArgumentTypeError(f"{text!r} is not three sizes in mm above 0, such as 1,1,5")
    return x, y, z


def _output_location(inputs: Sequence[Path], out: str) -> Path | S3Path:
    """Location of the label maps; refuses inputs in a bucket, and a bucket that does not exist."""
    for given in inputs:
        if is_url(given):
            raise ConfigError(
                f"{parse_location(given)} is in a bucket, but images are read from local files; copy it to this machine"
            )
    location = parse_location(out)
    if isinstance(location, S3Path):
        location.require_bucket()
        return location
    return location.absolute()
