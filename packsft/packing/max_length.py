"""Compares several `max_length` for a data set: what each cuts off, and how many packs it makes.

Knows lengths only, not the memory cost of a longer row, and not the limits of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .plan import pack_segments
from .segments import IntArray, cut_examples

CANDIDATES = (1024, 2048, 4096, 8192, 16_384, 32_768)
CUT_AT_MOST = 0.005  # of the tokens

CountScored = Callable[[IntArray, IntArray, IntArray], IntArray]


@dataclass(frozen=True)
class MaxLength:
    """The effect of one `max_length`: examples truncated there, and the `"bfd"` packs that they make."""

    max_length: int
    examples_truncated: int
    tokens_lost: int
    share_lost: float  # of all tokens
    share_cut: float  # of all tokens, what a longer `max_length` would keep
    packs: int
    fill: float


def compare_max_lengths(
    lengths: IntArray, candidates: Iterable[int] = CANDIDATES, count_scored: CountScored | None = None
) -> list[MaxLength]:
    """A `MaxLength` for each of the candidates, the smallest first.

    Args:
        lengths: `[examples]` in tokens.
        count_scored: (examples, starts, stops) to the scored tokens of each segment; what has none is lost, as in
            training. None: every token counts as scored.
    """
    count = count_scored or _all_scored
    whole = count(np.arange(len(lengths)), np.zeros_like(lengths), lengths)
    total, never_scored = max(1, int(lengths.sum())), int(lengths[whole == 0].sum())
    compared = []
    for max_length in sorted(set(candidates)):
        segments = cut_examples(lengths, max_length, strategy="bfd")
        scored = whole[segments.examples]
        shorter = np.flatnonzero(segments.stops < lengths[segments.examples])  # the others are whole
        scored[shorter] = count(*(array[shorter] for array in (segments.examples, segments.starts, segments.stops)))
        segments = segments.keep_scored(scored)
        plan, _ = pack_segments(segments)
        lost = plan.account.tokens_lost
        cut = (lost - never_scored) / total
        compared.append(
            MaxLength(max_length, plan.account.examples_truncated, lost, lost / total, cut, len(plan), plan.fill)
        )
    return compared


def _all_scored(examples: IntArray, starts: IntArray, stops: IntArray) -> IntArray:
    return stops - starts


def recommended_max_length(compared: Sequence[MaxLength], cut_at_most: float = CUT_AT_MOST) -> int | None:
    """The smallest `max_length` that cuts at most this share of the tokens, or None if all cut more."""
    return min((each.max_length for each in compared if each.share_cut <= cut_at_most), default=None)
