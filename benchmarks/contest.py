"""Competitors on the same inputs: checked against float64, then timed in turns beside their limit, a row for each.

One that cannot run is a row with the reason; one whose answer is wrong is shown as wrong, and has no time. Knows
clocks and errors; knows nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure import Figure, figure, interleave, training_dtype
from peers import OURS, Peer
from torch import Tensor

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Limit:
    """What no implementation can beat: `work` in floating-point operations ("FLOP") or bytes moved ("B")."""

    name: str
    run: Callable[[], object]
    work: float
    unit: str


@dataclass(frozen=True)
class Verdict:
    """The largest error of each output of one competitor, relative to the output's largest value, beside the most
    that is allowed: twice that of plain PyTorch in the same dtype, and half a unit in the last place."""

    errors: dict[str, float]
    allowed: dict[str, float]

    @property
    def share(self) -> float:
        """The largest error over what is allowed for it."""
        return max(error / self.allowed[name] for name, error in self.errors.items())

    @property
    def right(self) -> bool:
        return self.share <= 1.0

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        if self.right:
            return f"errors: {listed}"
        return f"WRONG: errors {listed} (allowed: {', '.join(f'{value:.1e}' for value in self.allowed.values())})"


def check(
    peers: Sequence[Peer], outputs: Callable[[Any], Outputs], truth: Outputs, plain: str
) -> tuple[dict[str, Verdict], list[Figure]]:
    """The verdict on each competitor that runs, and a row for each that does not. Ours has to run.

    Args:
        outputs: what a competitor's `run` computes, by name.
        truth: the same in float64.
        plain: the name of the competitor whose rounding is the yardstick.
    """
    found: dict[str, dict[str, float]] = {}
    absent = []
    for peer in peers:
        reason = peer.missing
        if peer.run is not None:
            try:
                found[peer.name] = relative_errors(outputs(peer.run), truth)
                continue
            except Exception as error:
                if peer.name.startswith(OURS) or peer.name == plain:
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        absent.append(figure(peer.name, note=f"cannot run: {reason}"))
    allowed = allowed_errors(found[plain], training_dtype())
    return {name: Verdict(errors, allowed) for name, errors in found.items()}, absent


def allowed_errors(plain: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """Twice plain PyTorch's error and half a unit in the last place; eps is the distance from 1 to the next number."""
    return {name: 2 * error + torch.finfo(dtype).eps / 4 for name, error in plain.items()}


def relative_errors(found: Outputs, truth: Outputs) -> dict[str, float]:
    """Largest error over largest value, for each output; infinite where something is not a number."""
    errors = {
        name: float((found[name].double() - exact).abs().max() / exact.abs().max()) for name, exact in truth.items()
    }
    return {name: error if error == error else float("inf") for name, error in errors.items()}


def compete(
    peers: Sequence[Peer],
    verdicts: dict[str, Verdict],
    limit: Limit,
    timed: Callable[[Any], Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    chart: str,
    at_most: float | None = None,
    at_least: dict[str, float] | None = None,
    headlines: dict[str, str] | None = None,
) -> list[Figure]:
    """Time the limit and every competitor that is right, in turns; a row for each, and the assertion that ours is.

    Args:
        timed: from a competitor's `run` what is timed, forward and backward.
        at_most: the most that ours may take, times the limit.
        at_least: by competitor, the least that it takes, times ours.
        headlines: by competitor, its row in the README.
    """
    right = [peer for peer in peers if peer.name in verdicts and verdicts[peer.name].right]
    times = interleave({limit.name: limit.run} | {peer.name: timed(peer.run) for peer in right}, repeats, warmup=warmup)
    ours, floor = times[OURS].median if OURS in times else None, times[limit.name]
    headlines, at_least = headlines or {}, at_least or {}

    def achieved(seconds: float) -> dict[str, Any]:
        return {"rate": limit.work / seconds / 1e9, "rate_unit": f"G{limit.unit}/s", "chart": chart}

    table = [
        figure(
            limit.name, floor.median, "s", spread=floor.spread, note="the limit", limit=True, **achieved(floor.median)
        )
    ]
    for peer in peers:
        if (verdict := verdicts.get(peer.name)) is None:
            continue
        if not verdict.right:
            table.append(figure(peer.name, note=str(verdict)))
            continue
        seconds = times[peer.name].median
        mine = peer.name.startswith(OURS)
        compared: dict[str, Any] = {"ratio": seconds / floor.median, "ratio_of": f"time / {limit.name}"}
        if not mine and ours is not None:
            compared = {"ratio": seconds / ours, "ratio_of": "time / packsft", "at_least": at_least.get(peer.name)}
        elif peer.name == OURS:
            compared["at_most"] = at_most
        table.append(
            figure(
                peer.name, seconds, "s", spread=times[peer.name].spread, note=str(verdict),
                headline=headlines.get(peer.name, ""), **compared, **achieved(seconds),
            )
        )  # fmt: skip
    for name, verdict in verdicts.items():
        if name.startswith(OURS):
            table.append(
                figure(
                    f"{name}, error against float64", ratio=verdict.share, ratio_of="error / allowed", at_most=1.0,
                    parity=True, note=str(verdict),
                )
            )  # fmt: skip
    return table
