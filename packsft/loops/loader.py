"""The optimizer steps of one rank, in any training loop: their order, and a state to go on from."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader

from packsft.data.batch import StepRows, for_model
from packsft.data.collator import PackingCollator
from packsft.data.document import Pack
from packsft.data.packs import PackedDataset, PackSampler
from packsft.data.ranks import Ranks
from packsft.data.steps import StepDataset, StepStream
from packsft.data.streams import PackedStream
from packsft.loops.mixture import Mixture


class Batch(dict[str, Any]):
    """A forward and backward pass: what `model(**batch)` takes, for a model of `prepare`.

    Attributes:
        num_tokens, num_scored, num_documents: int, without padding.
        rows: `[D]` int64, each document's row in the data set; -1 if unknown.
    """

    num_tokens: int
    num_scored: int
    num_documents: int
    rows: np.ndarray

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch, with its tensors on a device."""
        moved = Batch(self)
        for key, value in self.items():
            if isinstance(value, torch.Tensor):
                moved[key] = value.to(device, non_blocking=non_blocking)
        vars(moved).update(vars(self))
        return moved


class Step(list[Batch]):
    """An optimizer step: its batches on this rank, equally many on every rank.

    Attributes:
        num_items: the scored tokens (or the sum of their weights) of the step on all ranks.
    """

    num_items: float

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Step:
        """The same step, with its tensors on a device."""
        moved = Step(batch.to(device, non_blocking=non_blocking) for batch in self)
        moved.num_items = self.num_items
        return moved


@dataclass(frozen=True)
class Order:
    """What the steps of an epoch depend on, beside the packs; as in `pack`."""

    batch_size: int
    tokens_per_pass: int
    shuffle: bool
    seed: int
    drop_last: bool
    mixture: Mixture | None = None


class StepLoader:
    """Iterates over the `Step`s of an epoch on one rank; the next time over those of the next epoch, also if this one
    was left early.

    `state_dict()` says how far it came, and `load_state_dict()` goes on there: for planned rows also with another batch
    size or other ranks.

    Attributes:
        epoch: that of the next step; the first is 0.
    """

    def __init__(
        self,
        packs: PackedDataset | PackedStream,
        order: Order,
        fingerprint: str,
        ranks: Ranks,
        collator: PackingCollator,
        device: torch.device | str | None,
        workers: dict[str, Any],
    ) -> None:
        self._order, self._fingerprint = order, fingerprint
        self._collator, self._device, self._workers = collator, device, workers
        steps: Any = StepStream if isinstance(packs, PackedStream) else StepDataset
        own = packs.share(Ranks()) if isinstance(packs, PackedStream) else copy.copy(packs)
        self._source = steps(own, order.batch_size, order.tokens_per_pass, ranks, collator.padded)
        self.epoch = self._taken = 0
        self._began = False  # whether the epoch is one that an earlier iteration began
        self._group_size = order.batch_size  # of the packs that are balanced; a resumed run keeps its order

    @property
    def _streams(self) -> bool:
        return isinstance(self._source, StepStream)

    def __len__(self) -> int:
        """Steps in an epoch. Raises TypeError for a stream."""
        if self._streams:
            raise TypeError("a stream has no length")
        items, size = self._num_items, self._order.batch_size
        return items // size if self._order.drop_last else -(-items // size)

    @property
    def _num_items(self) -> int:
        return len(self._source if self._order.mixture is None else self._order.mixture)

    def _is_over(self) -> bool:
        """Whether nothing is left of the epoch. Of a stream, only its end shows it."""
        least = self._order.batch_size if self._order.drop_last else 1
        return not self._streams and self._num_items - self._taken < least

    def _end_epoch(self) -> None:
        self.epoch, self._taken, self._began = self.epoch + 1, 0, False

    def __iter__(self) -> Iterator[Step]:
        if self._began or self._is_over():
            self._end_epoch()
        self._began = True
        self._source.examples.set_epoch(self.epoch)
        options: dict[str, Any] = {"batch_size": 1}
        if not self._streams:
            items = itertools.islice(self._items(), self._taken, None)
            options = {"batch_sampler": BatchSampler(items, self._order.batch_size, self._order.drop_last)}
        # a generator of its own: from PyTorch's, an epoch would draw a number
        loader = DataLoader(
            self._source, collate_fn=self._step, generator=torch.Generator(), **options, **self._workers
        )
        for step, num_taken in loader:
            if self._order.drop_last and num_taken < self._order.batch_size:  # the end of a stream
                continue
            self._taken += num_taken
            if self._is_over():  # already: Lightning asks for no step behind the last
                self._end_epoch()
            yield step if self._device is None else step.to(self._device, non_blocking=self._workers["pin_memory"])
        if self._streams:
            self._end_epoch()

    def _items(self) -> Iterator[int]:
        """Those of the epoch, in the order in which `PackedSFTTrainer` takes them with the same seed (packs: without
        gradient accumulation)."""
        packs: PackedDataset = self._source.examples
        if self._order.mixture is not None:
            return iter(self._order.mixture.order(self.epoch).tolist())
        if packs.repacks:
            return (index for _, index in PackSampler(packs, self._group_size))
        if not self._order.shuffle:
            return iter(range(len(packs)))
        sampler = SeedableRandomSampler(packs, data_seed=self._order.seed)
        sampler.set_epoch(self.epoch)
        return iter(sampler)

    def _step(self, items: list[StepRows]) -> tuple[Step, int]:
        (rows,) = items
        step = Step(self._batch(documents, rows.num_items) for documents in rows.passes)
        step.num_items = rows.num_items
        return step, len(rows.examples)

    def _batch(self, documents: Pack, num_items: float) -> Batch:
        whole = self._collator.torch_call([documents])
        batch = Batch(for_model(whole))
        batch["num_items"] = num_items / self._source.ranks.size
        vars(batch).update({name: whole[name] for name in ("num_tokens", "num_scored", "num_documents", "rows")})
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: behind the last step that was given.

        Raises:
            ValueError: a stream with workers, which have read ahead.
        """
        state: dict[str, Any] = {"epoch": self.epoch, "taken": self._taken, "fingerprint": self._known()}
        if not self._streams:
            return state | {"group_size": self._group_size}
        if count := self._workers["num_workers"]:
            raise ValueError(f"num_workers={count}: workers have read the stream ahead, set it to 0")
        return state | {"stream": self._source.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is of other rows, or of rows in other packs or another order."""
        own = {"epoch", "taken", "fingerprint", "stream" if self._streams else "group_size"}
        if set(state) != own:
            raise ValueError(f"the state has {', '.join(state) or 'nothing'}, expected {', '.join(sorted(own))}")
        if state["fingerprint"] != (known := self._known()):
            raise ValueError(
                f"the state is of rows with the fingerprint {state['fingerprint']}, these have {known}: they are other "
                "rows, or packed in another way, or shuffled in another order"
            )
        if self._streams:
            self._source.load_state_dict(state["stream"])
        else:
            self._group_size = state["group_size"]
        self.epoch, self._taken, self._began = state["epoch"], state["taken"], False

    def _known(self) -> str:
        """The fingerprint; that of a stream depends on its first rows, which are read now."""
        if not self._streams:
            return self._fingerprint
        return hashlib.sha256(f"{self._fingerprint} {self._source.examples.sample()}".encode()).hexdigest()
