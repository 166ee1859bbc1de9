"""``python -m mpscl_ray.check``."""

from mpscl_ray.prepare.check_command import main
from mpscl_ray.runs.cli import run

if __name__ == "__main__":
    run(main)
