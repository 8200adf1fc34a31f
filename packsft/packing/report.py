"""What a packing plan does to a data set and to the number of optimizer steps, as data.

Nothing is lost silently: every example and token that goes in is counted as packed, or as lost and why. This file
refuses to draw; `rows` gives labels and texts to whoever prints a table, `as_dict` gives plain values for JSON.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from .plan import PackPlan


@dataclass(frozen=True)
class PackingReport:
    """Counts before and after packing; tokens are tokens of the examples, without padding.

    - `examples_in` = `examples_packed` + `examples_dropped` (of length 0) + `unscored_dropped` (no scored token)
      + `overlong_dropped` (longer than `max_length`)
    - `examples_truncated`, `examples_split`: among the packed, those that were cut short or lie in several pieces
    - `segments_unscored`: segments of the packed that are left out, since they have no scored token
    - `tokens_in` = `tokens_kept` + `tokens_lost`, for any of these reasons
    - `fill`: tokens / (packs * max_length); `packs_lower_bound`: ceil(tokens / max_length)
    - `examples_per_pack_*`: documents in a pack; 0 without packs
    - `steps_packed`, `steps_unpacked`: optimizer steps, `ceil(samples / effective_batch_size) * num_train_epochs`,
      where samples are packs or packed examples
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

    def as_dict(self) -> dict[str, str | int | float]:
        """Field names and plain Python values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Labels and texts for a two-column table; a count that is 0 is left out unless it says something."""
        rows = [("examples", f"{self.examples_in:,}")]
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
        return [
            *rows,
            (
                f"packs of {self.max_length:,} ({self.strategy})",
                f"{self.packs:,} (at least {self.packs_lower_bound:,} needed)",
            ),
            ("fill", f"{self.fill:.2%}"),
            (
                "examples per pack",
                f"{self.examples_per_pack_mean:.1f} ({self.examples_per_pack_min:,} to {self.examples_per_pack_max:,})",
            ),
            ("optimizer steps, packed", f"{self.steps_packed:,}"),
            ("optimizer steps, unpacked", f"{self.steps_unpacked:,}"),
        ]


def packing_report(plan: PackPlan, *, effective_batch_size: int, num_train_epochs: float) -> PackingReport:
    """Report on a plan.

    `effective_batch_size` is per_device_train_batch_size * devices * gradient_accumulation_steps.

    Raises ValueError for an `effective_batch_size` below 1 or `num_train_epochs` of 0 or less.
    """
    if effective_batch_size < 1:
        raise ValueError(f"effective_batch_size={effective_batch_size!r}: must be at least 1")
    if not num_train_epochs > 0:
        raise ValueError(f"num_train_epochs={num_train_epochs!r}: must be above 0")

    def steps(samples: int) -> int:
        return math.ceil(-(-samples // effective_batch_size) * num_train_epochs)  # epochs may be a fraction

    per_pack = np.diff(plan.offsets.astype(np.int64)) if len(plan) else np.zeros(1, np.int64)
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
    )
