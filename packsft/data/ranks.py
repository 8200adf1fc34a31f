"""Which ranks share a batch: the ranks of a tensor-parallel group. All other ranks take different batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ranks:
    """This process's place in data parallelism.

    - `rank`: which share of the data it takes, below `size`
    - `size`: how many shares there are
    - `sharing`: how many processes take the same share; a sum over all processes counts each share this many times
    """

    rank: int = 0
    size: int = 1
    sharing: int = 1

    @classmethod
    def of(cls, accelerator: Any) -> Ranks:
        """The place of this process, from an `accelerate.Accelerator`."""
        parallelism = getattr(accelerator, "parallelism_config", None)
        sharing = 1 if parallelism is None else parallelism.tp_size
        return cls(accelerator.process_index // sharing, accelerator.num_processes // sharing, sharing)
