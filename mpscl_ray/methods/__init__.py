"""Published methods, each a file that reads like its paper."""

from __future__ import annotations

from mpscl_ray.methods.adabn import AdaBN
from mpscl_ray.methods.adaoutput import AdaOutput
from mpscl_ray.methods.advent import AdvEnt
from mpscl_ray.methods.base import Batch, Method
from mpscl_ray.methods.cag import CAG
from mpscl_ray.methods.clan import CLAN
from mpscl_ray.methods.intrada import IntraDA
from mpscl_ray.methods.mean_teacher import MeanTeacher
from mpscl_ray.methods.mpscl import MPSCL
from mpscl_ray.methods.segmentation import Segmentation
from mpscl_ray.methods.sifa import SIFA

METHODS: dict[str, type[Method]] = {
    "mpscl": MPSCL,
    "segmentation": Segmentation,
    "adabn": AdaBN,
    "adaoutput": AdaOutput,
    "advent": AdvEnt,
    "clan": CLAN,
    "intrada": IntraDA,
    "cag": CAG,
    "mean_teacher": MeanTeacher,
    "sifa": SIFA,
}
"""The class of every method by the name it has in a config: the keys of ``METHOD_CONFIGS``."""

__all__ = [
    "CAG",
    "CLAN",
    "METHODS",
    "MPSCL",
    "SIFA",
    "AdaBN",
    "AdaOutput",
    "AdvEnt",
    "Batch",
    "IntraDA",
    "MeanTeacher",
    "Method",
    "Segmentation",
]
