"""The Triton kernel: the whole of `test_cross_entropy.py` under the interpreter, and its machine code for real targets.

Triton chooses between interpreter and compiler when a kernel is defined, hence a process of its own for each.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import bench_static
import gpu
from packsft_kernels import cross_entropy, launch

ROOT = Path(__file__).parents[2]
# The plugin is found before pytest has read its own `pythonpath`.
INTERPRETED_PATH = os.pathsep.join([str(ROOT / "tests" / "ops"), os.environ.get("PYTHONPATH", "")])
GPU = "cuda"
LLAMA_ON_HOPPER = bench_static.Case(128_256, 90, torch.bfloat16, "loss, entropy, correct")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


SOME = "test_contract and everything and inplace or over_several_blocks and plain or first_argmax"
EVERY = "not registered and not named and not switched"  # those run no kernel


@pytest.mark.parametrize("cases", [SOME, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "every"])
def test_the_cases_of_cross_entropy_hold_in_the_interpreted_kernel(cases: str) -> None:
    tests = ["tests/ops/test_cross_entropy.py", "-k", cases]
    plugins = ["-p", "no:cacheprovider", "-p", "card_exp"]
    output = run("-m", "pytest", *tests, "-q", "-rN", *plugins, TRITON_INTERPRET="1", PYTHONPATH=INTERPRETED_PATH)
    assert "passed" in output
    assert "skipped" not in output


def test_every_launch_compiles_without_spills_and_with_wide_accesses_on_six_architectures() -> None:
    """The interpreter accepts much that the compiler refuses; no GPU is needed to ask it."""
    checked = bench_static.check_all(bench_static.cases(every=False))
    shapes = {case.shape for case, _, _ in checked}
    assert shapes == {*launch.ONE_READ_SHAPES.values(), launch.TWO_READ_SHAPE}
    assert {case: wrong for case, _, wrong in checked if wrong} == {}


def test_a_block_that_spills_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """32,768 columns at once do not fit into 65,536 registers beside the sums."""
    monkeypatch.setattr(launch, "TWO_READ_SHAPE", launch.KernelShape(8, 4096, 16, 128, 1, one_read=True))
    (spilled,) = bench_static.faults(LLAMA_ON_HOPPER, bench_static.compiled(LLAMA_ON_HOPPER))
    assert "spilled" in spilled


def test_narrow_accesses_and_a_missing_barrier_are_found() -> None:
    code = bench_static.compiled(replace(LLAMA_ON_HOPPER, columns_less=1))
    narrow = bench_static.faults(LLAMA_ON_HOPPER, code)  # held to what a row without edges may do
    assert any("loads narrower" in fault for fault in narrow)
    assert any("stores narrower" in fault for fault in narrow)
    assert bench_static.overwrites_safely(LLAMA_ON_HOPPER, code)
    without = "\n".join(line for line in code.ttgir.splitlines() if "barrier" not in line)
    assert not bench_static.overwrites_safely(LLAMA_ON_HOPPER, replace(code, ttgir=without))
    without = tuple(x for x in code.instructions if not x[0].startswith("BAR"))
    assert not bench_static.overwrites_safely(LLAMA_ON_HOPPER, replace(code, instructions=without))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_every_case_of_the_losses_holds_on_the_gpu(name: str) -> None:
    """In several processes where pytest-xdist is there: a second goes into compiling each of some 200 kernels."""
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    tests = ["-m", "pytest", f"tests/ops/test_{name}.py", "-q", "--tb=line", "-p", "no:cacheprovider", *workers]
    assert "passed" in run(*tests, PACKSFT_TEST_DEVICE=GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["racecheck", "memcheck"])
def test_no_launch_races_in_shared_memory_or_leaves_its_tensors(tool: str) -> None:
    if (sanitizer := gpu.compute_sanitizer()) is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not found")
    command, environment = gpu.sanitizing(sanitizer, tool), os.environ | gpu.NO_CACHING
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "every launch ran" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [*launch.ONE_READ_SHAPES, 50_257, 128_256])
def test_a_gradient_in_the_logits_place_is_the_gradient_beside_them(vocab: int) -> None:
    """Bit for bit, over many rows and runs: the arithmetic is the same, so that only a race could make a difference.

    (racecheck looks at shared memory alone.) Targets lie everywhere, at a row's ends too.
    """
    logits = torch.randn(2048, vocab, device=GPU, dtype=torch.bfloat16)
    targets = torch.randint(vocab, (2048,), device=GPU)
    targets[::3], targets[1::3] = 0, vocab - 1

    def gradient(inplace: bool) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(
            cross_entropy(leaf.view_as(leaf), targets=targets, reduction="sum", inplace=inplace).loss, leaf
        )
        return grad

    beside = gradient(False)
    for _ in range(20):
        assert torch.equal(gradient(True), beside)
