"""Tokenised rows and a plan to a data set of packs: gathers the tokens of one pack when it is asked for.

Knows Arrow columns of token ids; knows nothing of text, models or devices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset

from packsft.batch import IGNORE_INDEX
from packsft.packing import PackPlan, plan_packs


class TokenRows:
    """The list columns `input_ids` and `labels` of a data set, read in place: a row is a view, never a copy.

    Args:
        dataset: has `input_ids`, and `labels` of the same lengths (-100 = not scored).

    Raises:
        ValueError: a row whose labels and input ids differ in length, named by its number.
    """

    def __init__(self, dataset: Dataset) -> None:
        # A selection or a shuffle is an index beside the table: write it out once, so that rows are slices again.
        self._dataset = dataset.flatten_indices() if dataset._indices is not None else dataset
        self._read_columns()
        differ = np.flatnonzero(self.lengths != self._labels.lengths)
        if len(differ):
            row = differ[0]
            raise ValueError(
                f"row {row} of the data set: {self._labels.lengths[row]} labels for {self.lengths[row]} input_ids"
            )

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

    def count_scored(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """`[rows]` int64: scored labels in `start + 1 : stop` of each row (nothing predicts the first token)."""
        return self._labels.count_not(IGNORE_INDEX, starts + 1, stops)

    def check_ids(self, vocab_size: int) -> None:
        """Raises ValueError, naming the row, for an id or a label outside the vocabulary."""
        for name, column, ignore in (("input_ids", self._ids, None), ("labels", self._labels, IGNORE_INDEX)):
            if (found := column.first_outside(vocab_size, ignore)) is not None:
                row, value = found
                raise ValueError(
                    f"row {row} of the data set: {name} holds {value}, but the vocabulary has {vocab_size} entries, "
                    f"0 to {vocab_size - 1}" + (" (or -100, not scored)" if ignore is not None else "")
                )

    def __getstate__(self) -> dict[str, Any]:
        return {"_dataset": self._dataset}  # not the views: a worker maps the Arrow file of the data set itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._dataset = state["_dataset"]
        self._read_columns()


class _ListColumn:
    """One Arrow list column as (offsets, values) arrays per chunk, the values zero-copy."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []
        for chunk in dataset.data.column(name).chunks:
            if chunk.null_count:
                row = sum(len(offsets) - 1 for offsets, _ in self._chunks) + chunk.is_null().index(True).as_py()
                raise ValueError(f"row {row} of the data set: {name} is missing")
            if not hasattr(chunk, "offsets"):  # fixed-size lists
                values = chunk.flatten().to_numpy(zero_copy_only=False)
                offsets = np.arange(len(chunk) + 1) * (len(values) // max(len(chunk), 1))
            else:
                values = chunk.values.to_numpy(zero_copy_only=False)
                offsets = chunk.offsets.to_numpy().astype(np.int64)
            self._chunks.append((offsets, values))
        counts = [len(offsets) - 1 for offsets, _ in self._chunks]
        self._first_rows = np.cumsum([0, *counts])
        self.lengths = np.concatenate([np.diff(offsets) for offsets, _ in self._chunks] or [np.zeros(0, np.int64)])

    def row(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        offsets, values = self._chunks[chunk]
        local = row - self._first_rows[chunk]
        return values[offsets[local] : offsets[local + 1]]

    def count_not(self, ignored: int, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        counts = np.zeros(len(starts), dtype=np.int64)
        for (offsets, values), first in zip(self._chunks, self._first_rows, strict=False):
            rows = slice(first, first + len(offsets) - 1)
            begin, end = offsets[:-1] + starts[rows], offsets[:-1] + stops[rows]
            scored = np.append(values != ignored, False).astype(np.int64)
            # reduceat gives an empty segment the value at its start, hence the mask
            bounds = np.stack([np.minimum(begin, len(values)), end], axis=1).ravel()
            counts[rows] = np.where(end > begin, np.add.reduceat(scored, bounds)[::2], 0) if len(bounds) else 0
        return counts

    def first_outside(self, vocab_size: int, ignored: int | None) -> tuple[int, int] | None:
        """(row, value) of the first value that is no id, or None."""
        for (offsets, values), first in zip(self._chunks, self._first_rows, strict=False):
            begin, end = offsets[0], offsets[-1]
            used = values[begin:end]
            bad = (used < 0) | (used >= vocab_size)
            if ignored is not None:
                bad &= used != ignored
            if bad.any():
                at = int(np.argmax(bad))
                return int(first + np.searchsorted(offsets, begin + at, side="right") - 1), int(used[at])
        return None


class PackedDataset(torch.utils.data.Dataset):
    """A plan over rows. Item i is pack i: `input_ids`, `labels` and `seq_lengths`, gathered when asked for.

    `unscored` [rows] bool marks the examples left out because nothing in them is scored.
    """

    def __init__(self, rows: TokenRows, plan: PackPlan, unscored: np.ndarray, *, keep_end: bool = False) -> None:
        self.rows = rows
        self.plan = plan
        self.unscored_dropped = int(unscored.sum())
        self.unscored_tokens = int(rows.lengths[unscored].sum())
        self._keep_end = keep_end

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pieces = []
        for example, start, stop in self.plan.pieces(int(index)):
            # a truncated example keeps its end where the configuration says so
            shift = int(self.rows.lengths[example]) - stop if self._keep_end else 0
            pieces.append(self.rows.tokens(example, start + shift, stop + shift))
        return {
            "input_ids": np.concatenate([ids for ids, _ in pieces]),
            "labels": np.concatenate([labels for _, labels in pieces]),
            "seq_lengths": [len(ids) for ids, _ in pieces],
        }


def pack_dataset(
    dataset: Dataset,
    max_length: int | None,
    *,
    strategy: str,
    name: str,
    vocab_size: int | None = None,
    seed: int | None = None,
    keep_end: bool = False,
) -> PackedDataset:
    """Plan the packs of a tokenised data set and wrap it.

    Args:
        dataset: columns `input_ids` and `labels`.
        max_length: tokens a pack holds, and where an example is cut; None only with `strategy="none"`.
        strategy: of `plan_packs`; "none" for one example per item.
        name: what the messages call the data set.
        vocab_size: ids and labels must be below it.
        seed: shuffles which examples meet, and the order of the packs.
        keep_end: a truncated example keeps its last tokens rather than its first.

    Raises:
        ValueError: an empty data set, one without a scored token, or a row that is not well formed.
    """
    if len(dataset) == 0:
        raise ValueError(f"the {name} data set is empty")
    keep_end = keep_end and strategy in ("bfd", "none")  # the others lose nothing
    rows = TokenRows(dataset)
    if vocab_size is not None:
        rows.check_ids(vocab_size)
    lengths = rows.lengths
    stops = lengths if max_length is None or strategy in ("bfd_split", "wrapped") else np.minimum(lengths, max_length)
    shift = lengths - stops if keep_end else np.zeros_like(lengths)
    unscored = (rows.count_scored(shift, stops + shift) == 0) & (lengths > 0)
    if not ((lengths > 0) & ~unscored).any():
        raise ValueError(
            f"no example of the {name} data set has a token to score within max_length={max_length}: all its labels "
            "are -100 there (or its examples hold a single token or none)"
        )
    planned = np.where(unscored, 0, lengths)  # a length of 0 is left out of every plan
    longest = int(lengths.max()) if max_length is None else max_length
    plan = plan_packs(planned, longest, strategy=strategy, seed=seed)
    return PackedDataset(rows, plan, unscored, keep_end=keep_end)
