"""A document: a run of tokens that attends only to itself. It is checked once, where it enters.

Documents enter in three places, and each calls this file: the columns of a tokenised data set (`columns.py`,
`packs.py`), the rows of a stream (`streams.py`), and packs that the user made (`documents_of`).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    - `of_tokens`: what the processor of a row with pictures gives beside the ids, `[L]` each
    - `of_pictures`: its pictures, as the processor gives those of one row, without padding
    """

    input_ids: np.ndarray
    labels: np.ndarray
    num_scored: int
    weight: float
    row: int = -1
    of_tokens: Mapping[str, Any] = field(default_factory=dict)
    of_pictures: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    def with_pictures(self, of_tokens: Mapping[str, Any], of_pictures: Mapping[str, Any]) -> Document:
        return replace(self, of_tokens=of_tokens, of_pictures=of_pictures)

    def part(self, start: int, stop: int) -> Document:
        """Tokens `start:stop` as a document of its own, with the same weight. Not of one with pictures."""
        if (start, stop) == (0, len(self)):
            return self
        assert not self.of_pictures
        of_tokens = {key: values[start:stop] for key, values in self.of_tokens.items()}
        part = make_document(self.input_ids[start:stop], self.labels[start:stop], self.weight, self.row)
        return part.with_pictures(of_tokens, {})


@dataclass(frozen=True, eq=False)
class PlannedDocument:
    """Stands for a `Document` of a stream with pictures, which are processed when a pass needs them.

    - `length`: of the document
    - `num_scored`, `weight`, `row`: as of a `Document`
    - `tokens_of_row`: without a cut
    - `given`: the row
    """

    length: int
    num_scored: int
    row: int
    tokens_of_row: int
    given: Mapping[str, Any]
    weight: float = 0.0

    def __len__(self) -> int:
        return self.length

    def part(self, start: int, stop: int) -> PlannedDocument:
        """The whole: the buffer cuts nothing where pictures are."""
        assert (start, stop) == (0, self.length)
        return self


Pack = list[Document]


def make_document(input_ids: np.ndarray, labels: np.ndarray, weight: float | None = None, row: int = -1) -> Document:
    """A document of checked `input_ids` and `labels`, `[L]` integers. By default it is a whole example."""
    labels = np.array(labels, dtype=np.int64)  # a copy
    labels[:1] = IGNORE_INDEX
    num_scored = int(np.count_nonzero(labels != IGNORE_INDEX))
    if weight is None:
        weight = 1.0 / max(1, num_scored)
    return Document(np.asarray(input_ids, dtype=np.int64), labels, num_scored, weight, row)


def documents_of(row: Mapping[str, Any], where: str, vocab_size: int | None = None, number: int = -1) -> Pack:
    """The documents of a row that the user made.

    Args:
        row: `input_ids`; optionally `labels` (default: the input ids), `seq_lengths` (the lengths of its documents;
            default: a document begins where `position_ids` are 0; without both, the row is one document),
            `attention_mask` (0 for padding, which is left out) and `loss_weights` (one `Document.weight` per document).
            None is not a default: a data set of rows with and without a column has None where it is left out.
        where: names the row in messages.
        vocab_size: ids and labels must be below it; None for no check.
        number: of the row, if known.

    Raises:
        ValueError: as in `checked_tokens`, or one of the other columns does not fit.
    """
    check_row(row, where)
    ids, labels = checked_tokens(row.get("input_ids"), row.get("labels", row.get("input_ids")), where, vocab_size)
    span = unpadded(row["attention_mask"], len(ids), where) if "attention_mask" in row else (0, len(ids))
    if "position_ids" in row:
        lengths = lengths_of(row["position_ids"], len(ids), span, where)
    else:
        lengths = np.array([span[1] - span[0]])
    ids, labels = ids[slice(*span)], labels[slice(*span)]
    if "seq_lengths" in row:
        given = _integers(row["seq_lengths"], f"{where}: seq_lengths")
        if (given < 0).any():
            raise ValueError(f"{where}: seq_lengths holds {given.min()}, expected 0 or more")
        if (total := sum(given.tolist())) != len(ids):
            raise ValueError(f"{where}: seq_lengths sum to {total}, but there are {len(ids)} input_ids")
        if "position_ids" in row and not np.array_equal(given[given > 0], lengths):
            raise ValueError(f"{where}: position_ids begin anew at other places than seq_lengths says")
        lengths = given
    weights: list[float] | list[None] = [None] * len(lengths)
    if "loss_weights" in row:
        weights = _weights(row["loss_weights"], len(lengths), f"{where}: loss_weights")
    stops = np.cumsum(lengths)
    return [
        make_document(ids[stop - length : stop], labels[stop - length : stop], weight, number)
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
        column = _integers(values, f"{where}: {name}")
        if vocab_size is not None and (bad := is_outside(column, name, vocab_size)).any():
            raise ValueError(outside_vocabulary(where, name, column[bad][0], vocab_size))
        columns.append(column)
    ids, checked = columns
    if len(ids) != len(checked):
        raise ValueError(f"{where}: {len(checked)} labels for {len(ids)} input_ids")
    return ids, checked


def unpadded(attention_mask: Any, count: int, where: str) -> tuple[int, int]:
    """(start, stop) of the tokens of a row that are no padding.

    Raises ValueError unless the mask has a 0 or 1 for each of `count` input ids, and all its 1 are in one run.
    """
    check_mask(attention_mask, count, where, "attention_mask")
    (ones,) = np.nonzero(_array(attention_mask))
    if not len(ones):
        return 0, 0
    start, stop = int(ones[0]), int(ones[-1]) + 1
    if stop - start > len(ones):
        raise ValueError(f"{where}: attention_mask has a 0 between its 1: padding must be at the start or at the end")
    return start, stop


def lengths_of(position_ids: Any, count: int, span: tuple[int, int], where: str) -> np.ndarray:
    """`[D]`: the lengths of the documents in a row: one begins at each position 0 within `span` (start, stop).

    Raises ValueError unless there is an integer for each of `count` input ids that counts from 0 in each document.
    """
    positions = _integers(position_ids, f"{where}: position_ids")
    if len(positions) != count:
        raise ValueError(f"{where}: {len(positions)} position_ids for {count} input_ids")
    positions = positions[slice(*span)]
    (begins,) = np.nonzero(positions == 0)
    lengths = np.diff(begins, append=len(positions))
    counted = np.arange(lengths.sum()) - np.repeat(begins - begins[:1], lengths)
    if not np.array_equal(positions, counted):
        raise ValueError(f"{where}: position_ids is {short(positions.tolist())}, expected to count 0, 1, 2, ...")
    return lengths


def check_single(lengths: np.ndarray, where: str) -> None:
    """Raises ValueError if there are several documents."""
    if len(lengths) > 1:
        raise ValueError(
            f"{where}: its position_ids begin anew, so it holds {len(lengths)} documents, but is taken as one: set "
            "dataset_kwargs={'skip_prepare_dataset': True}, for packs of your own"
        )


def check_row(row: Any, where: str) -> None:
    """Raises ValueError for a row that is not a mapping, as a data set in the format "pandas" or "arrow" gives it."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}, expected a dict with the columns as keys")


def check_mask(values: Any, count: int, where: str, name: str) -> None:
    """Raises ValueError unless a mask has a 0 or 1, of any type, for each of `count` input ids."""
    column = _array(values)
    if column.dtype.kind not in "biuf" or column.ndim != 1 or not ((column == 0) | (column == 1)).all():
        raise ValueError(f"{where}: {name} is {short(values)}, expected a list of 0 or 1")
    if len(column) != count:
        raise ValueError(f"{where}: {len(column)} {name} for {count} input_ids")


def _integers(values: Any, what: str) -> np.ndarray:
    """`values` as int64 `[L]`."""
    column = _array(values)
    too_large = column.dtype == np.uint64 and (column > np.iinfo(np.int64).max).any()
    if column.ndim != 1 or (len(column) and column.dtype.kind not in "iu") or too_large:
        raise ValueError(f"{what} is {short(values)}, expected a list of integers (int64)")
    return column.astype(np.int64, copy=False)


def _weights(values: Any, count: int, what: str) -> list[float]:
    column = _array(values)
    if column.shape != (count,) or column.dtype.kind not in "iuf" or not ((column >= 0) & (column < np.inf)).all():
        raise ValueError(f"{what} is {short(values)}, expected {count} numbers of 0 or more, one per document")
    return column.astype(np.float64).tolist()


def _array(values: Any) -> np.ndarray:
    """`values` as numpy has them; without a dimension where it cannot."""
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors of bfloat16 or with a gradient
        return np.array(None)


def short(values: Any) -> str:
    """On one line, cut in the middle."""
    return " ".join(reprlib.repr(values).split())


def is_outside(values: np.ndarray, name: str, vocab_size: int) -> np.ndarray:
    """Which values are outside the vocabulary; labels may be -100."""
    bad = (values < 0) | (values >= vocab_size)
    return bad & (values != IGNORE_INDEX) if name == "labels" else bad


def outside_vocabulary(where: str, name: str, value: int, vocab_size: int) -> str:
    """The error message for a value outside the vocabulary."""
    return (
        f"{where}: {name} holds {value}, but the vocabulary has {vocab_size} entries, 0 to {vocab_size - 1}"
        + (" (or -100, not scored)" if name == "labels" else "")
    )  # fmt: skip
