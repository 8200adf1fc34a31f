"""Cross-entropy on logits that exist, loss and gradient, against a copy of them: every logit read and written once.

Every run gets fresh random logits, since ours overwrites them. Knows logits; knows no head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from contest import Limit, Outputs, Verdict, check, compete
from measure import Figure, Settings, device, figure, training_dtype
from peers import PLAIN_LOSS, Loss, Peer, losses
from torch import Tensor

COPY = "copy of the logits"
CHECKED_ROWS = 1024  # in float64 a benchmark's logits and their gradient would be tens of gigabytes


def bench_cross_entropy(settings: Settings) -> Iterator[Figure]:
    """8,192 rows of Llama 3's vocabulary on a GPU, 512 of SmolLM2's on a CPU; on a GPU also one of 50,257 columns."""
    on_gpu = device().type == "cuda"
    shapes = [(8192, 128_256), (8192, 50_257)] if on_gpu else [(512, 49_152)]
    peers = losses()
    if settings.quick:
        yield from (
            figure(peer.name, note="not run with --quick: compiles") for peer in peers if "compile" in peer.name
        )
        peers = [peer for peer in peers if "compile" not in peer.name]
    for num_rows, vocab in shapes:
        shape = f"[{num_rows:,}, {vocab:,}]"
        yield from compete(
            peers,
            *_checked(peers, min(num_rows, CHECKED_ROWS), vocab),
            copy_limit(num_rows, vocab),
            lambda run, n=num_rows, v=vocab: timed(run, n, v),  # type: ignore[misc]
            repeats=2 if settings.quick else 10,
            chart=f"Cross-entropy of {shape} logits",
            prefix=f"{shape}: " if on_gpu else "",
            at_most=1 / 0.85 if on_gpu else None,
        )


def copy_limit(num_rows: int, vocab: int) -> Limit:
    source, destination = _logits(num_rows, vocab), _logits(num_rows, vocab)
    return Limit(COPY, lambda: destination.copy_(source), 2 * source.numel() * source.element_size(), "B")


def timed(loss: Loss, num_rows: int, vocab: int) -> Callable[[], None]:
    """Forward and backward. The noise is laid over a buffer outside of the clock for the next run, not for this one."""
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


def _checked(peers: list[Peer], num_rows: int, vocab: int) -> tuple[dict[str, Verdict], dict[str, str]]:
    logits, targets = _logits(num_rows, vocab), torch.randint(vocab, (num_rows,), device=device())

    def outputs(loss: Loss, logits: Tensor = logits) -> Outputs:
        leaf = logits.clone().requires_grad_()
        value = loss(leaf.view_as(leaf), targets)
        return {"loss": value.detach().clone(), "gradient": torch.autograd.grad(value, leaf)[0]}

    return check(peers, outputs, outputs(F.cross_entropy, logits.double()), PLAIN_LOSS)
