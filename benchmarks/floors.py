"""Limits no implementation can beat, measured in the same run: the bare matrix multiplications, and bytes.

Knows shapes and GEMMs; knows nothing of losses, attention or trainers.
"""

from __future__ import annotations

from collections.abc import Callable

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
