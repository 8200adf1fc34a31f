"""Limits no implementation can beat, measured in the same run: the bare matrix multiplications, and bytes.

Knows shapes and GEMMs; knows nothing of losses, attention or trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def head_gemms(hidden_NM: Tensor, weight_VM: Tensor) -> Callable[[], None]:
    """The three GEMMs of a language-model head, forward and backward, over its N scored rows."""
    return linear_gemms([(hidden_NM, weight_VM.detach())])


def linear_gemms(layers: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Y = X W^T, dX = dY W, dW = dY^T X for every layer, as (input `[rows, in]`, weight `[out, in]`).

    Every layer multiplies its own weights, as in a model: weights that all layers shared would stay in cache.
    """
    layers = [(x.detach(), weight.detach()) for x, weight in layers]

    def run() -> None:
        outputs = [x @ weight.t() for x, weight in layers]
        for (x, weight), grad in zip(layers, outputs, strict=True):
            grad @ weight
            grad.t() @ x

    return run


def attention_gemms(
    lengths: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], None], float]:
    """As many floating-point operations as causal attention over these documents, in seven plain products, and how
    many: two products of the forward, and five of the backward, which computes the scores anew (FlashAttention-2,
    arXiv:2307.08691). Each is `[heads, T, head_dim] x [heads, head_dim, m]`, with m half the mean length that a token
    sees, so that no short document makes a small product: T m = sum of squared lengths / 2.
    """
    T = sum(lengths)
    m = max(round(sum(length**2 for length in lengths) / (2 * T)), 1)
    left_HTK = torch.randn(heads, T, head_dim, device=device).to(dtype)
    right_HKm = torch.randn(heads, head_dim, m, device=device).to(dtype)

    def run() -> None:
        for _ in range(7):
            left_HTK @ right_HKm

    return run, 7 * 2.0 * heads * T * head_dim * m


def model_gemms(model: nn.Module, num_tokens: int, num_scored: int) -> tuple[Callable[[], None], float]:
    """The bare GEMMs of one training step of a causal language model, and their floating-point operations.

    Every linear layer sees `num_tokens` rows, the head (the output embeddings) only the `num_scored` that have a
    target. Inputs are random: zeros would be multiplied faster.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    layers, flops = [], 0.0
    inputs: dict[tuple[int, int], Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
        elif isinstance(module, Conv1D):
            weight = module.weight.t()
        else:
            continue
        shape = (num_scored if module is head else num_tokens, weight.shape[1])
        if shape not in inputs:
            inputs[shape] = torch.randn(shape, dtype=weight.dtype, device=weight.device)
        layers.append((inputs[shape], weight))
        flops += 3 * 2 * shape[0] * weight.numel()
    return linear_gemms(layers), flops
