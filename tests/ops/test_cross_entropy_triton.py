"""The Triton kernel: the whole of `test_cross_entropy.py` under the interpreter, and its machine code for real targets.

Triton chooses between interpreter and compiler when a kernel is defined, hence a process of its own for each.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import bench_static
from packsft_kernels import launch

ROOT = Path(__file__).parents[2]
LLAMA_ON_HOPPER = bench_static.Case(128_256, 90, torch.bfloat16, "loss, entropy, correct")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_every_case_of_cross_entropy_holds_in_the_interpreted_kernel() -> None:
    tests = [
        "tests/ops/test_cross_entropy.py",
        "-k",
        "not registered and not named and not switched",
    ]  # those run no kernel
    output = run("-m", "pytest", *tests, "-q", "-rN", "-p", "no:cacheprovider", TRITON_INTERPRET="1")
    assert "passed" in output
    assert "skipped" not in output


def test_every_launch_compiles_without_spills_and_with_wide_accesses_on_six_architectures() -> None:
    """The interpreter accepts much that the compiler refuses; no GPU is needed to ask it."""
    checked = bench_static.check_all(every=False)
    shapes = {case.shape for case, _, _ in checked}
    assert shapes == {*launch.ONE_READ_SHAPES.values(), launch.TWO_READ_SHAPE}
    assert {case: wrong for case, _, wrong in checked if wrong} == {}


def test_a_block_that_spills_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """32,768 columns at once do not fit into 65,536 registers beside the sums."""
    monkeypatch.setattr(launch, "TWO_READ_SHAPE", launch.KernelShape(8, 4096, 16, 128, 1, one_read=True))
    (spilled,) = bench_static.faults(LLAMA_ON_HOPPER, bench_static.compiled(LLAMA_ON_HOPPER))
    assert "spilled" in spilled


def test_narrow_accesses_and_a_missing_barrier_are_found() -> None:
    code = bench_static.compiled(replace(LLAMA_ON_HOPPER, edges=True))
    narrow = bench_static.faults(LLAMA_ON_HOPPER, code)  # held to what a row without edges may do
    assert any("loads narrower" in fault for fault in narrow)
    assert any("stores narrower" in fault for fault in narrow)
    without = tuple(x for x in code.instructions if not x[0].startswith("BAR"))
    assert not bench_static.overwrites_safely(LLAMA_ON_HOPPER, replace(code, instructions=without))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_every_case_of_the_losses_holds_on_the_gpu(name: str) -> None:
    output = run(
        "-m", "pytest", f"tests/ops/test_{name}.py", "-q", "-p", "no:cacheprovider", PACKSFT_TEST_DEVICE="cuda"
    )
    assert "passed" in output


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["racecheck", "memcheck"])
def test_no_launch_races_or_leaves_its_tensors(tool: str) -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not on the PATH")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "tests/ops/sanitize.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "every launch ran" in done.stdout
