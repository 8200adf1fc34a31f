"""Reports what a packing plan does to a data set and to the number of optimizer steps.

Draws nothing: `rows` gives labels and texts for a table, `as_dict` gives plain values for JSON.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np

from .account import Account
from .balance import attention_costs, balanced_order, cost_imbalance
from .plan import PackPlan
from .steps import simulate_steps
from .strategies import STRATEGIES

SIMULATED_STEPS = 64


@dataclass(frozen=True)
class PackingReport:
    """Counts before and after packing. Tokens are tokens of the examples, without padding.

    - `account`: what went in, and what was lost and why
    - `tokens_per_pass`: under "step" the limit of a pass, otherwise `max_length`
    - `packs`: under "step" the passes of an epoch on all ranks, estimated from 64 steps; `fill`: tokens / (packs *
      tokens_per_pass); `packs_lower_bound`: ceil(tokens / tokens_per_pass); for both, a longer example counts as
      `tokens_per_pass`: it is a pass of its own
    - `examples_per_pack_*`: documents in a pack; 0 without packs
    - `steps_packed`, `steps_unpacked`: optimizer steps, `ceil(samples / effective_batch_size) * num_train_epochs`;
      samples are packs, or packed examples (segments of examples that are split), as with exact steps
    - `examples_per_step_mean`: packed examples in an optimizer step; unpacked it is `effective_batch_size`
    - `cost_imbalance`: attention cost (sum of squared document lengths) of the busiest of `ranks` ranks over their
      mean, averaged over the optimizer steps in training order; `cost_imbalance_shuffled`: the same in a random order.
      None for a single rank or without a whole step
    """

    strategy: str
    max_length: int
    tokens_per_pass: int
    account: Account
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
    examples_per_step_mean: float
    ranks: int
    cost_imbalance: float | None
    cost_imbalance_shuffled: float | None

    def as_dict(self) -> dict[str, str | int | float | None]:
        """Field names and plain Python values, with the fields of the account."""
        values = asdict(self)
        tokens = {"tokens_kept": self.account.tokens_kept, "tokens_lost": self.account.tokens_lost}
        return values.pop("account") | tokens | values

    def _filled(self, exact: bool) -> tuple[str, str]:
        """The row that says how full packs are; under "step" in tokens, since a pass holds at most its step."""
        if not exact or not self.packs:
            return "fill", f"{self.fill:.2%}"
        mean, longer = self.fill * self.tokens_per_pass, self.max_length > self.tokens_per_pass
        return (
            "tokens per pass",
            f"{mean:,.0f} on average, at most {self.tokens_per_pass:,}" + ", or one longer example" * longer,
        )

    def rows(self) -> list[tuple[str, str]]:
        """Labels and texts for a two-column table. Most counts of 0 are left out."""
        account = self.account
        rows = [("examples", f"{account.examples_in:,}")]
        if account.examples_packed != account.examples_in:
            rows.append(("examples kept", f"{account.examples_packed:,}"))
        for label, count in (
            ("dropped, empty", account.examples_empty),
            ("dropped, no scored token", account.examples_unscored),
            (f"dropped, above {self.max_length:,} tokens", account.examples_overlong_dropped),
            (f"truncated at {self.max_length:,} tokens", account.examples_truncated),
            ("split", account.examples_split),
        ):
            if count:
                rows.append((f"examples {label}", f"{count:,} ({count / account.examples_in:.2%})"))
        if account.segments_unscored:
            rows.append(("segments dropped, no scored token", f"{account.segments_unscored:,}"))
        lost = (
            f"{account.tokens_lost:,} ({account.tokens_lost / account.tokens_in:.2%})" if account.tokens_lost else "0"
        )
        epochs = ("epochs", f"{self.num_train_epochs:g}")
        rows += [("tokens kept", f"{account.tokens_kept:,}"), ("tokens lost", lost)]
        if self.strategy == "none":
            return [*rows, epochs, ("optimizer steps", f"{self.steps_unpacked:,}")]
        exact = STRATEGIES[self.strategy].exact_steps
        kind = "passes of an epoch" if exact else f"packs of {self.max_length:,}"
        what = "pieces" if exact and account.examples_split else "examples"  # a piece counts as an example
        rows += [
            (
                f"{kind} ({self.strategy})",
                f"{'about ' * exact}{self.packs:,} (at least {self.packs_lower_bound:,} needed)",
            ),
            self._filled(exact),
            (
                f"{what} per pass" if exact else "examples per pack",
                f"{self.examples_per_pack_mean:.1f} ({self.examples_per_pack_min:,} to {self.examples_per_pack_max:,})",
            ),
            (
                f"{what} per optimizer step",
                f"{self.effective_batch_size:,}"
                if exact
                else f"{self.examples_per_step_mean:,.1f} ({self.effective_batch_size:,} unpacked)",
            ),
        ]
        if self.cost_imbalance is not None:
            text = f"{self.cost_imbalance:.2f} ({self.cost_imbalance_shuffled:.2f} in a random order)"
            rows.append((f"attention cost, busiest of {self.ranks:,} devices / mean", text))
        if exact:
            as_unpacked = "" if account.examples_split else ", as unpacked"
            return [*rows, epochs, (f"optimizer steps{as_unpacked}", f"{self.steps_unpacked:,}")]
        return [
            *rows,
            epochs,
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

    Args:
        effective_batch_size: per_device_train_batch_size * ranks * gradient_accumulation_steps.
        packs_at_once: per_device_train_batch_size * ranks if training follows `balanced_order`, otherwise None.
        tokens_per_pass: for the strategy "step" only; the plan's `max_length` by default.

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

    # an unpacked run takes segments one by one, except that the segments of "wrapped" exist only through its packs
    strategy = STRATEGIES[plan.strategy]
    samples = plan.account.examples_packed if strategy.end_to_end else len(plan.examples)
    tokens_per_pass = (strategy.exact_steps and tokens_per_pass) or plan.max_length
    if strategy.exact_steps:
        packs = _exact_steps(plan, effective_batch_size, ranks, tokens_per_pass)
    else:
        packs = _packs(plan, effective_batch_size, ranks, packs_at_once)
    num_packs = packs["packs"]
    return PackingReport(
        strategy=plan.strategy,
        max_length=plan.max_length,
        tokens_per_pass=tokens_per_pass,
        account=plan.account,
        effective_batch_size=effective_batch_size,
        num_train_epochs=num_train_epochs,
        steps_packed=steps(len(plan)),
        steps_unpacked=steps(samples),
        examples_per_pack_mean=len(plan.examples) / max(num_packs, 1),
        examples_per_step_mean=samples / max(1, -(-len(plan) // effective_batch_size)),
        ranks=ranks,
        **packs,
    )


def _packs(plan: PackPlan, effective_batch_size: int, ranks: int, packs_at_once: int | None) -> dict[str, Any]:
    """The packs of a plan over the whole data set, and the attention cost in training order."""
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
    """The passes of an epoch, estimated from some steps in a random order."""
    lengths = plan.document_lengths
    sizes = int(np.minimum(lengths, tokens_per_pass).sum())
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
        "packs_lower_bound": -(-sizes // tokens_per_pass),
        "fill": sizes / (num_packs * tokens_per_pass) if num_packs else 0.0,
        "examples_per_pack_min": min(map(len, passes), default=0),
        "examples_per_pack_max": max(map(len, passes), default=0),
        "cost_imbalance": imbalance,
        "cost_imbalance_shuffled": shuffled,
    }
