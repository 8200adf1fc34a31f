"""A data set of packs: a plan over tokenised rows. Tokens of a pack are gathered when the pack is read.

Knows Arrow columns of token ids, not text, models or devices.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value

from packsft.data.document import (
    IGNORE_INDEX,
    Pack,
    documents_of,
    first_outside,
    make_document,
    outside_vocabulary,
)
from packsft.packing import (
    STRATEGIES,
    Segments,
    Strategy,
    balanced_order,
    check_max_lost_fraction,
    cut_examples,
    pack_segments,
)

BLOCK = 1 << 22  # values counted at once


class TokenRows:
    """The list columns `input_ids` and `labels` of a data set, read in place: a row is a view, never a copy.

    Args:
        dataset: has `input_ids`, and `labels` of the same lengths (-100 = not scored).

    Raises:
        ValueError: a column is missing, as a whole or in a row, or holds anything but integers, a row's labels and
            input ids differ in length, or the data set has a transform.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = flat_rows(dataset)
        self._read_columns()
        self._ids.check_lengths("labels", self._labels)

    def _read_columns(self) -> None:
        self._ids = _ListColumn(self._dataset, "input_ids")
        self._labels = _ListColumn(self._dataset, "labels")

    @property
    def lengths(self) -> np.ndarray:
        """`[rows]` int64, tokens in each row."""
        return self._ids.lengths

    def tokens(self, row: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Input ids and labels `start:stop` of a row."""
        return self._ids.row(row)[start:stop], self._labels.row(row)[start:stop]

    def count_scored(self, examples: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """`[S]` integers: scored labels in `start + 1 : stop` of each segment (nothing predicts its first token).

        The segments `[S]` must not be empty, and must be sorted by row and start.
        """
        return self._labels.count_not(IGNORE_INDEX, examples, starts, stops)

    def check_ids(self, vocab_size: int) -> None:
        """Raises ValueError, naming the row, for an id or a label outside the vocabulary."""
        for name, column in (("input_ids", self._ids), ("labels", self._labels)):
            if (found := column.first_outside(name, vocab_size)) is not None:
                row, value = found
                raise ValueError(outside_vocabulary(f"row {row} of the data set", name, value, vocab_size))

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex over the tokens and labels of all rows, in order; their integer type does not matter."""
        return hashlib.sha256((self._ids.digest() + self._labels.digest()).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {"_dataset": self._dataset}  # without the views: a worker maps the Arrow file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._dataset = state["_dataset"]
        self._read_columns()


class _ListColumn:
    """One Arrow list column as (offsets, values) arrays per chunk, the values zero-copy.

    Raises ValueError, naming the row, for a list that is missing and a value that is not an int64, or with `mask`,
    is not 0 or 1 (of any type).
    """

    def __init__(self, dataset: Dataset, name: str, *, mask: bool = False) -> None:
        if name not in dataset.column_names:
            raise ValueError(f"the data set has no column {name!r}, only {', '.join(dataset.column_names)}")
        column = dataset.data.column(name)
        expected = "0 or 1" if mask else "integers (int64)"
        if not is_list(column.type):
            raise ValueError(f"the data set's column {name!r} holds {column.type}, expected lists of {expected}")
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []
        first = 0
        for chunk in column.chunks:
            if chunk.null_count:
                row = first + chunk.is_null().index(True).as_py()
                raise ValueError(f"row {row} of the data set: {name} is missing")
            if len(chunk) == 0:  # may have no offsets
                continue
            if pa.types.is_fixed_size_list(chunk.type):
                offsets = np.arange(len(chunk) + 1) * chunk.type.list_size
            else:
                offsets = chunk.offsets.to_numpy().astype(np.int64)
                offsets -= offsets[0]  # a slice of an array begins later
            values, unfit = _as_numpy(chunk.flatten(), mask)
            if unfit is not None:
                at, given = unfit
                row = first + np.searchsorted(offsets, at, side="right") - 1
                raise ValueError(f"row {row} of the data set: {name} holds {given}, expected {expected}")
            self._chunks.append((offsets, values))
            first += len(chunk)
        counts = [len(offsets) - 1 for offsets, _ in self._chunks]
        self._first_rows = np.cumsum([0, *counts])
        self.lengths = np.concatenate([np.diff(offsets) for offsets, _ in self._chunks] or [np.zeros(0, np.int64)])

    def check_lengths(self, name: str, other: _ListColumn) -> None:
        """Raises ValueError for a row of `other`, a column of that name, with more or fewer values."""
        differ = np.flatnonzero(self.lengths != other.lengths)
        if len(differ):
            row = differ[0]
            raise ValueError(
                f"row {row} of the data set: {other.lengths[row]} {name} for {self.lengths[row]} input_ids"
            )

    def row(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        offsets, values = self._chunks[chunk]
        local = row - self._first_rows[chunk]
        return values[offsets[local] : offsets[local + 1]]

    def count_not(self, ignored: int, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        counts = np.zeros(len(rows), np.int32)
        of_chunk = np.searchsorted(rows, self._first_rows)
        for i, (offsets, values) in enumerate(self._chunks):
            segments = slice(of_chunk[i], of_chunk[i + 1])
            begin = offsets[rows[segments].astype(np.int64) - self._first_rows[i]]
            begin, end = begin + starts[segments] + 1, begin + stops[segments]
            # a running count per block, extended to the end of a segment: a chunk may hold billions of values
            cuts = np.flatnonzero(np.diff(begin // BLOCK, prepend=-1, append=-1))
            for first, last in itertools.pairwise(cuts):
                block, low = slice(first, last), begin[first]
                running = np.cumsum(np.append(False, values[low : end[last - 1]] != ignored), dtype=np.int32)
                counts[segments][block] = running[end[block] - low] - running[begin[block] - low]
        return counts

    def digest(self) -> str:
        """SHA-256 in hex over the lengths of all rows and their values."""
        digest = hashlib.sha256()
        digest.update(self.lengths.astype("<i8", copy=False).data)
        for offsets, values in self._chunks:
            for start in range(int(offsets[0]), int(offsets[-1]), BLOCK):
                block = values[start : min(start + BLOCK, int(offsets[-1]))]
                narrow = block.astype("<i4")  # half the bytes to hash, for every vocabulary that exists
                digest.update((narrow if (narrow == block).all() else block.astype("<i8")).data)
        return digest.hexdigest()

    def first_outside(self, name: str, vocab_size: int) -> tuple[int, int] | None:
        """(row, value) of the first value outside the vocabulary, or None."""
        for (offsets, values), first in zip(self._chunks, self._first_rows, strict=False):
            begin, end = offsets[0], offsets[-1]
            if (at := first_outside(values[begin:end], name, vocab_size)) is not None:
                return int(first + np.searchsorted(offsets, begin + at, side="right") - 1), int(values[begin + at])
        return None


def _as_numpy(values: pa.Array, mask: bool) -> tuple[np.ndarray, tuple[int, Any] | None]:
    """`values` as an array, and the index of the first that does not fit, with what it is."""
    kind, none = values.type, np.zeros(0, np.int64)
    if values.null_count:
        return none, (values.is_null().index(True).as_py(), "null")
    if len(values) == 0:  # of any type: `datasets` types lists that are all empty as lists of null
        return none, None
    if not (pa.types.is_integer(kind) or (mask and (pa.types.is_boolean(kind) or pa.types.is_floating(kind)))):
        return none, (0, kind)
    array = values.to_numpy(zero_copy_only=not pa.types.is_boolean(kind))
    if mask:
        unfit = (array != 0) & (array != 1)
    elif array.dtype == np.uint64:
        unfit = array > np.iinfo(np.int64).max
    else:
        return array, None
    return array, (int(np.argmax(unfit)), array[np.argmax(unfit)]) if unfit.any() else None


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def flat_rows(dataset: Dataset) -> Dataset:
    """The data set without an index: a selection or a shuffle is written out once, to make rows slices again."""
    if dataset.format["type"] == "custom":
        raise ValueError(
            "the data set has a transform (with_transform), but packsft reads its columns, which a transform does not "
            "change: apply it with map() first"
        )
    return dataset.flatten_indices() if dataset._indices is not None else dataset


def masked_rows(dataset: Dataset, masks: Sequence[str]) -> Dataset:
    """The data set as `flat_rows`, its `input_ids` and `masks` checked: before labels are made of them.

    Raises ValueError, naming the row, unless `input_ids` are lists of integers and each mask has a 0 or 1 for each.
    """
    dataset = flat_rows(dataset)
    ids = _ListColumn(dataset, "input_ids")
    for name in masks:
        ids.check_lengths(name, _ListColumn(dataset, name, mask=True))
    return dataset


class UserPacks(torch.utils.data.Dataset):
    """Packs that the user made. Item i is row i, as a list of `Document`s; `documents_of` describes a row.

    Args:
        rows: the packs.
        vocab_size: ids and labels must be below it; None for no check.
    """

    strategy, repacks = STRATEGIES["none"], False
    total_dataset_length = 0  # see `PackedDataset`

    def __init__(self, rows: Dataset, vocab_size: int | None) -> None:
        self.rows, self._vocab_size = rows, vocab_size

    @cached_property
    def lengths(self) -> np.ndarray:
        """`[P]` int64, the tokens of each pack."""
        return _ListColumn(flat_rows(self.rows), "input_ids").lengths

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 in hex of each column that is read; empty if the rows have a transform."""
        if self.rows.format["type"] == "custom":
            return {}
        rows = flat_rows(self.rows)
        names = [name for name in ("input_ids", "labels", "seq_lengths") if name in rows.column_names]
        digests = {name: _ListColumn(rows, name).digest() for name in names}
        if "loss_weights" in rows.column_names:
            weights = repr(rows.with_format(None)["loss_weights"][:])
            digests["loss_weights"] = hashlib.sha256(weights.encode()).hexdigest()
        return digests

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | None) -> Pack:
        """Item `index`; [] for None."""
        if index is None:
            return []
        return documents_of(self.rows[index], f"row {index} of the data set", self._vocab_size, index)


class Column(Sequence):
    """One column of a `PackedDataset`, read item by item.

    `column[i]` is the list of integers of item i, a slice a list of them.
    """

    def __init__(self, packs: PackedDataset, name: str) -> None:
        self._packs, self._name = packs, name

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: Any) -> Any:
        return self._packs[index][self._name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class PackedDataset(torch.utils.data.Dataset):
    """A plan over rows. Item i is pack i, gathered when it is read.

    `pack(i)` and `packs()` give lists of `Document`s; the data loader takes these. Everything else reads as a
    `datasets.Dataset` of TRL: `dataset[i]` is a dict of lists with the keys `column_names`, `dataset[2:5]` and
    `dataset[[0, 3]]` are dicts of lists of them, `dataset["labels"]` is a `Column`. `labels` are those of the rows: the
    collator leaves out the first of each document.

    Args:
        rows: the tokens.
        segments: the segments to pack.
        scored: `[S]` integers, the scored tokens of each segment.
        seed: for the plan. With a seed, `set_epoch` packs anew, into the same number of packs.
        per_example: the segments of an example together weigh 1 in the loss.

    Attributes:
        plan: the packs.
        scored: `[S]` unsigned integers, the scored tokens of each segment of the plan.
        lengths: `[P]` int64, the tokens of each item.
        items: `[P]` int64 or float64, what each item adds to the loss's denominator: scored tokens, or their weights.
        repacks: whether each epoch has its own packs.
    """

    def __init__(
        self,
        rows: TokenRows,
        segments: Segments,
        scored: np.ndarray,
        *,
        seed: int | None = None,
        per_example: bool = False,
    ) -> None:
        self.rows = rows
        self._segments, self._segment_scored, self._per_example = segments, scored, per_example
        self.seed = seed
        self.repacks = seed is not None and STRATEGIES[segments.strategy].repacks
        self._pack(seed, None)
        if self.repacks:  # another seed may need one more pack, but never more than the plan without mixing
            fewest = len(pack_segments(segments)[0])
            if fewest > len(self):
                self._pack(seed, fewest)
        self.epoch = 0

    def _pack(self, seed: int | None, num_packs: int | None) -> None:
        self.plan, order = pack_segments(self._segments, seed=seed, num_packs=num_packs)
        plan, scored = self.plan, self._segment_scored[order]
        self.scored = scored.astype(np.min_scalar_type(int(scored.max(initial=0))))
        self._weights = None
        items: np.ndarray = self.scored.astype(np.int64)
        if self._per_example:
            self._weights = 1.0 / np.bincount(plan.examples, self.scored)[plan.examples]
            items = items * self._weights
        if len(plan):
            self.lengths = np.add.reduceat(plan.stops.astype(np.int64) - plan.starts, plan.offsets[:-1])
            self.items = np.add.reduceat(items, plan.offsets[:-1])

    total_dataset_length = 0  # otherwise accelerate cuts the last gathered batch, as if it repeated examples

    def set_epoch(self, epoch: int) -> None:
        """Pack anew for an epoch (the first is 0): other examples meet. Without a seed, do nothing."""
        if self.repacks and epoch != self.epoch:
            assert self.seed is not None
            self._pack(self.seed + epoch, len(self))
            self.epoch = epoch

    def most_tokens(self, num_items: int) -> int:
        """Sum of the tokens of the `num_items` longest items."""
        return int(np.sort(self.lengths)[-num_items:].sum())

    @property
    def strategy(self) -> Strategy:
        return STRATEGIES[self.plan.strategy]

    def check_ids(self, vocab_size: int) -> None:
        self.rows.check_ids(vocab_size)

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def column_names(self) -> list[str]:
        return ["input_ids", "labels"] + (["seq_lengths"] if self.plan.strategy != "none" else [])

    @property
    def features(self) -> Features:
        return Features({name: List(Value("int64")) for name in self.column_names})

    def __getitem__(self, key: Any) -> Any:
        """A `Column` for a name, otherwise as in the class's description. Raises KeyError and IndexError."""
        if isinstance(key, str):
            if key not in self.column_names:
                raise KeyError(f"column {key!r} does not exist, only {', '.join(self.column_names)}")
            return Column(self, key)
        if isinstance(key, slice):
            key = range(len(self))[key]
        if isinstance(key, Iterable):
            rows = [self._row(index) for index in key]
            return {name: [row[name] for row in rows] for name in self.column_names}
        return self._row(key)

    def _row(self, index: int) -> dict[str, list[int]]:
        number = range(len(self))[index]  # raises IndexError
        segments = self.plan.segments(number)
        tokens = [self.rows.tokens(*segment) for segment in segments]
        ids, labels = (np.concatenate(parts).astype(np.int64).tolist() for parts in zip(*tokens, strict=True))
        row = {"input_ids": ids, "labels": labels, "seq_lengths": [len(ids) for ids, _ in tokens]}
        return {name: row[name] for name in self.column_names}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return map(self._row, range(len(self)))

    def packs(self) -> Iterator[Pack]:
        """All items, in order."""
        return map(self.pack, range(len(self)))

    def __getitems__(self, indices: Sequence[int | tuple[int, int] | None]) -> list[Pack]:
        """What a data loader reads: the packs of a batch."""
        return [self.pack(index) for index in indices]

    def pack(self, index: int | tuple[int, int] | None) -> Pack:
        """Item `index`, or (epoch, index): this tells a persistent worker when a new epoch begins; [] for None."""
        if index is None:
            return []
        if isinstance(index, tuple):
            epoch, index = index
            self.set_epoch(epoch)
        segments = self.plan.segments(int(index))
        first = int(self.plan.offsets[index])
        weights = [None] * len(segments) if self._weights is None else self._weights[first : first + len(segments)]
        return [
            make_document(*self.rows.tokens(*segment), weight, int(segment[0]))
            for segment, weight in zip(segments, weights, strict=True)
        ]


def pack_dataset(
    dataset: Dataset,
    max_length: int | None,
    *,
    strategy: str,
    name: str,
    overlong: str | None = None,
    max_lost_fraction: float = 1.0,
    vocab_size: int | None = None,
    seed: int | None = None,
    keep_end: bool = False,
    per_example: bool = False,
) -> PackedDataset:
    """Plan the packs of a tokenised data set. Segments without a scored token are left out.

    Args:
        dataset: columns `input_ids` and `labels`.
        max_length: tokens a pack holds, and where an example is cut; None only with `strategy="none"`.
        strategy: as in `plan_packs`; "none" for one example per item.
        name: names the data set in messages.
        overlong: as in `plan_packs`: what happens to an example longer than `max_length`.
        max_lost_fraction: the share of the data set's tokens, 0 to 1, that may be lost for any reason.
        vocab_size: ids and labels must be below it.
        seed: for the examples that meet in a pack, and the order of packs; with a seed, every epoch is packed anew.
        keep_end: a truncated example keeps its last tokens instead of its first.
        per_example: examples weigh the same in the loss, instead of scored tokens.

    Raises:
        ValueError: the data set is empty, has no scored token or loses more than `max_lost_fraction`, a row is not
            well formed, or `cut_examples` refuses it.
    """
    check_max_lost_fraction(max_lost_fraction)
    if len(dataset) == 0:
        raise ValueError(f"the {name} data set is empty")
    rows = TokenRows(dataset)
    if vocab_size is not None:
        rows.check_ids(vocab_size)
    longest = max(int(rows.lengths.max()), 1) if max_length is None else max_length
    segments = cut_examples(rows.lengths, longest, strategy=strategy, overlong=overlong, keep_end=keep_end)
    scored = rows.count_scored(segments.examples, segments.starts, segments.stops)
    packed = PackedDataset(rows, segments.keep_scored(scored), scored[scored > 0], seed=seed, per_example=per_example)
    plan = packed.plan
    if not len(plan):
        raise ValueError(
            f"no example of the {name} data set has a token to score within max_length={max_length} (labels that are "
            f"not -100, after an example's first token): {'; '.join(plan.account.describe_losses(max_length))}"
        )
    plan.account.check_lost_fraction(max_lost_fraction, max_length, f"{name} data set")
    return packed


class PackSampler(torch.utils.data.Sampler):
    """Gives each epoch its own packs, ordered so that packs that run at the same time cost attention the same.

    Yields (epoch, pack).

    Args:
        packs: a data set that repacks.
        group_size: how many packs run at the same time: the packs of a batch, on all devices.
    """

    def __init__(self, packs: PackedDataset, group_size: int) -> None:
        self._packs, self._group_size = packs, group_size

    def __len__(self) -> int:
        return len(self._packs)

    def set_epoch(self, epoch: int) -> None:
        self._packs.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self._packs.epoch
        assert self._packs.seed is not None
        for pack in balanced_order(self._packs.plan, self._group_size, self._packs.seed + epoch):
            yield epoch, int(pack)
