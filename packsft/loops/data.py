"""Optimizer steps of packed rows for any training loop: which batches each rank takes, and what divides their loss."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, Features, List, Value, load_from_disk
from packsft_kernels.version import __version__
from torch.utils.data import BatchSampler, DataLoader

from packsft.config import NORMALIZATIONS
from packsft.data.batch import HOST_KEYS, StepRows
from packsft.data.collator import PackingCollator
from packsft.data.document import Pack, short
from packsft.data.packs import PackedDataset, PackSampler, pack_dataset
from packsft.data.ranks import Ranks
from packsft.data.steps import StepDataset, StepStream
from packsft.data.streams import PackedStream
from packsft.loops.mixture import Mixture, joined
from packsft.packing import PackingReport, PackPlan, packing_report
from packsft.packing.strategies import strategy_named

GIVEN = ("labels", "row_lengths")  # of `HOST_KEYS`, what a model of `prepare` takes
COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")
SAVED, ROWS, PLAN = "packsft.json", "rows", "plan.npz"  # in the folder of `PackedData.save`


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
        moved = Batch(
            {
                key: value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value
                for key, value in self.items()
            }
        )
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


class PackedData:
    """Rows and how they are packed: what `pack` and `load` return.

    Attributes:
        packs: the plan over the rows, or the stream of packs.
        max_length, batch_size, strategy, tokens_per_pass: as given to `pack`.
        mixture: of several data sets, what an epoch takes of each; None for one.
        fingerprint: SHA-256 in hex over the plan, the mixture and a sample of the rows; None for a stream.
    """

    def __init__(
        self, packs: PackedDataset | PackedStream, settings: dict[str, Any], mixture: Mixture | None = None
    ) -> None:
        self.packs, self.mixture, self._settings = packs, mixture, settings
        self.max_length: int = settings["max_length"]
        self.batch_size: int = settings["batch_size"]
        self.strategy: str = settings["strategy"]
        self.tokens_per_pass: int = settings["tokens_per_pass"] or self.max_length
        self.fingerprint: str | None = None
        if isinstance(packs, PackedDataset):
            content = [packs.plan.fingerprint, packs.sample(), None if mixture is None else mixture.as_dict()]
            self.fingerprint = hashlib.sha256(repr(content).encode()).hexdigest()

    def __str__(self) -> str:
        """What packing does, and of several data sets what an epoch takes of each. Raises ValueError for a stream."""
        rows = self.report.rows() + ([] if self.mixture is None else self.mixture.rows())
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    @property
    def report(self) -> PackingReport:
        """What packing does to the rows and to the number of steps. Raises ValueError for a stream."""
        plan, size = self._planned().plan, self.batch_size
        return packing_report(plan, effective_batch_size=size, num_train_epochs=1, tokens_per_pass=self.tokens_per_pass)

    def _planned(self) -> PackedDataset:
        if isinstance(self.packs, PackedStream):
            raise ValueError("a stream is planned as its rows arrive: it has no report, fingerprint or folder")
        return self.packs

    def loader(
        self,
        rank: int | None = None,
        ranks: int | None = None,
        *,
        padded: bool = False,
        device: torch.device | str | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> StepLoader:
        """The steps of one rank, an epoch each time it is iterated.

        Args:
            rank, ranks: of data parallelism; default: those of `torch.distributed`, or one. Losses are such that their
                *mean* over the ranks is the step's: DDP and FSDP average gradients.
            padded: rows for a model that cannot be packed: `model.packing.padded`.
            device: where batches go; None: they stay on the host.
            num_workers, pin_memory: as in `torch.utils.data.DataLoader`.
            pad_to_multiple_of: pads each row, with tokens that are not scored.

        Raises:
            ValueError: ranks that do not exist.
        """
        if rank is None or ranks is None:
            if (rank is None) != (ranks is None):
                raise ValueError(f"rank={rank} and ranks={ranks}: give both, or none")
            known = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if known else (0, 1)
        if not 0 <= rank < ranks:
            raise ValueError(f"rank={rank} must be at least 0 and below ranks={ranks}")
        collator = PackingCollator(
            pad_token_id=0, padded=padded, max_length=self.max_length, pad_to_multiple_of=pad_to_multiple_of,
            per_example=self._settings["loss_normalization"] == "example",
        )  # fmt: skip
        workers = {"num_workers": num_workers, "pin_memory": pin_memory}
        return StepLoader(self, self._settings, Ranks(rank, ranks), collator, device, workers)

    @property
    def collator(self) -> PackingCollator:
        """For a trainer that asks for items of `packs` itself, as `transformers.Trainer` does: gives one batch of them,
        whose loss is divided by what the trainer passes as `num_items_in_batch`."""
        return _ForTrainers(pad_token_id=0, max_length=self.max_length)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokens (Arrow), plan and settings into a new folder, which `load` reads without planning.

        Raises:
            FileExistsError: the folder exists and is not empty.
            ValueError: a stream.
        """
        packs, folder = self._planned(), Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty: save packed data into a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        rows: Any = packs.rows
        rows = rows.dataset
        rows.select_columns([name for name in COLUMNS if name in rows.column_names]).save_to_disk(str(folder / ROWS))
        packs.plan.save(folder / PLAN)
        content = {"packsft_version": __version__, "fingerprint": self.fingerprint, "settings": self._settings}
        # last: a folder without it is one that was not finished
        (folder / SAVED).write_text(json.dumps(content, indent=2), encoding="utf-8")


class _ForTrainers(PackingCollator):
    def torch_call(self, examples: Sequence[Any]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        return {key: value for key, value in batch.items() if key in GIVEN or key not in HOST_KEYS}


class StepLoader:
    """Iterates over the `Step`s of an epoch on one rank; the next time over those of the next epoch.

    `state_dict()` says how far it came, and `load_state_dict()` goes on there, for planned rows also with another batch
    size or other ranks.

    Attributes:
        epoch: that of the next step; the first is 0.
    """

    def __init__(
        self,
        data: PackedData,
        settings: dict[str, Any],
        ranks: Ranks,
        collator: PackingCollator,
        device: torch.device | str | None,
        workers: dict[str, Any],
    ) -> None:
        self._collator, self._device, self._workers = collator, device, workers
        self._shuffles, self._seed, self._drop_last = (settings[name] for name in ("shuffle", "seed", "drop_last"))
        self._fingerprint, self._mixture = data.fingerprint, data.mixture
        steps: Any = StepStream if isinstance(data.packs, PackedStream) else StepDataset
        packs = data.packs.share(Ranks()) if isinstance(data.packs, PackedStream) else copy.copy(data.packs)
        self._source = steps(packs, data.batch_size, data.tokens_per_pass, ranks, collator.padded)
        self.epoch = self._start = self._taken = 0

    def __len__(self) -> int:
        """Steps in an epoch. Raises TypeError for a stream."""
        if self._fingerprint is None:
            raise TypeError("a stream has no length")
        items, size = self._items_in_epoch(), self._source.batch_size
        return items // size if self._drop_last else -(-items // size)

    def __iter__(self) -> Iterator[Step]:
        self._source.examples.set_epoch(self.epoch)
        self._taken, self._start = self._start, 0
        options: dict[str, Any] = {"batch_size": 1}
        if self._fingerprint is not None:
            order = itertools.islice(self._order(), self._taken, None)
            options = {"batch_sampler": BatchSampler(order, self._source.batch_size, self._drop_last)}
        # a generator of its own: from PyTorch's, an epoch would draw a number
        loader = DataLoader(
            self._source, collate_fn=self._step, generator=torch.Generator(), **options, **self._workers
        )
        for step, num_taken in loader:
            self._taken += num_taken
            if self._fingerprint is not None and self._items_left() == 0:
                self.epoch, self._taken = self.epoch + 1, 0  # already: Lightning asks for no step behind the last
            yield step if self._device is None else step.to(self._device, non_blocking=self._workers["pin_memory"])
        if self._fingerprint is None:
            self.epoch, self._taken = self.epoch + 1, 0

    def _items_in_epoch(self) -> int:
        return len(self._source if self._mixture is None else self._mixture)

    def _items_left(self) -> int:
        left = self._items_in_epoch() - self._taken
        return 0 if self._drop_last and left < self._source.batch_size else left

    def _order(self) -> Iterator[int]:
        """The items of the epoch in the order in which `PackedSFTTrainer` takes them, with the same seed."""
        packs: PackedDataset = self._source.examples
        if self._mixture is not None:
            return iter(self._mixture.order(self.epoch).tolist())
        if packs.repacks:
            return (index for _, index in PackSampler(packs, self._source.batch_size))
        if not self._shuffles:
            return iter(range(len(packs)))
        sampler = SeedableRandomSampler(packs, data_seed=self._seed)
        sampler.set_epoch(self.epoch)
        return iter(sampler)

    def _step(self, items: list[StepRows]) -> tuple[Step, int]:
        (rows,) = items
        step = Step(self._batch(documents, rows.num_items) for documents in rows.passes)
        step.num_items = rows.num_items
        return step, len(rows.examples)

    def _batch(self, documents: Pack, num_items: float) -> Batch:
        whole = self._collator.torch_call([documents])
        batch = Batch({key: value for key, value in whole.items() if key in GIVEN or key not in HOST_KEYS})
        batch["num_items"] = num_items / self._source.ranks.size
        vars(batch).update({name: whole[name] for name in ("num_tokens", "num_scored", "num_documents", "rows")})
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: behind the last step that was given.

        Raises:
            ValueError: a stream with workers, which have read ahead.
        """
        state: dict[str, Any] = {"epoch": self.epoch, "taken": self._taken, "fingerprint": self._fingerprint}
        if self._fingerprint is None and self._workers["num_workers"]:
            raise ValueError(
                f"num_workers={self._workers['num_workers']}: workers have read a stream ahead, set it to 0"
            )
        return state if self._fingerprint is not None else state | {"stream": self._source.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is of other rows, or of rows that were packed in another way."""
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the state is of rows with the fingerprint {state['fingerprint']}, these have {self._fingerprint}: "
                "they are other rows, or packed in another way"
            )
        if self._fingerprint is None:
            self._source.load_state_dict(state["stream"])
        self.epoch, self._start = state["epoch"], state["taken"]


def pack(
    rows: Any,
    max_length: int,
    *,
    batch_size: int,
    strategy: str = "step",
    tokens_per_pass: int | None = None,
    overlong: str | None = None,
    max_lost_fraction: float = 1.0,
    loss_normalization: str = "token",
    shuffle: bool = True,
    seed: int = 42,
    drop_last: bool = False,
    vocab_size: int | None = None,
    weights: Mapping[str, float] | None = None,
    weights_of: str = "token",
    stopping_strategy: str = "first_exhausted",
) -> PackedData:
    """Plan optimizer steps of packed rows.

    Args:
        rows: a `datasets.Dataset`, or a stream, with the columns `input_ids` and `labels` (-100 = not scored); or a
            sequence of token lists, all scored, or of mappings with both. Or several data sets (no streams): a mapping
            from names to them, with a strategy that makes no packs ("step", "none").
        max_length: the most tokens of an example, and of a pack.
        batch_size: with the strategy "step", the examples of an optimizer step; else its packs, one a pass. On all
            ranks together.
        strategy: a name in `packsft.packing.STRATEGIES`.
        tokens_per_pass: with "step", the most tokens of a pass; default: `max_length`.
        overlong: what happens to a longer example: as in `plan_packs`.
        max_lost_fraction: the share of tokens, 0 to 1, that may be lost for any reason.
        loss_normalization: "token", or "example": every example counts the same in the loss.
        shuffle: another order in each epoch, from `seed`; and, with "bfd", other packs. A stream keeps its order.
        drop_last: leave out a last step of fewer items.
        vocab_size: ids and labels must be below it.
        weights: of several data sets, by name; None: an epoch is every document once.
        weights_of: "token": weights are shares of an epoch's tokens; "document": of its documents.
        stopping_strategy: with weights, an epoch ends before a document comes twice ("first_exhausted"), or when every
            document came once ("all_exhausted").

    Raises:
        ValueError, TypeError: bad input; the message names the argument or the row.
    """
    settings = {name: value for name, value in locals().items() if name != "rows"}
    for name, number in (("max_length", max_length), ("batch_size", batch_size), ("tokens_per_pass", tokens_per_pass)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{name}={number!r}: must be an integer of at least 1")
    if loss_normalization not in NORMALIZATIONS:
        raise ValueError(f"loss_normalization={loss_normalization!r}: must be one of {', '.join(NORMALIZATIONS)}")
    exact_steps, repacks = strategy_named(strategy).exact_steps, strategy_named(strategy).repacks
    if tokens_per_pass is not None and not exact_steps:
        raise ValueError(f"tokens_per_pass={tokens_per_pass}: the packs of strategy={strategy!r} are the passes")
    options: dict[str, Any] = {
        "strategy": strategy,
        "name": "train",
        "overlong": overlong,
        "max_lost_fraction": max_lost_fraction,
        "vocab_size": vocab_size,
        "per_example": loss_normalization == "example",
    }
    if isinstance(rows, Mapping):
        return _mixed(rows, settings, options)
    if weights is not None:
        raise ValueError("weights are of several data sets: give rows as a mapping from names to them")
    if isinstance(rows, (Dataset, Sequence)):
        dataset = _dataset_of(rows)
        packs = pack_dataset(dataset, max_length, seed=seed if shuffle and repacks else None, **options)
        return PackedData(packs, settings)
    if not isinstance(rows, Iterable):
        raise TypeError(f"rows must be a datasets.Dataset, a stream or token lists, got {type(rows).__name__}")
    return PackedData(PackedStream(rows, max_length, **options), settings)


def _mixed(rows: Mapping[str, Any], settings: dict[str, Any], options: dict[str, Any]) -> PackedData:
    strategy = settings["strategy"]
    if "input_ids" in rows:
        raise ValueError("rows is a mapping of columns, and must be one of data sets: use datasets.Dataset.from_dict")
    if strategy not in ("step", "none"):
        raise ValueError(
            f"strategy={strategy!r} makes packs before it is known what an epoch takes: use 'step' or 'none'"
        )
    if bad := [name for name, one in rows.items() if not isinstance(one, (Dataset, Sequence))]:
        raise TypeError(
            f"the set {bad[0]} is a {type(rows[bad[0]]).__name__}, expected a datasets.Dataset or token lists"
        )
    sets = {name: _dataset_of(one) for name, one in rows.items()}
    packs = pack_dataset(joined(sets, COLUMNS), settings["max_length"], **options)
    sizes = {name: len(one) for name, one in sets.items()}
    own = {name: settings[name] for name in ("weights", "weights_of", "stopping_strategy", "shuffle", "seed")}
    mixture = Mixture(sizes, packs.plan.examples, packs.lengths, **own)
    return PackedData(packs, settings | {"sets": sizes}, mixture)


def _dataset_of(rows: Dataset | Sequence[Any]) -> Dataset:
    if isinstance(rows, Dataset):
        return rows
    columns: dict[str, list] = {"input_ids": [], "labels": []}
    for number, row in enumerate(rows):
        given = row if isinstance(row, Mapping) else {"input_ids": row, "labels": row}
        for name, column in columns.items():
            tokens = np.asarray(given.get(name, [[]]))
            if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
                raise ValueError(f"row {number} of the data set: {name} must be a list of integers, got {short(row)}")
            column.append(tokens.astype(np.int64))
    return Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, List(Value("int64")))))


def load(folder: str | os.PathLike[str]) -> PackedData:
    """What `PackedData.save` wrote. Tokens are read in place; the plan is made again, and compared.

    Raises:
        FileNotFoundError: there is no such folder, or it was not written to its end.
        ValueError: its rows, its plan or its settings are not those that were saved.
    """
    folder = Path(folder)
    if not (folder / SAVED).exists():
        raise FileNotFoundError(f"{folder} holds no packed data that was saved to its end: {SAVED} is missing")
    saved = json.loads((folder / SAVED).read_text(encoding="utf-8"))
    settings, rows = saved["settings"], load_from_disk(str(folder / ROWS))
    if (sizes := settings.pop("sets", None)) is not None:
        stops = np.cumsum(list(sizes.values())).tolist()
        rows = {name: rows.select(range(stop - sizes[name], stop)) for name, stop in zip(sizes, stops, strict=True)}
    data = pack(rows, **settings)
    planned = PackPlan.load(folder / PLAN).fingerprint
    if data.fingerprint != saved["fingerprint"] or data._planned().plan.fingerprint != planned:
        raise ValueError(
            f"{folder} holds other rows, or another plan, than were saved (by packsft {saved['packsft_version']}; this "
            f"is {__version__}): pack the rows again"
        )
    return data
