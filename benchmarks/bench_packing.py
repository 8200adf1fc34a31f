"""Planning a data set: ours beside TRL's `pack_dataset`, over the whole set and in its default map batches of 1,000.

The lengths are log-normal, close to Dolly-15k's. All take the same ones. TRL's time holds what it does besides: it
copies the tokens (one byte each here, the least it can be given) into a second data set, which a plan need not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from trl import pack_dataset

from packsft.packing import plan_packs


def bench_packing(quick: bool) -> list[dict[str, Any]]:
    """Rows of name, num_lengths, max_length, seconds, packs, lower_bound and density (tokens / (packs * max_length)).

    200,000 lengths at 2,048 for everybody; unless `quick`, also 1 and 10 million at 4,096 for ours.
    """
    datasets.disable_progress_bars()
    lengths = log_normal_lengths(200_000, 2048)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.int8)))
    data = datasets.Dataset(pa.table({"input_ids": tokens}))  # in memory: `map` writes no cache file

    def trl(batch_size: int | None) -> Callable[[], int]:
        return lambda: len(pack_dataset(data, 2048, "bfd", map_kwargs={"batch_size": batch_size}))

    rows = [
        _row("packsft", lengths, 2048, lambda: len(plan_packs(lengths, 2048)), repeats=5),
        _row("packsft, seeded", lengths, 2048, lambda: len(plan_packs(lengths, 2048, seed=0)), repeats=5),
        _row("TRL, whole set", lengths, 2048, trl(None), repeats=1),
        _row("TRL, map batches", lengths, 2048, trl(1000), repeats=1),
    ]
    for num_lengths in () if quick else (1_000_000, 10_000_000):
        many = log_normal_lengths(num_lengths, 4096)
        rows.append(_row("packsft", many, 4096, lambda many=many: len(plan_packs(many, 4096)), repeats=3))
    return rows


def log_normal_lengths(num_lengths: int, max_length: int) -> np.ndarray:
    """`clip(lognormal(4.9, 0.9), 8, max_length)`, seed 0."""
    return np.clip(np.random.default_rng(0).lognormal(4.9, 0.9, num_lengths), 8, max_length).astype(np.int64)


def _row(name: str, lengths: np.ndarray, max_length: int, pack: Callable[[], int], repeats: int) -> dict[str, Any]:
    """The least time of several, since a plan is the same work each time."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        packs = pack()
        seconds.append(time.perf_counter() - start)
    tokens = int(lengths.sum())
    return {
        "name": name,
        "num_lengths": len(lengths),
        "max_length": max_length,
        "seconds": min(seconds),
        "packs": packs,
        "lower_bound": -(-tokens // max_length),
        "density": tokens / (packs * max_length),
    }
