"""The language-model head: loss and both gradients from hidden states, against its bare GEMMs and every other head.

Knows hidden states and heads; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from contest import Limit, Outputs, check, compete, runnable
from floors import head_gemms
from measure import Figure, Settings, device, extra_memory, figure, training_dtype
from peers import OURS, PLAIN_HEAD, Head, Peer, heads, ours
from shapes import SMOLLM2_HEAD, HeadShape, gpu_heads
from torch import Tensor

GEMMS = "three bare GEMMs"
TRL_HEAD = "TRL ChunkedLogProbFunction"
AT_LEAST = {TRL_HEAD: 6.0, "full logits": 2.0}  # on a CPU, where TRL scores every position
HEADLINES = {
    OURS: "the LM head, forward and backward, against its three bare matrix products",
    TRL_HEAD: "TRL's fused head, against ours",
}

Inputs = tuple[Tensor, Tensor, Tensor]
"""Hidden states `[T, M]` and weight `[V, M]` in the dtype of training, labels `[T]`, -100 where nothing is scored."""


def bench_head(settings: Settings) -> Iterator[Figure]:
    """Time, error and extra memory of every head, forward and backward: SmolLM2's on a CPU, larger ones on a GPU."""
    shapes = gpu_heads() if device().type == "cuda" else {"SmolLM2-135M": SMOLLM2_HEAD}
    if settings.quick:
        shapes = {model: replace(shape, T=shape.T // 2, N=shape.N // 2) for model, shape in shapes.items()}
    for model, shape in shapes.items():
        yield from _one_shape(model, shape, settings)
    yield figure("extra memory", note="not run with --quick") if settings.quick else _memory_growth()


def inputs(shape: HeadShape) -> Inputs:
    """Random hidden states and weights; the scored rows form runs, as completions do.

    The logits have standard deviation 3, so that some tokens are likely: with small ones the softmax is next to nothing
    in the weight's gradient, and a head that forgot it would pass.
    """
    torch.manual_seed(0)
    hidden_TM = (3 * torch.randn(shape.T, shape.M, device=device())).to(training_dtype()).requires_grad_()
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
    given = inputs(shape)
    peers, table = _worth_running(peers_of(given), settings)
    verdicts, absent = check(peers, lambda run: _outputs(run, given), _exact(given), PLAIN_HEAD)
    prefix = f"{model}: " if device().type == "cuda" else ""
    table += compete(
        peers,
        verdicts,
        absent,
        limit_of(given),
        lambda run: timed(run, given),
        repeats=1 if settings.quick else 7,
        chart=f"Language-model head of {model}, {shape.N:,} scored of {shape.T:,} tokens",
        prefix=prefix,
        at_most=1.3,
        at_least=AT_LEAST if device().type == "cpu" and not settings.quick else None,
        headlines=HEADLINES,
    )
    if settings.quick:
        return table
    return table + _memory(
        [peer for peer in peers if peer.name in verdicts and verdicts[peer.name].right], given, model, prefix
    )


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


def _memory(peers: list[Peer], given: Inputs, model: str, prefix: str) -> list[Figure]:
    """Extra memory of one forward and backward of each head that is right."""
    _, weight, labels = given
    logits = int((labels != -100).sum()) * len(weight) * weight.element_size() / 2**20
    note = f"both gradients included; the logits of the scored rows alone are {logits:.0f} MiB"
    able, _ = runnable({peer.name: timed(peer.run, given) for peer in peers if peer.run is not None})
    used = {name: extra_memory(run) for name, run in able.items()}
    return [
        figure(
            f"{prefix}extra memory, {name}", value, "MiB", ratio=value / used[OURS], ratio_of="memory / packsft",
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
        grown[count] = extra_memory(timed(ours(peers_of(given)), given))
    return figure(
        f"extra memory, packsft, {many:,} scored rows",
        grown[many],
        "MiB",
        ratio=grown[many] / grown[few],
        ratio_of=f"memory / of {few:,} rows",
        at_most=1.2,
        note="the logits alone would grow to twice their size",
    )
