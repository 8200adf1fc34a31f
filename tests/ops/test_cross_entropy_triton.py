"""The Triton kernel: the whole of `test_cross_entropy.py` under the interpreter, and a compilation for real targets.

Triton chooses between interpreter and compiler when a kernel is defined, hence a process of its own for each.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


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
    tests = ["tests/ops/test_cross_entropy.py", "-k", "not registered and not named"]  # those run no kernel
    output = run("-m", "pytest", *tests, "-q", "-rN", "-p", "no:cacheprovider", TRITON_INTERPRET="1")
    assert "passed" in output
    assert "skipped" not in output


COMPILE = """
import triton
from packsft_kernels import launch
from packsft_kernels.cross_entropy import _cross_entropy_kernel as kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pointers = {"targets": "*i64", "correct": "*i8", "logits": None, "grad": None}
for capability in (80, 90, 100):
    for dtype in ("bf16", "fp32"):
        block, warps = launch.kernel_block(128256)
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(kernel.arg_names):
            if name.isupper():
                signature[name] = "constexpr"
                constants[(index,)] = block if name == "BLOCK" else name != "ROUND_BF16"
            elif name.endswith("_ptr"):
                signature[name] = pointers.get(name[:-4], "*fp32") or "*" + dtype
                attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if name in ("softcap", "logit_scale", "smoothing", "z_loss") else "i32"
                if name in ("logits_stride", "grad_stride", "vocab"):
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps})
        ptx = compiled.asm["ptx"]
        # Eight bf16 at a time: 128 bits, as four registers of 32.
        print(capability, dtype, "v4" in ptx and "bar.sync" in ptx)
"""


def test_the_kernel_compiles_for_ampere_hopper_and_blackwell() -> None:
    """The interpreter accepts much that the compiler refuses; no GPU is needed to ask it."""
    lines = run("-c", COMPILE).splitlines()
    assert len(lines) == 6
    assert all(line.endswith("True") for line in lines), lines
