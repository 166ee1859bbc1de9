"""``python -m mpscl_ray.tune``."""

from mpscl_ray.runs.cli import run
from mpscl_ray.tune.command import main

if __name__ == "__main__":
    run(main)
