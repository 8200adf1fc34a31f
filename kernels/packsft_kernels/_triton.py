"""Triton where there is one, and stand-ins where there is none, so that kernel files import everywhere.

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

    tl = types.SimpleNamespace(constexpr=None)  # what the signatures of kernels name

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on the CPU, one program after the other: Triton decides it when a kernel is defined."""


def jit(function: Any = None, **options: Any) -> Any:
    """`triton.jit`, with its options or without, or the plain function where it will never be launched."""
    if HAS_TRITON:
        return triton.jit(function, **options)
    return (lambda undecorated: undecorated) if function is None else function


def usable(device: torch.device) -> bool:
    """Whether a kernel can be launched on tensors of `device`. On CUDA without Triton, says so once."""
    if device.type == "cuda" and not HAS_TRITON:
        _announce_fallback()
    return HAS_TRITON and (device.type == "cuda" or INTERPRET)


@functools.cache
def _announce_fallback() -> None:
    warnings.warn("packsft_kernels: no triton found, the loss runs as plain PyTorch on CUDA (slower)", stacklevel=4)


@jit
def tanh(x):
    """tanh in float32 to about one unit in the last place (`libdevice` is not there under the interpreter).

    Near 0, where the closed form cancels, its series: the first term left out is 2e-9 at |x| = 0.25.
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
    """The nearest bf16 to a float32, ties to even, still as float32 (the interpreter's own cast cuts off instead)."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
