"""The one tolerance of the project: no worse than twice PyTorch's own error in the same dtype, against float64."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """max|ours - exact| / max|exact|; NaN or infinity in ours is an infinite error."""
    ours, exact = ours.detach().double(), exact.detach().double()
    scale = exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    error = ((ours - exact).abs().max() / scale).item()
    return error if error == error else float("inf")


def assert_within_torch_error(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """err(ours) <= 2 * err(theirs) + half a unit in the last place of the dtype of ours."""
    allowed = 2 * relative_error(theirs, exact) + torch.finfo(ours.dtype).eps / 2
    error = relative_error(ours, exact)
    assert error <= allowed, f"error {error:.3g}, PyTorch's own {relative_error(theirs, exact):.3g}"
