"""The one numerical contract: no worse than twice PyTorch's own error in the same dtype. No tolerance is set elsewhere.

    err(ours) <= 2 * err(torch) + eps,    err(x) = max|x - truth| / max|truth|

with the truth in float64, `torch` the plain definition in the dtype under test, and eps half a unit in the last place
of the dtype in which the result is handed over: a result that is right but for its own rounding has to pass. In
float32 it is a whole unit: the arithmetic is no wider than the result, and a few rows of PyTorch's may be rounded
luckily. In float64 itself both errors are rounding, and the contract becomes `EXACT`: fusing and chunking may not
change anything.
"""

import math

import torch
from torch import Tensor

EXACT = 1e-12
"""Largest error of a float64 computation against a float64 definition: 4,500 units in the last place."""


def seeded(seed: int) -> torch.Generator:
    """A generator on the device under test."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def error(value: Tensor, truth: Tensor) -> float:
    """`max|value - truth| / max|truth|`; infinite if a NaN or an infinity stands where the truth has none."""
    value, truth = value.detach().cpu().double().flatten(), truth.detach().cpu().double().flatten()
    assert value.shape == truth.shape, f"shapes differ: {tuple(value.shape)} and {tuple(truth.shape)}"
    finite = truth.isfinite()
    same = torch.where(truth.isnan(), value.isnan(), value == truth)
    if not bool((finite | same).all()) or not bool(value[finite].isfinite().all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    largest, difference = truth[finite].abs().max(), (value - truth)[finite].abs().max()
    return float(difference / largest) if largest > 0 else (0.0 if difference == 0 else float("inf"))


def worst_row_error(value: Tensor, truth: Tensor) -> float:
    """The largest `error` of any row: a row of small gradients does not hide behind one of large ones."""
    assert value.shape == truth.shape, f"shapes differ: {tuple(value.shape)} and {tuple(truth.shape)}"
    rows = truth.shape[-1]
    return max(
        (error(v, t) for v, t in zip(value.reshape(-1, rows), truth.reshape(-1, rows), strict=True)), default=0.0
    )


def assert_accurate(ours: Tensor, plain: Tensor, truth: Tensor, what: str, *, by_row: bool = False) -> None:
    """Hold `ours` to the contract.

    Args:
        ours: the result under test, in the dtype in which it is handed over.
        plain: the same by plain PyTorch in the same dtype of inputs.
        truth: the same in float64, from the same inputs (already rounded to the dtype under test).
        what: named in the message.
        by_row: also compare the worst row with PyTorch's worst row (for gradients).
    """
    assert truth.dtype == torch.float64, "the truth has to be computed in float64"
    ours, plain, truth = (x.detach().cpu() for x in (ours, plain, truth))  # thousands of rows, each read by the host
    for measure in [error, worst_row_error] if by_row else [error]:
        got, own = measure(ours, truth), measure(plain, truth)
        assert math.isfinite(own), f"{what}: plain PyTorch is not finite, so that anything would pass"
        rounding = torch.finfo(ours.dtype).eps / (1 if ours.dtype == torch.float32 else 2)
        bound = EXACT if ours.dtype == torch.float64 else 2 * own + rounding
        assert got <= bound, f"{what}: {measure.__name__} {got:.3e}, allowed {bound:.3e} (plain PyTorch: {own:.3e})"


def norms_keep_float64(model: torch.nn.Module) -> None:
    """For the rest of the process, the RMSNorms of this model's class compute in float64. transformers' own round to
    float32 inside, and where a last bit of their input differs, their output differs by 6e-8."""

    def forward(norm, x):
        gemma = hasattr(norm, "eps")
        scale = 1 + norm.weight if gemma else norm.weight
        return scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (norm.eps if gemma else norm.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            type(module).forward = forward
