"""Times planning and loading: ours beside TRL's `pack_dataset` and loaders, and beside two plain ways to pack.

`plan` is over 200,000 log-normal lengths, close to Dolly-15k's, the same for all. TRL's time holds what it does
besides: it copies the tokens (one byte each here, the least it can be given) into a second data set.
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from harness.measure import Figure, Settings, figure
from harness.shapes import random_documents, tiny_llama, tiny_tokenizer
from harness.trainers import EXACT, OURS, TRL_PACKED, TRL_PADDED, build_trainer
from trl import pack_dataset

from packsft.data.packs import pack_dataset as plan_rows
from packsft.packing import PackPlan, attention_costs, balanced_order, cost_imbalance, plan_packs, plan_step

COUNT, RANKS = 200_000, 8


def bench(settings: Settings) -> Iterator[Figure]:
    yield from plans(settings.quick)
    yield from many_ranks()
    yield from shuffled(settings.quick)
    yield from loaders(settings.quick)


def plans(quick: bool) -> Iterator[Figure]:
    """Seconds, packs and how full they are, for `COUNT` lengths at 2,048; ours also on lengths near a quarter of 8,192,
    which are hard to pack, and unless `quick` on 1 and 10 million at 4,096."""
    datasets.disable_progress_bars()
    lengths = log_normal_lengths(COUNT, 2048)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.int8)))
    data = datasets.Dataset(pa.table({"input_ids": tokens}))  # in memory: `map` writes no cache file

    def trl(batch_size: int | None) -> int:
        return len(pack_dataset(data, 2048, "bfd", map_kwargs={"batch_size": batch_size}))

    ours, packs = _timed("packsft", lengths, 2048, _ours, repeats=5, at_most=0.2)
    yield ours

    def beside(name: str, pack: Callable[[np.ndarray, int], int], repeats: int = 1) -> tuple[Figure, int]:
        return _timed(name, lengths, 2048, pack, repeats=repeats, beside=ours["value"])

    yield beside("packsft, seeded", partial(_ours, seed=0), repeats=5)[0]
    yield beside("first fit decreasing", first_fit_decreasing)[0]
    whole, theirs = beside("TRL, whole set", lambda *_: trl(None))
    yield whole
    yield beside("TRL, map batches", lambda *_: trl(1000))[0]
    of_whole = "packs / TRL over the whole set"
    yield figure("packs of packsft", packs, "packs", ratio=packs / theirs, ratio_of=of_whole, at_most=1.0)
    near = np.random.default_rng(0).integers(int(0.175 * 8192), int(0.3 * 8192) + 1, COUNT)
    yield _timed("packsft, adversarial", near, 8192, _ours)[0]
    yield _timed("first fit decreasing, adversarial", near, 8192, first_fit_decreasing)[0]
    for millions in () if quick else (1, 10):
        yield _timed("packsft", log_normal_lengths(millions * 10**6, 4096), 4096, _ours, repeats=3)[0]
    for name, seed in (("packsft", None), ("packsft, seeded", 0)):
        plan = plan_packs(lengths, 2048, seed=seed)
        costs, shuffled = attention_costs(plan), np.random.default_rng(0).permutation(len(plan))
        yield _balance(name, costs[shuffled], costs[balanced_order(plan, RANKS)], at_most=1.1)
    for num_examples in (64, 512):
        yield from _exact_step(lengths, num_examples)


def many_ranks() -> Iterator[Figure]:
    """One optimizer step of 128 examples a rank into passes of 16,384 tokens: seconds to plan it, which every rank
    does, and how even its ranks are. No plan is more even than its longest example allows."""
    most = 65_536
    rng = np.random.default_rng(0)
    distributions = {
        "log-normal": log_normal_lengths(most, 2048),
        "uniform to 2,048": rng.integers(8, 2049, most),
        "Pareto to 16,384": np.clip(50 * (1 + rng.pareto(1.2, most)), 8, 16_384).astype(np.int64),
    }
    for (name, lengths), ranks in product(distributions.items(), (8, 64, 512)):
        step = lengths[: 128 * ranks]
        start = time.perf_counter()
        shares = [np.concatenate(passes) for passes in plan_step(step, 16_384, ranks)]
        seconds = time.perf_counter() - start
        tokens = np.array([step[share].sum() for share in shares])
        attention = np.array([(step[share] ** 2).sum() for share in shares])
        what = f"step of {len(step):,} examples, {ranks} ranks, {name}"
        bound = float((step**2).max() / attention.mean())
        yield figure(f"{what}: planning", seconds, "s", at_most=0.2, note=f"tokens: {tokens.max() / tokens.mean():.3f}")
        even = float(attention.max() / attention.mean())
        yield figure(
            f"{what}: attention, highest rank / mean", even, "", ratio=even / max(1.0, bound), at_most=1.15,
            ratio_of="this / the longest example alone" if bound > 1 else "this / even",
        )  # fmt: skip


def shuffled(quick: bool) -> Iterator[Figure]:
    """Seconds to plan 2 million tokenised rows on a disk (`quick`: 200,000), in their order and shuffled, which is read
    in place; and what numpy allocates at its peak."""
    lengths = log_normal_lengths(200_000 if quick else 2_000_000, 1024)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.int32)))
    with tempfile.TemporaryDirectory() as folder:
        datasets.disable_progress_bars()
        table = pa.table({"input_ids": tokens, "labels": tokens})
        datasets.Dataset(table, fingerprint="rows").save_to_disk(folder)
        del table, tokens
        rows = datasets.load_from_disk(folder)
        seconds: dict[str, float] = {}
        for name, data in (("in order", rows), ("shuffled", rows.shuffle(seed=0))):
            start = time.perf_counter()
            plan_rows(data, 1024, strategy="bfd", name="rows", vocab_size=1000)
            seconds[name] = time.perf_counter() - start
            tracemalloc.start()
            plan_rows(data, 1024, strategy="bfd", name="rows", vocab_size=1000)
            note = f"{offsets[-1]:,} tokens; {tracemalloc.get_traced_memory()[1] / 2**20:,.0f} MiB at the peak"
            tracemalloc.stop()
            ratio: dict[str, Any] = {"ratio": seconds[name] / seconds["in order"], "ratio_of": "time / in order"}
            what = f"packsft, {len(lengths):,} rows on a disk, {name}"
            yield figure(what, seconds[name], "s", note=note, **ratio if name == "shuffled" else {})


def loaders(quick: bool) -> Iterator[Figure]:
    """Tokens a second that one process gathers and collates, of an epoch of examples that are already token ids.

    Real tokens, without padding, from the trainer's own loader in the trainer's process; each worker does as much.
    """
    data = random_documents(1000 if quick else 10_000, 64, 1024)
    num_tokens = sum(map(len, data["input_ids"]))
    speeds: dict[str, float] = {}
    for name in (OURS, EXACT, TRL_PACKED, TRL_PADDED):
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(name, tiny_llama(torch.float32), tiny_tokenizer(), data, folder)
            start = time.perf_counter()
            for _ in trainer.get_train_dataloader():
                pass
            speeds[name] = num_tokens / (time.perf_counter() - start)
        ratio: dict[str, Any] = {"ratio": speeds[OURS] / speeds[name], "ratio_of": "speed of packsft / this"}
        yield figure(f"loader of {name}", speeds[name], "tokens/s", note="one process", **ratio if name != OURS else {})


def log_normal_lengths(num_lengths: int, max_length: int) -> np.ndarray:
    """`clip(lognormal(4.9, 0.9), 8, max_length)`, seed 0."""
    return np.clip(np.random.default_rng(0).lognormal(4.9, 0.9, num_lengths), 8, max_length).astype(np.int64)


def first_fit_decreasing(lengths: np.ndarray, max_length: int) -> int:
    """The number of packs when each length, from the longest on, goes into the first pack with room (as Axolotl packs).

    The tree holds the most space in each half, so that the first pack with room is found in log2(packs) steps.
    """
    leaves = 1 << int(len(lengths) - 1).bit_length()
    most = [max_length] * (2 * leaves)
    num_packs = 0
    for length in np.sort(lengths)[::-1].tolist():
        node = 1
        while node < leaves:
            node = 2 * node if most[2 * node] >= length else 2 * node + 1
        num_packs = max(num_packs, node - leaves + 1)
        most[node] -= length
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
    return num_packs


def _ours(lengths: np.ndarray, max_length: int, seed: int | None = None) -> int:
    plan: PackPlan = plan_packs(lengths, max_length, seed=seed)
    return len(plan)


def _timed(
    name: str,
    lengths: np.ndarray,
    max_length: int,
    pack: Callable[[np.ndarray, int], int],
    *,
    repeats: int = 1,
    beside: float | None = None,
    at_most: float | None = None,
) -> tuple[Figure, int]:
    """The least time of several, since a plan is the same work each time; and the number of packs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        packs = pack(lengths, max_length)
        seconds.append(time.perf_counter() - start)
    note = f"{packs:,} packs, {100 * lengths.sum() / (packs * max_length):.2f}% full"
    ratio: dict[str, Any] = {} if beside is None else {"ratio": min(seconds) / beside, "ratio_of": "time / packsft"}
    what = f"{name}, {len(lengths):,} lengths at {max_length:,}"
    return figure(what, min(seconds), "s", note=note, at_most=at_most, **ratio), packs


def _balance(name: str, shuffled: np.ndarray, balanced: np.ndarray, at_most: float | None = None) -> Figure:
    what = f"attention cost, highest of {RANKS} ranks / mean, {name}"
    note = f"{cost_imbalance(shuffled, RANKS):.2f} in a random order"
    return figure(what, cost_imbalance(balanced, RANKS), "", note=note, at_most=at_most)


def _exact_step(lengths: np.ndarray, num_examples: int) -> Iterator[Figure]:
    """One optimizer step of examples as a sampler draws them, into passes of 2,048 tokens; the mean of 30."""
    steps = np.random.default_rng(0).permutation(lengths)[: 30 * num_examples].reshape(30, num_examples)
    start = time.perf_counter()
    plans = [plan_step(step, 2048, RANKS) for step in steps]
    seconds = (time.perf_counter() - start) / len(steps)
    packs = float(np.mean([RANKS * len(ranks[0]) for ranks in plans]))
    full = 100 * float(steps.sum(axis=1).mean()) / (packs * 2048)
    name = f"packsft, exact step on {RANKS} ranks"
    what = f"{name}, {num_examples} lengths at 2,048"
    yield figure(what, seconds, "s", note=f"{round(packs):,} packs, {full:.2f}% full")
    # a step of few examples can be no more even than its longest one: no target
    costs = [
        (step[np.concatenate(passes)] ** 2).sum() for step, ranks in zip(steps, plans, strict=True) for passes in ranks
    ]
    shuffled = (steps.reshape(30 * RANKS, -1) ** 2).sum(axis=1)
    yield _balance(f"{name} of {num_examples} examples", shuffled, np.array(costs))
