"""Networks and their initialisation."""

from mpscl_ray.networks.deeplab import DeepLabV2
from mpscl_ray.networks.factory import Segmenter, build, initialise

__all__ = ["DeepLabV2", "Segmenter", "build", "initialise"]
