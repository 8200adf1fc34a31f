"""Wraps every competitor of the kernels in one signature, so that a benchmark is a loop over names.

- Heads: `(hidden_TM, weight_VM, labels_T) -> loss`, the mean over the scored tokens, differentiable in both tensors.
  `labels_T[t]` is what position t predicts, -100 where nothing is scored.
- Losses: `(logits_NV, targets_N) -> loss`, the mean over the rows.
- Attention: `(q_THK, k_TGK, v_TGK) -> out_THK` for the documents of one pack, causal.

A competitor that cannot run is listed with the reason. Knows the peers' own interfaces; knows no clock.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from harness.measure import device
from torch import Tensor

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS = "packsft"
PLAIN_HEAD = "full logits, scored rows only"
PLAIN_LOSS = "F.cross_entropy"
PLAIN_ATTENTION = "SDPA, one document at a time"
LEFT_OUT = "not run with --quick or --minutes: compiles"
BLOCK_MASK = "SDPA, [T, T] block mask"


@dataclass(frozen=True)
class Peer:
    """A competitor: how to run it, or why it cannot be run here. `compiles`: for many seconds, at its first run."""

    name: str
    run: Callable[..., Any] | None
    missing: str = ""
    compiles: bool = False


def ours(peers: Sequence[Peer]) -> Callable[..., Any]:
    """What runs packsft, of a list that has it."""
    return next(peer.run for peer in peers if peer.name == OURS and peer.run is not None)


def heads(rows_N: Tensor, softcap: float | None = None) -> list[Peer]:
    """Every way to get the loss of a language-model head. `rows_N` are the scored positions, known beforehand.

    (packsft's collator knows them on the host; the others that score only those are given them, for a fair comparison.)
    """

    def full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return _full_logits(hidden, weight, labels, softcap)

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from packsft_kernels import LossOptions, linear_cross_entropy

        options = LossOptions(softcap=softcap, entropy=True, correct=True)
        return linear_cross_entropy(hidden, weight, labels[rows_N], rows=rows_N, options=options).loss

    def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return full(hidden[rows_N], weight, labels[rows_N])

    compiled = torch.compile(plain, dynamic=False)
    return [
        Peer(OURS, ours),
        Peer("full logits", full),
        Peer(PLAIN_HEAD, plain),
        Peer(f"{PLAIN_HEAD}, torch.compile", compiled, compiles=True),
        *_torch_heads(softcap),
        _trl_head(rows_N, softcap),
        # its default adds up dW in the weight's dtype, chunk by chunk
        _liger(
            "Liger fused linear cross-entropy, accum_dtype=float32",
            "liger_fused_linear_cross_entropy",
            softcap=softcap,
            accum_dtype=torch.float32,
        ),
        *_cut_cross_entropy(softcap),
    ]


def losses() -> list[Peer]:
    """Every way to get the loss and the gradient of logits that exist."""
    from packsft_kernels import LossOptions, cross_entropy

    def ours(inplace: bool, metrics: bool) -> Loss:
        options = LossOptions(entropy=metrics, correct=metrics)
        return lambda logits, targets: cross_entropy(logits, targets=targets, inplace=inplace, options=options).loss

    return [
        Peer(OURS, ours(inplace=True, metrics=False)),
        Peer(f"{OURS}, entropy and accuracy", ours(inplace=True, metrics=True)),
        Peer(f"{OURS}, inplace=False", ours(inplace=False, metrics=False)),
        Peer(PLAIN_LOSS, F.cross_entropy),
        Peer(f"{PLAIN_LOSS}, torch.compile", torch.compile(F.cross_entropy, dynamic=False), compiles=True),
        _liger("Liger cross-entropy", "liger_cross_entropy"),
    ]


def attentions(bounds: Tensor, dtype: torch.dtype, head_dim: int) -> list[Peer]:
    """Every way to attend within documents, whose `bounds` are `[D + 1]` int32. A mask is built in the first call for
    all of them, as it is for all layers of a forward."""
    from packsft_kernels.attention_spec import AttentionSpec
    from packsft_kernels.varlen_attention import BACKENDS, choose_backend, varlen_attention, why_not

    edges, longest = bounds.tolist(), int(bounds.diff().max())
    spec = AttentionSpec(bounds.device.type, dtype, head_dim)

    def backend(name: str) -> Attention:
        return lambda q, k, v: varlen_attention(q, k, v, bounds, longest, backend=name)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([sdpa(q[a:b], k[a:b], v[a:b], is_causal=True) for a, b in pairwise(edges)])

    lengths = bounds.diff().tolist()

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)]
        output = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)
        return torch.cat([row[:length] for row, length in zip(output, lengths, strict=True)])

    taken = choose_backend(spec)
    others = [name for name in BACKENDS if name != taken]
    return [
        Peer(OURS, backend("auto")),
        *(Peer(name, None if why_not(name, spec) else backend(name), why_not(name, spec) or "") for name in others),
        Peer(PLAIN_ATTENTION, alone),
        Peer(BLOCK_MASK, _block_mask(bounds)),
        _flex_attention(bounds),
        Peer("SDPA, padded rows, with padding and unpadding", padded),
    ]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """`F.scaled_dot_product_attention` of one sequence, `[T, heads, K]` in and out."""
    if q.is_cuda and q.dtype.itemsize > 2:  # there grouped heads get the kernel that forms all products, no other
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **arguments)[0].transpose(0, 1)


def _full_logits(hidden_TM: Tensor, weight_VM: Tensor, labels_T: Tensor, softcap: float | None) -> Tensor:
    """As transformers computes the loss: the logits in float32 (or wider)."""
    logits_TV = hidden_TM @ weight_VM.t()
    if softcap is not None:
        logits_TV = torch.tanh(logits_TV / softcap) * softcap
    return F.cross_entropy(logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)), labels_T)


def _torch_heads(softcap: float | None) -> list[Peer]:
    whole, chunked = "F.linear_cross_entropy", "F.linear_cross_entropy, chunked"
    if not hasattr(F, "linear_cross_entropy"):
        return [Peer(name, None, f"not in torch {torch.__version__}") for name in (whole, chunked)]
    if softcap is not None:
        return [Peer(name, None, "it has no softcap") for name in (whole, chunked)]
    options = torch.nn.LinearCrossEntropyOptions()
    return [
        Peer(whole, F.linear_cross_entropy),
        Peer(
            chunked, lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels, options=options)
        ),
    ]  # fmt: skip


def _trl_head(rows_N: Tensor, softcap: float | None) -> Peer:
    name = "TRL ChunkedLogProbFunction"
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError as error:
        return Peer(name, None, str(error))

    def run(hidden_TM: Tensor, weight_VM: Tensor, labels_T: Tensor) -> Tensor:
        # As `trl.trainer.utils.add_fused_lm_head` calls it: off the GPU every position is scored, then masked.
        compact = _use_triton(hidden_TM.device)
        log_probs = ChunkedLogProbFunction.apply(
            hidden_TM[rows_N] if compact else hidden_TM,
            weight_VM,
            None,
            labels_T[rows_N] if compact else labels_T.clamp(min=0),
            1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            softcap,
            1.0,
            ("entropy", "is_top1"),
        )[0]
        return -(log_probs if compact else log_probs.masked_fill(labels_T == -100, 0)).sum() / len(rows_N)

    return Peer(name, run)


def _liger(name: str, function: str, **options: Any) -> Peer:
    if missing := _missing("liger-kernel"):
        return Peer(name, None, missing)
    from liger_kernel.transformers import functional

    run = getattr(functional, function)
    return Peer(f"{name} {_version('liger-kernel')}", lambda *inputs: run(*inputs, **options))


def _cut_cross_entropy(softcap: float | None) -> list[Peer]:
    """Its kernel on a GPU, as it is and without leaving out small gradients; elsewhere what it has for elsewhere."""
    name = "cut-cross-entropy"
    if (version := _version(name)) is None:
        return [Peer(name, None, "not installed")]

    def peer(what: str, **options: Any) -> Peer:
        def run(hidden_TM: Tensor, weight_VM: Tensor, labels_T: Tensor) -> Tensor:
            from cut_cross_entropy import linear_cross_entropy

            return linear_cross_entropy(hidden_TM, weight_VM, labels_T, softcap=softcap, **options)

        return Peer(f"{name} {version}, {what}", run, compiles=options["impl"] == "torch_compile")

    if device().type != "cuda":
        return [peer("torch_compile", impl="torch_compile")]
    return [peer("cce", impl="cce"), peer("cce, filter_eps=None", impl="cce", filter_eps=None)]


def _block_mask(bounds: Tensor) -> Attention:
    """One call over the whole pack under a `[T, T]` mask, with repeated keys and values, as transformers calls SDPA."""

    @cache
    def mask() -> Tensor:
        position = torch.arange(int(bounds[-1]), device=bounds.device)
        document = torch.bucketize(position, bounds, right=True)
        return (document[:, None] == document) & (position[:, None] >= position)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cuda":  # elsewhere SDPA takes grouped heads beside a mask as fast
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return sdpa(q, k, v, attn_mask=mask())

    return run


def _flex_attention(bounds: Tensor) -> Peer:
    name = "FlexAttention, document mask"
    if bounds.device.type != "cuda":
        return Peer(name, None, "has no backward on the CPU")
    from torch.nn.attention.flex_attention import create_block_mask

    length = int(bounds[-1])
    document = torch.bucketize(torch.arange(length, device=bounds.device), bounds, right=True)

    def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (query >= key)

    @cache
    def mask() -> Any:
        return create_block_mask(same_document, None, None, length, length, device=bounds.device.type)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        return _compiled_flex_attention()(q, k, v, block_mask=mask(), enable_gqa=True)[0].transpose(0, 1)

    return Peer(name, run, compiles=True)


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _missing(package: str) -> str:
    """Why a package of GPU kernels cannot run here; empty if it can."""
    if _version(package) is None:
        return "not installed"
    return "" if device().type == "cuda" else "its kernels need a GPU"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
