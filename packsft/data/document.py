"""A document: a run of tokens that attends only to itself. It is checked once, where it enters.

Documents enter in three places, and each calls this file: the columns of a tokenised data set (`packs.py`), the rows of
a stream (`streams.py`), and packs that the user made (`documents_of`, called by the collator).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORE_INDEX = -100  # a label that is not scored


@dataclass(frozen=True, eq=False)
class Document:
    """L tokens with their labels and weight. Make one with `make_document`.

    - `input_ids` `[L]` int64
    - `labels` `[L]` int64, -100 = not scored; the first is always -100, since nothing predicts the first token
    - `num_scored`: labels that are not -100
    - `weight`: weight of each scored token if all examples count the same: 1 / scored tokens of the example
    - `row`: its row in the data set, or its number in reading order in a stream; -1 if unknown
    """

    input_ids: np.ndarray
    labels: np.ndarray
    num_scored: int
    weight: float
    row: int = -1

    def __len__(self) -> int:
        return len(self.input_ids)

    def part(self, start: int, stop: int) -> Document:
        """Tokens `start:stop` as a document of its own, with the same weight."""
        if (start, stop) == (0, len(self)):
            return self
        return make_document(self.input_ids[start:stop], self.labels[start:stop], self.weight, self.row)


Pack = list[Document]


def make_document(input_ids: np.ndarray, labels: np.ndarray, weight: float | None = None, row: int = -1) -> Document:
    """A document of checked `input_ids` and `labels`, `[L]` integers. By default it is a whole example."""
    labels = np.array(labels, dtype=np.int64)  # a copy
    labels[:1] = IGNORE_INDEX
    num_scored = int(np.count_nonzero(labels != IGNORE_INDEX))
    if weight is None:
        weight = 1.0 / max(1, num_scored)
    return Document(np.asarray(input_ids, dtype=np.int64), labels, num_scored, weight, row)


def documents_of(row: Mapping[str, Any], where: str, vocab_size: int | None = None) -> Pack:
    """The documents of a row that the user made.

    Args:
        row: `input_ids`; optionally `labels` (default: the input ids), `seq_lengths` (the lengths of its documents;
            default: the row is one document) and `loss_weights` (one `Document.weight` per document).
        where: names the row in messages.
        vocab_size: ids and labels must be below it; None for no check.

    Raises:
        ValueError: as in `checked_tokens`, or `seq_lengths` do not fit the input ids.
    """
    labels, weights = row.get("labels"), row.get("loss_weights")
    ids, labels = checked_tokens(
        row.get("input_ids"), row.get("input_ids") if labels is None else labels, where, vocab_size
    )
    lengths = row.get("seq_lengths")
    lengths = np.array([len(ids)] if lengths is None else lengths, dtype=np.int64)
    if lengths.sum() != len(ids) or (lengths < 0).any():
        raise ValueError(f"{where}: seq_lengths sum to {lengths.sum()}, but there are {len(ids)} input_ids")
    weights = [None] * len(lengths) if weights is None else weights
    stops = np.cumsum(lengths)
    return [
        make_document(ids[stop - length : stop], labels[stop - length : stop], weight)
        for stop, length, weight in zip(stops, lengths, weights, strict=True)
        if length
    ]


def checked_tokens(
    input_ids: Any, labels: Any, where: str, vocab_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Both as int64 `[L]`.

    Raises:
        ValueError: either is missing or not a list of integers, they differ in length, or an id or a label is outside
            the vocabulary.
    """
    columns = []
    for name, values in (("input_ids", input_ids), ("labels", labels)):
        if values is None:
            raise ValueError(f"{where} has no {name}")
        try:
            column = np.asarray(values)
            if column.ndim != 1 or (len(column) and column.dtype.kind not in "iu"):
                raise TypeError
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {name} is not a list of integers") from None
        column = column.astype(np.int64, copy=False)
        if vocab_size is not None and (at := first_outside(column, name, vocab_size)) is not None:
            raise ValueError(outside_vocabulary(where, name, column[at], vocab_size))
        columns.append(column)
    ids, checked = columns
    if len(ids) != len(checked):
        raise ValueError(f"{where}: {len(checked)} labels for {len(ids)} input_ids")
    return ids, checked


def first_outside(values: np.ndarray, name: str, vocab_size: int) -> int | None:
    """The index of the first value outside the vocabulary, or None; labels may be -100."""
    bad = (values < 0) | (values >= vocab_size)
    if name == "labels":
        bad &= values != IGNORE_INDEX
    return int(np.argmax(bad)) if bad.any() else None


def outside_vocabulary(where: str, name: str, value: int, vocab_size: int) -> str:
    """The error message for a value outside the vocabulary."""
    return (
        f"{where}: {name} holds {value}, but the vocabulary has {vocab_size} entries, 0 to {vocab_size - 1}"
        + (" (or -100, not scored)" if name == "labels" else "")
    )  # fmt: skip
