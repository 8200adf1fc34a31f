"""Runs an example in float64: `run_example.py OUTPUT EXAMPLE MODEL`, one process or several."""

import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
OPTIONS = {"num_rows": 40, "batch_size": 8, "epochs": 2, "learning_rate": 1e-3, "dtype": torch.float64}


def run(output, example, model, **options):
    """The trained weights, by name."""
    importlib.import_module(example).main(str(model), str(output), **OPTIONS | options)


if __name__ == "__main__":
    run(*sys.argv[1:4])
