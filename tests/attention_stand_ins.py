"""Strict stand-ins for attention's GPU back ends: what a card would refuse, these refuse on the CPU.

Each has the parameters of the real function, in their order, with their defaults; makes its checks, with its kind of
error; and computes attention as *that* function defines its arguments, in float64 and rounded once. They refuse, too,
what no library checks and a card gets wrong: rows that are not aligned to 16 bytes, boundaries that do not fit.

What they mirror (which checks are made in Python, which in C++, is not kept apart), and where it was read:

    flash_attn_2        `flash_attn.flash_attn_varlen_func` with a softcap (since 2.6), in the repository
    flash_attn_3        `flash_attn_interface.flash_attn_varlen_func`, in the repository, `hopper/`
    flash_attn_4        `flash_attn.cute.flash_attn_varlen_func`, in flash-attn-4 4.0.0b36
    torch_varlen        `aten::_flash_attention_forward`, the operator below `torch.nn.attention.varlen`, and its
                        backward; the schema of torch 2.10 to 2.15, the checks in PyTorch's own
                        `transformers/cuda/flash_attn/flash_api.cpp`. The derivative is PyTorch's.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from packsft_kernels.reference import varlen_attention as reference
from torch._subclasses.fake_tensor import FakeTensor


def require(condition, message, error=RuntimeError):
    if not condition:
        raise error(message)


def attend(q, k, v, cu, longest, *, causal, window, scale, softcap=0.0, sinks=None, dropout=0.0):
    """`window` counts the neighbours (left, right) of a token, negative for all; `causal` is (left, 0).

    Boundaries of queries and keys are the same, so that a diagonal aligned at the bottom right is *the* diagonal.
    """
    left, right = window[0], 0 if causal else window[1]
    require(
        right in (0, left) or (left < 0 and right < 0), f"the definition has no window {window}", NotImplementedError
    )
    q64, k64, v64 = q.double(), k.double(), v.double()
    options = {
        "causal": right == 0,
        "window": None if left < 0 else left + 1,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": softcap or None,
        "sinks": sinks,
    }
    if dropout:  # the weights are what the definition makes of the unit vectors
        unit = torch.eye(len(v), dtype=torch.float64)[:, None].expand(-1, v.shape[1], -1)
        weights = F.dropout(reference(q64, k64, unit, cu, longest, **options), dropout)
        v_THK = v64.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return torch.einsum("qhs,shk->qhk", weights, v_THK).to(q.dtype)
    return reference(q64, k64, v64, cu, longest, **options).to(q.dtype)


def weights_of(q, k, cu, lse, *, causal, window, scale, dropout, seed):
    """The weights, and what dropout multiplies each with, `[T, H, T]`: of `lse` `[H, T]`, as kernels compute them again
    in a backward."""
    position = torch.arange(len(q))
    document, distance = torch.bucketize(position.int(), cu[1:], right=True), position[:, None] - position
    right = 0 if causal else window[1]
    seen = document[:, None] == document
    seen &= (distance <= window[0] if window[0] >= 0 else True) & (distance >= -right if right >= 0 else True)
    scores = torch.einsum("qhk,shk->qhs", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    weights = (scores - lse.double().T[..., None]).exp() * seen[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return weights, F.dropout(torch.ones_like(weights), dropout)


def logsumexp_of(q, k, cu, **options):
    """`[H, T]` float32, as kernels keep it."""
    weights, _ = weights_of(q.double(), k.double(), cu, torch.zeros(q.shape[1], len(q)), dropout=0.0, seed=0, **options)
    return weights.sum(-1).log().T.float().contiguous()


def gradients(grad_out, query, key, value, out, logsumexp, cu, **options):
    """Of q, k and v, by the `out` and `logsumexp` that are given (arXiv:2205.14135, algorithm 4)."""
    grad, q, k, v, o = (x.double() for x in (grad_out, query, key, value, out))
    groups = q.shape[1] // k.shape[1]
    weights, kept = weights_of(q, k, cu, logsumexp, **options)
    dv = torch.einsum("qhs,qhk->shk", weights * kept, grad)
    dweights = torch.einsum("qhk,shk->qhs", grad, v.repeat_interleave(groups, 1)) * kept
    dscores = weights * (dweights - (grad * o).sum(-1, keepdim=True)) * options["scale"]
    dq = torch.einsum("qhs,shk->qhk", dscores, k.repeat_interleave(groups, 1))
    dk = torch.einsum("qhs,qhk->shk", dscores, q)
    results = dq, *(x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return tuple(torch.empty_like(x).copy_(result) for x, result in zip((query, key, value), results, strict=True))


class FlashAlgorithm(torch.autograd.Function):
    """What a flash kernel without an error of its own would give: the output is rounded once, and the gradients are
    those of the rounded output. (Of a token that sees itself alone, gradients of q and k are that rounding error.)"""

    @staticmethod
    def forward(ctx, q, k, v, sinks, cu, options):
        out = reference(*(x.double() for x in (q, k, v)), cu, len(q), sinks=sinks, **options).to(q.dtype)
        window = options.get("window")
        ctx.options = {"causal": options.get("causal", True), "scale": options.get("scale", q.shape[-1] ** -0.5)}
        ctx.options["window"] = (-1, -1) if window is None else (window - 1, window - 1)
        lse = logsumexp_of(q, k, cu, **ctx.options)
        lse = lse if sinks is None else torch.logaddexp(lse, sinks.float()[:, None])
        ctx.save_for_backward(q, k, v, sinks, cu, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, sinks, cu, out, lse = ctx.saved_tensors
        dq, dk, dv = gradients(grad, q, k, v, out, lse, cu, **ctx.options, dropout=0.0, seed=0)
        weights = None if sinks is None else (sinks.float()[:, None] - lse).exp()
        dsinks = None if sinks is None else -((grad.double() * out.double()).sum(-1).T * weights).sum(1).to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None


def check(q, k, v, cu_q, cu_k, max_q, max_k, *, largest=256, equal_sizes=True, error=RuntimeError):
    """What all of them check, and what none does but must hold."""
    cards = {x.device for x in (q, k, v, cu_q, cu_k)}
    require(len(cards) == 1, f"tensors on {cards}", error)
    require(q.dtype in (torch.float16, torch.bfloat16), f"neither float16 nor bfloat16: {q.dtype}", error)
    require(q.dtype == k.dtype == v.dtype, f"dtypes differ: {q.dtype}, {k.dtype}, {v.dtype}", error)
    require(q.ndim == k.ndim == v.ndim == 3, "not [T, heads, head size]", error)
    require(k.shape[:2] == v.shape[:2] and q.shape[2] == k.shape[2], "shapes of q, k and v do not fit", error)
    require(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} heads for {k.shape[1]} key heads", error)
    for x in (q, k, v):
        require(x.shape[2] % 8 == 0 and x.shape[2] <= largest, f"head size {x.shape[2]}", error)
        require(x.stride(-1) == 1, f"last stride {x.stride(-1)}", error)
        require(all(n % 8 == 0 for n in x.stride()[:-1]), f"misaligned address: strides {x.stride()}", error)
    require(not equal_sizes or q.shape[2] == v.shape[2], f"head sizes {q.shape[2]} and {v.shape[2]}", error)
    for cu, longest in ((cu_q, max_q), (cu_k, max_k)):
        require(
            cu.dtype == torch.int32 and cu.ndim == 1 and cu.is_contiguous(), "boundaries not int32 in one row", error
        )
        require(type(longest) is int, f"max_seqlen is no int: {longest!r}", TypeError)
        if not isinstance(cu, FakeTensor):
            lengths = [stop - start for start, stop in pairwise(cu.tolist())]
            require(min(lengths) >= 0, f"boundaries fall: {cu.tolist()}")
            require(max(lengths) <= longest, f"a document of {max(lengths)} tokens, max_seqlen is {longest}")
            require(cu[0] == 0 and cu[-1] == len(q) == len(k), "memory outside the boundaries is never written")


def check_flash_2(q, k, cu, longest, dropout=0.0):
    """The kernels of flash-attention 2, which are PyTorch's too."""
    if longest == 1 and q.shape[1] > k.shape[1]:  # with decoding in mind, q is reshaped to [D, ...]
        require(len(q) == len(cu) - 1, "max_seqlen 1, grouped heads and an empty document")
    major, minor = torch.cuda.get_device_capability()
    small, size = major == 12 or (major == 8 and minor > 0), q.shape[-1]  # in shared memory: 99 KiB
    # In the backward, and not in all releases: PyTorch's `main` has lifted it.
    require(not small or size <= 192 or (size > 224 and not dropout), f"no backward for head size {size}")


def unit_stride(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    size, scale = q.shape[-1], q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q, k, v = (unit_stride(F.pad(x, (0, -size % 8)) if size % 8 else x) for x in (q, k, v))
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_flash_2(q, k, cu_seqlens_q, max_seqlen_q, dropout_p)
    require(not (softcap and dropout_p), "a softcap and dropout")
    return attend(
        q, k, v, cu_seqlens_q, max_seqlen_q, causal=causal, window=window_size, scale=scale, softcap=softcap,
        dropout=dropout_p,
    )[..., :size]  # fmt: skip


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    require(torch.cuda.get_device_capability()[0] == 9, "built for Hopper")
    v = v if v.stride(-3) == 1 else unit_stride(v)  # for float8, v may lie the other way round
    check(unit_stride(q), unit_stride(k), v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attend(
        q, k, v, cu_seqlens_q, max_seqlen_q, causal=causal, window=window_size, scale=softmax_scale, softcap=softcap
    )


def flash_attn_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    major = torch.cuda.get_device_capability()[0]
    require(9 <= major <= 11, "no backward on this card", AssertionError)
    largest = 256 if major == 9 else 128
    check(
        *(x.contiguous() for x in (q, k, v)), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        largest=largest, equal_sizes=False, error=AssertionError,
    )  # fmt: skip
    window = tuple(-1 if n is None else n for n in window_size)
    out = attend(
        q, k, v, cu_seqlens_q, max_seqlen_q, causal=causal, window=window, scale=softmax_scale, softcap=softcap,
        sinks=learnable_sink,
    )  # fmt: skip
    return out, None  # in the second place is the lse


def torch_varlen(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None,
):  # fmt: skip
    """Returns (output, logsumexp, rng_state, unused, debug mask)."""
    check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    check_flash_2(query, key, cum_seq_q, max_q, dropout_p)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = {"causal": is_causal, "window": (window_size_left, window_size_right), "scale": scale}
    seed = torch.randint(2**31, (2,))
    with torch.random.fork_rng():
        torch.manual_seed(int(seed[0]))
        out = attend(query, key, value, cum_seq_q, max_q, dropout=dropout_p, **options)
    logsumexp, unused = logsumexp_of(query, key, cum_seq_q, **options), torch.zeros((), dtype=torch.uint64)
    return torch.empty_like(query).copy_(out), logsumexp, seed.to(torch.uint64), unused, query.new_empty(0)


def torch_varlen_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """Gradients of query, key and value, with the same weights dropped as in the forward."""
    check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for x in (grad_out, out):
        require(x.dtype == query.dtype and x.shape == query.shape, f"{tuple(x.shape)} {x.dtype} of an output")
    require(logsumexp.dtype == torch.float32 and logsumexp.shape == (query.shape[1], len(query)), "logsumexp")
    return gradients(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, causal=is_causal,
        window=(window_size_left, window_size_right), scale=scale, dropout=dropout_p, seed=int(rng_state[0]),
    )  # fmt: skip


@dataclass(frozen=True)
class StandIn:
    """Where a stand-in goes: the back end of ours that calls it, and the module in which it is looked up, or the
    operator of PyTorch that it is, with its backward."""

    function: object
    backend: str
    module: str
    package: str
    features: frozenset = frozenset()
    backward: object = None
    largest_head: int = 256


STAND_INS = [
    StandIn(
        flash_attn_2, "flash_attn_2", "flash_attn", "flash_attn.flash_attn_interface",
        frozenset({"window", "softcap", "dropout"}),
    ),
    StandIn(
        flash_attn_3, "flash_attn_3", "flash_attn_interface", "flash_attn_interface", frozenset({"window", "softcap"})
    ),
    StandIn(flash_attn_4, "flash_attn_4", "flash_attn.cute", "flash_attn.cute", largest_head=128),
    StandIn(
        torch_varlen, "torch_varlen", "_flash_attention_forward", "", frozenset({"window", "sinks", "dropout"}),
        torch_varlen_backward,
    ),
]  # fmt: skip
