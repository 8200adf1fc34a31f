"""Which `max_length` a data set asks for: what each of several would cut off, and how many packs it would make.

Knows lengths alone. What a longer one costs in memory is the trainer's, and whether the model can take it the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .plan import IntArray, plan_packs

CANDIDATES = (1024, 2048, 4096, 8192, 16_384, 32_768)
LOST_AT_MOST = 0.005  # of the tokens


@dataclass(frozen=True)
class MaxLength:
    """What a `max_length` would do to the examples if each were cut there, and the packs (`"bfd"`) that they make."""

    max_length: int
    examples_truncated: int
    tokens_lost: int
    share_lost: float  # of all tokens
    packs: int
    fill: float


def compare_max_lengths(lengths: IntArray, candidates: Iterable[int] = CANDIDATES) -> list[MaxLength]:
    """A `MaxLength` for each of the candidates, the smallest first; `lengths` `[examples]` in tokens."""
    total = int(lengths.sum())
    compared = []
    for max_length in sorted(set(candidates)):
        over = np.maximum(lengths - max_length, 0)
        plan = plan_packs(np.minimum(lengths, max_length), max_length)
        lost = int(over.sum())
        share = lost / total if total else 0.0
        compared.append(MaxLength(max_length, int((over > 0).sum()), lost, share, len(plan), plan.fill))
    return compared


def recommended_max_length(compared: Sequence[MaxLength], lost_at_most: float = LOST_AT_MOST) -> int | None:
    """The smallest that loses at most that share of the tokens, or None if all lose more."""
    return min((each.max_length for each in compared if each.share_lost <= lost_at_most), default=None)
