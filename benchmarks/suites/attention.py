"""Times attention over packed documents, against its bare GEMMs, one call with a block mask, padded rows and kernels.

On the CPU float32 outputs must be bit for bit those of each document alone. Knows q, k and v; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from harness.contest import Limit, Outputs, contest, memory
from harness.floors import attention_gemms
from harness.measure import Figure, Settings, device, figure, interleave, training_dtype
from harness.peers import LEFT_OUT, OURS, PLAIN_ATTENTION, Attention, Peer, attentions, ours, sdpa
from harness.shapes import LLAMA_1B_ATTENTION, PACK_LENGTHS, SMOLLM2_ATTENTION, AttentionShape
from packsft_kernels.attention_spec import AttentionSpec
from packsft_kernels.varlen_attention import choose_backend, varlen_attention
from torch import Tensor
from torch.nn.attention import SDPBackend

ONE_CALL = "one SDPA call on the batch"
SDPA = "SDPA, documents of similar length in one batch"
# (query heads, key heads, size of keys, size of values): what the kernels of FlashAttention do not take as it is
BEYOND_FLASH = {
    "sinks, as in gpt-oss": (64, 8, 64, 64),
    "values of another size, as in DeepSeek": (16, 16, 192, 128),
    "heads of 512, as in Gemma 4": (16, 2, 512, 512),
    "float32": (32, 8, 64, 64),
}


def bench(settings: Settings) -> Iterator[Figure]:
    """Forward and backward over one pack: of 1,024 tokens at SmolLM2's shape, on a GPU of 8,192 at Llama-3.2-1B's."""
    on_gpu = device().type == "cuda"
    lengths = PACK_LENGTHS * 8 if on_gpu else PACK_LENGTHS
    shape = LLAMA_1B_ATTENTION if on_gpu else SMOLLM2_ATTENTION
    bounds, qkv = boundaries(lengths), inputs(shape, sum(lengths))
    peers = peers_of(bounds, qkv)
    if settings.short:
        yield from (figure(peer.name, note=LEFT_OUT) for peer in peers if peer.compiles)
        peers = [peer for peer in peers if not peer.compiles]
    doubled = tuple(tensor.detach().double().requires_grad_() for tensor in qkv)
    alone = next(peer.run for peer in peers_of(bounds, doubled) if peer.name == PLAIN_ATTENTION)
    assert alone is not None
    timing = lambda run: timed(run, qkv)  # noqa: E731
    title = f"Attention over a pack of {len(lengths)} documents, {sum(lengths):,} tokens"
    repeats = 5 if settings.quick else 30
    verdicts = yield from contest(
        peers, lambda run: _outputs(run, qkv), _outputs(alone, doubled), PLAIN_ATTENTION, limit_of(lengths, shape),
        timing, repeats=repeats, chart=title,
    )  # fmt: skip
    # of competitors that build their masks anew
    yield from memory(peers_of(bounds, qkv), verdicts, timing, "Extra memory of attention")
    yield _equal_lengths(shape, settings.quick)
    for name, beyond in BEYOND_FLASH.items():
        yield _beside_sdpa(name, beyond, lengths, settings.quick)
    yield _same_bits(shape)


def boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths], device=device()).cumsum(0).to(torch.int32)


def inputs(shape: AttentionShape, T: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q `[T, H, K]`, k and v `[T, G, K]`, in the dtype of training if no other is given."""
    torch.manual_seed(0)
    dtype = dtype or training_dtype()
    q, k, v = (torch.randn(T, heads, shape.K, device=device()).to(dtype) for heads in (shape.H, shape.G, shape.G))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def peers_of(bounds: Tensor, qkv: tuple[Tensor, ...]) -> list[Peer]:
    return attentions(bounds, qkv[0].dtype, qkv[0].shape[-1])


def limit_of(lengths: tuple[int, ...], shape: AttentionShape) -> Limit:
    """For comparison on a GPU, rather than a limit: plain products write scores that a fused kernel keeps to itself."""
    run, flops = attention_gemms(lengths, shape.H, shape.K, training_dtype(), device())
    note = "for comparison" if device().type == "cuda" else "the limit"
    return Limit("bare GEMMs of as many FLOP", run, flops, "FLOP", note)


def timed(attend: Attention, qkv: tuple[Tensor, ...]) -> Callable[[], object]:
    """Forward and backward, three gradients."""
    grad = torch.randn_like(qkv[0])
    return lambda: torch.autograd.grad(attend(*qkv), qkv, grad)


def _outputs(attend: Attention, qkv: tuple[Tensor, ...]) -> Outputs:
    output = attend(*qkv)
    grad = torch.linspace(-1, 1, output.numel(), device=output.device).to(output.dtype).view_as(output)
    return dict(
        zip(("output", "dQ", "dK", "dV"), (output.detach(), *torch.autograd.grad(output, qkv, grad)), strict=True)
    )


def _equal_lengths(shape: AttentionShape, quick: bool) -> Figure:
    """Where nothing is to be gained: documents of one length, which plain PyTorch takes as the batch that they are.

    Both lie in memory as projections leave them, token after token.
    """
    D, L = (64, 1024) if device().type == "cuda" else (8, 128)
    bounds, qkv = boundaries((L,) * D), inputs(shape, D * L)
    grad = torch.randn_like(qkv[0])
    *rows, row_grad = (x.detach().unflatten(0, (D, -1)).transpose(1, 2) for x in (*qkv, grad))
    rows = [x.requires_grad_() for x in rows]

    def one_call() -> object:
        output = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(output, rows, row_grad)

    # private, and the only way to ask: cuDNN's kernel is another limit than flash attention's
    chosen = SDPBackend(torch._fused_sdp_choice(*rows, is_causal=True, enable_gqa=True)).name
    packed = ours(peers_of(bounds, qkv))
    steps = {OURS: lambda: torch.autograd.grad(packed(*qkv), qkv, grad), ONE_CALL: one_call}
    times = interleave(steps, 30 if quick else 100, warmup=2)
    return figure(
        f"{OURS}, {D} documents of {L} tokens", times[OURS].median, "s", spread=times[OURS].spread,
        ratio=times[OURS].median / times[ONE_CALL].median, ratio_of=f"time / {ONE_CALL}", at_most=1.05,
        note=f"1.05 rather than 1: the noise of two timings; SDPA ran {chosen}",
    )  # fmt: skip


def _beside_sdpa(name: str, shape: tuple[int, ...], lengths: tuple[int, ...], quick: bool) -> Figure:
    if device().type == "cpu":
        return figure(name, note="not on a CPU: there it is one SDPA call per document in any case")
    H, G, K, V = shape
    bounds, T = boundaries(lengths), sum(lengths)
    torch.manual_seed(0)
    shapes = (T, H, K), (T, G, K), (T, G, V), (T, H, V)
    dtype = torch.float32 if name == "float32" else training_dtype()
    *qkv, grad = (torch.randn(sizes, device=device()).to(dtype).requires_grad_() for sizes in shapes)
    sinks = torch.randn(H, device=device()) if "sinks" in name else None
    backend = choose_backend(AttentionSpec(device().type, dtype, max(K, V), K == V, sinks=sinks is not None))

    def through(backend: str) -> Attention:
        return partial(varlen_attention, cu_seqlens=bounds, max_seqlen=max(lengths), sinks=sinks, backend=backend)

    peer, attend = SDPA, through("sdpa")
    if backend == "sdpa":
        plain = (peer.run for peer in peers_of(bounds, tuple(qkv)) if peer.name == PLAIN_ATTENTION)
        peer, attend = PLAIN_ATTENTION, next(run for run in plain if run is not None)

    def step(attend: Attention) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(*qkv), qkv, grad)

    times = interleave({OURS: step(through(backend)), peer: step(attend)}, 3 if quick else 10, warmup=2)
    return figure(
        f"{name}: {backend}", times[OURS].median, "s", spread=times[OURS].spread,
        ratio=times[OURS].median / times[peer].median, ratio_of=f"time / {peer}",
    )  # fmt: skip


def _same_bits(shape: AttentionShape) -> Figure:
    """Outputs that differ in any bit from the document's alone: through packsft, on the CPU also through plain SDPA."""
    bounds, (q, k, v) = boundaries(PACK_LENGTHS), inputs(shape, sum(PACK_LENGTHS), torch.float32)
    on_cpu = q.device.type == "cpu"  # elsewhere another kernel answers, and rounds differently
    together = _packed(bounds, q, k, v)
    unequal = 0
    for start, stop in pairwise(bounds.tolist()):
        document = [x[start:stop] for x in (q, k, v)]
        unequal += int((together[start:stop] != _packed(boundaries((stop - start,)), *document)).sum())
        if on_cpu:
            unequal += int((together[start:stop] != sdpa(*document, is_causal=True)).sum())
    return figure(
        "outputs that differ in any bit from the document alone, float32", unequal, "outputs", at_most=0,
        parity=on_cpu, note=f"of {q.numel():,}; alone through packsft" + " and through plain SDPA" * on_cpu,
    )  # fmt: skip


def _packed(bounds: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ours(peers_of(bounds, (q, k, v)))(q, k, v)
