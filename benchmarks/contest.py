"""Competitors on the same inputs: checked against float64, then timed in turns beside their limit, a row for each.

One that cannot run is a row with the reason; one whose answer is wrong is shown as wrong, and has no time. Knows
clocks and errors; knows nothing of what is computed.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure import Figure, figure, interleave, synchronize
from peers import OURS, Peer
from torch import Tensor

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Limit:
    """What the times stand beside: `work` in floating-point operations ("FLOP") or bytes moved ("B")."""

    name: str
    run: Callable[[], object]
    work: float
    unit: str
    note: str = "the limit"


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
) -> tuple[dict[str, Verdict], dict[str, str]]:
    """The verdict on each competitor that runs, and for each that does not the reason. Ours has to run.

    Args:
        outputs: what a competitor's `run` computes, by name.
        truth: the same in float64.
        plain: the name of the competitor whose rounding is the yardstick.
    """
    found: dict[str, dict[str, float]] = {}
    dtypes: dict[str, dict[str, torch.dtype]] = {}
    absent = {peer.name: peer.missing for peer in peers if peer.run is None}
    for peer in peers:
        if peer.run is None:
            continue
        try:
            results = outputs(peer.run)
            synchronize()
            found[peer.name] = relative_errors(results, truth)
            dtypes[peer.name] = {name: result.dtype for name, result in results.items()}
        except Exception as error:
            absent[peer.name] = _reason(peer, error, plain)
    return {
        name: Verdict(errors, allowed_errors(found[plain], dtypes[name])) for name, errors in found.items()
    }, absent  # fmt: skip


def allowed_errors(plain: dict[str, float], dtypes: dict[str, torch.dtype]) -> dict[str, float]:
    """Twice plain PyTorch's error and half a unit in the last place; eps is the distance from 1 to the next number."""
    assert all(math.isfinite(error) for error in plain.values()), f"plain PyTorch gave no numbers: {plain}"
    return {name: 2 * error + torch.finfo(dtypes[name]).eps / 4 for name, error in plain.items()}


def relative_errors(found: Outputs, truth: Outputs) -> dict[str, float]:
    """Largest error over largest value, for each output; infinite where something is not a number."""
    errors = {
        name: float((found[name].double() - exact).abs().max() / exact.abs().max()) for name, exact in truth.items()
    }
    return {name: error if math.isfinite(error) else math.inf for name, error in errors.items()}


def runnable(
    candidates: dict[str, Callable[[], object]], ours: str = OURS
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Run each once: those that did not raise, and for the others the reason. What begins with `ours` has to run."""
    able, absent = {}, {}
    for name, run in candidates.items():
        try:
            getattr(run, "prepare", lambda: None)()
            run()
            synchronize()
            able[name] = run
        except Exception as error:
            absent[name] = _reason(Peer(name, run), error, ours)
            gc.collect()
            torch.cuda.empty_cache()
    return able, absent


def _reason(peer: Peer, error: Exception, indispensable: str) -> str:
    if peer.name.startswith(OURS) or peer.name == indispensable:
        raise error
    return f"{type(error).__name__}: {error}".splitlines()[0]


def compete(
    peers: Sequence[Peer],
    verdicts: dict[str, Verdict],
    absent: dict[str, str],
    limit: Limit,
    timed: Callable[[Any], Callable[[], object]],
    *,
    repeats: int,
    chart: str,
    prefix: str = "",
    at_most: float | None = None,
    at_least: dict[str, float] | None = None,
    headlines: dict[str, str] | None = None,
) -> list[Figure]:
    """Time the limit and every competitor that is right, in turns; a row for each, and the assertion that ours is.

    Args:
        absent: by competitor, why it cannot run.
        timed: from a competitor's `run` what is timed, forward and backward.
        prefix: of the names of all rows.
        at_most: the most that ours may take, times the limit.
        at_least: by competitor, the least that it takes, times ours.
        headlines: by competitor, its row in the README.
    """
    right = {peer.name: timed(peer.run) for peer in peers if peer.name in verdicts and verdicts[peer.name].right}
    limit.run()
    able, failed = runnable(right)  # which also is the warm-up
    times = interleave({limit.name: limit.run} | able, repeats, warmup=0)
    absent = absent | failed
    headlines, at_least = headlines or {}, at_least or {}

    def row(name: str, **more: Any) -> Figure:
        time = times[name]
        achieved = {"rate": limit.work / time.median / 1e9, "rate_unit": f"G{limit.unit}/s"}
        return figure(
            f"{prefix}{name}", time.median, "s", spread=time.spread, chart=chart, series=name, **achieved, **more
        )

    table = [row(limit.name, note=limit.note, limit=True)]
    for peer in peers:
        name = peer.name
        if name in absent:
            table.append(figure(f"{prefix}{name}", note=f"cannot run: {absent[name]}"))
        elif name not in able:
            table.append(figure(f"{prefix}{name}", note=str(verdicts[name])))
        else:
            beside = limit.name if name.startswith(OURS) or OURS not in times else OURS
            compared: dict[str, Any] = {"ratio": times[name].median / times[beside].median}
            compared |= {"ratio_of": f"time / {beside}", "headline": headlines.get(name, "")}
            compared |= {"at_most": at_most} if name == OURS else {"at_least": at_least.get(name)}
            table.append(row(name, note=str(verdicts[name]), **compared))
    for name, verdict in verdicts.items():
        if name.startswith(OURS):
            table.append(
                figure(
                    f"{prefix}{name}, error against float64", ratio=verdict.share, ratio_of="error / allowed",
                    at_most=1.0, parity=True, note=str(verdict),
                )
            )  # fmt: skip
    return table
