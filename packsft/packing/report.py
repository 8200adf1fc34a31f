"""What a packing plan does to a data set and to the number of optimizer steps, as data.

Nothing is lost silently: every example and token that goes in is counted as packed, truncated or dropped. This file
refuses to draw; `rows` gives labels and texts to whoever prints a table, `as_dict` gives plain values for JSON.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .balance import attention_costs, balanced_order, cost_imbalance
from .plan import PackPlan


@dataclass(frozen=True)
class PackingReport:
    """Counts before and after packing; tokens are tokens of the examples, without padding.

    - `examples_in` = `examples_packed` + `examples_dropped` (of length 0) + `unscored_dropped` (no scored token)
    - `examples_truncated`, `examples_split`: among the packed, those that lost their end or lie in several pieces
    - `tokens_in` = `tokens_kept` + `tokens_lost`, the tokens of unscored examples among the lost
    - `fill`: tokens / (packs * max_length); `packs_lower_bound`: ceil(tokens / max_length)
    - `examples_per_pack_*`: documents in a pack; 0 without packs
    - `steps_packed`, `steps_unpacked`: optimizer steps, `ceil(samples / effective_batch_size) * num_train_epochs`,
      where samples are packs or packed examples; `steps_exact`: under exact-step packing, whose steps take the examples
      that an unpacked run's would
    - `examples_per_step_mean`: packed examples in an optimizer step; unpacked it is `effective_batch_size`
    - `cost_imbalance`: attention cost (sum of squared document lengths) of the busiest of `ranks` devices over their
      mean, averaged over the optimizer steps, with packs in a random order as the trainer's sampler takes them, and
      `cost_imbalance_balanced` in that of `balanced_order`; None for a single rank or without a whole step
    """

    strategy: str
    max_length: int
    examples_in: int
    examples_packed: int
    examples_truncated: int
    examples_split: int
    examples_dropped: int
    unscored_dropped: int
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
    cost_imbalance_balanced: float | None

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
            (f"truncated at {self.max_length:,} tokens", self.examples_truncated),
            ("split", self.examples_split),
        ):
            if count:
                rows.append((f"examples {label}", f"{count:,} ({count / self.examples_in:.2%})"))
        lost = f"{self.tokens_lost:,} ({self.tokens_lost / self.tokens_in:.2%})" if self.tokens_lost else "0"
        rows += [("tokens kept", f"{self.tokens_kept:,}"), ("tokens lost", lost)]
        if self.strategy == "none":
            return [*rows, ("optimizer steps", f"{self.steps_unpacked:,}")]
        rows += [
            (
                f"packs of {self.max_length:,} ({self.strategy})",
                f"{self.packs:,} (at least {self.packs_lower_bound:,} needed)",
            ),
            ("fill", f"{self.fill:.2%}"),
            (
                "examples per pack",
                f"{self.examples_per_pack_mean:.1f} ({self.examples_per_pack_min:,} to {self.examples_per_pack_max:,})",
            ),
            (
                "examples per optimizer step",
                f"{self.examples_per_step_mean:,.1f} ({self.effective_batch_size:,} unpacked)",
            ),
        ]
        if self.cost_imbalance is not None:
            text = f"{self.cost_imbalance:.2f} ({self.cost_imbalance_balanced:.2f} in balanced order)"
            rows.append((f"attention cost, busiest of {self.ranks:,} devices / mean", text))
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
    unscored_dropped: int = 0,
    unscored_tokens: int = 0,
) -> PackingReport:
    """Report on a plan.

    `effective_batch_size` is per_device_train_batch_size * ranks * gradient_accumulation_steps. `unscored_dropped`
    counts examples left out because nothing in them is scored, of `unscored_tokens` tokens together; they were planned
    with a length of 0, so that the plan counts them among its dropped ones.

    Raises ValueError for an `effective_batch_size` that is below 1 or no multiple of `ranks`, `num_train_epochs` of 0
    or less, or a count that cannot be.
    """
    if effective_batch_size < 1:
        raise ValueError(f"effective_batch_size={effective_batch_size!r}: must be at least 1")
    if not num_train_epochs > 0:
        raise ValueError(f"num_train_epochs={num_train_epochs!r}: must be above 0")
    if ranks < 1 or effective_batch_size % ranks:
        raise ValueError(f"ranks={ranks!r}: must be at least 1 and divide effective_batch_size={effective_batch_size}")

    def steps(samples: int) -> int:
        return math.ceil(-(-samples // effective_batch_size) * num_train_epochs)  # epochs may be a fraction

    imbalance = balanced = None
    if ranks > 1 and len(plan) >= effective_batch_size:
        costs, accumulation = attention_costs(plan), effective_batch_size // ranks
        imbalance = cost_imbalance(np.random.default_rng(0).permutation(costs), ranks, accumulation)
        balanced = cost_imbalance(costs[balanced_order(plan, ranks)], ranks, accumulation)
    per_pack = np.diff(plan.offsets.astype(np.int64)) if len(plan) else np.zeros(1, np.int64)
    return PackingReport(
        strategy=plan.strategy,
        max_length=plan.max_length,
        **_account(plan, unscored_dropped, unscored_tokens),
        packs=len(plan),
        packs_lower_bound=plan.lower_bound,
        fill=plan.fill,
        examples_per_pack_mean=float(per_pack.mean()),
        examples_per_pack_min=int(per_pack.min()),
        examples_per_pack_max=int(per_pack.max()),
        effective_batch_size=effective_batch_size,
        num_train_epochs=num_train_epochs,
        steps_packed=steps(len(plan)),
        steps_unpacked=steps(plan.examples_packed),
        steps_exact=steps(plan.examples_packed),
        examples_per_step_mean=plan.examples_packed / max(1, -(-len(plan) // effective_batch_size)),
        ranks=ranks,
        cost_imbalance=imbalance,
        cost_imbalance_balanced=balanced,
    )


def _account(plan: PackPlan, unscored_dropped: int, unscored_tokens: int) -> dict[str, Any]:
    """What became of the examples and tokens that went in."""
    if not 0 <= unscored_dropped <= plan.examples_dropped:
        raise ValueError(
            f"unscored_dropped={unscored_dropped!r}: must be within the plan's {plan.examples_dropped} dropped"
        )
    return {
        "examples_in": plan.examples_in,
        "examples_packed": plan.examples_packed,
        "examples_truncated": plan.examples_truncated,
        "examples_split": plan.examples_split,
        "examples_dropped": plan.examples_dropped - unscored_dropped,
        "unscored_dropped": unscored_dropped,
        "tokens_in": plan.tokens_in + unscored_tokens,
        "tokens_kept": plan.num_tokens,
        "tokens_lost": plan.tokens_truncated + unscored_tokens,
    }
