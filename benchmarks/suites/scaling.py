"""Measures how cost grows: time against T, documents, N, V, H and the share of scored tokens, and memory against T.

Each point stands beside its limit of the same run; each line gets the exponent p of cost ~ size^p, fitted by least
squares on logarithms, with the target where it should be linear. What is timed belongs to the kernels' own suites and
to `step`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from harness.contest import runnable
from harness.measure import Figure, Settings, device, extra_memory, figure, interleave, training_dtype
from harness.peers import BLOCK_MASK, OURS, losses, ours
from harness.shapes import LLAMA_1B_ATTENTION, SMOLLM2_ATTENTION, HeadShape, packed_row, tiny_llama, tiny_tokenizer
from harness.trainers import TRL_PACKED, build_trainer
from suites import attention, cross_entropy, head
from suites.step import training_step

DOCUMENT = 128  # tokens, where the length of documents stays and T grows
LINEAR = 1.1  # an exponent of 1, and the noise of timings
SMALL_LLAMA = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
               "num_key_value_heads": 4, "max_position_embeddings": 65_536}  # fmt: skip
Candidates = dict[str, Callable[[], object]]


def bench(settings: Settings) -> Iterator[Figure]:
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
        return
    title, axis, sizes = "Training step over tokens", f"tokens T, in documents of {DOCUMENT}", doubling(4 * T)
    steps = _training_steps(sizes)
    memory = "Memory of a training step over T"
    yield from _axis(title, axis, sizes, steps.__getitem__, repeats, at_most=LINEAR, memory=memory)


def _axis(
    title: str,
    axis: str,
    sizes: Sequence[float],
    candidates: Callable[[Any], Candidates],
    repeats: int,
    at_most: float,
    memory: str = "",
) -> Iterator[Figure]:
    """A row for each size and candidate, the limit first, and an exponent for each candidate but the limit.

    A competitor's line ends at the size that it cannot run, for want of memory.

    Args:
        at_most: the target of our exponent.
        memory: the title of a second picture, of extra memory; such an axis has no limit.
    """
    lines: dict[str, list[float]] = {}

    def point(what: str, size: float, name: str, value: float, unit: str, **more: Any) -> Figure:
        lines.setdefault(f"{what}: {name}", []).append(value)
        drawn = {"chart": what, "series": name, "x": float(size), "x_name": axis}
        return figure(f"{what}, {size:,g}: {name}", value, unit, **drawn, **more)

    for size in sizes:
        able, absent = runnable(candidates(size))
        times = interleave(able, repeats, warmup=0)
        limit = "" if memory else next(iter(times))
        yield from (figure(f"{title}, {size:,g}: {name}", note=f"cannot run: {why}") for name, why in absent.items())
        for name, time in times.items():
            over: dict[str, Any] = {"limit": True} if name == limit else {}
            if limit and name != limit:
                over = {"ratio": time.median / times[limit].median, "ratio_of": f"time / {limit}"}
            yield point(title, size, name, time.median, "s", spread=time.spread, **over)
            if memory:
                yield point(memory, size, name, extra_memory(able[name]), "MiB")
    for name, values in lines.items():
        if name != f"{title}: {limit}":
            yield _exponent(name, sizes[: len(values)], values, at_most if name.endswith(f": {OURS}") else None)


def _exponent(name: str, sizes: Sequence[float], values: Sequence[float], at_most: float | None) -> Figure:
    if len(sizes) < 2:
        return figure(f"{name}, exponent", note="of one point there is none")
    slope = float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
    return figure(f"{name}, exponent", slope, "", at_most=at_most, note="p of cost ~ size^p")


def _cross_entropy(num_rows: int, vocab: int) -> Candidates:
    limit = cross_entropy.copy_limit(num_rows, vocab)
    return {limit.name: limit.run, OURS: cross_entropy.timed(ours(losses()), num_rows, vocab)}


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


def _training_steps(sizes: Sequence[int]) -> dict[int, Candidates]:
    """Forward and backward of a small Llama over a pack of each size, ours and TRL's."""
    rows = [packed_row((DOCUMENT,) * (size // DOCUMENT), 64, seed=0) for size in sizes]
    steps: dict[int, Candidates] = {size: {} for size in sizes}
    for name in (OURS, TRL_PACKED):
        with tempfile.TemporaryDirectory() as folder:
            model = tiny_llama(training_dtype(), **SMALL_LLAMA)
            trainer = build_trainer(
                name, model, tiny_tokenizer(), Dataset.from_list(rows), folder,
                dataset_kwargs={"skip_prepare_dataset": True}, max_length=max(sizes),
            )  # fmt: skip
            for size, row in zip(sizes, rows, strict=True):
                steps[size][name] = training_step(trainer, trainer.data_collator([row]))[0]
    return steps
