"""Compares several `max_length` for a data set: what each cuts off, and how many packs it makes.

Knows lengths only, not the memory cost of a longer row, and not the limits of the model.
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
    """The effect of one `max_length`: examples truncated there, and the `"bfd"` packs that they make."""

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
    """The smallest `max_length` that loses at most this share of the tokens, or None if all lose more."""
    return min((each.max_length for each in compared if each.share_lost <= lost_at_most), default=None)
