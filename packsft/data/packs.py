"""A data set of packs: a plan over tokenised rows. Tokens of a pack are gathered when the pack is read.

Knows Arrow columns of token ids, not text, models or devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value

from packsft.data.columns import INTEGERS, MASK, WEIGHTS, ListColumn, check_no_transform
from packsft.data.document import (
    IGNORE_INDEX,
    Document,
    Pack,
    check_single,
    documents_of,
    lengths_of,
    make_document,
    outside_vocabulary,
    unpadded,
)
from packsft.data.ranks import sampled_rows
from packsft.packing import (
    STRATEGIES,
    Segments,
    Strategy,
    balanced_order,
    check_max_lost_fraction,
    cut_examples,
    pack_segments,
)

if TYPE_CHECKING:  # pictures.py reads this file
    from packsft.data.pictures import PictureRows


class TokenRows:
    """The tokens and labels of a data set's rows, read in place: a row is a view, never a copy.

    Args:
        dataset: list columns `input_ids` and `labels` (-100 = not scored). Optionally `attention_mask` (padding, 0, is
            no part of a row) and `position_ids`, which must be what they are by default.
        once: the tokens with which a row begins and ends at most once, or None: a text may hold the token that its
            tokenizer adds.

    Attributes:
        dataset: as given.
        lengths: `[rows]` int64, tokens in each row.
        tokens_padding, texts_with_doubles: as in `Account`.

    Raises:
        ValueError: a column is missing, as a whole or in a row, or holds anything else, a row's columns differ in
            length, or the data set has a transform.
    """

    def __init__(self, dataset: Dataset, once: tuple[int | None, int | None] = (None, None)) -> None:
        check_no_transform(dataset)
        self.dataset = dataset
        self._read_columns()
        self._ids.check_lengths("labels", self._labels)
        self._starts, stops = np.zeros_like(self._ids.lengths), self._ids.lengths.copy()
        if "attention_mask" in dataset.column_names:
            self._leave_out_padding(ListColumn(dataset, "attention_mask", MASK), stops)
        unpadded_lengths = stops - self._starts
        self._leave_out_doubles(*once, stops)
        self.lengths = stops - self._starts
        self.tokens_padding = int((self._ids.lengths - unpadded_lengths).sum())
        self.texts_with_doubles = int(np.count_nonzero(unpadded_lengths - self.lengths))
        if "position_ids" in dataset.column_names:
            self._check_positions(ListColumn(dataset, "position_ids"))

    def _read_columns(self) -> None:
        self._ids = ListColumn(self.dataset, "input_ids")
        self._labels = ListColumn(self.dataset, "labels")

    def _leave_out_padding(self, mask: ListColumn, stops: np.ndarray) -> None:
        self._ids.check_lengths("attention_mask", mask)
        rows = np.flatnonzero(mask.lengths)
        ones = mask.count_not(0, rows, self._starts[rows], stops[rows])
        for row in rows[ones < mask.lengths[rows]]:
            where = f"row {row} of the data set"
            self._starts[row], stops[row] = unpadded(mask.row(row), mask.lengths[row], where)

    def _leave_out_doubles(self, first: int | None, last: int | None, stops: np.ndarray) -> None:
        for token, bound, step in ((first, self._starts, 1), (last, stops, -1)):
            rows = np.flatnonzero(stops - self._starts > 1) if token is not None else np.zeros(0, np.int64)
            end = bound[rows] if step > 0 else bound[rows] - 1
            doubled = (self._ids.at(rows, end) == token) & (self._ids.at(rows, end + step) == token)
            bound[rows[doubled]] += step

    def _check_positions(self, positions: ListColumn) -> None:
        for row, (start, length) in enumerate(zip(self._starts, self.lengths, strict=True)):
            where = f"row {row} of the data set"
            span = (start, start + length)
            check_single(lengths_of(positions.row(row), self._ids.lengths[row], span, where), where)

    def tokens(self, row: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Input ids and labels `start:stop` of a row."""
        span = slice(self._starts[row] + start, self._starts[row] + stop)
        return self._ids.row(row)[span], self._labels.row(row)[span]

    def document(self, row: int, start: int, stop: int, weight: float | None = None) -> Document:
        """Tokens `start:stop` of a row."""
        return make_document(*self.tokens(row, start, stop), weight, int(row))

    def count_scored(self, examples: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """`[S]` integers: scored labels in `start + 1 : stop` of each segment (nothing predicts its first token)."""
        begins = self._starts[examples]
        second = np.minimum(starts + 1, stops)  # an empty segment has none
        return self._labels.count_not(IGNORE_INDEX, examples, begins + second, begins + stops)

    def sample(self) -> str:
        """SHA-256 in hex over the number of rows and the tokens and labels of some of them."""
        return sample_of(len(self.lengths), lambda row: self.tokens(row, 0, self.lengths[row]))

    def check_ids(self, vocab_size: int) -> None:
        """Raises ValueError, naming the row, for an id or a label outside the vocabulary."""
        for name, column in (("input_ids", self._ids), ("labels", self._labels)):
            if (found := column.first_outside(name, vocab_size)) is not None:
                row, value = found
                raise ValueError(outside_vocabulary(f"row {row} of the data set", name, value, vocab_size))

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex over the tokens and labels of all rows, in order; their integer type does not matter."""
        stops = self._starts + self.lengths
        digests = [column.digest(self._starts, stops) for column in (self._ids, self._labels)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        views = ("_ids", "_labels")  # a worker maps the Arrow file itself
        return {name: value for name, value in vars(self).items() if name not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._read_columns()


def sample_of(num_rows: int, read: Callable[[int], Sequence[np.ndarray]]) -> str:
    """SHA-256 in hex over the number of rows and what `read` gives for some of them."""
    rows = sampled_rows(num_rows)
    return hashlib.sha256(repr([num_rows, *([x.tolist() for x in read(row)] for row in rows)]).encode()).hexdigest()


USER_COLUMNS = {
    "input_ids": INTEGERS,
    "labels": INTEGERS,
    "seq_lengths": INTEGERS,
    "position_ids": INTEGERS,
    "attention_mask": MASK,
    "loss_weights": WEIGHTS,
}


class UserPacks(torch.utils.data.Dataset):
    """Packs that the user made. Item i is row i, as a list of `Document`s; `documents_of` describes a row.

    Args:
        rows: the packs.
        vocab_size: ids and labels must be below it; None for no check.

    Attributes:
        document_lengths: `[documents]` int64; empty if the rows have a transform.
        lengths: `[P]` int64, the tokens of each pack, without padding; likewise.
        tokens_padding: the tokens of padding, which are left out.

    Raises:
        ValueError: a row is not well formed. Rows with a transform are checked when they are read.
    """

    strategy, repacks = STRATEGIES["none"], False
    total_dataset_length = 0  # see `PackedDataset`

    def __init__(self, rows: Dataset, vocab_size: int | None) -> None:
        self.rows, self._vocab_size = rows, vocab_size
        self._transforms = rows.format["type"] == "custom"
        self._read_columns()
        document_lengths: list[int] = []
        lengths: list[int] = []
        scores = False
        for index in range(0 if self._transforms else len(rows)):  # one by one: the documents are copies
            pack = self[index]
            document_lengths += map(len, pack)
            lengths.append(sum(map(len, pack)))
            scores = scores or any(document.num_scored and document.weight for document in pack)
        if lengths and not scores:
            raise ValueError(
                "no document of the data set has a token to score (a label that is not -100, after its first)"
            )
        self.document_lengths, self.lengths = np.array(document_lengths, np.int64), np.array(lengths, np.int64)
        in_columns = int(self._columns["input_ids"].lengths.sum()) if lengths else 0
        self.tokens_padding = in_columns - int(self.lengths.sum())

    def _read_columns(self) -> None:
        names = [] if self._transforms else [name for name in USER_COLUMNS if name in self.rows.column_names]
        self._columns = {name: ListColumn(self.rows, name, USER_COLUMNS[name]) for name in names}

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 in hex of each column that is read; empty if the rows have a transform."""
        return {name: column.digest() for name, column in self._columns.items()}

    def sample(self) -> str:
        """SHA-256 in hex over the number of packs and the tokens and labels of some of them; without them if the rows
        have a transform."""
        if self._transforms:
            return str(len(self))
        return sample_of(len(self), lambda row: [x for d in self[row] for x in (d.input_ids, d.labels)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | None) -> Pack:
        """Item `index`; [] for None."""
        if index is None:
            return []
        row = {name: column.row(index) for name, column in self._columns.items()}
        return documents_of(row or self.rows[index], f"row {index} of the data set", self._vocab_size, index)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_columns": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._read_columns()


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
        rows: TokenRows | PictureRows,
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
        self.lengths, self.items = plan.per_pack(plan.document_lengths), plan.per_pack(items)

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

    @property
    def document_lengths(self) -> np.ndarray:
        """`[documents]` integers, the tokens of each document of the plan."""
        return self.plan.document_lengths

    def sample(self) -> str:
        """SHA-256 in hex over the number of rows and the tokens and labels of some of them."""
        return self.rows.sample()

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
            self.rows.document(row, start, stop, weight)
            for (row, start, stop), weight in zip(segments.tolist(), weights, strict=True)
        ]


def pack_dataset(
    dataset: Dataset | PictureRows,
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
    once: tuple[int | None, int | None] = (None, None),
) -> PackedDataset:
    """Plan the packs of a tokenised data set, or of rows with pictures. Segments without a scored token are left out.

    Args:
        dataset: see `TokenRows`.
        max_length: tokens a pack holds, and where an example is cut; None only with `strategy="none"`.
        strategy: as in `plan_packs`; "none" for one example per item.
        name: names the data set in messages.
        overlong: as in `plan_packs`: what happens to an example longer than `max_length`.
        max_lost_fraction: the share of the data set's tokens, 0 to 1, that may be lost for any reason.
        vocab_size: ids and labels must be below it.
        seed: for the examples that meet in a pack, and the order of packs; with a seed, every epoch is packed anew.
        keep_end: a truncated example keeps its last tokens instead of its first.
        per_example: examples weigh the same in the loss, instead of scored tokens.
        once: see `TokenRows`.

    Raises:
        ValueError: the data set is empty, has no scored token or loses more than `max_lost_fraction`, a row is not
            well formed, or `cut_examples` refuses it.
    """
    check_max_lost_fraction(max_lost_fraction)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"the {name} data set is empty")
    rows = TokenRows(dataset, once) if isinstance(dataset, Dataset) else dataset
    if vocab_size is not None:
        rows.check_ids(vocab_size)
    longest = max(int(rows.lengths.max()), 1) if max_length is None else max_length
    uncut = None if isinstance(rows, TokenRows) else rows.pictures_end
    segments = cut_examples(rows.lengths, longest, strategy=strategy, overlong=overlong, keep_end=keep_end, uncut=uncut)
    scored = rows.count_scored(segments.examples, segments.starts, segments.stops)
    segments = segments.keep_scored(scored)
    segments.account.tokens_padding = rows.tokens_padding
    segments.account.texts_with_doubles = rows.texts_with_doubles
    packed = PackedDataset(rows, segments, scored[scored > 0], seed=seed, per_example=per_example)
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
