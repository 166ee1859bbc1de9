"""``python -m mpscl_ray.evaluate``."""

from mpscl_ray.evaluate.command import main
from mpscl_ray.runs.cli import run

if __name__ == "__main__":
    run(main)
