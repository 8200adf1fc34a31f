"""PyTorch's own FlashAttention for documents in a row, with attention sinks, too.

Sinks (gpt-oss) are one more logit per head in each softmax, without a value. The kernels of FlashAttention know
none, and need none. Let `lse` be the logarithm of a softmax's sum of exponentials, and `s` the sink. The sum becomes

    lse' = log(exp(lse) + exp(s)),

and the output `out' = exp(lse - lse') * out`. The backward of the kernel is given `lse` and `out`, and computes the
weights and their gradients again (Dao et al. 2022, arXiv:2205.14135, algorithm 4):

    P = exp(scores - lse),    dscores = P * (dout @ v.T - sum(dout * out)).

Given `lse'` and `out'` in their place, it computes those of the softmax with the sink. The gradient of the sink itself
is `-exp(s - lse') * sum(dout * out')`, summed over the tokens: its value is 0.

Shapes: T tokens, D documents, H query heads, G key heads, K head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packsft_kernels.attention_spec import AttentionSpec
from packsft_kernels.autograd import differentiable_once


def torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, sinks: Tensor | None, spec: AttentionSpec
) -> Tensor:
    # The operator below `torch.nn.attention.varlen`, whose two operators in Python are most of a short call's time. It
    # has its own backward, and takes grouped heads, a scale, a window and dropout in every release since 2.10.
    left, right = spec.window_pair
    row = cu, cu, longest, longest, spec.dropout, (left, right) == (-1, 0)
    window = {"window_size_left": left, "window_size_right": right}
    if sinks is not None:
        return _FlashWithSinks.apply(q, k, v, sinks, row, {"scale": scale, **window})
    return torch.ops.aten._flash_attention_forward.default(q, k, v, *row, False, scale=scale, **window)[0]


class _FlashWithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, row: tuple[Any, ...], options: dict[str, Any]
    ) -> Tensor:
        out, lse, *random_state, _ = torch.ops.aten._flash_attention_forward.default(q, k, v, *row, False, **options)
        lse_with_sink = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])  # [H, T]
        # Not in place: traced by torch 2.11, the gradients would be zeros, without a word.
        out = (out * (lse - lse_with_sink).exp().T[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, row[0], out, lse_with_sink, *random_state)
        ctx.row, ctx.options = row[2:], options
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, cu, out, lse, *random_state = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
            grad, q, k, v, out, lse, cu, cu, *ctx.row, *random_state, **ctx.options
        )
        dsinks = None
        if ctx.needs_input_grad[3]:
            dlogits = (grad.float() * out).sum(-1).T * (sinks[:, None] - lse).exp()  # [H, T]
            dsinks = -dlogits.sum(1).to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None
