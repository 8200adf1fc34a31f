"""Attention with SDPA, document by document: the backend for the CPU, for float32, and for what other backends refuse.

The cost is proportional to the sum of squared lengths; on a GPU, documents of similar length share a call. It reads the
boundaries on the host. Tracers and fake tensors have no boundaries to read: for them all of it is one operator,
`packsft::varlen_sdpa`. Knows documents in a row; knows no other backend.

Shapes: T tokens, D documents, H query heads, G key heads, K head size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from packsft_kernels.attention_spec import HALF_DTYPES, AttentionSpec

# On the CPU, SDPA in float32 is faster than in bfloat16 on short documents, casts included: 2.3x at 100 tokens, 1.0x at
# 700.
CPU_FLOAT32_LENGTH = 512
# On a GPU 60 documents of about 140 tokens become 7 calls, with 1.2 times as many scores. A kernel's block has 64 rows.
# Not measured: from where on filling up could cost more than the calls that it saves.
SIMILAR, SHORT, LONG = 0.75, 64, 1024


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, sinks: Tensor | None, spec: AttentionSpec
) -> Tensor:
    # Tracers and fake tensors have no boundaries to read: for them all of it is one operator. Its backward recomputes
    # what is not flash, so it supports no dropout: with dropout, a compiled graph breaks here.
    compiling = torch.compiler.is_compiling()
    if (compiling or isinstance(cu, FakeTensor)) and not spec.dropout:
        options = longest, scale, spec.causal, spec.window, spec.softcap
        return torch.ops.packsft.varlen_sdpa(q, k, v, cu, sinks, *options)[0]
    run = _outside_of_graphs if compiling else _per_document
    return run(q, k, v, cu, longest, scale, sinks, spec)


@torch.library.custom_op("packsft::varlen_sdpa", mutates_args=())
def _sdpa_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    max_seqlen: int,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The attention, and the logarithms of its sums of exponentials, `[T * H]`: none where the backward recomputes."""
    spec = _sdpa_spec(q, v, causal, window, softcap, sinks=sinks)
    if _is_flash_on_cpu(spec):
        return _flash_on_cpu(q, k, v, cu_seqlens, max_seqlen, scale, spec)
    out = _per_document(q, k, v, cu_seqlens, max_seqlen, scale, sinks, spec)
    # q if T = 0: an operator may not return its input
    return out.clone() if out is q else out.contiguous(), q.new_empty(0)


def _sdpa_spec(
    q: Tensor, v: Tensor, causal: bool, window: int | None, softcap: float | None, *, sinks: Tensor | None
) -> AttentionSpec:
    same = q.shape[-1] == v.shape[-1]
    return AttentionSpec(q.device.type, q.dtype, q.shape[-1], same, causal, window, softcap, sinks is not None)


@_sdpa_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, sinks: Tensor | None, longest: int, scale: float, *masking: Any
) -> tuple[Tensor, Tensor]:
    """Allocates only the output: what else SDPA keeps depends on the boundaries, and a fake tensor has none."""
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    if _is_flash_on_cpu(_sdpa_spec(q, v, *masking, sinks=sinks)):
        return out, q.new_empty(q.shape[0] * q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
    return out, q.new_empty(0)


@torch.library.custom_op("packsft::varlen_sdpa_backward", mutates_args=())
def _sdpa_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    max_seqlen: int,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    out: Tensor,
    logsumexp: Tensor,
) -> list[Tensor]:
    """Gradients of q, k, v and, if given, the sinks."""
    spec = _sdpa_spec(q, v, causal, window, softcap, sinks=sinks)
    if _is_flash_on_cpu(spec):
        return _flash_on_cpu_backward(grad, q, k, v, out, logsumexp, cu_seqlens, max_seqlen, scale, spec)
    exclude, key = torch._C._SetExcludeDispatchKeyGuard, torch._C.DispatchKey
    # Autograd does not record inside an operator unless its dispatch keys are enabled again.
    with exclude(key.AutogradFunctionality, False), exclude(key.ADInplaceOrView, False), torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        sinks = None if sinks is None else sinks.detach().requires_grad_()
        out = _per_document(q, k, v, cu_seqlens, max_seqlen, scale, sinks, spec)
        grads = torch.autograd.grad(out, (q, k, v) if sinks is None else (q, k, v, sinks), grad)
    return [grad.contiguous() for grad in grads]


@_sdpa_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, sinks: Tensor | None, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, sinks) if x is not None]


def _sdpa_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _sdpa_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, out, logsumexp = ctx.saved_tensors
    dq, dk, dv, *dsinks = torch.ops.packsft.varlen_sdpa_backward(grad, *inputs, *ctx.options, out, logsumexp)
    return dq, dk, dv, None, dsinks[0] if dsinks else None, *[None] * len(ctx.options)


_sdpa_op.register_autograd(_sdpa_backward, setup_context=_sdpa_setup_context)


# ---- PyTorch's flash attention for the CPU, which SDPA takes there: forward and backward as two calls ----


def _is_flash_on_cpu(spec: AttentionSpec) -> bool:
    plain = spec.window is None and spec.softcap is None and not spec.sinks and not spec.dropout
    return spec.device == "cpu" and spec.equal_head_dims and plain


def _flash_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    runs = _equal_length_runs(cu.tolist(), q.shape[0], longest)
    finite = _is_finite(q, k)
    out, sums = torch.empty_like(q, memory_format=torch.contiguous_format), []
    for run, q_run, k_run, v_run, out_run in _split(runs, q, k, v, out):
        inputs = (_to_documents(x, run, spec) for x in (q_run, k_run, v_run))
        result, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *inputs, 0.0, spec.causal, scale=scale
        )
        if not finite:
            result = _with_nan(result, _to_documents(q_run, run), _to_documents(k_run, run), spec.causal)
        _to_documents(out_run, run).copy_(result)
        sums.append(logsumexp.flatten())
    return out, torch.cat(sums) if sums else q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))


def _flash_on_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, cu: Tensor, longest: int,
    scale: float, spec: AttentionSpec,
) -> list[Tensor]:  # fmt: skip
    runs = _equal_length_runs(cu.tolist(), q.shape[0], longest)
    if not _is_finite(q, k):
        grad = grad.masked_fill(out.isnan(), torch.nan)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    sums = logsumexp.split([count * q.shape[1] * length for count, length in runs])
    for sums_run, (run, *given, dq, dk, dv) in zip(sums, _split(runs, grad, q, k, v, out, *grads), strict=True):
        inputs = (_to_documents(x, run, spec) for x in given)
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, sums_run.view(run[0], q.shape[1], run[1]), 0.0, spec.causal, scale=scale
        )
        for kept, result in zip((dq, dk, dv), results, strict=True):
            _to_documents(kept, run).copy_(result)
    return grads


def _split(runs: list[tuple[int, int]], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """(count, length) of each run, and its part of every tensor `[T, ...]`."""
    sizes = [count * length for count, length in runs]
    return zip(runs, *(tensor.split(sizes) for tensor in tensors), strict=True)


def _to_documents(x: Tensor, run: tuple[int, int], spec: AttentionSpec | None = None) -> Tensor:
    """`[count * length, heads, K]` as `[count, heads, length, K]`; with a spec, in the dtype that SDPA is given."""
    if spec is not None and spec.dtype in HALF_DTYPES and run[1] <= CPU_FLOAT32_LENGTH:
        x = x.float()
    return x.unflatten(0, run).transpose(1, 2)


# ---- NaN ----


def _is_finite(q: Tensor, k: Tensor) -> bool:
    """Whether neither holds a NaN or an infinity. By their sums: one too large for its dtype denies it, too."""
    (total,) = (q.sum() + k.sum())[None].tolist()
    return math.isfinite(total)


def _with_nan(out: Tensor, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """`out`, with NaN for the queries whose scores are all NaN, or have no finite largest one. `[B, heads, S, K]`.

    For them PyTorch's kernels for the CPU give 0, as for a query that sees no key: a row of the output is 0, although
    the query or a key that it sees is not finite. The gradients become NaN with it.
    """
    seen = (~torch.isfinite(k)).any(-1).repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = seen.cummax(-1).values if causal else seen.any(-1, keepdim=True)
    lost = (out == 0).all(-1) & (seen | (~torch.isfinite(q)).any(-1))
    return out * torch.ones_like(lost, dtype=out.dtype).masked_fill(lost, torch.nan)[..., None]


# ---- one call per document, or on a GPU per group of documents ----


def _per_document(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, sinks: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """One SDPA call per document; neighbours of equal length form one batch. Cost: the sum of squared lengths.

    On a GPU, where calls cost more than scores, documents of similar length form one batch, too, filled up at their
    ends: causal attention sees nothing that comes later.
    """
    boundaries = cu.tolist()
    runs = _equal_length_runs(boundaries, q.shape[0], longest)
    if spec.device != "cpu" and spec.causal:
        groups, shifts = _similar_length_groups(boundaries)
        if len(groups) < len(runs):
            shift_T = torch.tensor(shifts, device=cu.device).repeat_interleave(cu.diff(), output_size=q.shape[0])
            place_T = torch.arange(q.shape[0], device=cu.device) + shift_T
            size = sum(count * length for count, length in groups)
            q, k, v = (x.new_zeros(size, *x.shape[1:]).index_copy(0, place_T, x) for x in (q, k, v))
            return _in_runs(q, k, v, groups, scale, sinks, spec).index_select(0, place_T)
    return _in_runs(q, k, v, runs, scale, sinks, spec)


def _in_runs(
    q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[int, int]], scale: float, sinks: Tensor | None,
    spec: AttentionSpec,
) -> Tensor:  # fmt: skip
    """`split` and `cat`, not slices: the backward of a slice fills a [T, H, K] with zeros for every document."""
    if spec.device == "cuda" and q.shape[1] != k.shape[1]:  # `enable_gqa` in float32 takes a kernel that stores scores
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    finite = spec.device != "cpu" or _is_finite(q, k)
    if len(runs) == 1:  # no `split`: its backward would copy every gradient
        return _documents(q, k, v, runs[0][0], scale, sinks, spec, finite)
    outs = [
        _documents(q_run, k_run, v_run, run[0], scale, sinks, spec, finite)
        for run, q_run, k_run, v_run in _split(runs, q, k, v)
    ]
    return torch.cat(outs) if outs else q[..., :1].expand(-1, -1, v.shape[-1])


# `torch.compiler.disable` imports the compiler (1.2 s) at once; this imports it only when it is called.
_outside_of_graphs = torch._disable_dynamo(_per_document)


def _equal_length_runs(boundaries: list[int], num_tokens: int, max_seqlen: int) -> list[tuple[int, int]]:
    """(count, length) of each run of neighbouring documents of equal length; empty documents are skipped."""
    runs: list[tuple[int, int]] = []
    for document, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        if stop < start:
            raise ValueError(f"cu_seqlens falls from {start} to {stop} at document {document}: it must not decrease")
        if stop - start > max_seqlen:
            raise ValueError(f"max_seqlen is {max_seqlen}, but document {document} has {stop - start} tokens")
        if stop == start:
            continue
        if runs and runs[-1][1] == stop - start:
            runs[-1] = (runs[-1][0] + 1, stop - start)
        else:
            runs.append((1, stop - start))
    if boundaries[0] != 0 or boundaries[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens runs from {boundaries[0]} to {boundaries[-1]}, expected from 0 to T = {num_tokens}"
        )
    return runs


def _similar_length_groups(boundaries: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """(count, longest) of each group of documents of similar length, and how far each document moves, in tokens, if the
    groups lie end to end, and every document of a group takes the room of its longest.

    The shortest has `SIMILAR` of the longest, or both are within `SHORT`; above `LONG` lengths are equal. Empty
    documents are skipped.
    """
    groups: list[tuple[int, int]] = []
    shifts, place = [0] * (len(boundaries) - 1), 0
    lengths = [stop - start for start, stop in itertools.pairwise(boundaries)]
    for document in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[document]
        if not length:
            break
        longest = groups[-1][1] if groups else 0
        if length == longest or 0 < longest <= SHORT or SIMILAR * longest <= length <= longest <= LONG:
            groups[-1] = groups[-1][0] + 1, groups[-1][1]
        else:
            groups.append((1, length))
        shifts[document] = place - boundaries[document]
        place += groups[-1][1]
    return groups, shifts


def _documents(
    q: Tensor, k: Tensor, v: Tensor, count: int, scale: float, sinks: Tensor | None, spec: AttentionSpec, finite: bool
) -> Tensor:
    """Attention of `count` documents of equal length, end to end: `[count * length, H, K]` in and out."""
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))  # [count, heads, length, K]
    length = q.shape[2]
    window = spec.window if spec.window is not None and spec.window < length else None
    if spec.softcap is not None or sinks is not None:
        mask = _document_mask(length, spec.causal, window, q.device) if spec.causal or window else None
        out = attention_with_scores(q, k, v, scale, mask, spec.softcap, sinks)
    elif window is not None:
        mask = _document_mask(length, spec.causal, window, q.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=spec.dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        if spec.device == "cpu" and spec.dtype in HALF_DTYPES and length <= CPU_FLOAT32_LENGTH:
            q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=spec.causal, dropout_p=spec.dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    if not finite:
        out = _with_nan(out, q, k, spec.causal)
    return out.to(spec.dtype).transpose(1, 2).flatten(0, 1)


def _document_mask(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """`[length, length]` bool of one document (never of the row): True where a query (row) sees a key (column)."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)  # in place: distances would take 8 bytes each
    if window is not None:
        seen = seen.triu_(1 - window).tril_(window - 1)
    return seen.tril_() if causal else seen


def attention_with_scores(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention with explicit scores, for what SDPA cannot express: a softcap or sinks. `[B, H, S, K]` in and out.

    The softmax is at least float32, as in the models that use these.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(2, 3)) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        # not -inf: a query that sees no key (left padding) must not become NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink_column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink_column], dim=-1)
    weights = scores.softmax(dim=-1)
    weights = weights[..., :-1] if sinks is not None else weights
    return weights.to(v.dtype) @ v
