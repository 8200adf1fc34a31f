"""How many scored tokens a loss is divided by: counted on the host, summed over an optimizer step and its ranks.

The loss of an optimizer step is the sum over all its scored tokens divided by their number, however they are split
into passes, micro-batches and ranks. Gradients of the parts then add up to the gradient of one large batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from packsft.batch import count_scored


def scored_in_step(batches: Sequence[Mapping[str, Any]], accelerator: Any, *, across_ranks: bool) -> int | Tensor:
    """Scored tokens of all batches of one optimizer step, at least 1, so that a step without any gives a zero loss.

    Args:
        batches: what this rank's data loader gave for the step.
        accelerator: accelerate's; sums over its processes.
        across_ranks: whether to sum over ranks (transformers' `average_tokens_across_devices`).

    Returns:
        An int, or with several ranks a 0-d int64 tensor on the device, which is not read back. Ranks that share a
        batch count it once.
    """
    count = sum(count_scored(batch) for batch in batches)
    if not across_ranks or accelerator.num_processes == 1:
        return max(count, 1)
    total = accelerator.reduce(torch.tensor(count, device=accelerator.device), reduction="sum")
    return (total // ranks_per_batch(accelerator)).clamp(min=1)


def ranks_per_batch(accelerator: Any) -> int:
    """How many ranks work on the same batch: those of a tensor-parallel group."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    return 1 if parallelism is None else parallelism.tp_size
