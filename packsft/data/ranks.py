"""Which ranks share a batch: those of a tensor-parallel group, which all take the whole of it, and those of a
sequence-parallel group, which take a part each. All other ranks take different batches.

All ranks hold the same data set, and each takes its share of it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, load_from_disk

SAMPLED_ROWS = 64
_kept: list[tempfile.TemporaryDirectory] = []  # until the process ends


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


def sampled_rows(num_rows: int) -> np.ndarray:
    """At most `SAMPLED_ROWS` row numbers, from the first to the last, evenly spread."""
    return np.unique(np.linspace(0, num_rows - 1, SAMPLED_ROWS, dtype=np.int64))


def on_a_disk_of_the_node(dataset: Any, name: str) -> Any:
    """Rows in memory, written once on each node: `datasets` then finds there what another process made of them.

    Without it every process would tokenise them, one group after the other. Anything else is returned as it is.

    Raises:
        ValueError: on all ranks, if one has other rows.
    """
    state = PartialState()
    if state.num_processes == 1 or not isinstance(dataset, Dataset) or dataset.cache_files or not len(dataset):
        return dataset
    if dataset.format["type"] == "custom":  # a function of each row, which no disk keeps
        return dataset
    some = sampled_rows(len(dataset))
    as_text = repr((len(dataset), dataset.with_format("arrow")[some].to_pydict()))
    check_same_on_all_ranks(state, hashlib.sha256(as_text.encode()).hexdigest(), name)
    folder, failed = "", ""
    if state.is_local_main_process:
        _kept.append(tempfile.TemporaryDirectory(prefix="packsft-"))
        folder = _kept[-1].name
        try:
            dataset.save_to_disk(folder)
        except Exception as error:
            failed = f"rank {state.process_index} could not write the {name} to {folder}: {error}"
    of_all = gather_object([(folder, failed)])  # and waits
    if errors := [failed for _, failed in of_all if failed]:
        raise RuntimeError(errors[0])
    return load_from_disk(next(folder for folder, _ in of_all if folder and os.path.isdir(folder)))
