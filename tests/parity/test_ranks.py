"""Two gloo processes under `accelerate launch` give the weights of one process, in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import error

SCRIPT = Path(__file__).with_name("train_tiny.py")


def run(output, *arguments, processes):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", f"--num_processes={processes}",
              "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]  # fmt: skip
    import packsft_kernels

    import packsft

    roots = [SCRIPT.parents[1], *(Path(package.__file__).parents[1] for package in (packsft, packsft_kernels))]
    path = os.pathsep.join([*map(str, roots), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), str(SCRIPT), str(output), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one") / "w.pt", 4, 4, processes=1)


def test_two_processes_give_the_weights_of_one(one_process, tmp_path):
    # 64 examples, 16 a step: as 4 x 4 in one process, and as 4 x 2 in each of two
    two = run(tmp_path / "w.pt", 4, 2, processes=2)
    assert two["steps"] == one_process["steps"] == 8
    for name, weight in two["weights"].items():
        assert error(weight, one_process["weights"][name]) < 1e-9, name
    assert two["losses"] == pytest.approx(one_process["losses"], rel=1e-5)  # logged in float32, averaged over ranks
    assert two["history"] == pytest.approx(one_process["history"], rel=1e-9)


def test_the_split_into_micro_batches_changes_no_weight(one_process, tmp_path):
    split = run(tmp_path / "w.pt", 2, 8, processes=1)
    for name, weight in split["weights"].items():
        assert error(weight, one_process["weights"][name]) < 1e-9, name
