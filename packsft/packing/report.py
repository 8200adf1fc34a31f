"""What a packing plan does to a data set and to the number of optimizer steps, as data.

Nothing is lost silently: every example and token that goes in is counted as packed, or as lost and why. This file
refuses to draw; `rows` gives labels and texts to whoever prints a table, `as_dict` gives plain values for JSON.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np

from .balance import attention_costs, balanced_order, cost_imbalance
from .plan import PackPlan
from .steps import simulate_steps

SIMULATED_STEPS = 64


@dataclass(frozen=True)
class PackingReport:
    """Counts before and after packing; tokens are tokens of the examples, without padding.

    - `examples_in` = `examples_packed` + `examples_dropped` (of length 0) + `unscored_dropped` (no scored token)
      + `overlong_dropped` (longer than `max_length`)
    - `examples_truncated`, `examples_split`: among the packed, those that were cut short or lie in several pieces
    - `segments_unscored`: segments of the packed that are left out, since they have no scored token
    - `tokens_in` = `tokens_kept` + `tokens_lost`, for any of these reasons
    - `packs`, under "step" the passes of an epoch on all devices, estimated from those of 64 steps; `fill`: tokens /
      (packs * max_length), or tokens_per_pass; `packs_lower_bound`: ceil(tokens / max_length)
    - `examples_per_pack_*`: documents in a pack; 0 without packs
    - `steps_packed`, `steps_unpacked`: optimizer steps, `ceil(samples / effective_batch_size) * num_train_epochs`,
      where samples are packs or packed examples (or the segments of those that are split); `steps_exact`: under
      exact-step packing, whose steps take the examples that an unpacked run's would
    - `examples_per_step_mean`: packed examples in an optimizer step; unpacked it is `effective_batch_size`
    - `cost_imbalance`: attention cost (sum of squared document lengths) of the busiest of `ranks` devices over their
      mean, averaged over the optimizer steps, in the order of training; `cost_imbalance_shuffled`: were the order
      random; None for a single rank or without a whole step
    """

    strategy: str
    max_length: int
    examples_in: int
    examples_packed: int
    examples_truncated: int
    examples_split: int
    examples_dropped: int
    unscored_dropped: int
    overlong_dropped: int
    segments_unscored: int
    tokens_in: int
    tokens_kept: int
    tokens_lost: int
    packs: int
    packs_lower_bound: int
    fill: float
    examples_per_pack_mean: float
    examples_per_pack_min: int
    examples_per_pack_max: int
    effective_batch_size: int
    num_train_epochs: float
    steps_packed: int
    steps_unpacked: int
    steps_exact: int
    examples_per_step_mean: float
    ranks: int
    cost_imbalance: float | None
    cost_imbalance_shuffled: float | None

    def as_dict(self) -> dict[str, str | int | float | None]:
        """Field names and plain Python values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Labels and texts for a two-column table; a count that is 0 is left out unless it says something."""
        rows = [("examples", f"{self.examples_in:,}")]
        if self.examples_packed != self.examples_in:
            rows.append(("examples kept", f"{self.examples_packed:,}"))
        for label, count in (
            ("dropped, empty", self.examples_dropped),
            ("dropped, no scored token", self.unscored_dropped),
            (f"dropped, above {self.max_length:,} tokens", self.overlong_dropped),
            (f"truncated at {self.max_length:,} tokens", self.examples_truncated),
            ("split", self.examples_split),
        ):
            if count:
                rows.append((f"examples {label}", f"{count:,} ({count / self.examples_in:.2%})"))
        if self.segments_unscored:
            rows.append(("segments dropped, no scored token", f"{self.segments_unscored:,}"))
        lost = f"{self.tokens_lost:,} ({self.tokens_lost / self.tokens_in:.2%})" if self.tokens_lost else "0"
        rows += [("tokens kept", f"{self.tokens_kept:,}"), ("tokens lost", lost)]
        if self.strategy == "none":
            return [*rows, ("optimizer steps", f"{self.steps_unpacked:,}")]
        exact = self.strategy == "step"
        kind = "passes of an epoch" if exact else f"packs of {self.max_length:,}"
        rows += [
            (
                f"{kind} ({self.strategy})",
                f"{'about ' * exact}{self.packs:,} (at least {self.packs_lower_bound:,} needed)",
            ),
            ("fill", f"{self.fill:.2%}"),
            (
                "examples per pass" if exact else "examples per pack",
                f"{self.examples_per_pack_mean:.1f} ({self.examples_per_pack_min:,} to {self.examples_per_pack_max:,})",
            ),
            (
                "examples per optimizer step",
                f"{self.effective_batch_size:,}"
                if exact
                else f"{self.examples_per_step_mean:,.1f} ({self.effective_batch_size:,} unpacked)",
            ),
        ]
        if self.cost_imbalance is not None:
            text = f"{self.cost_imbalance:.2f} ({self.cost_imbalance_shuffled:.2f} in a random order)"
            rows.append((f"attention cost, busiest of {self.ranks:,} devices / mean", text))
        if exact:
            return [*rows, ("optimizer steps, as unpacked", f"{self.steps_exact:,}")]
        return [
            *rows,
            ("optimizer steps, packed", f"{self.steps_packed:,}"),
            ("optimizer steps, unpacked or exact-step", f"{self.steps_unpacked:,}"),
        ]


def packing_report(
    plan: PackPlan,
    *,
    effective_batch_size: int,
    num_train_epochs: float,
    ranks: int = 1,
    packs_at_once: int | None = None,
    tokens_per_pass: int | None = None,
) -> PackingReport:
    """Report on a plan.

    `effective_batch_size` is per_device_train_batch_size * ranks * gradient_accumulation_steps; `packs_at_once` is
    per_device_train_batch_size * ranks where training follows `balanced_order`, else None; `tokens_per_pass`, by
    default the plan's `max_length`, is for the strategy "step" only.

    Raises ValueError for an `effective_batch_size` that is below 1 or no multiple of `ranks`, or `num_train_epochs` of
    0 or less.
    """
    if effective_batch_size < 1:
        raise ValueError(f"effective_batch_size={effective_batch_size!r}: must be at least 1")
    if not num_train_epochs > 0:
        raise ValueError(f"num_train_epochs={num_train_epochs!r}: must be above 0")
    if ranks < 1 or effective_batch_size % ranks:
        raise ValueError(f"ranks={ranks!r}: must be at least 1 and divide effective_batch_size={effective_batch_size}")

    def steps(samples: int) -> int:
        return math.ceil(-(-samples // effective_batch_size) * num_train_epochs)  # epochs may be a fraction

    # what an unpacked run would take one by one: the segments; those of "wrapped" end where its packs do
    samples = plan.examples_packed if plan.strategy == "wrapped" else len(plan.examples)
    if plan.strategy == "step":
        packs = _exact_steps(plan, effective_batch_size, ranks, tokens_per_pass or plan.max_length)
    else:
        packs = _packs(plan, effective_batch_size, ranks, packs_at_once)
    num_packs = packs["packs"]
    return PackingReport(
        strategy=plan.strategy,
        max_length=plan.max_length,
        examples_in=plan.examples_in,
        examples_packed=plan.examples_packed,
        examples_truncated=plan.examples_truncated,
        examples_split=plan.examples_split,
        examples_dropped=plan.examples_empty,
        unscored_dropped=plan.examples_unscored,
        overlong_dropped=plan.examples_overlong_dropped,
        segments_unscored=plan.segments_unscored,
        tokens_in=plan.tokens_in,
        tokens_kept=plan.num_tokens,
        tokens_lost=plan.tokens_lost,
        effective_batch_size=effective_batch_size,
        num_train_epochs=num_train_epochs,
        steps_packed=steps(len(plan)),
        steps_unpacked=steps(samples),
        steps_exact=steps(samples),
        examples_per_pack_mean=len(plan.examples) / max(num_packs, 1),
        examples_per_step_mean=samples / max(1, -(-len(plan) // effective_batch_size)),
        ranks=ranks,
        **packs,
    )


def _packs(plan: PackPlan, effective_batch_size: int, ranks: int, packs_at_once: int | None) -> dict[str, Any]:
    """What a plan over the whole data set makes, and the attention cost in the order of its training."""
    imbalance = shuffled = None
    if ranks > 1 and len(plan) >= effective_batch_size:
        costs, accumulation = attention_costs(plan), effective_batch_size // ranks
        shuffled = cost_imbalance(np.random.default_rng(0).permutation(costs), ranks, accumulation)
        order = None if packs_at_once is None else balanced_order(plan, packs_at_once)
        imbalance = shuffled if order is None else cost_imbalance(costs[order], ranks, accumulation)
    per_pack = np.diff(plan.offsets.astype(np.int64)) if len(plan) else np.zeros(1, np.int64)
    return {
        "packs": len(plan),
        "packs_lower_bound": plan.lower_bound,
        "fill": plan.fill,
        "examples_per_pack_min": int(per_pack.min()),
        "examples_per_pack_max": int(per_pack.max()),
        "cost_imbalance": imbalance,
        "cost_imbalance_shuffled": shuffled,
    }


def _exact_steps(plan: PackPlan, effective_batch_size: int, ranks: int, tokens_per_pass: int) -> dict[str, Any]:
    """The passes of an epoch, from those of some steps in a random order."""
    lengths = plan.stops.astype(np.int64) - plan.starts
    steps = simulate_steps(lengths, effective_batch_size, tokens_per_pass, ranks, SIMULATED_STEPS)
    passes = [documents for shares in steps for share in shares for documents in share]
    num_packs = round(len(passes) * len(lengths) / max(1, sum(map(len, passes))))
    imbalance = shuffled = None
    whole = [shares for shares in steps if sum(len(d) for share in shares for d in share) == effective_batch_size]
    if ranks > 1 and whole:
        squares = lengths**2
        costs = [squares[np.concatenate(share)].sum() for shares in whole for share in shares]
        taken = np.concatenate([np.sort(np.concatenate(list(chain(*shares)))) for shares in whole])
        imbalance = cost_imbalance(np.array(costs), ranks)
        shuffled = cost_imbalance(squares[taken].reshape(-1, effective_batch_size // ranks).sum(axis=1), ranks)
    return {
        "packs": num_packs,
        "packs_lower_bound": -(-plan.num_tokens // tokens_per_pass),
        "fill": plan.num_tokens / (num_packs * tokens_per_pass) if num_packs else 0.0,
        "examples_per_pack_min": min(map(len, passes), default=0),
        "examples_per_pack_max": max(map(len, passes), default=0),
        "cost_imbalance": imbalance,
        "cost_imbalance_shuffled": shuffled,
    }
