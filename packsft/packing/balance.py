"""Orders packs so that packs trained at the same time cost attention the same.

Attention costs the square of a document's length, so packs of equal size can differ several times in cost, and all
ranks wait for the costliest pack. This file knows lengths only.

The order is for a sampler that keeps it (`packsft.data.packs.PackSampler`): accelerate then gives consecutive batches
to consecutive ranks. Groups come shuffled.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .plan import PackPlan


def attention_costs(plan: PackPlan) -> NDArray[np.int64]:
    """The sum of the squared lengths of each pack's documents, `[P]`."""
    return plan.per_pack(plan.document_lengths**2)


def balanced_order(plan: PackPlan, group_size: int, seed: int = 0) -> NDArray[np.int64]:
    """A permutation `[P]` of the packs in which each run of `group_size` packs costs attention nearly the same.

    `group_size` is what all devices take at once: packs per device * devices, without gradient accumulation. Then each
    micro-batch is balanced, and so is a step of several. Packs are sorted by cost, and neighbours make a group. `seed`
    decides which packs stay outside a group and come last, the order of the groups, and the order within a group.

    Raises ValueError for a `group_size` below 1.
    """
    if group_size < 1:
        raise ValueError(f"group_size={group_size!r}: must be at least 1")
    rng = np.random.default_rng(seed)
    by_cost = np.argsort(attention_costs(plan), kind="stable")
    num_rest = len(plan) % group_size
    rest = int(rng.integers(len(plan) - num_rest + 1)) if num_rest else 0  # a run of packs at a random place
    groups = np.delete(by_cost, slice(rest, rest + num_rest)).reshape(-1, group_size)
    groups = rng.permuted(groups[rng.permutation(len(groups))], axis=1)
    return np.concatenate((groups.ravel(), rng.permutation(by_cost[rest : rest + num_rest])))


def cost_imbalance(costs: NDArray[np.int64], ranks: int, accumulation: int = 1) -> float:
    """Cost of the busiest rank over the mean of the ranks, averaged over the optimizer steps; 1 means balanced.

    `costs` come in training order and are dealt to the ranks one by one; an incomplete last step is left out.
    """
    step = ranks * accumulation
    steps = costs[: len(costs) // step * step].reshape(-1, accumulation, ranks).sum(axis=1)
    return float((steps.max(axis=1) / steps.mean(axis=1)).mean()) if len(steps) else 1.0
