"""Checks competitors on the same inputs against float64, then times them beside their limit, a row for each.

One that cannot run is a row with the reason; one with a wrong answer is shown as wrong, and has no time. Knows clocks
and errors; knows nothing of what is computed.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness.measure import Figure, Timing, extra_memory, figure, interleave, synchronize
from harness.peers import OURS, Peer
from torch import Tensor

Outputs = dict[str, Tensor]
Timed = Callable[[Any], Callable[[], object]]  # from a competitor's `run`, what is timed


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
    """The largest error of each output, relative to its largest value, beside the most that is allowed."""

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

    def as_figure(self, name: str, **more: Any) -> Figure:
        shown = {"ratio": self.share, "ratio_of": "error / allowed", "at_most": 1.0, "parity": True, "note": str(self)}
        return figure(name, **shown | more)


def allowed_errors(plain: dict[str, float], found: Outputs) -> dict[str, float]:
    """Twice the error of plain PyTorch in the same dtype, and half a unit in the last place of the result."""
    assert all(math.isfinite(error) for error in plain.values()), f"plain PyTorch gave no numbers: {plain}"
    # eps is the distance from 1 to the next number
    return {name: 2 * error + torch.finfo(found[name].dtype).eps / 4 for name, error in plain.items()}


def relative_errors(found: Outputs, truth: Outputs) -> dict[str, float]:
    """Largest error over largest value, for each output; infinite where something is not a number."""
    errors = {
        name: float((found[name].double() - exact).abs().max() / exact.abs().max()) for name, exact in truth.items()
    }
    return {name: error if math.isfinite(error) else math.inf for name, error in errors.items()}


def check(
    peers: Sequence[Peer], outputs: Callable[[Any], Outputs], truth: Outputs, plain: dict[str, float]
) -> tuple[dict[str, Verdict], dict[str, str]]:
    """The verdict on each competitor that runs, and for each that does not the reason. Ours has to run.

    Args:
        outputs: what a competitor's `run` computes, by name.
        truth: the same in float64.
        plain: the `relative_errors` of plain PyTorch, the yardstick.
    """
    absent = {peer.name: peer.missing for peer in peers if peer.run is None}

    def verdict(run: Callable[..., Any]) -> Verdict:
        results = outputs(run)
        return Verdict(relative_errors(results, truth), allowed_errors(plain, results))

    found, failed = attempt({peer.name: partial(verdict, peer.run) for peer in peers if peer.run is not None})
    return found, absent | failed


def attempt(candidates: dict[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each returned, and for those that raised the reason. Ours must not raise."""
    found, absent = {}, {}
    for name, run in candidates.items():
        try:
            found[name] = run()
            synchronize()
        except Exception as error:
            if name.startswith(OURS):
                raise
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            gc.collect()
            torch.cuda.empty_cache()
    return found, absent


def runnable(candidates: dict[str, Callable[[], object]]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Run each once: those that did not raise, and for the others the reason."""
    found, absent = attempt({name: _without_result(run) for name, run in candidates.items()})
    return {name: candidates[name] for name in found}, absent


def _without_result(run: Callable[[], object]) -> Callable[[], None]:
    def ran() -> None:
        getattr(run, "prepare", lambda: None)()
        run()

    return ran


def contest(
    peers: Sequence[Peer],
    outputs: Callable[[Any], Outputs],
    truth: Outputs,
    plain: str,
    limit: Limit,
    timed: Timed,
    *,
    repeats: int,
    chart: str,
    prefix: str = "",
    at_most: float | None = None,
    at_least: dict[str, float] | None = None,
) -> Generator[Figure, None, dict[str, Verdict]]:
    """Check and time every competitor: a row for each, and the assertion that ours is right. Returns the verdicts.

    Ours and the limit come first and what compiles comes last, so that a run that is cut short has the others. Each
    group is timed in turns; ours also beside the others.

    Args:
        plain: the name of the competitor whose rounding is the yardstick.
        prefix: of the names of all rows.
        at_most: the most that ours may take, times the limit.
        at_least: by competitor, the least that it takes, times ours.
    """
    first = [peer for peer in peers if peer.name.startswith(OURS) or peer.name == plain]
    others = [[peer for peer in peers if peer not in first and peer.compiles == late] for late in (False, True)]
    yardstick = relative_errors(outputs(next(peer.run for peer in first if peer.name == plain)), truth)
    at_least = at_least or {}
    verdicts: dict[str, Verdict] = {}
    beside: dict[str, Callable[[], object]] = {limit.name: limit.run}
    for group in filter(None, (first, *others)):
        found, absent = check(group, outputs, truth, yardstick)
        verdicts |= found
        right = {peer.name: timed(peer.run) for peer in group if peer.name in found and found[peer.name].right}
        able, failed = runnable(right)  # which also is the warm-up
        times = interleave(beside | able, repeats, warmup=0) if able else {}

        def row(name: str, times: dict[str, Timing] = times, **more: Any) -> Figure:
            time = times[name]
            achieved = {"rate": limit.work / time.median / 1e9, "rate_unit": f"G{limit.unit}/s"}
            return figure(
                f"{prefix}{name}", time.median, "s", spread=time.spread, chart=chart, series=name, **achieved, **more
            )

        if group is first:
            yield row(limit.name, note=limit.note, limit=True)
        for peer in group:
            name, reason = peer.name, (absent | failed).get(peer.name)
            if reason is not None:
                yield figure(f"{prefix}{name}", note=f"cannot run: {reason}")
            elif name not in able:
                yield figure(f"{prefix}{name}", note=str(found[name]))
            else:
                other = limit.name if name.startswith(OURS) or OURS not in times else OURS
                target = {"at_most": at_most} if name == OURS else {"at_least": at_least.get(name)}
                ratio = times[name].median / times[other].median
                yield row(name, note=str(found[name]), ratio=ratio, ratio_of=f"time / {other}", **target)
        for name, verdict in found.items():
            if name.startswith(OURS):
                yield verdict.as_figure(f"{prefix}{name}, error against float64")
        beside = {name: run for name, run in (beside | able).items() if name == OURS}
    return verdicts


def memory(
    peers: Sequence[Peer], verdicts: dict[str, Verdict], timed: Timed, chart: str, prefix: str = "", note: str = ""
) -> Iterator[Figure]:
    """Extra memory of one run of each competitor that is right."""
    right = {peer.name: timed(peer.run) for peer in peers if peer.name in verdicts and verdicts[peer.name].right}
    used = {name: extra_memory(run) for name, run in runnable(right)[0].items()}
    for name, value in used.items():
        yield figure(
            f"{prefix}extra memory, {name}", value, "MiB", ratio=value / used[OURS], ratio_of="memory / packsft",
            note=note * (name == OURS), chart=chart, series=name,
        )  # fmt: skip
