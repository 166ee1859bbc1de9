"""``python -m mpscl_ray.predict``."""

from mpscl_ray.predict.command import main
from mpscl_ray.runs.cli import run

if __name__ == "__main__":
    run(main)
