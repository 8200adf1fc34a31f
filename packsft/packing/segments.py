"""Cuts examples into segments: which tokens of each example may be packed, and an account of the rest.

A segment is a run of tokens of one example, at most `max_length` long; in a pack it is one document. This file knows
lengths only. Which segments meet in a pack is decided in `plan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .account import Account
from .strategies import STRATEGIES, strategy_named

IntArray = NDArray[np.integer[Any]]

OVERLONG = ("truncate", "split", "drop", "error")


@dataclass(frozen=True, eq=False)
class Segments:
    """S segments, sorted by example and start. Segment `j` is the tokens `starts[j]:stops[j]` of example `examples[j]`.

    - `examples` `[S]`, `starts` `[S]`, `stops` `[S]` integers
    - `lengths` `[examples]` int64: the lengths of all examples before they were cut
    - `max_length`, `strategy`, `overlong`: as in `cut_examples`; `overlong` is never None
    - `packs` `[S]`: the pack of each segment under "wrapped", which cuts where its packs end; otherwise None
    - `unscored`: the example of each segment that `keep_scored` removed
    - `dropped`: overlong examples that were left out
    """

    examples: IntArray
    starts: IntArray
    stops: IntArray
    lengths: NDArray[np.int64]
    max_length: int
    strategy: str
    overlong: str
    packs: IntArray | None = None
    unscored: IntArray = field(default_factory=lambda: np.zeros(0, np.uint8))
    dropped: IntArray = field(default_factory=lambda: np.zeros(0, np.uint8))

    def __len__(self) -> int:
        """The number of segments."""
        return len(self.examples)

    def keep_scored(self, scored: NDArray[Any]) -> Segments:
        """Keeps the segments whose `scored` `[S]` (a count or a flag) is not 0. Under "wrapped" packs get shorter."""
        keep = scored != 0
        if keep.all():
            return self
        return replace(
            self,
            examples=self.examples[keep],
            starts=self.starts[keep],
            stops=self.stops[keep],
            packs=None if self.packs is None else self.packs[keep],
            unscored=np.concatenate((self.unscored, self.examples[~keep])),
        )

    @cached_property
    def account(self) -> Account:
        """Where every example and token went."""
        packed = np.zeros(len(self.lengths), bool)
        packed[self.examples] = True
        overlong = self.lengths > self.max_length
        empty = len(packed) - int(np.count_nonzero(self.lengths))
        dropped = np.zeros_like(overlong)
        dropped[self.dropped] = True
        truncated = overlong & packed if self.overlong == "truncate" else np.zeros_like(overlong)
        again = self.examples[1:] == self.examples[:-1]
        tokens_in, tokens_dropped = int(self.lengths.sum()), int(self.lengths[dropped].sum())
        tokens_kept = int(self.stops.sum(dtype=np.int64) - self.starts.sum(dtype=np.int64))
        tokens_truncated = int(self.lengths[truncated].sum()) - self.max_length * int(truncated.sum())
        return Account(
            examples_in=len(packed),
            examples_packed=int(packed.sum()),
            examples_empty=empty,
            examples_unscored=len(packed) - int(packed.sum()) - empty - int(dropped.sum()),
            examples_overlong_dropped=int(dropped.sum()),
            examples_truncated=int(truncated.sum()),
            examples_split=int(again[:1].sum()) + int((again[1:] & ~again[:-1]).sum()),
            segments_unscored=int(packed[self.unscored].sum()),
            tokens_in=tokens_in,
            tokens_truncated=tokens_truncated,
            tokens_unscored=tokens_in - tokens_kept - tokens_truncated - tokens_dropped,
            tokens_dropped=tokens_dropped,
        )


def resolve_overlong(strategy: str, overlong: str | None) -> str:
    """What happens to an overlong example; None means the strategy's own way. An unknown strategy does not split.

    Raises ValueError for an unknown `overlong`, or one that contradicts a strategy which splits.
    """
    if overlong is not None and overlong not in OVERLONG:
        raise ValueError(f"overlong={overlong!r} is unknown, expected None or one of {list(OVERLONG)}")
    splits = strategy in STRATEGIES and STRATEGIES[strategy].splits
    if splits and overlong not in (None, "split"):
        raise ValueError(
            f"overlong={overlong!r} contradicts the strategy {strategy!r}, which splits longer examples: "
            "leave overlong unset, or choose the strategy 'bfd'"
        )
    return overlong or ("split" if splits else "truncate")


def cut_examples(
    lengths: Sequence[int] | IntArray,
    max_length: int,
    *,
    strategy: str = "bfd",
    overlong: str | None = None,
    keep_end: bool = False,
    uncut: IntArray | None = None,
) -> Segments:
    """Cut examples of the given lengths (`[examples]` integers, in tokens) into segments of at most `max_length`.

    `overlong` says what happens to an example longer than `max_length`:
    - `"truncate"`: keep its first `max_length` tokens, or its last ones with `keep_end`
    - `"split"`: cut it every `max_length` tokens
    - `"drop"`: leave it out
    - `"error"`: raise
    - None: the strategies "bfd_split" and "wrapped" split, the others truncate

    Where "truncate" would cut within the first `uncut[example]` tokens, the example is left out.

    "wrapped" lays all examples end to end and cuts every `max_length` tokens. Examples of length 0 give no segment.

    Raises ValueError that names the row or the argument: a length that is negative or not an integer; lengths that are
    not 1-D; a `max_length` that is None or below 1; an unknown strategy; an unknown `overlong`, or one that contradicts
    the strategy; an overlong example with `overlong="error"`.
    """
    max_length = _checked_max_length(max_length)
    end_to_end = strategy_named(strategy).end_to_end
    overlong = resolve_overlong(strategy, overlong)
    lengths = _checked_lengths(lengths)

    too_long = lengths > max_length
    dropped = too_long & (overlong == "drop")
    if uncut is not None:
        dropped |= too_long & (uncut > max_length)
    used = (lengths > 0) & ~dropped
    if overlong == "error" and len(rows := np.flatnonzero(lengths > max_length)):
        raise ValueError(
            f"row {rows[0]} has {lengths[rows[0]]} tokens, more than max_length={max_length}, as have {len(rows)} of "
            f"{len(lengths)} rows: raise max_length, or choose an overlong other than 'error'"
        )
    examples = smallest(np.flatnonzero(used))
    kept = lengths if len(examples) == len(lengths) else lengths[examples]
    packs = None
    if overlong == "split":
        phases = (np.cumsum(kept) - kept) % max_length if end_to_end else np.zeros_like(kept)
        examples, starts, stops = _cut(examples, kept, phases, max_length)
        if end_to_end:
            packs = smallest((np.cumsum(stops - starts) - 1) // max_length)
    else:
        starts = smallest(np.maximum(kept - max_length, 0)) if keep_end else np.zeros(len(kept), np.uint8)
        stops = smallest(kept if keep_end else np.minimum(kept, max_length))
    left_out = smallest(np.flatnonzero(dropped))
    return Segments(examples, starts, stops, lengths, max_length, strategy, overlong, packs, dropped=left_out)


def _cut(
    examples: IntArray, lengths: IntArray, phases: IntArray, max_length: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Cut examples at every multiple of `max_length`, where example `e` starts `phases[e]` after such a multiple."""
    num_segments = (phases + lengths - 1) // max_length + 1
    cuts = ranges(np.zeros_like(num_segments), num_segments) * max_length - np.repeat(phases, num_segments)
    stops = np.minimum(cuts + max_length, np.repeat(lengths, num_segments))
    return np.repeat(examples, num_segments), np.maximum(cuts, 0), stops


def ranges(starts: IntArray, counts: IntArray) -> NDArray[np.int64]:
    """`concatenate([arange(s, s + c) for s, c in zip(starts, counts)])`."""
    return np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


def smallest(array: IntArray) -> IntArray:
    """The same values (0 or more) in the smallest unsigned dtype."""
    return array.astype(np.min_scalar_type(int(array.max()) if len(array) else 0))


def _checked_max_length(max_length: int) -> int:
    if isinstance(max_length, bool) or not isinstance(max_length, (int, np.integer)) or not 1 <= max_length < 2**63:
        raise ValueError(f"max_length={max_length!r}: packing needs an integer of at least 1 token, below 2**63")
    return int(max_length)


def _checked_lengths(lengths: Sequence[int] | IntArray) -> NDArray[np.int64]:
    """As int64 `[examples]`, or a ValueError that names the first row at fault."""
    try:
        array = np.asarray(lengths)
    except ValueError:  # rows of unequal lengths: the loop below names the first that is no integer
        array = np.empty(len(lengths), object)
    if array.ndim != 1:
        raise ValueError(f"lengths must be 1-D, one integer per row, but have shape {array.shape}")
    if not len(array):
        return np.zeros(0, np.int64)
    if array.dtype.kind in "iu":
        as_int64 = array.astype(np.int64, copy=False)
        if as_int64.min() >= 0:  # uint64 past int64 has wrapped around to below 0
            return as_int64
    for row, length in enumerate(lengths):
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or not 0 <= length < 2**63:
            given = length.item() if isinstance(length, np.generic) else length
            raise ValueError(f"lengths[{row}] is {given!r}: a length must be an integer of at least 0, below 2**63")
    return np.asarray(list(lengths), np.int64)
