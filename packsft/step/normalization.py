"""What a loss is divided by: known on the host, summed over an optimizer step and its ranks.

The loss of an optimizer step is the sum over all its scored tokens divided by their number (or, where every example
counts the same, the weighted sum divided by the sum of the weights), however they are split into passes, micro-batches
and ranks. Gradients of the parts then add up to the gradient of one large batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def items_in_step(
    batches: Sequence[Mapping[str, Any]], accelerator: Any, *, across_ranks: bool
) -> int | float | Tensor:
    """The scored tokens of an optimizer step, or the sum of their weights. Without any, 1: its loss is zero.

    Args:
        batches: what this rank's data loader gave for the step: its micro-batches, or one exact step, which knows the
            number on all ranks already.
        accelerator: accelerate's; sums over its processes.
        across_ranks: whether to sum over ranks (transformers' `average_tokens_across_devices`).

    Returns:
        A number, or with several ranks a 0-d tensor on the device, which is not read back. Ranks that share a batch
        count it once.
    """
    items = sum(batch["num_items"] for batch in batches)
    if not across_ranks or accelerator.num_processes == 1 or any("passes" in batch for batch in batches):
        return items or 1
    total = accelerator.reduce(torch.tensor(items, dtype=torch.float64, device=accelerator.device), reduction="sum")
    total = total / ranks_per_batch(accelerator)
    return torch.where(total > 0, total, 1.0)


def ranks_per_batch(accelerator: Any) -> int:
    """How many ranks work on the same batch: those of a tensor-parallel group."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    return 1 if parallelism is None else parallelism.tp_size
