"""Writes the numbers of one released repository: python -m tests.golden.generate NAME CHECKOUT."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tests.golden.generate import adversarial, cag, intrada

RUNS = {
    "advent": adversarial.advent,
    "adaptsegnet": adversarial.adaptsegnet,
    "clan": adversarial.clan,
    "cag": cag.cag,
    "intrada": intrada.intrada,
}

if __name__ == "__main__":
    name, folder = sys.argv[1:]
    results = RUNS[name](Path(folder).resolve())
    np.savez_compressed(Path(__file__).parents[1] / f"released_{name}.npz", **results)
