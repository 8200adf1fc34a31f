"""How cost grows: time against T, documents at fixed T, N, V, H and the share of scored tokens, and memory against T.

Each point stands beside its limit of the same run; each line gets the exponent p of cost ~ size^p, fitted by least
squares on logarithms, with the target where it should be linear. Knows sizes; what is timed belongs to the kernels' own
suites and to the training step's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bench_cross_entropy
import bench_linear_cross_entropy as head
import bench_varlen_attention as attention
import numpy as np
from bench_training_step import training_step
from contest import runnable
from datasets import Dataset
from measure import Figure, Settings, device, extra_memory, figure, interleave, training_dtype
from peers import BLOCK_MASK, OURS, losses, ours
from shapes import LLAMA_1B_ATTENTION, SMOLLM2_ATTENTION, HeadShape, packed_row, small_llama, tiny_tokenizer
from trainers import TRL_PACKED, build_trainer

DOCUMENT = 128  # tokens, where the length of documents stays and T grows
LINEAR = 1.1  # an exponent of 1, and the noise of timings
Candidates = dict[str, Callable[[], object]]


def bench_scaling(settings: Settings) -> Iterator[Figure]:
    """A line of points and an exponent for each axis; --quick: three small sizes of each, and no model."""
    on_gpu, quick = device().type == "cuda", settings.quick or settings.dry_run
    N, V, H = (4096, 65_536, 2048) if on_gpu else (512, 16_384, 512)
    steps = 3 if quick else 4
    if quick:
        N, V, H = N // 8, V // 8, H // 4
    repeats = 2 if quick else 5
    T = 8192 if on_gpu else 512 if quick else 1024

    def doubling(largest: int) -> list[int]:
        return [largest >> i for i in reversed(range(steps))]

    for title, axis, sizes, candidates in (
        ("Cross-entropy over rows", "rows of logits, N", doubling(2 * N), lambda n: _cross_entropy(n, V)),
        ("Cross-entropy over columns", "vocabulary, V", doubling(2 * V), lambda v: _cross_entropy(N, v)),
        ("Head over scored tokens", "scored tokens, N", doubling(4 * N), lambda n: _head(n, n, H, V)),
        ("Head over the vocabulary", "vocabulary, V", doubling(4 * V), lambda v: _head(N, N, H, v)),
        ("Head over the model width", "model width, H", doubling(2 * H), lambda h: _head(N, N, h, V)),
        ("Head over the share of scored tokens", "scored % of tokens", [12.5, 25, 50, 100][-steps:],
         lambda share: _head(4 * N, round(4 * N * share / 100), H, V)),
        ("Attention over tokens", f"tokens T, in documents of {DOCUMENT}", doubling(4 * T),
         lambda t: _attention(t, t // DOCUMENT)),
    ):  # fmt: skip
        yield from _axis(title, axis, sizes, candidates, repeats, at_most=LINEAR)
    documents = [1, 2, 4, 8, 16][:: 2 if quick else 1]
    title, axis = f"Attention over documents in {2 * T:,} tokens", "documents in the pack"
    # never dearer for more documents: the squares of their lengths add up to T^2 / D
    yield from _axis(title, axis, documents, lambda count: _attention(2 * T, count), repeats, at_most=0.0)
    if quick:
        yield figure("Training step over tokens", note="not run with --quick")
    else:
        yield from _training_steps(doubling(4 * T), repeats)


def _axis(
    title: str, axis: str, sizes: Sequence[float], candidates: Callable[[Any], Candidates], repeats: int, at_most: float
) -> list[Figure]:
    """A row for each size and candidate, the limit first, and an exponent for each candidate but the limit.

    A competitor's line ends at the size that it cannot run, for want of memory.
    """
    seconds: dict[str, list[float]] = {}
    table = []
    for size in sizes:
        able, absent = runnable(candidates(size))
        times = interleave(able, repeats, warmup=0)
        limit = next(iter(times))
        table += [figure(f"{title}, {size:,g}: {name}", note=f"cannot run: {why}") for name, why in absent.items()]
        for name, time in times.items():
            seconds.setdefault(name, []).append(time.median)
            over: dict[str, Any] = {"limit": True}
            if name != limit:
                over = {"ratio": time.median / times[limit].median, "ratio_of": f"time / {limit}"}
            table.append(
                figure(
                    f"{title}, {size:,g}: {name}", time.median, "s", spread=time.spread, chart=title, series=name,
                    x=float(size), x_name=axis, **over,
                )
            )  # fmt: skip
    return table + [
        _exponent(f"{title}: {name}", sizes[: len(values)], values, at_most if name == OURS else None)
        for name, values in list(seconds.items())[1:]
    ]


def _exponent(name: str, sizes: Sequence[float], values: Sequence[float], at_most: float | None) -> Figure:
    if len(sizes) < 2:
        return figure(f"{name}, exponent", note="of one point there is none")
    slope = float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
    return figure(f"{name}, exponent", slope, "", at_most=at_most, note="p of cost ~ size^p")


def _cross_entropy(num_rows: int, vocab: int) -> Candidates:
    limit = bench_cross_entropy.copy_limit(num_rows, vocab)
    return {limit.name: limit.run, OURS: bench_cross_entropy.timed(ours(losses()), num_rows, vocab)}


def _head(T: int, N: int, H: int, V: int) -> Candidates:
    given = head.inputs(HeadShape(T, N, H, V))
    limit = head.limit_of(given)
    return {limit.name: limit.run, OURS: head.timed(ours(head.peers_of(given)), given)}


def _attention(T: int, count: int) -> Candidates:
    """Documents of one length; the block mask stands for what packing costs without `cu_seqlens`."""
    shape = LLAMA_1B_ATTENTION if device().type == "cuda" else SMOLLM2_ATTENTION
    lengths = (T // count,) * count
    bounds, qkv = attention.boundaries(lengths), attention.inputs(shape, T)
    limit = attention.limit_of(lengths, shape)
    peers = attention.peers_of(bounds, qkv)
    masked = next(peer.run for peer in peers if peer.name == BLOCK_MASK)
    assert masked is not None
    return {limit.name: limit.run, OURS: attention.timed(ours(peers), qkv), BLOCK_MASK: attention.timed(masked, qkv)}


def _training_steps(sizes: Sequence[int], repeats: int) -> list[Figure]:
    """Forward and backward of a small Llama over a pack of T tokens, ours and TRL's: time and extra memory."""
    rows = [packed_row((DOCUMENT,) * (size // DOCUMENT), 64, seed=0) for size in sizes]
    steps: dict[str, list[Callable[[], object]]] = {}
    for trainer_name in (OURS, TRL_PACKED):
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(
                trainer_name, small_llama(training_dtype()), tiny_tokenizer(), Dataset.from_list(rows), folder,
                dataset_kwargs={"skip_prepare_dataset": True}, max_length=max(sizes),
            )  # fmt: skip
            batches = [trainer.data_collator([row]) for row in rows]
            steps[trainer_name] = [training_step(trainer, batch)[0] for batch in batches]
    table, seconds, memory = [], {}, {}
    for place, size in enumerate(sizes):
        able, _ = runnable({name: runs[place] for name, runs in steps.items()})
        times = interleave(able, repeats, warmup=0)
        for name, time in times.items():
            seconds.setdefault(name, []).append(time.median)
            memory.setdefault(name, []).append(extra_memory(steps[name][place]))
            drawn = {"series": name, "x": float(size), "x_name": f"tokens T, in documents of {DOCUMENT}"}
            what = f"Training step of a small Llama over {size:,} tokens: {name}"
            table += [
                figure(what, time.median, "s", spread=time.spread, chart="Training step over tokens", **drawn),
                figure(f"{what}, memory", memory[name][-1], "MiB", chart="Memory of a training step over T", **drawn),
            ]
    for name in steps:
        target = LINEAR if name == OURS else None
        for what, values in (("Training step over tokens", seconds), ("Memory of a training step over T", memory)):
            table.append(_exponent(f"{what}: {name}", sizes[: len(values[name])], values[name], target))
    return table
