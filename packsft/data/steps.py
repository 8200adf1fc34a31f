"""Optimizer steps: packs a step's examples into the passes of this rank, or deals packs to the ranks, one a pass.

All ranks plan every step from lengths alone. Each rank gathers only its own passes. A data set and a stream differ only
in where lengths and documents come from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from packsft.data.batch import StepRows
from packsft.data.document import Pack
from packsft.data.packs import PackedDataset
from packsft.data.ranks import Ranks
from packsft.data.stream_pack import stream_digests
from packsft.packing import plan_step


class _Steps:
    """Plans steps of `batch_size` items (on all ranks) for one rank.

    Args:
        examples: a data set or stream. With the strategy "step", each item is one document; else a pack.
        batch_size: items in a step, on all ranks.
        tokens_per_pass, padded: see `plan_step`.
        ranks: the place of this rank.
    """

    def __init__(
        self, examples: Any, batch_size: int, tokens_per_pass: int, ranks: Ranks | None = None, padded: bool = False
    ) -> None:
        self.examples = examples
        self.tokens_per_pass = tokens_per_pass
        self.batch_size, self.ranks, self.padded = batch_size, ranks or Ranks(), padded

    def _plan(self, lengths: Any) -> list[np.ndarray]:
        """The passes of this rank, as indices into the lengths of the step's items."""
        if not self.examples.strategy.exact_steps:
            size, all_items = self.ranks.size, np.arange(len(lengths))
            return [all_items[i + self.ranks.rank : i + self.ranks.rank + 1] for i in range(0, len(lengths), size)]
        return plan_step(lengths, self.tokens_per_pass, self.ranks.size, padded=self.padded)[self.ranks.rank]


class StepDataset(_Steps, torch.utils.data.Dataset):
    """Optimizer steps over a `PackedDataset`. The loader asks for a whole step: the same indices on every rank."""

    total_dataset_length = 0  # see `PackedDataset`

    def step(self, examples: np.ndarray) -> StepRows:
        """The passes of this rank in the step with these examples, `[B]`."""
        packed: PackedDataset = self.examples
        passes = [
            [document for index in examples[chosen] for document in packed.pack(index)]
            for chosen in self._plan(packed.lengths[examples])
        ]
        return StepRows(passes, examples, packed.items[examples].sum().item(), self.tokens_per_pass)

    def longest(self) -> int:
        """Tokens of the longest example."""
        return self.examples.most_tokens(1)

    def most_tokens_per_rank(self) -> int:
        """An upper bound on the tokens that a step brings to a rank, if they are dealt evenly."""
        return -(-self.examples.most_tokens(self.batch_size) // self.ranks.size)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: list[int]) -> list[StepRows]:
        return [self.step(np.array(indices, dtype=np.int64))]


class StepStream(_Steps, torch.utils.data.IterableDataset):
    """Optimizer steps over a `PackedStream`: its next `batch_size` examples, packed for one rank.

    Every rank reads all rows, and ends with the stream, as all others do. A worker makes steps of the examples that it
    reads. The state is the state of `examples`.
    """

    def step(self, examples: list[Pack]) -> StepRows:
        """The passes of this rank in the step with these examples."""
        documents = [document for pack in examples for document in pack]
        lengths = [sum(map(len, pack)) for pack in examples]
        process = self.examples.processed
        passes = [process([document for i in chosen for document in examples[i]]) for chosen in self._plan(lengths)]
        per_example = self.examples.per_example
        items = sum(document.num_scored * (document.weight if per_example else 1) for document in documents)
        return StepRows(passes, examples, items, self.tokens_per_pass, stream_digests(examples))

    def longest(self) -> int:
        """An upper bound on the tokens of an example."""
        return self.examples.max_length or 0

    def most_tokens_per_rank(self) -> int:
        """An upper bound on the tokens that a step brings to a rank, if they are dealt evenly."""
        return -(-self.batch_size * self.longest() // self.ranks.size)

    def set_epoch(self, epoch: int) -> None:
        self.examples.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.examples.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.examples.load_state_dict(state)

    def __iter__(self) -> Iterator[StepRows]:
        examples = self.examples.planned()
        while rows := list(itertools.islice(examples, self.batch_size)):
            yield self.step(rows)
