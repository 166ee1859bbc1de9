"""``python -m mpscl_ray.score``; the function of the same name is ``from mpscl_ray import score``."""

from mpscl_ray.evaluate.score_command import main
from mpscl_ray.runs.cli import run

if __name__ == "mpscl_ray.score":  # Imported, this module would replace the function as attribute of the package.
    raise ImportError("mpscl_ray.score is a command; the function is imported by: from mpscl_ray import score")
if __name__ == "__main__":
    run(main)
