"""`differentiable_once`: a backward whose result has no derivative, and says so."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("packsft_kernels: a loss, and attention with sinks, can be differentiated once, not twice")


def differentiable_once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Allow `create_graph=True`, but raise when its result is differentiated.

    PyTorch's `once_differentiable` raises only if the upstream gradient requires a derivative. The gradients of a loss
    and of attention also depend on their inputs, so a missing second derivative would silently be 0.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return grads
        return tuple(None if g is None else _NoSecondDerivative.apply(g.detach().requires_grad_()) for g in grads)

    return wrapped
