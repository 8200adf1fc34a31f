"""Planning a data set: ours beside TRL's `pack_dataset`, over the whole set and in its default map batches of 1,000,
first fit decreasing with a tree over the packs (as Axolotl packs), and next fit, both one example at a time.

The lengths are log-normal, close to Dolly-15k's. All take the same ones. TRL's time holds what it does besides: it
copies the tokens (one byte each here, the least it can be given) into a second data set, which a plan need not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from measure import Figure, Settings, figure
from shapes import random_documents, tiny_llama, tiny_tokenizer
from trainers import EXACT, OURS, TRL_PACKED, TRL_PADDED, build_trainer
from trl import pack_dataset

from packsft.packing import PackPlan, attention_costs, balanced_order, cost_imbalance, plan_packs, plan_step


def bench_packing(settings: Settings) -> list[Figure]:
    return figures_of(plans(settings.quick)) + loaders(settings.quick)


def loaders(quick: bool) -> list[Figure]:
    """Tokens a second that one process gathers and collates, of an epoch of examples that are already token ids.

    Real tokens, without padding, from the trainer's own loader in the trainer's process; each worker does as much.
    """
    data = random_documents(1000 if quick else 10_000, 64, 1024)
    num_tokens = sum(map(len, data["input_ids"]))
    rows = []
    speeds: dict[str, float] = {}
    for name in (OURS, EXACT, TRL_PACKED, TRL_PADDED):
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(name, tiny_llama(torch.float32), tiny_tokenizer(), data, folder)
            start = time.perf_counter()
            for _ in trainer.get_train_dataloader():
                pass
            speeds[name] = num_tokens / (time.perf_counter() - start)
        ratio = {} if name == OURS else {"ratio": speeds[OURS] / speeds[name], "ratio_of": "speed of packsft / this"}
        rows.append(figure(f"loader of {name}", speeds[name], "tokens/s", note="one process", **ratio))  # type: ignore[arg-type]
    return rows


def plans(quick: bool) -> list[dict[str, Any]]:
    """Rows of name, num_lengths, max_length, seconds, packs, lower_bound and density (tokens / (packs * max_length)).

    200,000 lengths at 2,048 for everybody, and as many at 8,192 of sizes near a quarter of it for all that only plan;
    unless `quick`, also 1 and 10 million at 4,096 for ours. Our own plans also say what they leave uneven:
    `examples_cv`, and `cost_imbalance` of 8 ranks in a random order and in a balanced one. The rows of exact steps are
    one optimizer step on 8 ranks, on average.
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
        _row("first fit decreasing", lengths, 2048, lambda: first_fit_decreasing(lengths, 2048), repeats=1),
        _row("next fit", lengths, 2048, lambda: next_fit(lengths, 2048), repeats=1),
        _row("TRL, whole set", lengths, 2048, trl(None), repeats=1),
        _row("TRL, map batches", lengths, 2048, trl(1000), repeats=1),
    ]
    for row, seed in zip(rows[:2], (None, 0), strict=True):
        row.update(_balance(plan_packs(lengths, 2048, seed=seed)))
    near = np.random.default_rng(0).integers(int(0.175 * 8192), int(0.3 * 8192) + 1, 200_000)
    rows += [
        _row("packsft, adversarial", near, 8192, lambda: len(plan_packs(near, 8192)), repeats=1),
        _row("packsft, adversarial, seeded", near, 8192, lambda: len(plan_packs(near, 8192, seed=0)), repeats=1),
        _row("first fit decreasing, adversarial", near, 8192, lambda: first_fit_decreasing(near, 8192), repeats=1),
        _row("next fit, adversarial", near, 8192, lambda: next_fit(near, 8192), repeats=1),
    ]
    rows += [_step_row(lengths, num_examples, 8) for num_examples in (64, 512)]
    for num_lengths in () if quick else (1_000_000, 10_000_000):
        many = log_normal_lengths(num_lengths, 4096)
        for name, seed in (("packsft", None), ("packsft, seeded", 0)):
            plan = partial(plan_packs, many, 4096, seed=seed)
            rows.append(_row(name, many, 4096, lambda plan=plan: len(plan()), repeats=3))
    return rows


def figures_of(rows: list[Figure]) -> list[Figure]:
    """The planner's own rows (name, num_lengths, max_length, seconds, packs, density) as figures."""
    reference = {row["name"]: row for row in rows if row["num_lengths"] == 200_000}
    ours, whole = reference["packsft"], reference["TRL, whole set"]
    table = []
    for row in rows:
        targets: dict[str, Any] = {}
        if row is ours:
            targets = {"at_most": 0.2, "headline": "planning 200,000 examples"}
        elif row["num_lengths"] == 200_000 and row["max_length"] == ours["max_length"]:
            targets = {"ratio": row["seconds"] / ours["seconds"], "ratio_of": "time / packsft"}
        name = f"{row['name']}, {row['num_lengths']:,} lengths at {row['max_length']:,}"
        note = f"{round(row['packs']):,} packs, {100 * row['density']:.2f}% full"
        table.append(figure(name, row["seconds"], "s", note=note, **targets))
    for row in rows:
        if "cost_imbalance" in row:
            whole_set = "examples_cv" in row  # a step of few examples can be no more even than its longest one
            spread = f"; examples per pack vary by {100 * row['examples_cv']:.0f}%" if whole_set else ""
            note = f"{row['cost_imbalance']:.2f} in a random order{spread}"
            what = row["name"] if whole_set else f"{row['name']} of {row['num_lengths']} examples"
            name = f"attention cost, highest of 8 ranks / mean, {what}"
            targets = {"at_most": 1.1} if whole_set else {}
            table.append(figure(name, row["cost_imbalance_balanced"], "", note=note, **targets))
    fewer: dict[str, Any] = {"headline": "packs of 200,000 examples, against TRL over the whole set"}
    fewer |= {"ratio": ours["packs"] / whole["packs"], "ratio_of": "packs / TRL over the whole set", "at_most": 1.0}
    return [*table, figure("packs of packsft", ours["packs"], "packs", **fewer)]


def log_normal_lengths(num_lengths: int, max_length: int) -> np.ndarray:
    """`clip(lognormal(4.9, 0.9), 8, max_length)`, seed 0."""
    return np.clip(np.random.default_rng(0).lognormal(4.9, 0.9, num_lengths), 8, max_length).astype(np.int64)


def first_fit_decreasing(lengths: np.ndarray, max_length: int) -> int:
    """The number of packs when each length, from the longest on, goes into the first pack with room.

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


def next_fit(lengths: np.ndarray, max_length: int) -> int:
    """The number of packs when a length that does not fit closes the pack for good."""
    num_packs, space = 0, 0
    for length in lengths.tolist():
        if length > space:
            num_packs, space = num_packs + 1, max_length
        space -= length
    return num_packs


def _step_row(lengths: np.ndarray, num_examples: int, num_ranks: int) -> dict[str, Any]:
    """One optimizer step of examples as a sampler draws them, into passes of 2,048 tokens; the mean of 30."""
    steps = np.random.default_rng(0).permutation(lengths)[: 30 * num_examples].reshape(30, num_examples)
    start = time.perf_counter()
    plans = [plan_step(step, 2048, num_ranks) for step in steps]
    seconds = (time.perf_counter() - start) / len(steps)
    packs = float(np.mean([num_ranks * len(ranks[0]) for ranks in plans]))
    costs = [
        (step[np.concatenate(passes)] ** 2).sum() for step, ranks in zip(steps, plans, strict=True) for passes in ranks
    ]
    shuffled = (steps.reshape(30 * num_ranks, -1) ** 2).sum(axis=1)
    tokens = float(steps.sum(axis=1).mean())
    return {
        "name": f"packsft, exact step on {num_ranks} ranks",
        "num_lengths": num_examples,
        "max_length": 2048,
        "seconds": seconds,
        "packs": packs,
        "lower_bound": tokens / 2048,
        "density": tokens / (packs * 2048),
        "cost_imbalance": cost_imbalance(shuffled, num_ranks),
        "cost_imbalance_balanced": cost_imbalance(np.array(costs), num_ranks),
    }


def _balance(plan: PackPlan) -> dict[str, float]:
    """How uneven the packs are: examples in a pack, and attention cost over 8 ranks."""
    counts, costs = np.diff(plan.offsets.astype(np.int64)), attention_costs(plan)
    shuffled = np.random.default_rng(0).permutation(len(plan))
    return {
        "examples_cv": float(counts.std() / counts.mean()),
        "cost_imbalance": cost_imbalance(costs[shuffled], 8),
        "cost_imbalance_balanced": cost_imbalance(costs[balanced_order(plan, 8)], 8),
    }


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
