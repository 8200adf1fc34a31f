"""Makes the limits that no implementation can beat: the bare matrix products of a head, of attention, of a model.

Knows shapes and what a training step has to multiply; knows nothing of losses or trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

DATASHEET = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # FLOP/s


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
    m = max(round(sum(length**2 for length in lengths) / (2 * T * 8)), 1) * 8  # tensor cores want multiples of 8
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
    head = model.get_output_embeddings()
    layers, flops = [], 0.0
    inputs: dict[tuple[int, int], Tensor] = {}
    for module, weight in linear_weights(model):
        shape = (num_scored if module is head else num_tokens, weight.shape[1])
        if shape not in inputs:
            inputs[shape] = torch.randn(shape, dtype=weight.dtype, device=weight.device)
        layers.append((inputs[shape], weight))
        flops += 3 * 2 * shape[0] * weight.numel()
    return linear_gemms(layers), flops


def linear_weights(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """(layer, its weight `[out, in]`) of every linear layer of a model."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module, module.weight
        elif isinstance(module, Conv1D):
            yield module, module.weight.t()


def training_flops(model: nn.Module, documents: Sequence[int], num_scored: int) -> float:
    """Useful floating-point operations of forward and backward over documents of these lengths, in tokens.

    Of every linear weight 6 a token (2 forward, 2 for the gradient of the input, 2 for that of the weight, which a
    frozen one has not), where the head sees only the `num_scored` tokens. Of causal attention with H query heads of
    size K, 6 H K L^2 a layer and document of length L: two products of L^2 / 2 pairs forward, twice that backward.
    Padding, recomputed activations and masked pairs are work too, but none that the training asks for.
    """
    head, tokens = model.get_output_embeddings(), sum(documents)
    flops = 0.0
    for module, weight in linear_weights(model):
        per_token = 6 if module.weight.requires_grad else 4
        flops += per_token * weight.numel() * (num_scored if module is head else tokens)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = sum(length**2 for length in documents)
    return flops + config.num_hidden_layers * 6 * config.num_attention_heads * head_dim * pairs


def datasheet_peak(device_name: str) -> float | None:
    """FLOP/s of dense bfloat16 products that the maker states for this GPU (its SXM form), None if not known here."""
    if "PCIe" in device_name or "NVL" in device_name:
        return None
    return next((flops for name, flops in DATASHEET.items() if name in device_name), None)
