"""The denominator of the loss, known on the host and summed over an optimizer step and its ranks.

The loss of an optimizer step is the sum over all its scored tokens divided by their number (if every example counts the
same, the weighted sum divided by the sum of the weights). It does not depend on how the step is split into
micro-batches and ranks: their gradients add up to the gradient of one large batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from packsft.data.ranks import Ranks


def items_in_step(
    batches: Sequence[Mapping[str, Any]], accelerator: Any, *, across_ranks: bool
) -> int | float | Tensor:
    """The scored tokens of an optimizer step, or the sum of their weights; 1 if there are none: the loss is zero.

    Args:
        batches: the step's items from this rank's data loader: its micro-batches, or one exact step, which already
            knows the sum over all ranks.
        accelerator: accelerate's; sums over its processes.
        across_ranks: whether to sum over ranks (transformers' `average_tokens_across_devices`).

    Returns:
        A number; with several ranks a 0-d tensor on the device, which is not read back. Ranks that share a batch count
        it once.
    """
    items = sum(batch["num_items"] for batch in batches)
    if not across_ranks or accelerator.num_processes == 1 or any("passes" in batch for batch in batches):
        return items or 1
    own = torch.full((), items, dtype=torch.float64, device=accelerator.device)  # a fill: a copy would wait
    total = accelerator.reduce(own, reduction="sum")
    total = total / Ranks.of(accelerator).sharing
    return torch.where(total > 0, total, 1.0)
