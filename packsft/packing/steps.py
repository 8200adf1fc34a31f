"""Exact-step packing: packs the examples of one optimizer step into passes, equally many and balanced on all ranks.

A step takes the same examples as in an unpacked run. They go into the fewest passes of at most `tokens_per_pass`
tokens. The size of a pass changes only speed and memory; the step, the schedule and the loss curve are those of the
unpacked run. This file knows lengths only and gives the same result in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .plan import plan_packs

Passes = list[NDArray[np.int64]]


def plan_step(
    lengths: Sequence[int] | NDArray[np.integer[Any]], tokens_per_pass: int, num_ranks: int = 1, *, padded: bool = False
) -> list[Passes]:
    """For each rank a list of passes, for each pass its documents, as indices into `lengths`.

    Every document is in one pass. All ranks have the same number of passes, the smallest that best fit finds; a pass
    may be empty. Ranks and passes get equal shares of the tokens and of the attention cost (sum of squared lengths), as
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
    if padded:
        order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
        passes = _rows_of_similar_length(np.asarray(lengths, np.int64), order, tokens_per_pass)
        num_passes = max(1, -(-len(passes) // num_ranks))
    else:
        sizes = np.minimum(lengths, tokens_per_pass)
        fewest = plan_packs(sizes, tokens_per_pass)
        num_passes = max(1, -(-len(fewest) // num_ranks))
        passes = _balanced(np.asarray(lengths, np.int64), sizes, tokens_per_pass, num_passes * num_ranks)
        passes = passes or [fewest[i] for i in range(len(fewest))]
    passes += [np.zeros(0, np.int64)] * (num_passes * num_ranks - len(passes))
    return _dealt(passes, np.asarray(lengths, np.int64), num_ranks)


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

    By decreasing length, each document goes to the least loaded pass; the load is the larger of the pass's shares of
    tokens and of attention cost. If a document finds no room, only the longest documents are spread this way, and
    the rest go by best fit: they are short and cost little attention.
    """
    order = np.argsort(-sizes, kind="stable").tolist()
    tokens_share = num_passes / max(1, int(lengths.sum()))
    attention_share = num_passes / max(1, int((lengths**2).sum()))
    for num_spread in (len(order), len(order) * 3 // 4, len(order) // 2, len(order) // 4):
        room = np.full(num_passes, tokens_per_pass)
        tokens, attention = np.zeros(num_passes), np.zeros(num_passes)
        documents: list[list[int]] = [[] for _ in range(num_passes)]
        for position, document in enumerate(order):
            length = int(lengths[document])
            fits = room >= sizes[document]
            if not fits.any():
                break
            if position < num_spread:
                load = np.maximum((tokens + length) * tokens_share, (attention + length**2) * attention_share)
            else:
                load = room
            to = int(np.where(fits, load, np.inf).argmin())
            documents[to].append(document)
            room[to] -= sizes[document]
            tokens[to] += length
            attention[to] += length**2
        else:
            return [np.array(pass_, dtype=np.int64) for pass_ in documents]
    return []


def _dealt(passes: Passes, lengths: NDArray[np.int64], num_ranks: int) -> list[Passes]:
    """Deals the passes to the ranks, equally many to each: the costliest first, to the rank with the least load."""
    tokens = np.array([lengths[documents].sum() for documents in passes], dtype=float)
    attention = np.array([(lengths[documents] ** 2).sum() for documents in passes], dtype=float)
    cost = np.maximum(tokens / max(1.0, tokens.sum()), attention / max(1.0, attention.sum()))
    ranks: list[Passes] = [[] for _ in range(num_ranks)]
    loads, counts = np.zeros((num_ranks, 2)), np.zeros(num_ranks, np.int64)
    for index in np.argsort(-cost, kind="stable"):
        share = np.array([tokens[index] / max(1.0, tokens.sum()), attention[index] / max(1.0, attention.sum())])
        full = counts == len(passes) // num_ranks
        to = int(np.where(full, np.inf, (loads + share).max(axis=1)).argmin())
        ranks[to].append(passes[index])
        loads[to] += share
        counts[to] += 1
    return ranks
