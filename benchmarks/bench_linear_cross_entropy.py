"""The language-model head: loss and both gradients from hidden states, against its bare GEMMs and every other head.

Each head is compared with float64 before it is timed; one that is wrong is shown as wrong, and not as fast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from floors import head_gemms
from measure import Settings, device, extra_memory, figure, interleave, training_dtype
from peers import OURS, Head, Peer, heads
from shapes import SMOLLM2_HEAD, HeadShape
from torch import Tensor

GEMMS = "three bare GEMMs"
PLAIN = "full logits, scored rows only"  # plain PyTorch in the same dtype: the yardstick for rounding
SLOW_ON_CPU = "F.linear_cross_entropy, chunked"  # tens of seconds
SPEEDUPS = {"TRL ChunkedLogProbFunction": 6.0, "full logits": 2.0}


def bench_head(settings: Settings) -> list[dict[str, Any]]:
    """Time, error and extra memory of every head at SmolLM2's shape, forward and backward."""
    hidden, weight, labels = _inputs(SMOLLM2_HEAD, training_dtype())
    rows = (labels != -100).nonzero().flatten()
    truth = _exact(hidden, weight, labels)
    peers = heads(rows)
    errors = {}
    figures = []
    for peer in list(peers):
        if peer.name == SLOW_ON_CPU and hidden.device.type == "cpu":
            peers.remove(peer)
            figures.append(figure(peer.name, note="not run on the CPU: it takes tens of seconds"))
        elif peer.run is None:
            peers.remove(peer)
            figures.append(figure(peer.name, note=f"cannot run: {peer.missing}"))
        else:
            errors[peer.name] = _errors(_gradients(peer.run, hidden, weight, labels), truth)

    candidates = {GEMMS: head_gemms(hidden.detach()[rows], weight)}
    candidates |= {peer.name: _timed(peer.run, hidden, weight, labels) for peer in peers if peer.run is not None}
    times = interleave(
        candidates, 1 if settings.quick else 7, warmup=0 if settings.quick else 1
    )  # the check above ran each once
    ours, gemms = times[OURS].median, times[GEMMS].median
    flops = 3 * 2 * len(rows) * weight.numel()
    table = [
        figure(GEMMS, gemms, "s", spread=times[GEMMS].spread, note=f"the limit, {flops / gemms / 1e9:.0f} GFLOP/s"),
        figure(
            OURS, ours, "s", ratio=ours / gemms, ratio_of="time / bare GEMMs", at_most=1.3, spread=times[OURS].spread
        ),
    ]
    for peer in peers:
        if peer.name != OURS:
            time = times[peer.name]
            table.append(
                figure(
                    peer.name,
                    time.median,
                    "s",
                    ratio=time.median / ours,
                    ratio_of="time / packsft",
                    at_least=SPEEDUPS.get(peer.name),
                    spread=time.spread,
                    note=_verdict(errors[peer.name], errors[PLAIN]),
                )
            )
    ratio = max(ours_error / _allowed(plain) for ours_error, plain in zip(errors[OURS], errors[PLAIN], strict=True))
    table.append(
        figure(
            "packsft, error against float64",
            ratio=ratio,
            ratio_of="error / allowed",
            at_most=1.0,
            parity=True,
            note=_verdict(errors[OURS], errors[PLAIN]),
        )
    )
    if settings.quick:
        return [*table, *figures, figure("extra memory", note="not run with --quick")]
    return [*table, *figures, *_memory(peers, hidden, weight, labels), _memory_growth()]


def _inputs(shape: HeadShape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states and weights whose logits have variance 1; the scored rows form runs, as completions do."""
    torch.manual_seed(0)
    hidden_TM = torch.randn(shape.T, shape.M, device=device()).to(dtype).requires_grad_()
    weight_VM = (torch.randn(shape.V, shape.M, device=device()) / shape.M**0.5).to(dtype).requires_grad_()
    labels_T = torch.randint(shape.V, (shape.T,), device=device())
    unscored = shape.T - shape.N
    documents = 5
    starts = [shape.T * i // documents for i in range(documents)]
    for i, start in enumerate(starts):
        labels_T[start : start + unscored * (i + 1) // documents - unscored * i // documents] = -100
    assert int((labels_T != -100).sum()) == shape.N
    return hidden_TM, weight_VM, labels_T


def _gradients(run: Head, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = run(hidden, weight, labels)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def _exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64 from the same inputs."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    rows = (labels != -100).nonzero().flatten()
    return _gradients(lambda h, w, y: F.cross_entropy(h[rows] @ w.t(), y[rows]), hidden, weight, labels)


def _errors(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """Largest error over largest value: of the loss, the hidden states' gradient, the weight's gradient."""
    errors = []
    for ours, exact in zip(found, truth, strict=True):
        errors.append(float((ours.double() - exact).abs().max() / exact.abs().max()))
    return errors


def _allowed(plain: float) -> float:
    """Twice plain PyTorch's error and half a unit in the last place (eps is the distance from 1 to the next number)."""
    return 2 * plain + torch.finfo(training_dtype()).eps / 4


def _verdict(errors: list[float], plain: list[float]) -> str:
    listed = ", ".join(f"{name} {error:.1e}" for name, error in zip(("loss", "dX", "dW"), errors, strict=True))
    right = all(error <= _allowed(reference) for error, reference in zip(errors, plain, strict=True))
    return (
        f"errors: {listed}"
        if right
        else f"WRONG: errors {listed} (plain PyTorch: {', '.join(f'{e:.1e}' for e in plain)})"
    )


def _timed(run: Head, hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
    return lambda: _gradients(run, hidden, weight, labels)


def _memory(peers: list[Peer], hidden: Tensor, weight: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Extra memory of one forward and backward of each head."""
    logits = int((labels != -100).sum()) * len(weight) * weight.element_size() / 2**20
    used = {peer.name: extra_memory(_timed(peer.run, hidden, weight, labels)) for peer in peers if peer.run is not None}
    table = []
    for name, value in used.items():
        table.append(
            figure(
                f"extra memory, {name}",
                value,
                "MiB",
                ratio=value / used[OURS],
                ratio_of="memory / packsft",
                note=f"both gradients included; the logits of the scored rows alone are {logits:.0f} MiB"
                * (name == OURS),
            )
        )
    return table


def _memory_growth() -> dict[str, Any]:
    """How our extra memory grows with N: with full chunks of 4,096 rows, only by the gradient of the hidden states."""
    few, many = 8192, 16384
    grown = {}
    for count in (few, many):
        hidden, weight, labels = _inputs(HeadShape(count, count, SMOLLM2_HEAD.M, SMOLLM2_HEAD.V), training_dtype())
        rows = torch.arange(count, device=hidden.device)
        grown[count] = extra_memory(_timed(heads(rows)[0].run, hidden, weight, labels))
    return figure(
        f"extra memory, packsft, {many:,} scored rows",
        grown[many],
        "MiB",
        ratio=grown[many] / grown[few],
        ratio_of=f"memory / of {few:,} rows",
        at_most=1.2,
        note="the logits alone would grow to twice their size",
    )
