"""``python -m mpscl_ray.report``."""

from mpscl_ray.report.command import main
from mpscl_ray.runs.cli import run

if __name__ == "__main__":
    run(main)
