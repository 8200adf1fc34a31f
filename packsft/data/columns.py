"""Arrow columns of lists, read in place: a row is a view, never a copy, and a selection or a shuffle moves nothing.

Knows integers and masks, not documents.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from packsft.data.document import is_outside
from packsft.packing.segments import ranges

BLOCK = 1 << 22  # values read at once
INTEGERS, MASK, WEIGHTS = "integers (int64)", "0 or 1", "numbers of 0 or more"
ALL_FIT = np.array(True)
_IS_NUMBER = (pa.types.is_integer, pa.types.is_floating)
# what a column may hold: the types of its values, and which of the values fit
FITTING: dict[str, tuple[Sequence[Callable], Callable[[np.ndarray], np.ndarray]]] = {
    INTEGERS: (_IS_NUMBER[:1], lambda array: array <= np.iinfo(np.int64).max if array.dtype == np.uint64 else ALL_FIT),
    MASK: ((*_IS_NUMBER, pa.types.is_boolean), lambda array: (array == 0) | (array == 1)),
    WEIGHTS: (_IS_NUMBER, lambda array: (array >= 0) & (array < np.inf)),
}


class ListColumn:
    """One list column as (offsets, values) arrays per chunk, the values zero-copy, behind the data set's index.

    Args:
        dataset: has no transform, see `check_no_transform`.
        name: the column.
        values: what it must hold, a key of `FITTING`.

    Attributes:
        lengths: `[rows]` int64, values in each row.

    Raises:
        ValueError: there is no such column, or, naming the row of the data set: a list is missing, or a value is not
            what it must be. Rows that a selection leaves out may hold anything.
    """

    def __init__(self, dataset: Dataset, name: str, values: str = INTEGERS) -> None:
        if name not in dataset.column_names:
            raise ValueError(f"the data set has no column {name!r}, only {', '.join(dataset.column_names)}")
        column = dataset.data.column(name)
        if not is_list(column.type):
            raise ValueError(f"the data set's column {name!r} holds {column.type}, expected lists of {values}")
        self._order = order_of(dataset)
        self._dtype = "<f8" if values == WEIGHTS else "<i8"
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []
        first, chunk_lengths = 0, [np.zeros(0, np.int64)]
        for chunk in column.chunks:
            if len(chunk) == 0:  # may have no offsets
                continue
            if chunk.null_count and (row := self._find(first + true_at(chunk.is_null()))) is not None:
                raise ValueError(f"row {row} of the data set: {name} is missing")
            offsets, flat = _flat(chunk)
            array, unfit = _as_numpy(flat, values)
            if (found := self._find_value(first, offsets, unfit)) is not None:
                row, at = found
                given = "null" if not flat[at].is_valid else array[at] if len(array) else flat.type
                raise ValueError(f"row {row} of the data set: {name} holds {given}, expected {values}")
            self._chunks.append((offsets, array))
            chunk_lengths.append(np.diff(offsets))
            first += len(chunk)
        self._first_rows = np.cumsum([len(lengths) for lengths in chunk_lengths])
        lengths = np.concatenate(chunk_lengths)
        self.lengths = lengths if self._order is None else lengths[self._order]

    def _find(self, table_rows: np.ndarray) -> int | None:
        """The first row of the data set that is one of these rows of its table, which are sorted."""
        return first_of(self._order, table_rows)

    def _find_value(self, first: int, offsets: np.ndarray, at: np.ndarray) -> tuple[int, int] | None:
        """(row of the data set, i) of the first row that holds a value `at[i]` of the chunk, whose first row is
        `first`; `at` is sorted."""
        table_rows = first + np.searchsorted(offsets, at, side="right") - 1
        if (row := self._find(table_rows)) is None:
            return None
        table_row = row if self._order is None else self._order[row]
        return row, int(at[np.searchsorted(table_rows, table_row)])

    def check_lengths(self, name: str, other: ListColumn) -> None:
        """Raises ValueError for a row of `other`, a column of that name, with more or fewer values."""
        differ = np.flatnonzero(self.lengths != other.lengths)
        if len(differ):
            row = differ[0]
            raise ValueError(
                f"row {row} of the data set: {other.lengths[row]} {name} for {self.lengths[row]} input_ids"
            )

    def row(self, row: int) -> np.ndarray:
        if self._order is not None:
            row = self._order[row]
        chunk = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        offsets, values = self._chunks[chunk]
        local = row - self._first_rows[chunk]
        return values[offsets[local] : offsets[local + 1]]

    def at(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """`[R]`: the value at place `places[r]` of row `rows[r]`."""
        found = np.zeros(len(rows), np.int64)
        for chosen, values, begin in self._by_chunk(rows):
            found[chosen] = values[begin + places[chosen]]
        return found

    def _by_chunk(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(which of `rows` lie in it, its values, where these rows begin there) for each chunk that holds any."""
        base = rows if self._order is None else self._order[rows]
        base = base.astype(np.int64)
        chunks = np.searchsorted(self._first_rows, base, side="right") - 1
        by_chunk = np.argsort(chunks, kind="stable")
        found, firsts = np.unique(chunks[by_chunk], return_index=True)
        for chunk, chosen in zip(found, np.split(by_chunk, firsts[1:]), strict=False):  # without rows: one empty part
            offsets, values = self._chunks[chunk]
            yield chosen, values, offsets[base[chosen] - self._first_rows[chunk]]

    def count_not(self, ignored: int, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """`[S]` int32: values other than `ignored` in `starts:stops` of `rows`."""
        counts = np.zeros(len(rows), np.int32)
        for chosen, values, begin in self._by_chunk(rows):
            begin, end = begin + starts[chosen], begin + stops[chosen]
            in_order = np.argsort(begin, kind="stable")
            chosen, begin, end = chosen[in_order], begin[in_order], end[in_order]
            # a running count per block, extended to the end of a segment: a chunk may hold billions of values
            cuts = np.flatnonzero(np.diff(begin // BLOCK, prepend=-1, append=-1))
            for first, last in itertools.pairwise(cuts):
                block, low, high = slice(first, last), begin[first], end[first:last].max()
                running = np.cumsum(np.append(False, values[low:high] != ignored), dtype=np.int32)
                counts[chosen[block]] = running[end[block] - low] - running[begin[block] - low]
        return counts

    def digest(self, starts: np.ndarray | None = None, stops: np.ndarray | None = None) -> str:
        """SHA-256 in hex over the lengths and values of `starts:stops` (default: all) of the rows, in order."""
        starts = np.zeros_like(self.lengths) if starts is None else starts
        lengths = (self.lengths if stops is None else stops) - starts
        digest = hashlib.sha256(lengths.astype("<i8", copy=False).data)
        ends = np.cumsum(lengths)
        cuts = np.searchsorted(ends, np.arange(0, int(ends[-1]) if len(ends) else 0, BLOCK), side="right")
        for first, last in itertools.pairwise(np.unique([*cuts, len(lengths)])):
            rows = np.arange(first, last)
            block = np.zeros(int(lengths[rows].sum()), self._dtype)
            places = np.cumsum(lengths[rows]) - lengths[rows]
            for chosen, values, begin in self._by_chunk(rows):
                counts = lengths[rows[chosen]]
                block[ranges(places[chosen], counts)] = values[ranges(begin + starts[rows[chosen]], counts)]
            narrow = block.astype("<i4")  # half the bytes to hash, for every vocabulary that exists
            digest.update((narrow if (narrow == block).all() else block.astype(self._dtype)).data)
        return digest.hexdigest()

    def first_outside(self, name: str, vocab_size: int) -> tuple[int, int] | None:
        """(row, value) of the first row with a value outside the vocabulary, or None."""
        found = []
        for (offsets, values), first in zip(self._chunks, self._first_rows, strict=False):
            at = np.flatnonzero(is_outside(values, name, vocab_size))
            if len(at) and (place := self._find_value(int(first), offsets, at)) is not None:
                found.append((place[0], int(values[place[1]])))
        return min(found, default=None)


def _flat(chunk: Any) -> tuple[np.ndarray, pa.Array]:
    """(offsets, values) of the rows of a list array, those of missing rows too."""
    if pa.types.is_fixed_size_list(chunk.type):
        offsets = (np.arange(len(chunk) + 1) + chunk.offset) * chunk.type.list_size
    else:
        offsets = chunk.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], chunk.values.slice(offsets[0], offsets[-1] - offsets[0])


def _as_numpy(values: pa.Array, expected: str) -> tuple[np.ndarray, np.ndarray]:
    """`values` as an array, and the indices of those that do not fit. An empty array if their type does not."""
    none, types = np.zeros(0, np.int64), FITTING[expected][0]
    if len(values) == values.null_count or not any(is_type(values.type) for is_type in types):
        return none, np.arange(len(values))  # `datasets` types lists that are all empty as lists of null
    known = values.fill_null(pa.scalar(0).cast(values.type)) if values.null_count else values
    array = known.to_numpy(zero_copy_only=not pa.types.is_boolean(values.type))
    fits = FITTING[expected][1](array)
    unfit = none if fits.all() else np.flatnonzero(~fits)
    return array, np.union1d(unfit, true_at(values.is_null())) if values.null_count else unfit


def true_at(flags: pa.BooleanArray) -> np.ndarray:
    """The indices of the values that are true."""
    return np.flatnonzero(flags.fill_null(False).to_numpy(zero_copy_only=False))


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def order_of(dataset: Dataset) -> np.ndarray | None:
    """`[rows]`: the row of the table behind each row of a data set that was selected or shuffled; otherwise None."""
    return None if dataset._indices is None else dataset._indices.column(0).to_numpy().astype(np.int64)


def first_of(order: np.ndarray | None, table_rows: np.ndarray) -> int | None:
    """The first row of a data set with this `order_of` that is one of these rows of its table, which are sorted."""
    rows = rows_of(order, table_rows)
    return int(rows[0]) if len(rows) else None


def rows_of(order: np.ndarray | None, table_rows: np.ndarray) -> np.ndarray:
    """The rows of a data set with this `order_of` that are among these rows of its table."""
    return table_rows if order is None else np.flatnonzero(np.isin(order, table_rows))


def check_no_transform(dataset: Dataset) -> None:
    """Raises ValueError for a data set whose rows are not what its columns hold."""
    if dataset.format["type"] == "custom":
        raise ValueError(
            "the data set has a transform (Dataset.with_transform()), but packsft reads its columns, which a transform "
            "does not change: apply it with map() first, or set dataset_kwargs={'skip_prepare_dataset': True} and let "
            "it give trainer-ready rows, see packs of your own"
        )
