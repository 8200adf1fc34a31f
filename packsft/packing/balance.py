"""An order of packs in which those that are trained on together cost attention the same.

Attention costs the square of a document's length, so that packs of equally many tokens can differ several times over,
and all ranks wait for the one with the costliest pack. This file knows a plan's lengths, not ranks or samplers.

The order is for a sampler that keeps it (`packsft.data.packs.PackSampler`), of which `accelerate` hands consecutive
batches to consecutive ranks. The groups come shuffled already.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .plan import PackPlan


def attention_costs(plan: PackPlan) -> NDArray[np.int64]:
    """The sum of the squared lengths of each pack's documents, `[P]`."""
    squares = (plan.stops.astype(np.int64) - plan.starts.astype(np.int64)) ** 2
    return np.diff(np.concatenate(([0], np.cumsum(squares)))[plan.offsets])


def balanced_order(plan: PackPlan, group_size: int, seed: int = 0) -> NDArray[np.int64]:
    """A permutation of the packs, `[P]`, in which each run of `group_size` packs costs attention nearly the same.

    `group_size` is what all devices take at once: packs per device * devices. Their passes are then even one by one,
    and so is a step of several (times the accumulation, the passes of a group would not be). The packs are sorted by
    cost and neighbours make a group; `seed` says which few stay outside a group and come last, the order of the groups,
    and the order within each.

    Raises ValueError for a `group_size` below 1.
    """
    if group_size < 1:
        raise ValueError(f"group_size={group_size!r}: must be at least 1")
    rng = np.random.default_rng(seed)
    by_cost = np.argsort(attention_costs(plan), kind="stable")
    num_rest = len(plan) % group_size
    rest = int(rng.integers(len(plan) - num_rest + 1)) if num_rest else 0  # any place but always a whole run
    groups = np.delete(by_cost, slice(rest, rest + num_rest)).reshape(-1, group_size)
    groups = rng.permuted(groups[rng.permutation(len(groups))], axis=1)
    return np.concatenate((groups.ravel(), rng.permutation(by_cost[rest : rest + num_rest])))


def cost_imbalance(costs: NDArray[np.int64], ranks: int, accumulation: int = 1) -> float:
    """The highest cost of a rank in an optimizer step over the mean of the ranks, averaged over the steps; 1 is even.

    `costs` in the order of training, dealt to the ranks one by one; the rest that makes no whole step is left out.
    """
    step = ranks * accumulation
    steps = costs[: len(costs) // step * step].reshape(-1, accumulation, ranks).sum(axis=1)
    return float((steps.max(axis=1) / steps.mean(axis=1)).mean()) if len(steps) else 1.0
