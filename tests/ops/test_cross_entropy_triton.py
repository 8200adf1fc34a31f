"""The Triton kernel: the whole of `test_cross_entropy.py` under the interpreter, and on a GPU.

Triton chooses between interpreter and compiler when a kernel is defined, hence a process of its own for each.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from packsft_kernels import cross_entropy, launch

ROOT = Path(__file__).parents[2]
# The plugin is found before pytest has read its own `pythonpath`.
INTERPRETED_PATH = os.pathsep.join([str(ROOT / "tests" / "ops"), os.environ.get("PYTHONPATH", "")])
GPU = "cuda"
KERNELS = ("_cross_entropy_kernel", "_scale_kernel")  # all others would take minutes
# Every tensor is then an allocation of its own, whose end memcheck knows.
NO_CACHING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


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


@pytest.mark.slow
def test_the_launch_shapes_can_be_timed() -> None:
    pytest.importorskip("rich")
    output = run("tools/tune_cross_entropy.py", "--rows=2", "--vocab=600", "--repeats=1", TRITON_INTERPRET="1")
    (now,) = (line.split("│")[1:6] for line in output.splitlines() if " now " in line)
    assert [int(value) for value in now] == list(launch._SHAPES[2**13][:5])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_every_case_of_the_losses_holds_on_the_gpu(name: str) -> None:
    """In several processes where pytest-xdist is there: a second goes into compiling each of some 200 kernels."""
    workers = ["-n", str(os.cpu_count() or 1), "--dist", "load"] if importlib.util.find_spec("xdist") else []
    tests = ["-m", "pytest", f"tests/ops/test_{name}.py", "-q", "--tb=line", "-p", "no:cacheprovider", *workers]
    assert "passed" in run(*tests, PACKSFT_TEST_DEVICE=GPU)


def compute_sanitizer() -> str | None:
    """On the PATH, in a CUDA toolkit, or in a Python package."""
    packages = sysconfig.get_path("purelib")
    places = ["/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/*/compute-sanitizer"]
    places += [f"{packages}/nvidia/*/bin", f"{packages}/nvidia/*/compute-sanitizer", f"{packages}/triton/**/bin"]
    found = [path for place in places for path in glob(f"{place}/compute-sanitizer", recursive=True)]
    able = [path for path in found if os.access(path, os.X_OK) and Path(path).is_file()]
    return shutil.which("compute-sanitizer") or (able[-1] if able else None)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["racecheck", "memcheck"])
def test_no_launch_races_in_shared_memory_or_leaves_its_tensors(tool: str) -> None:
    if (sanitizer := compute_sanitizer()) is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not found")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []  # PyTorch's own questions to the driver
    for kernel in KERNELS:
        command += ["--kernel-name", f"kns={kernel}"]
    command += [sys.executable, "tests/ops/sanitize.py"]
    environment = os.environ | NO_CACHING
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "every launch ran" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1000, 4096, 32_768, 50_257, 65_536, 128_256])
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
