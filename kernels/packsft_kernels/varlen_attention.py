"""Attention over documents that lie end to end in one row: `varlen_attention` and its backends.

A document attends causally to itself and to nothing else. `cu_seqlens` gives the boundaries. No path builds a mask over
the row (SDPA needs a mask over one document for a window, a softcap or sinks). `backend="auto"` tries the backends in
this order:

    flash_attn_4, flash_attn_3, flash_attn_2   the packages, if installed and able
    torch_varlen                               PyTorch's own FlashAttention, on Ampere and newer
    sdpa                                       SDPA, document by document: the CPU, float32, and all other calls

`why_not` looks up in a table whether a backend can run a call, and gives the reason. This file knows tensors only.

Shapes: T tokens, D documents, H query heads, G key heads, K head size.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packsft_kernels.attention_spec import HALF_DTYPES, AttentionSpec
from packsft_kernels.varlen_sdpa import sdpa
from packsft_kernels.varlen_torch import torch_varlen

FLOAT_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)
OPERATORS = (torch.ops.aten._flash_attention_forward.default, torch.ops.packsft.varlen_sdpa.default)
"""The operators of `torch_varlen` and of `sdpa` where it is traced, for checkpoints that save what attention gives."""


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

    Per document and head, in PyTorch (`reference.varlen_attention` computes this in any dtype):

        scores = softcap * tanh(q @ k.T * scale / softcap)          # the softcap if given
        out = softmax(scores + mask, dim=-1) @ v                    # causal and within the window

    Args:
        q: `[T, H, K]`.
        k: `[T, G, K]`, H a multiple of G (grouped-query attention).
        v: `[T, G, K]`, or `[T, G, V]` with another head size V, as in DeepSeek.
        cu_seqlens: `[D + 1]` int32, document boundaries from 0 to T, on the device of `q`.
        max_seqlen: length of the longest document, an int on the host.
        causal: whether a token sees only itself and the tokens before it.
        scale: factor of the scores; default `K ** -0.5`.
        window: number of tokens that a token sees, itself included (`sliding_window` of transformers); None: all.
        softcap: bound on the scores, as in Gemma 2.
        sinks: `[H]`, one logit per head that takes part in the softmax and has no value, as in gpt-oss.
        dropout: probability of dropping an attention weight.
        backend: "auto", or one of `BACKENDS`.

    Returns:
        `[T, H, V]` in the dtype of the computation: the autocast dtype under autocast, otherwise the promoted dtype of
        `q`, `k` and `v`. (Under autocast, models pass float32 q and k and a bfloat16 v, which flash kernels refuse.)

    Raises:
        ValueError: an invalid argument, or a backend that cannot run this call. Boundaries that decrease, do not end at
            T, or exceed `max_seqlen` are detected only where the host reads them; nothing reads back from a GPU.
    """
    _check_arguments(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, sinks, dropout)
    dtype = _compute_dtype(q, k, v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    asked = (
        q.device.type, dtype, max(q.shape[-1], v.shape[-1]), q.shape[-1] == v.shape[-1],
        causal, window, softcap, sinks is not None, dropout,
    )  # fmt: skip
    name, spec = _chosen(backend, *asked), AttentionSpec(*asked)
    scale, v_head_dim = q.shape[-1] ** -0.5 if scale is None else scale, v.shape[-1]
    if name != "sdpa":
        q, k, v = (_as_flash_reads_it(x, spec.head_dim) for x in (q, k, v))
        cu_seqlens = cu_seqlens.contiguous()
        # At 1, flash-attention 2 reads grouped q as [D, H, K], which fails if a document is empty.
        max_seqlen = max(max_seqlen, 2)
    with torch.autocast(q.device.type, enabled=False):  # the dtype is chosen: autocast would undo a cast of the backend
        out = BACKENDS[name].run(q, k, v, cu_seqlens, max_seqlen, scale, sinks, spec)
    return out if out.shape[-1] == v_head_dim else out[..., :v_head_dim]


def _asked_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a tracer store the answer as a constant, instead of tracing into caches and into what is installed.

    The same as `torch.compiler.assume_constant_result`, which also imports the compiler (1.2 s).
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@_asked_once
def _chosen(backend: str, *asked: Any) -> str:  # the fields: torch 2.10 cannot pass a dataclass
    return choose_backend(AttentionSpec(*asked), backend)


def choose_backend(spec: AttentionSpec, backend: str = "auto") -> str:
    """The name of the backend that runs a call: `backend` itself, or for "auto" the first one that can run it.

    Raises:
        ValueError: the name is unknown, or the backend cannot run the call; the message gives the reason.
    """
    able = [name for name in BACKENDS if why_not(name, spec) is None]
    if backend == "auto" and able:
        return able[0]
    if backend == "auto":
        reasons = "; ".join(f"{name}: {why_not(name, spec)}" for name in BACKENDS)
        raise ValueError(f"no backend can run this attention: {reasons}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown, expected 'auto' or one of {list(BACKENDS)}")
    if backend not in able:
        reason = why_not(backend, spec)
        raise ValueError(f"backend={backend!r} cannot run this attention: {reason}; these can: {able}")
    return backend


@cache
def why_not(name: str, spec: AttentionSpec) -> str | None:
    """Why backend `name` cannot run a call, or None if it can. Reads its row of the table `BACKENDS`."""
    backend = BACKENDS[name]
    if name == "sdpa":
        return "SDPA has no dropout with a softcap or sinks" if spec.dropout and (spec.softcap or spec.sinks) else None
    if spec.device != "cuda":
        return f"it needs a CUDA device, but the tensors are on {spec.device!r}"
    if spec.dtype not in HALF_DTYPES:
        return f"it needs bfloat16 or float16, got {spec.dtype}"
    if name == "flash_attn_2" and spec.softcap is not None and spec.dropout:
        return "it does not support dropout with a softcap"
    if backend.package is not None and not _installed(backend.package):
        return f"the package {backend.package!r} is not installed"
    if backend.package is None and not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without FlashAttention"
    capability = torch.cuda.get_device_capability()
    if not backend.min_capability <= capability[0] <= backend.max_capability:
        return f"it does not run on compute capability {capability[0]}.{capability[1]}"
    if spec.head_dim > backend.max_head_dim:
        return f"head size {spec.head_dim} is above {backend.max_head_dim}"
    # GPUs with 99 KiB of shared memory: some releases refuse these head sizes there, and only in the backward.
    small = capability[0] == 12 or (capability[0] == 8 and capability[1] > 0)
    if small and (192 < spec.head_dim <= 224 or (spec.head_dim > 192 and spec.dropout > 0)):
        return f"its backward does not support head size {spec.head_dim} with dropout {spec.dropout} on {capability}"
    asked = {
        "dropout": spec.dropout > 0,
        "softcap": spec.softcap is not None,
        "window": spec.window is not None,
        "sinks": spec.sinks,
    }
    if missing := [feature for feature, wanted in asked.items() if wanted and feature not in backend.features]:
        return f"it does not support {' and '.join(missing)}"
    return None


@cache
def _installed(module: str) -> bool:
    if module == "flash_attn.cute":  # flash-attn 2 ships this folder too, without its dependencies
        return _distribution_installed("flash-attn-4")
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent package is missing, or is built for another torch
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
    """Checks that need no values. The values in `cu_seqlens` are checked where SDPA reads them."""
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
        raise ValueError(f"q, k and v must be [T, heads, head size], got {shapes[0]}, {shapes[1]} and {shapes[2]}")
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
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}: they must be on the same device")
        if name != "cu_seqlens" and tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be one of {list(FLOAT_DTYPES)}, got {tensor.dtype}")
    if not isinstance(max_seqlen, int) or max_seqlen < 0:
        raise ValueError(f"max_seqlen must be an int on the host, 0 or more, got {max_seqlen!r}")
    documents = cu_seqlens.numel() - 1
    if max_seqlen * documents < q.shape[0]:
        raise ValueError(f"max_seqlen is {max_seqlen}, too small for {q.shape[0]} tokens in {documents} documents")
    if scale is not None and not 0 < scale < math.inf:  # PyTorch's attention on the CPU gives NaN
        raise ValueError(f"scale must be finite and above 0, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be 1 or more (1: a token sees only itself), got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or finite and above 0, got {softcap}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")


def _compute_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        return torch.get_autocast_dtype(q.device.type)
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _as_flash_reads_it(x: Tensor, head_dim: int) -> Tensor:
    """`x` in the one head size that flash kernels know for q, k and v, and with rows that they can load in units of 16
    bytes. Not all of them check this. Zeros fill up the head size: they change no score, and add zeros to the output.
    """
    if missing := math.ceil(head_dim / 8) * 8 - x.shape[-1]:
        return F.pad(x, (0, missing))
    return x if x.stride(-1) == 1 and all(n % 8 == 0 for n in x.stride()[:-1]) else x.contiguous()


# ---- backends: (q, k, v, cu_seqlens, max_seqlen, scale, sinks, spec) -> out ------------------------------------------


def _flash_attn_2(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, sinks: Tensor | None, spec: AttentionSpec
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, dropout_p=spec.dropout,
        softmax_scale=scale, causal=spec.causal, window_size=spec.window_pair, softcap=spec.softcap or 0.0,
    )  # fmt: skip


def _flash_attn_3(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, sinks: Tensor | None, spec: AttentionSpec
) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scale, causal=spec.causal, window_size=spec.window_pair, softcap=spec.softcap or 0.0,
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


@dataclass(frozen=True)
class Backend:
    """One row of the table: the function, the package that it needs (None: PyTorch itself), and what it supports."""

    run: Callable[..., Tensor]
    package: str | None = None
    features: frozenset[str] = frozenset()
    min_capability: int = 8
    max_capability: int = 12
    max_head_dim: int = 256


BACKENDS: dict[str, Backend] = {
    "flash_attn_4": Backend(
        # It accepts a window, a softcap and sinks. In the source of 4.0.0b36 its backward does so too; earlier betas
        # refused or ignored them. Not claimed until it has run on a GPU.
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
    "torch_varlen": Backend(torch_varlen, None, frozenset({"window", "sinks", "dropout"})),
    "sdpa": Backend(sdpa, None, frozenset({"window", "softcap", "sinks", "dropout"}), 0),
}
