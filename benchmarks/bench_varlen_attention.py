"""Attention over packed documents: per document, against one call with a block mask and against padded rows.

Float32 outputs must be bit for bit those of each document alone. Knows q, k and v; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from measure import Settings, device, extra_memory, figure, interleave, training_dtype
from shapes import PACK_LENGTHS, SMOLLM2_ATTENTION
from torch import Tensor

OURS = "packsft varlen_attention"
BLOCK_MASK = "SDPA, [T, T] block mask"
PADDED = "SDPA, padded rows"
ONE_CALL = "one SDPA call on the batch"


def bench_attention(settings: Settings) -> list[dict[str, Any]]:
    """Forward and backward at SmolLM2's shape over one pack of 1,024 tokens; equality in float32."""
    bounds = torch.tensor([0, *PACK_LENGTHS], device=device()).cumsum(0).to(torch.int32)
    candidates = {OURS: _packed, BLOCK_MASK: _block_mask, PADDED: _padded}
    qkv = _inputs(training_dtype())
    output_grad = torch.randn_like(qkv[0])
    steps = {name: _step(attend, qkv, bounds, output_grad) for name, attend in candidates.items()}
    times = interleave(steps, 5 if settings.quick else 30, warmup=2)
    ours = times[OURS].median
    table = [figure(OURS, ours, "s", spread=times[OURS].spread)]
    for name in (BLOCK_MASK, PADDED):
        table.append(
            figure(
                name,
                times[name].median,
                "s",
                ratio=times[name].median / ours,
                ratio_of="time / packsft",
                spread=times[name].spread,
                note=_difference(candidates[name], bounds),
            )
        )
    memory = {name: extra_memory(step) for name, step in steps.items()}
    for name, value in memory.items():
        table.append(
            figure(f"extra memory, {name}", value, "MiB", ratio=value / memory[OURS], ratio_of="memory / packsft")
        )

    table += _equal_lengths(qkv, output_grad, settings.quick)

    q, k, v = _inputs(torch.float32)
    together = _packed(q, k, v, bounds)
    unequal = 0
    edges = bounds.tolist()
    for start, stop in pairwise(edges):
        alone = _packed(
            q[start:stop],
            k[start:stop],
            v[start:stop],
            torch.tensor([0, stop - start], dtype=torch.int32, device=device()),
        )
        plain = _sdpa(q[start:stop], k[start:stop], v[start:stop], is_causal=True)
        unequal += int((together[start:stop] != alone).sum())
        if q.device.type == "cpu":  # elsewhere another kernel answers, and rounds differently
            unequal += int((together[start:stop] != plain).sum())
    table.append(
        figure(
            "outputs that differ in any bit from the document alone, float32",
            unequal,
            "outputs",
            at_most=0,
            parity=q.device.type == "cpu",
            note=f"of {q.numel():,}; alone through packsft and through plain SDPA",
        )
    )
    return table


def _equal_lengths(qkv: tuple[Tensor, ...], grad: Tensor, quick: bool) -> list[dict[str, Any]]:
    """Where nothing is to be gained: documents of one length, which plain PyTorch takes as the batch that they are.

    Both lie in memory as projections leave them, token after token.
    """
    D = 8
    bounds = torch.arange(0, len(grad) + 1, len(grad) // D, dtype=torch.int32, device=grad.device)
    *rows, row_grad = (x.detach().unflatten(0, (D, -1)).transpose(1, 2) for x in (*qkv, grad))
    rows = [x.requires_grad_() for x in rows]

    def one_call() -> Any:
        output = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(output, rows, row_grad)

    steps = {OURS: _step(_packed, qkv, bounds, grad), ONE_CALL: one_call}
    times = interleave(steps, 8 if quick else 100, warmup=2)
    note = "1.05 rather than 1: the noise of two timings"
    ratio = times[OURS].median / times[ONE_CALL].median
    name = f"{OURS}, {D} documents of {len(grad) // D} tokens"
    return [
        figure(
            name, times[OURS].median, "s", ratio=ratio, ratio_of=f"time / {ONE_CALL}", at_most=1.05,
            spread=times[OURS].spread, note=note,
        )
    ]  # fmt: skip


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q `[T, H, K]`, k and v `[T, G, K]`."""
    torch.manual_seed(0)
    shape, T = SMOLLM2_ATTENTION, sum(PACK_LENGTHS)
    q, k, v = (torch.randn(T, heads, shape.K, device=device()).to(dtype) for heads in (shape.H, shape.G, shape.G))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """`F.scaled_dot_product_attention` of one sequence, `[T, heads, K]` in and out."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **arguments)[0].transpose(0, 1)


def _packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    from packsft_kernels import varlen_attention

    return varlen_attention(q, k, v, bounds, int(bounds.diff().max()))


def _block_mask(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """One call over the whole pack; the mask, as transformers builds it once per forward, is part of the price."""
    position = torch.arange(len(q), device=q.device)
    document = torch.bucketize(position, bounds, right=True)
    mask = (document[:, None] == document) & (position[:, None] >= position)
    return _sdpa(q, k, v, attn_mask=mask)


def _padded(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """One call over `[D, longest]` right-padded rows; with the padding and unpadding, which a padded run is spared."""
    lengths = bounds.diff().tolist()
    rows = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)]
    output = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)
    return torch.cat([row[:length] for row, length in zip(output, lengths, strict=True)])


def _step(attend: Callable[..., Tensor], qkv: tuple[Tensor, ...], bounds: Tensor, grad: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(attend(*qkv, bounds), qkv, grad)


def _difference(attend: Callable[..., Tensor], bounds: Tensor) -> str:
    """Whether a peer computes the same thing at all, in float64."""
    qkv = [tensor.detach().double() for tensor in _inputs(torch.float32)]
    edges = bounds.tolist()
    alone = torch.cat([_sdpa(*(x[a:b] for x in qkv), is_causal=True) for a, b in pairwise(edges)])
    error = float((attend(*qkv, bounds) - alone).abs().max() / alone.abs().max())
    return f"float64 error {error:.0e}" if error <= 1e-12 else f"WRONG: float64 error {error:.0e}"
