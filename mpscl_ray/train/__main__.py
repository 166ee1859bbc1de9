"""``python -m mpscl_ray.train``."""

from mpscl_ray.runs.cli import run
from mpscl_ray.train.command import main

if __name__ == "__main__":
    run(main)
