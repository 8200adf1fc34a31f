"""Which ranks share a batch: those of a tensor-parallel group, which all take the whole of it, and those of a
sequence-parallel group, which take a part each. All other ranks take different batches.

All ranks hold the same data set, and each takes its share of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object


@dataclass(frozen=True)
class Ranks:
    """This process's place in data parallelism.

    - `rank`: which share of the data it takes, below `size`
    - `size`: how many shares there are
    - `sharing`: how many processes take the same share; a sum over all processes counts each share this many times
    - `parts`: how many processes take a part each of a share's rows
    """

    rank: int = 0
    size: int = 1
    sharing: int = 1
    parts: int = 1

    @classmethod
    def of(cls, accelerator: Any) -> Ranks:
        """The place of this process, from an `accelerate.Accelerator`."""
        parallelism = getattr(accelerator, "parallelism_config", None)
        sharing = 1 if parallelism is None else parallelism.tp_size
        parts = getattr(accelerator, "packsft_sequence_parts", 1)
        processes = sharing * parts
        return cls(accelerator.process_index // processes, accelerator.num_processes // processes, sharing, parts)


def check_same_on_all_ranks(accelerator: Any, sample: str, name: str) -> None:
    """Raises ValueError, on all ranks, unless every rank has the same sample of this data."""
    samples = gather_object([sample]) if accelerator.num_processes > 1 else []
    if others := [rank for rank, given in enumerate(samples) if given != samples[0]]:
        raise ValueError(
            f"the {name} holds other rows on rank {others[0]} than on rank 0, but packsft deals the rows to the ranks "
            "itself: give every rank the whole data set, without shard() or split_dataset_by_node()"
        )
