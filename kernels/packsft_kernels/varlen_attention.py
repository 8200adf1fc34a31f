"""Attention over documents laid end to end: `varlen_attention` and its back ends.

A document attends causally to itself and to nothing else. The boundaries come as `cu_seqlens`; no mask over the row
is built on any path (SDPA needs one over a single document for a window, a softcap or sinks). Back ends, in the order
in which `backend="auto"` tries them:

    flash_attn_4, flash_attn_3, flash_attn_2   the packages, where installed and able
    torch_varlen                               `torch.nn.attention.varlen`, in PyTorch itself, Ampere and newer
    sdpa                                       one SDPA call per document: the CPU, float32, and whatever else is left

Which one takes a call is a question to a table (`why_not`), answered with a reason. This file knows tensors only.

Shapes: T tokens, D documents, H query heads, G key heads, K head size.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from packsft_kernels.options import HALF_DTYPES, AttentionSpec
from packsft_kernels.varlen_sdpa import sdpa

FLOAT_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention within each document of a packed row.

    Per document and head, in PyTorch (`reference.varlen_attention` is this, in any dtype):

        scores = softcap * tanh(q @ k.T * scale / softcap)          # the softcap where one is given
        out = softmax(scores + mask, dim=-1) @ v                    # causal, and within the window

    Args:
        q: `[T, H, K]`.
        k: `[T, G, K]`, H a multiple of G (grouped-query attention).
        v: `[T, G, K]`.
        cu_seqlens: `[D + 1]` int32, document boundaries from 0 to T, on the device of `q`.
        max_seqlen: length of the longest document, an int on the host.
        causal: whether a token sees only itself and what is before it.
        scale: factor of the scores, default `K ** -0.5`.
        window: how many tokens a token sees, itself included (transformers' `sliding_window`); None for all.
        softcap: bound of the scores, as in Gemma 2.
        sinks: `[H]`, a logit per head that takes part in the softmax and has no value, as in gpt-oss.
        dropout: probability of dropping an attention weight.
        backend: "auto", or one of `BACKENDS`.

    Returns:
        `[T, H, K]` in the dtype of the computation: the autocast dtype under autocast, else the promoted dtype of
        `q`, `k` and `v`. Models under autocast hand over float32 q and k and a bfloat16 v; flash kernels refuse that.

    Raises:
        ValueError: an argument that does not fit, or a back end that cannot run this call. Boundaries that fall, end
            elsewhere than at T or pass `max_seqlen` are seen where they are read, on the host; nothing reads a card.
    """
    _check_arguments(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, sinks, dropout)
    dtype = _compute_dtype(q, k, v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    asked = (
        q.device.type, dtype, max(q.shape[-1], v.shape[-1]), q.shape[-1] == v.shape[-1],
        causal, window, softcap, sinks is not None, dropout,
    )  # fmt: skip
    name, spec = _chosen(backend, *asked), AttentionSpec(*asked)
    if name != "sdpa":
        q, k, v, cu_seqlens = _aligned(q), _aligned(k), _aligned(v), cu_seqlens.contiguous()
        # At 1, flash-attention 2 takes grouped q for [D, H, K], which fails where a document is empty.
        max_seqlen = max(max_seqlen, 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):  # the dtype is chosen: autocast would undo a back end's own
        return BACKENDS[name].run(q, k, v, cu_seqlens, max_seqlen, scale, sinks, spec)


def _asked_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """For tracers, whose graph holds the answer: what is installed and cached is not for them to look at.

    `torch.compiler.assume_constant_result`, which does this and imports the compiler (1.2 s).
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@_asked_once
def _chosen(backend: str, *asked: Any) -> str:  # the fields, since torch 2.10 cannot hand over a dataclass
    return choose_backend(AttentionSpec(*asked), backend)


def choose_backend(spec: AttentionSpec, backend: str = "auto") -> str:
    """The name of the back end that takes a call: `backend` itself if it can, the first able one for "auto".

    Raises:
        ValueError: the name is unknown, or that back end cannot run the call; the reason is in the message.
    """
    able = [name for name in BACKENDS if why_not(name, spec) is None]
    if backend == "auto" and able:
        return able[0]
    if backend == "auto":
        reasons = "; ".join(f"{name}: {why_not(name, spec)}" for name in BACKENDS)
        raise ValueError(f"no back end can run this attention: {reasons}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown, expected 'auto' or one of {list(BACKENDS)}")
    if backend not in able:
        reason = why_not(backend, spec)
        raise ValueError(f"backend={backend!r} cannot run this attention: {reason}; able here: {able}")
    return backend


@cache
def why_not(name: str, spec: AttentionSpec) -> str | None:
    """Why back end `name` cannot run a call, or None if it can. The table of capabilities, read row by row."""
    backend = BACKENDS[name]
    if name == "sdpa":
        return (
            "SDPA has no dropout beside a softcap or sinks" if spec.dropout and (spec.softcap or spec.sinks) else None
        )
    if spec.device != "cuda":
        return f"it needs a CUDA device, the tensors are on {spec.device!r}"
    if name == "flash_attn_2" and spec.softcap is not None and spec.dropout:
        return "it has no dropout beside a softcap"
    if backend.package is not None and not _installed(backend.package):
        return f"the package {backend.package!r} is not installed"
    if backend.package is None and not _installed("torch.nn.attention.varlen"):
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if spec.dtype not in HALF_DTYPES:
        return f"it computes in bfloat16 or float16, not in {spec.dtype}"
    capability = torch.cuda.get_device_capability()
    if not backend.min_capability <= capability[0] <= backend.max_capability:
        return f"it does not run on compute capability {capability[0]}.{capability[1]}"
    if not spec.equal_head_dims:
        return "the head size of v is not that of q and k"
    if spec.head_dim > backend.max_head_dim or spec.head_dim % 8:
        return f"head size {spec.head_dim} is not a multiple of 8 up to {backend.max_head_dim}"
    # Cards with 99 KiB of shared memory; some releases refuse these head sizes there, and only in the backward.
    small = capability[0] == 12 or (capability[0] == 8 and capability[1] > 0)
    if small and (192 < spec.head_dim <= 224 or (spec.head_dim > 192 and spec.dropout > 0)):
        return f"its backward has no head size {spec.head_dim} with dropout {spec.dropout} on {capability}"
    asked = {
        "dropout": spec.dropout > 0,
        "softcap": spec.softcap is not None,
        "window": spec.window is not None,
        "sinks": spec.sinks,
    }
    if name == "torch_varlen" and spec.window is not None and not _varlen_attn_takes("window_size"):
        return f"torch {torch.__version__}'s varlen_attn has no window"
    if missing := [feature for feature, wanted in asked.items() if wanted and feature not in backend.features]:
        return f"it has no {' and no '.join(missing)}"
    return None


@cache
def _installed(module: str) -> bool:
    if module == "flash_attn.cute":  # flash-attn 2 ships that folder, too, without what it needs
        return _distribution_installed("flash-attn-4")
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent package is missing, or was built for another torch
        return False


def _distribution_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> None:
    """What can be told on the host. The values in `cu_seqlens` are read, and so checked, where SDPA needs them."""
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
        raise ValueError(f"q, k and v must be [T, heads, head_dim], got {shapes[0]}, {shapes[1]} and {shapes[2]}")
    if k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: the same T, the same heads in "
            "k and v, the same head size in q and k, and query heads a multiple of key heads"
        )
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be [D + 1] int32, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be [H] = [{q.shape[1]}], got {tuple(sinks.shape)}")
    tensors = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens} | ({} if sinks is None else {"sinks": sinks})
    for name, tensor in tensors.items():
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}: they must be on one device")
        if name != "cu_seqlens" and tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be one of {list(FLOAT_DTYPES)}, got {tensor.dtype}")
    if not isinstance(max_seqlen, int) or max_seqlen < 0:
        raise ValueError(f"max_seqlen must be an int on the host, 0 or more, got {max_seqlen!r}")
    documents = cu_seqlens.numel() - 1
    if max_seqlen * documents < q.shape[0]:
        raise ValueError(f"max_seqlen is {max_seqlen}, too small for {q.shape[0]} tokens in {documents} documents")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be 1 (a token sees itself) or more, got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be above 0 and finite, or None for none, got {softcap}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be from 0 up to, but not including, 1, got {dropout}")


def _compute_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        return torch.get_autocast_dtype(q.device.type)
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _aligned(x: Tensor) -> Tensor:
    """`x`, copied if flash kernels could not load its rows in pieces of 16 bytes, which not all of them check."""
    return x if x.stride(-1) == 1 and all(n % 8 == 0 for n in x.stride()[:-1]) else x.contiguous()


# --- back ends: (q, k, v, cu_seqlens, max_seqlen, scale, sinks, spec) -> out ------------------------------------------


def _flash_attn_2(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, sinks: Tensor | None, spec: AttentionSpec
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, dropout_p=spec.dropout,
        softmax_scale=scale, causal=spec.causal, window_size=_window_pair(spec), softcap=spec.softcap or 0.0,
    )  # fmt: skip


def _flash_attn_3(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, sinks: Tensor | None, spec: AttentionSpec
) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scale, causal=spec.causal, window_size=_window_pair(spec), softcap=spec.softcap or 0.0,
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out


def _flash_attn_4(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, sinks: Tensor | None, spec: AttentionSpec
) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, softmax_scale=scale,
        causal=spec.causal,
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, sinks: Tensor | None, spec: AttentionSpec
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if _varlen_attn_takes("window_size"):  # since torch 2.11, in which causal is the window (-1, 0)
        options["window_size"] = _window_pair(spec)
    else:
        options["is_causal"] = spec.causal
    if _varlen_attn_takes("scale"):
        options["scale"] = scale
    else:  # torch 2.10 always takes K ** -0.5
        q = q * (scale * q.shape[-1] ** 0.5)
    if _varlen_attn_takes("enable_gqa"):
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, cu, cu, longest, longest, **options)
    assert isinstance(out, Tensor)  # no auxiliary outputs were asked for
    return out


@_asked_once
def _varlen_attn_takes(parameter: str) -> bool:
    return parameter in _varlen_attn_parameters()


@cache
def _varlen_attn_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _window_pair(spec: AttentionSpec) -> tuple[int, int]:
    """(left, right) neighbours of a token, -1 for all. A window of W counts the token itself: W - 1 are on its left."""
    left = -1 if spec.window is None else spec.window - 1
    return left, 0 if spec.causal else left


@dataclass(frozen=True)
class Backend:
    """One row of the table: what runs it, which package it needs (None: PyTorch's own), and what it can do."""

    run: Callable[..., Tensor]
    package: str | None = None
    features: frozenset[str] = frozenset()
    min_capability: int = 8
    max_capability: int = 12
    max_head_dim: int = 256


BACKENDS: dict[str, Backend] = {
    "flash_attn_4": Backend(
        # It takes a window, a softcap and sinks; in the source of 4.0.0b36 its backward does, too, where earlier betas
        # were found to refuse or ignore them. Not claimed until a card has shown it.
        _flash_attn_4,
        "flash_attn.cute",
        frozenset(),
        9,
        11,
        max_head_dim=128,
    ),
    "flash_attn_3": Backend(_flash_attn_3, "flash_attn_interface", frozenset({"window", "softcap"}), 9, 9),
    "flash_attn_2": Backend(
        _flash_attn_2, "flash_attn.flash_attn_interface", frozenset({"window", "softcap", "dropout"})
    ),
    "torch_varlen": Backend(_torch_varlen, None, frozenset({"window"})),
    "sdpa": Backend(sdpa, None, frozenset({"window", "softcap", "sinks", "dropout"}), 0),
}
