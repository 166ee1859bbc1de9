"""``python -m mpscl_ray.prepare``."""

from mpscl_ray.prepare.command import main
from mpscl_ray.runs.cli import run

if __name__ == "__main__":
    run(main)
