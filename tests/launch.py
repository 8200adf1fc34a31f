"""Runs a script in several gloo processes under `accelerate launch`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import packsft_kernels
import torch

import packsft


def launch(script: Path, processes: int, *arguments: object, **environment: str) -> str:
    """Run a Python file on the CPU; returns what it wrote to stderr. Does not look at the exit code: gloo may abort
    while it is taken down."""
    how = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", f"--num_processes={processes}",
           "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]  # fmt: skip
    roots = [Path(__file__).parent, *(Path(package.__file__).parents[1] for package in (packsft, packsft_kernels))]
    path = os.pathsep.join([*map(str, roots), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *(how if processes > 1 else []), str(script), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    return done.stderr


def results_of(script: Path, processes: int, output: Path, *arguments: object, **environment: str) -> Any:
    """What the script saves with `torch.save` in its first argument, at its end."""
    said = launch(script, processes, output, *arguments, **environment)
    assert output.exists(), said[-3000:]
    return torch.load(output)
