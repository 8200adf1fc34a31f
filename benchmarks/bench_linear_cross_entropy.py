"""The language-model head: loss and both gradients from hidden states, against its bare GEMMs and every other head.

Knows hidden states and heads; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from contest import Limit, Outputs, check, compete
from floors import head_gemms
from measure import Figure, Settings, device, extra_memory, figure, training_dtype
from peers import OURS, PLAIN_HEAD, Head, Peer, heads
from shapes import GPU_HEADS, SMOLLM2_HEAD, HeadShape
from torch import Tensor

GEMMS = "three bare GEMMs"
TRL_HEAD = "TRL ChunkedLogProbFunction"
CHECKED_ROWS = 1024  # in float64 the logits of a GPU's benchmark would not fit beside their gradient
AT_LEAST = {TRL_HEAD: 6.0, "full logits": 2.0}
HEADLINES = {
    OURS: "the LM head, forward and backward, against its three bare matrix products",
    TRL_HEAD: "TRL's fused head, against ours",
}

Inputs = tuple[Tensor, Tensor, Tensor]
"""Hidden states `[T, M]` and weight `[V, M]` in the dtype of training, labels `[T]`, -100 where nothing is scored."""


def bench_head(settings: Settings) -> list[Figure]:
    """Time, error and extra memory of every head, forward and backward: SmolLM2's on a CPU, larger ones on a GPU."""
    shapes = GPU_HEADS if device().type == "cuda" else {"SmolLM2-135M": SMOLLM2_HEAD}
    table = [row for model, shape in shapes.items() for row in _one_shape(model, shape, settings)]
    if settings.quick:
        return [*table, figure("extra memory", note="not run with --quick")]
    return [*table, _memory_growth()]


def inputs(shape: HeadShape) -> Inputs:
    """Random hidden states and weights whose logits have variance 1; the scored rows form runs, as completions do."""
    torch.manual_seed(0)
    hidden_TM = torch.randn(shape.T, shape.M, device=device()).to(training_dtype()).requires_grad_()
    weight_VM = (torch.randn(shape.V, shape.M, device=device()) / shape.M**0.5).to(training_dtype()).requires_grad_()
    labels_T = torch.randint(shape.V, (shape.T,), device=device())
    unscored = shape.T - shape.N
    documents = 5
    starts = [shape.T * i // documents for i in range(documents)]
    for i, start in enumerate(starts):
        labels_T[start : start + unscored * (i + 1) // documents - unscored * i // documents] = -100
    assert int((labels_T != -100).sum()) == shape.N
    return hidden_TM, weight_VM, labels_T


def peers_of(given: Inputs) -> list[Peer]:
    return heads((given[2] != -100).nonzero().flatten())


def limit_of(given: Inputs) -> Limit:
    """The three GEMMs over the scored rows."""
    hidden, weight, labels = given
    rows = hidden.detach()[labels != -100]
    return Limit(GEMMS, head_gemms(rows, weight), 3 * 2 * len(rows) * weight.numel(), "FLOP")


def timed(run: Head, given: Inputs) -> Callable[[], object]:
    """Forward and backward, both gradients."""
    return lambda: _gradients(run, given)


def _one_shape(model: str, shape: HeadShape, settings: Settings) -> list[Figure]:
    few = inputs(HeadShape(min(shape.T, CHECKED_ROWS), min(shape.N, CHECKED_ROWS), shape.M, shape.V))
    kept, table = _worth_running(peers_of(few), settings)
    verdicts, absent = check(kept, lambda run: _outputs(run, few), _exact(few), PLAIN_HEAD)
    given = inputs(shape)
    runs = {peer.name: peer for peer in peers_of(given)}
    kept = [runs[peer.name] for peer in kept]
    table += absent + compete(
        kept,
        verdicts,
        limit_of(given),
        lambda run: timed(run, given),
        repeats=1 if settings.quick else 7,
        warmup=0 if settings.quick else 1,  # the check ran each once
        chart=f"Language-model head of {model}, {shape.N:,} scored of {shape.T:,} tokens",
        at_most=1.3,
        at_least=AT_LEAST,
        headlines=HEADLINES,
    )
    if settings.quick:
        return table
    return table + _memory([peer for peer in kept if peer.name in verdicts], given, model)


def _worth_running(peers: list[Peer], settings: Settings) -> tuple[list[Peer], list[Figure]]:
    """What runs in bearable time, and a row for each that does not."""
    reasons = {}
    for peer in peers:
        if peer.name.endswith("chunked") and peer.run is not None and device().type == "cpu":
            reasons[peer.name] = "not run on the CPU: it takes tens of seconds"
        elif "compile" in peer.name and settings.quick:
            reasons[peer.name] = "not run with --quick: compiles"
    rows = [figure(name, note=reason) for name, reason in reasons.items()]
    return [peer for peer in peers if peer.name not in reasons], rows


def _gradients(run: Head, given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels = given
    loss = run(hidden, weight, labels)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def _outputs(run: Head, given: Inputs) -> Outputs:
    return dict(zip(("loss", "dX", "dW"), _gradients(run, given), strict=True))


def _exact(given: Inputs) -> Outputs:
    """Loss and gradients in float64 from the same inputs."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in given[:2])
    rows = (given[2] != -100).nonzero().flatten()
    return _outputs(lambda h, w, y: F.cross_entropy(h[rows] @ w.t(), y[rows]), (hidden, weight, given[2]))


def _memory(peers: list[Peer], given: Inputs, model: str) -> list[Figure]:
    """Extra memory of one forward and backward of each head."""
    _, weight, labels = given
    logits = int((labels != -100).sum()) * len(weight) * weight.element_size() / 2**20
    note = f"both gradients included; the logits of the scored rows alone are {logits:.0f} MiB"
    used = {peer.name: extra_memory(timed(peer.run, given)) for peer in peers if peer.run is not None}
    return [
        figure(
            f"extra memory, {name}", value, "MiB", ratio=value / used[OURS], ratio_of="memory / packsft",
            note=note * (name == OURS), chart=f"Extra memory of the language-model head of {model}", series=name,
        )
        for name, value in used.items()
    ]  # fmt: skip


def _memory_growth() -> Figure:
    """How our extra memory grows with N: with full chunks of 4,096 rows, only by the gradient of the hidden states."""
    few, many = 8192, 16384
    grown = {}
    for count in (few, many):
        given = inputs(HeadShape(count, count, SMOLLM2_HEAD.M, SMOLLM2_HEAD.V))
        ours = next(peer.run for peer in peers_of(given) if peer.name == OURS)
        grown[count] = extra_memory(timed(ours, given))  # type: ignore[arg-type]
    return figure(
        f"extra memory, packsft, {many:,} scored rows",
        grown[many],
        "MiB",
        ratio=grown[many] / grown[few],
        ratio_of=f"memory / of {few:,} rows",
        at_most=1.2,
        note="the logits alone would grow to twice their size",
    )
