"""``python -m mpscl_ray.compare``."""

from mpscl_ray.compare.command import main
from mpscl_ray.runs.cli import run

if __name__ == "__main__":
    run(main)
