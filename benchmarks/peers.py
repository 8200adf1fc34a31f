"""Every competitor under one signature, so that a benchmark is a loop over names.

- Heads: `(hidden_TM, weight_VM, labels_T) -> loss`, the mean over the scored tokens, differentiable in both tensors.
  `labels_T[t]` is what position t predicts, -100 where nothing is scored.
- Attention: `(documents) -> outputs`.

A competitor that cannot run is listed with the reason. Knows the peers' own interfaces; knows no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Head = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS = "packsft"


@dataclass(frozen=True)
class Peer:
    """A competitor: how to run it, or why it cannot be run here."""

    name: str
    run: Callable[..., Any] | None
    missing: str = ""


def heads(rows_N: Tensor, softcap: float | None = None) -> list[Peer]:
    """Every way to get the loss of a language-model head. `rows_N` are the scored positions, known beforehand.

    (packsft's collator knows them on the host; the others that score only those are given them, for a fair comparison.)
    """
    peers = [
        Peer(OURS, lambda hidden, weight, labels: _ours(hidden, weight, labels, rows_N, softcap)),
        Peer("full logits", lambda hidden, weight, labels: _full_logits(hidden, weight, labels, softcap)),
        Peer(
            "full logits, scored rows only",
            lambda hidden, weight, labels: _full_logits(hidden[rows_N], weight, labels[rows_N], softcap),
        ),
    ]
    names = ("F.linear_cross_entropy", "F.linear_cross_entropy, chunked")
    if not hasattr(F, "linear_cross_entropy"):
        peers += [Peer(name, None, f"not in torch {torch.__version__}") for name in names]
    elif softcap is not None:
        peers += [Peer(name, None, "it has no softcap") for name in names]
    else:
        options = torch.nn.LinearCrossEntropyOptions()
        peers += [
            Peer(names[0], F.linear_cross_entropy),
            Peer(
                names[1],
                lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels, options=options),
            ),
        ]
    return [*peers, _trl_head(rows_N, softcap)]


def _ours(
    hidden_TM: Tensor, weight_VM: Tensor, labels_T: Tensor, rows_N: Tensor, softcap: float | None = None
) -> Tensor:
    from packsft_kernels import LossOptions, linear_cross_entropy

    options = LossOptions(softcap=softcap, entropy=True, correct=True)
    return linear_cross_entropy(hidden_TM, weight_VM, labels_T[rows_N], rows=rows_N, options=options).loss


def _full_logits(hidden_TM: Tensor, weight_VM: Tensor, labels_T: Tensor, softcap: float | None = None) -> Tensor:
    """As transformers computes the loss: the logits in float32 (or wider)."""
    logits_TV = hidden_TM @ weight_VM.t()
    if softcap is not None:
        logits_TV = torch.tanh(logits_TV / softcap) * softcap
    return F.cross_entropy(logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)), labels_T)


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
