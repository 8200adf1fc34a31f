"""Times loss and gradient of logits that exist, against a copy of them: every logit read and written once.

Every run gets fresh random logits, since ours overwrites them. Knows logits; knows no head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from harness.contest import Limit, Outputs, contest
from harness.measure import Figure, Settings, device, figure, training_dtype
from harness.peers import LEFT_OUT, PLAIN_LOSS, Loss, losses
from torch import Tensor

COPY = "copy of the logits"
CHECKED_ROWS = 1024  # in float64 a benchmark's logits and their gradient would be tens of gigabytes


def bench(settings: Settings) -> Iterator[Figure]:
    """8,192 rows of Llama 3's vocabulary on a GPU, 512 of SmolLM2's on a CPU; on a GPU also one of 50,257 columns."""
    on_gpu = device().type == "cuda"
    peers = losses()
    if settings.short:
        yield from (figure(peer.name, note=LEFT_OUT) for peer in peers if peer.compiles)
        peers = [peer for peer in peers if not peer.compiles]
    for num_rows, vocab in [(8192, 128_256), (8192, 50_257)] if on_gpu else [(512, 49_152)]:
        shape = f"[{num_rows:,}, {vocab:,}]"
        logits = _logits(min(num_rows, CHECKED_ROWS), vocab)
        targets = torch.randint(vocab, (len(logits),), device=device())
        exact = outputs(F.cross_entropy, logits.double(), targets)
        yield from contest(
            peers,
            lambda loss, x=logits, y=targets: outputs(loss, x, y),  # type: ignore[misc]
            exact,
            PLAIN_LOSS,
            copy_limit(num_rows, vocab),
            lambda run, n=num_rows, v=vocab: timed(run, n, v),  # type: ignore[misc]
            repeats=2 if settings.quick else 10,
            chart=f"Cross-entropy of {shape} logits",
            prefix=f"{shape}: " if on_gpu else "",
            at_most=1 / 0.85 if on_gpu else None,
        )


def outputs(loss: Loss, logits: Tensor, targets: Tensor) -> Outputs:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf.view_as(leaf), targets)
    return {"loss": value.detach().clone(), "gradient": torch.autograd.grad(value, leaf)[0]}


def copy_limit(num_rows: int, vocab: int) -> Limit:
    source, destination = _logits(num_rows, vocab), _logits(num_rows, vocab)
    return Limit(COPY, lambda: destination.copy_(source), 2 * source.numel() * source.element_size(), "B")


def timed(loss: Loss, num_rows: int, vocab: int) -> Callable[[], None]:
    """Forward and backward on a buffer that `prepare` fills anew, outside of the clock."""
    fresh = _logits(num_rows, vocab)
    targets = torch.randint(vocab, (num_rows,), device=device())
    buffer = torch.empty_like(fresh)

    def run() -> None:
        leaf = buffer.requires_grad_()
        loss(leaf.view_as(leaf), targets).backward()

    def prepare() -> None:
        nonlocal buffer
        buffer = fresh.clone()

    run.prepare = prepare  # type: ignore[attr-defined]
    return run


def _logits(num_rows: int, vocab: int) -> Tensor:
    return 3 * torch.randn(num_rows, vocab, device=device()).to(training_dtype())
