"""The operators' fakes allocate and free what the operators do, so that memory measured on fake tensors is true.

What a PyTorch operator allocates and frees within itself is PyTorch's and not compared: a BLAS takes scratch memory on
some processors and none on others, and the CPU's `add` and `sum` cast to float32. An operator counts as what it
returns, as `FakeAllocations` counts it.

T = 600 tokens of which N = 512 are scored, M = 160, V = 4,096, R = 96: logits, gradients and weight are each far larger
than what is kept per row. The head works in 4 chunks of 128 rows; the row pass in blocks of 8 rows, 128 KiB of scratch.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from harness.allocations import FakeAllocations
from packsft_kernels import LossOptions, cross_entropy, launch, linear_cross_entropy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

T, N, M, V, R = 600, 512, 160, 4096, 96
CHUNK, BLOCK = 128, 8
SCRATCH = BLOCK * V * 4
OPTIONS = LossOptions(softcap=30.0, label_smoothing=0.1, z_loss=1e-3, entropy=True, correct=True)
HEAD, LOSS = (sys.modules[function.__module__] for function in (linear_cross_entropy, cross_entropy))
Work = Callable[[], object]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "rows_per_chunk", lambda *_, **__: CHUNK)
    monkeypatch.setattr(launch, "_CACHED_ELEMENTS", BLOCK * V)


def head(
    *trained: str,
    dtype: torch.dtype = torch.bfloat16,
    autocast: bool = False,
    low_rank: bool = False,
    absent: tuple[str, ...] = ("bias",),
    reduction: str = "mean",
) -> Work:
    """Forward and backward of the fused head, on tensors that are made at once."""
    given = {
        "hidden": torch.ones(T, M, dtype=dtype),
        "weight": torch.ones(V, M, dtype=torch.float32 if autocast else dtype),
        "bias": torch.ones(V, dtype=torch.float32 if autocast else dtype),
        "targets": torch.zeros(N, dtype=torch.int64),
        "rows": torch.arange(N),
        "weights": torch.ones(N),
    }
    if low_rank:
        given |= {"down": torch.ones(T, R, dtype=dtype), "up": torch.ones(V, R, dtype=given["weight"].dtype)}
    if "rows" in absent:
        given["hidden"] = given["hidden"][:N].clone()
    given = {name: value for name, value in given.items() if name not in absent}
    for name in trained:
        given[name].requires_grad_()
    arguments = {name: value for name, value in given.items() if name not in ("down", "up")}
    if low_rank:
        arguments["low_rank"] = given["down"], given["up"]

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(**arguments, options=OPTIONS, reduction=reduction).loss
        if trained:
            torch.autograd.grad(loss.sum(), [given[name] for name in trained])

    return work


def loss(*, dtype: torch.dtype = torch.bfloat16, inplace: bool = False, trained: bool = True) -> Work:
    leaf = torch.ones(N, V, dtype=dtype, requires_grad=trained)
    targets = torch.zeros(N, dtype=torch.int64)

    def work() -> None:
        logits = leaf.clone() if inplace else leaf
        out = cross_entropy(logits, targets=targets, options=OPTIONS, inplace=inplace)
        if trained:
            torch.autograd.grad(out.loss, leaf)

    return work


CASES: dict[str, Callable[[], Work]] = {
    "trained head": lambda: head("hidden", "weight"),
    "trained head, float32": lambda: head("hidden", "weight", dtype=torch.float32),
    "frozen head": lambda: head("hidden"),
    "weight only": lambda: head("weight"),
    "no gradient": lambda: head(),
    "no gradient, every row": lambda: head(absent=("rows", "bias")),
    "bias": lambda: head("hidden", "weight", "bias", absent=()),
    "every row": lambda: head("hidden", "weight", absent=("rows", "bias", "weights")),
    "autocast": lambda: head("hidden", "weight", autocast=True),
    "autocast, float32 hidden": lambda: head("hidden", "weight", dtype=torch.float32, autocast=True),
    "low rank": lambda: head("hidden", "down", "up", low_rank=True),
    "low rank, float32": lambda: head("hidden", "down", "up", low_rank=True, dtype=torch.float32),
    "low rank, autocast": lambda: head("hidden", "down", "up", low_rank=True, autocast=True),
    "low rank, none": lambda: head("hidden", "down", "up", low_rank=True, reduction="none"),
    "low rank, no gradient": lambda: head(low_rank=True),
    "none": lambda: head("hidden", "weight", reduction="none"),
    "none, no gradient": lambda: head(reduction="none"),
    "cross_entropy": lambda: loss(),
    "cross_entropy, float32": lambda: loss(dtype=torch.float32),
    "cross_entropy, in place": lambda: loss(inplace=True),
    "cross_entropy, no gradient": lambda: loss(trained=False),
}


class Recorded:
    """`sizes` and `peak`, in bytes, of what `run()` allocates on the CPU outside of PyTorch's own operators."""

    def __init__(self, run: Work) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        roots = profiler.profiler.kineto_results.experimental_event_tree()
        changes = [size for _, _, size in sorted(self._changes(roots))]
        self.sizes = [change for change in changes if change > 0]
        self.peak = max(itertools.accumulate(changes), default=0)

    def _changes(self, events: list) -> list[tuple[int, int, int]]:
        """(time, address, bytes) of each allocation and, below 0, each release."""
        changes = []
        for event in events:
            if event.name == "[memory]":
                changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
            below = self._changes(event.children)
            changes += self._left_over(below) if event.name.startswith("aten::") else below
        return changes

    @staticmethod
    def _left_over(changes: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Those changes whose memory is not released, or not allocated, among them."""
        live: dict[int, tuple[int, int, int]] = {}
        released = []
        for change in sorted(changes):
            _, address, size = change
            if size > 0:
                live[address] = change
            elif live.pop(address, None) is None:
                released.append(change)
        return [*released, *live.values()]


@functools.cache
def recorded(case: str) -> Recorded:
    work = CASES[case]()
    work()  # without what is allocated once and for all
    return Recorded(work)


def differences(case: str) -> list[str]:
    """Where the two traces part, but for what the row pass keeps per row of all blocks, where its fake sees one block
    (up to 64 bytes a row)."""
    real = recorded(case)
    with FakeTensorMode():
        fake = FakeAllocations().run(CASES[case]())
    found = []
    if abs(real.peak - fake.peak) > 64 * N:
        found.append(f"peak {real.peak:,}, faked {fake.peak:,}")
    large, faked = (Counter(size for size in trace.sizes if size > SCRATCH) for trace in (real, fake))
    if large != faked:
        found.append(f"only real: {large - faked}, only faked: {faked - large}")
    if real.sizes.count(SCRATCH) and not fake.sizes.count(SCRATCH):
        found.append("no scratch in the fake")
    return found


@pytest.mark.parametrize("case", CASES)
def test_fake_and_real_allocate_the_same(case: str) -> None:
    assert not differences(case)


def outputs_only(
    logits: Tensor, grad: object, targets: object, weights: object, scale: object, options: LossOptions, **_
):
    return HEAD.empty_outputs(logits, options)


@pytest.mark.parametrize("case", CASES)
def test_a_fake_without_the_scratch_of_the_row_pass_is_noticed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (HEAD, LOSS):
        monkeypatch.setattr(module, "loss_rows_fake", outputs_only)
    assert differences(case)


@pytest.mark.parametrize("case", [case for case in CASES if "cross_entropy" not in case])
def test_a_fake_without_the_chunk_of_logits_is_noticed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the head's fake is for sizes that are symbols: what it returns, and no workspace."""
    monkeypatch.setattr(HEAD, "has_symbolic_size", lambda *_: True)
    assert differences(case)
