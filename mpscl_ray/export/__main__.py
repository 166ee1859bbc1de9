"""``python -m mpscl_ray.export``."""

from mpscl_ray.export.command import main
from mpscl_ray.runs.cli import run

if __name__ == "__main__":
    run(main)
