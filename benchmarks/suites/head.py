"""Times loss and both gradients of the language-model head, against its bare GEMMs and every other head.

Knows hidden states and heads; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from harness.contest import Limit, Outputs, contest, memory
from harness.floors import head_gemms
from harness.measure import Figure, Settings, device, extra_memory, figure, training_dtype
from harness.peers import LEFT_OUT, PLAIN_HEAD, Head, Peer, heads, ours
from harness.shapes import SMOLLM2_HEAD, HeadShape, gpu_heads
from torch import Tensor

AT_LEAST = {"TRL ChunkedLogProbFunction": 6.0, "full logits": 2.0}  # on a CPU, where TRL scores every position

Inputs = tuple[Tensor, Tensor, Tensor]
"""Hidden states `[T, M]` and weight `[V, M]` in the dtype of training, labels `[T]`, -100 where nothing is scored."""


def bench(settings: Settings) -> Iterator[Figure]:
    """Time, error and extra memory of every head, forward and backward: SmolLM2's on a CPU, larger ones on a GPU."""
    on_gpu, quick = device().type == "cuda", settings.quick
    for model, shape in (gpu_heads() if on_gpu else {"SmolLM2-135M": SMOLLM2_HEAD}).items():
        given = inputs(replace(shape, T=shape.T // 2, N=shape.N // 2) if quick else shape)
        peers = []
        for peer in peers_of(given):
            if peer.name.endswith("chunked") and peer.run is not None and not on_gpu:
                yield figure(peer.name, note="not run on the CPU: it takes tens of seconds")
            elif peer.compiles and settings.short:
                yield figure(peer.name, note=LEFT_OUT)
            else:
                peers.append(peer)
        prefix = f"{model}: " if on_gpu else ""
        timing = lambda run, g=given: timed(run, g)  # type: ignore[misc]  # noqa: E731
        num_scored = int((given[2] != -100).sum())
        verdicts = yield from contest(
            peers, lambda run, g=given: _outputs(run, g), _exact(given), PLAIN_HEAD, limit_of(given), timing,  # type: ignore[misc]
            repeats=1 if quick else 7,
            chart=f"Language-model head of {model}, {num_scored:,} scored of {len(given[2]):,} tokens",
            prefix=prefix,
            at_most=1.3,
            at_least=None if on_gpu or quick else AT_LEAST,
        )  # fmt: skip
        if quick:
            continue
        logits = num_scored * len(given[1]) * given[1].element_size() / 2**20
        note = f"both gradients included; the logits of the scored rows alone are {logits:.0f} MiB"
        yield from memory(peers, verdicts, timing, f"Extra memory of the language-model head of {model}", prefix, note)
    yield figure("extra memory", note="not run with --quick") if quick else _memory_growth()


def inputs(shape: HeadShape) -> Inputs:
    """Random hidden states and weights; the scored rows form runs, as completions do.

    The logits have standard deviation 3, so that some tokens are likely: with small ones the softmax is next to nothing
    in the weight's gradient, and a head that forgot it would pass.
    """
    torch.manual_seed(0)
    hidden_TM = (3 * torch.randn(shape.T, shape.M, device=device())).to(training_dtype()).requires_grad_()
    weight_VM = (torch.randn(shape.V, shape.M, device=device()) / shape.M**0.5).to(training_dtype()).requires_grad_()
    labels_T = torch.randint(shape.V, (shape.T,), device=device())
    unscored, documents = shape.T - shape.N, 5
    for i in range(documents):
        start = shape.T * i // documents
        labels_T[start : start + unscored * (i + 1) // documents - unscored * i // documents] = -100
    assert int((labels_T != -100).sum()) == shape.N
    return hidden_TM, weight_VM, labels_T


def peers_of(given: Inputs) -> list[Peer]:
    return heads((given[2] != -100).nonzero().flatten())


def limit_of(given: Inputs) -> Limit:
    """The three GEMMs over the scored rows."""
    hidden, weight, labels = given
    rows = hidden.detach()[labels != -100]
    return Limit("three bare GEMMs", head_gemms(rows, weight), 3 * 2 * len(rows) * weight.numel(), "FLOP")


def timed(run: Head, given: Inputs) -> Callable[[], object]:
    """Forward and backward, both gradients."""
    return lambda: _outputs(run, given)


def _outputs(run: Head, given: Inputs) -> Outputs:
    hidden, weight, labels = given
    loss = run(hidden, weight, labels)
    return dict(zip(("loss", "dX", "dW"), (loss.detach(), *torch.autograd.grad(loss, (hidden, weight))), strict=True))


def _exact(given: Inputs) -> Outputs:
    """Loss and gradients in float64 from the same inputs."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in given[:2])
    rows = (given[2] != -100).nonzero().flatten()
    return _outputs(lambda h, w, y: F.cross_entropy(h[rows] @ w.t(), y[rows]), (hidden, weight, given[2]))


def _memory_growth() -> Figure:
    """How our extra memory grows with N: with full chunks of 4,096 rows, only by the gradient of the hidden states."""
    few, many = 8192, 16384
    grown = {}
    for count in (few, many):
        given = inputs(HeadShape(count, count, SMOLLM2_HEAD.M, SMOLLM2_HEAD.V))
        grown[count] = extra_memory(timed(ours(peers_of(given)), given))
    return figure(
        f"extra memory, packsft, {many:,} scored rows", grown[many], "MiB", ratio=grown[many] / grown[few],
        ratio_of=f"memory / of {few:,} rows", at_most=1.2, note="the logits alone would grow to twice their size",
    )  # fmt: skip
