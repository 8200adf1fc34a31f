"""Exact-step packing: packs the examples of one optimizer step into passes, equally many and balanced on all ranks.

A step takes the same examples as in an unpacked run. They go into the fewest passes of at most `tokens_per_pass`
tokens. The size of a pass changes only speed and memory; the step, the schedule and the loss curve are those of the
unpacked run. This file knows lengths only and gives the same result in every process.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .plan import best_fit_decreasing, plan_packs

Passes = list[NDArray[np.int64]]


def plan_step(
    lengths: Sequence[int] | NDArray[np.integer[Any]], tokens_per_pass: int, num_ranks: int = 1, *, padded: bool = False
) -> list[Passes]:
    """For each rank a list of passes, for each pass its documents, as indices into `lengths`.

    Every document is in one pass. All ranks have the same number of passes, no more than best fit needs; a pass may be
    empty. Ranks and passes get equal shares of the tokens and of the attention cost (sum of squared lengths), as
    far as there is room. A document longer than `tokens_per_pass` gets a pass of its own: nothing is cut here.

    Args:
        lengths: tokens of each document of the step, `[D]` integers of at least 1.
        tokens_per_pass: the most tokens in a pass; with `padded`, its documents times the longest of them.
        num_ranks: how many ranks share the step.
        padded: passes are rows padded to the longest document, so documents of similar length go together.

    Raises:
        ValueError: `tokens_per_pass` or `num_ranks` is below 1, or a length is not an integer of at least 0.
    """
    for name, value in (("tokens_per_pass", tokens_per_pass), ("num_ranks", num_ranks)):
        if value < 1:
            raise ValueError(f"{name}={value!r}: must be at least 1")
    tokens = np.asarray(lengths, np.int64)
    if padded:
        order = np.argsort(-tokens, kind="stable")
        passes = _rows_of_similar_length(tokens, order, tokens_per_pass)
        num_passes = max(1, -(-len(passes) // num_ranks))
    else:
        sizes = np.minimum(tokens, tokens_per_pass)
        fewest = -(-int(sizes.sum()) // tokens_per_pass)  # where every pass is full
        num_passes = max(1, -(-fewest // num_ranks))
        passes = _balanced(tokens, sizes, tokens_per_pass, num_passes * num_ranks)
        if not passes:
            packs = plan_packs(sizes, tokens_per_pass)
            num_passes = max(1, -(-len(packs) // num_ranks))
            passes = _balanced(tokens, sizes, tokens_per_pass, num_passes * num_ranks)
            passes = passes or [packs[i] for i in range(len(packs))]
    passes += [np.zeros(0, np.int64)] * (num_passes * num_ranks - len(passes))
    return _dealt(passes, tokens, num_ranks)


def simulate_steps(
    lengths: NDArray[np.int64], effective_batch_size: int, tokens_per_pass: int, num_ranks: int, num_steps: int
) -> list[list[Passes]]:
    """`plan_step` for the first steps of an epoch in a random order, as indices into `lengths`."""
    order = np.random.default_rng(0).permutation(len(lengths))[: num_steps * effective_batch_size]
    steps = [order[first : first + effective_batch_size] for first in range(0, len(order), effective_batch_size)]
    return [
        [[step[documents] for documents in share] for share in plan_step(lengths[step], tokens_per_pass, num_ranks)]
        for step in steps
    ]


def _rows_of_similar_length(lengths: NDArray[np.int64], order: NDArray[np.int64], tokens_per_pass: int) -> Passes:
    """Runs of documents by decreasing length, each as long as documents * longest allows."""
    passes, at = [], 0
    while at < len(order):
        count = max(1, tokens_per_pass // max(1, int(lengths[order[at]])))
        passes.append(order[at : at + count])
        at += count
    return passes


def _balanced(lengths: NDArray[np.int64], sizes: NDArray[np.int64], tokens_per_pass: int, num_passes: int) -> Passes:
    """Exactly `num_passes` passes of equal cost, or none if there is not enough room.

    By decreasing length, documents are spread over the passes. If one finds no room, only the longest are spread, and
    the rest go by best fit: they are short and cost little attention.
    """
    order = np.argsort(-sizes, kind="stable")
    for num_spread in (len(order), len(order) * 3 // 4, len(order) // 2, len(order) // 4):
        spread, rest = order[:num_spread], order[num_spread:]
        if (to := _spread(lengths[spread], sizes[spread], tokens_per_pass, num_passes)) is None:
            continue
        held = np.bincount(to, minlength=num_passes)
        room = tokens_per_pass - np.bincount(to, sizes[spread], minlength=num_passes).astype(np.int64)
        distinct, counts = np.unique(sizes[rest], return_counts=True)
        offsets, places = best_fit_decreasing(distinct[::-1], counts[::-1], tokens_per_pass, room, held)
        if len(offsets) - 1 == num_passes:
            documents = np.concatenate((spread[np.argsort(to, kind="stable")], rest))[places]
            return np.split(documents, offsets[1:-1])
    return []


def _spread(
    lengths: NDArray[np.int64], sizes: NDArray[np.int64], tokens_per_pass: int, num_passes: int
) -> NDArray[np.int64] | None:
    """The pass of each document, which come by decreasing length; None if one finds no room.

    A document goes to a pass with the least load: the larger of its shares of all tokens and of all attention. Passes
    that are less than one document apart get one each at once, the longest document to the least load.
    """
    shares = np.stack((lengths / max(1, lengths.sum()), lengths**2 / max(1, (lengths**2).sum())))
    loads, room = np.zeros((2, num_passes)), np.full(num_passes, tokens_per_pass)
    to = np.empty(len(lengths), np.int64)
    at = 0
    while at < len(lengths):
        fitting = np.flatnonzero(room >= sizes[at])
        if not len(fitting):
            return None
        load = (loads[:, fitting] + shares[:, at, None]).max(axis=0)
        near = fitting[np.argsort(load, kind="stable")]
        near = near[: max(1, int((load < load.min() + shares[:, at].max()).sum()))]
        dealt = slice(at, at + len(near))
        near = near[: len(to[dealt])]
        to[dealt] = near
        loads[:, near] += shares[:, dealt]
        room[near] -= sizes[dealt]
        at += len(near)
    return to


def _dealt(passes: Passes, lengths: NDArray[np.int64], num_ranks: int) -> list[Passes]:
    """Deals the passes to the ranks, equally many to each: the costliest first, to the rank with the least load."""
    tokens = np.array([lengths[documents].sum() for documents in passes], dtype=float)
    attention = np.array([(lengths[documents] ** 2).sum() for documents in passes], dtype=float)
    token_shares, attention_shares = tokens / max(1.0, tokens.sum()), attention / max(1.0, attention.sum())
    costliest_first = np.argsort(-(token_shares + attention_shares), kind="stable")
    ranks: list[Passes] = [[] for _ in range(num_ranks)]
    least = [(0.0, rank, 0.0, 0.0) for rank in range(num_ranks)]  # a heap: load, rank, its shares
    for index, token_share, attention_share in zip(
        costliest_first.tolist(), token_shares[costliest_first], attention_shares[costliest_first], strict=True
    ):
        _, rank, of_tokens, of_attention = heapq.heappop(least)
        ranks[rank].append(passes[index])
        if len(ranks[rank]) < len(passes) // num_ranks:
            of_tokens, of_attention = of_tokens + token_share, of_attention + attention_share
            heapq.heappush(least, (max(of_tokens, of_attention), rank, of_tokens, of_attention))
    return ranks
