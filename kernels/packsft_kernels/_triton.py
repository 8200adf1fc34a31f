"""Triton if it is installed, else stand-ins, so that kernel files can be imported everywhere.

Holds the few jit helpers that kernels share. Knows no loss.
"""

import functools
import os
import types
import warnings
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    tl = types.SimpleNamespace(constexpr=None)  # the only name that kernel signatures use

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on the CPU, one program at a time. Triton decides this when a kernel is defined."""


def jit(function: Any = None, **options: Any) -> Any:
    """`triton.jit`, with or without options. Without Triton it returns the plain function, which is never launched."""
    if HAS_TRITON:
        return triton.jit(function, **options)
    return (lambda undecorated: undecorated) if function is None else function


def usable(device: torch.device) -> bool:
    """Whether a kernel can be launched on tensors of `device`. Warns once on CUDA without Triton.

    Not on AMD's GPUs, which are "cuda", too: the kernels hold instructions of NVIDIA's."""
    if torch.version.hip is not None:
        return False
    if device.type == "cuda" and not HAS_TRITON:
        _announce_fallback()
    return HAS_TRITON and (device.type == "cuda" or INTERPRET)


@functools.cache
def _announce_fallback() -> None:
    warnings.warn("packsft_kernels: triton is not installed, the loss runs in plain PyTorch (slower)", stacklevel=4)


@jit
def tanh(x):
    """tanh in float32, accurate to about one unit in the last place. (The interpreter has no `libdevice`.)

    Near 0 the closed form cancels, so its series is used there. The first omitted term is 2e-9 at |x| = 0.25.
    """
    square = x * x
    series = x * (
        1 + square * (-0.33333333333 + square * (0.13333333333 + square * (-0.05396825397 + square * 0.02186948854)))
    )
    e = tl.exp(-2 * tl.abs(x))
    closed = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -closed, closed))


@jit
def round_to_bf16(x):
    """Round a float32 to the nearest bf16, ties to even; the result stays float32. (The interpreter truncates.)"""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
