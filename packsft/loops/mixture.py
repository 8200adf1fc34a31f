"""Several data sets in one: how many documents of each an epoch takes, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from numpy.typing import NDArray

from packsft.data.packs import TokenRows
from packsft.packing import PackPlan

WEIGHTS_OF = ("token", "document")
STOPPING = ("first_exhausted", "all_exhausted")  # the names of `datasets.interleave_datasets`
MOST_ROUNDS = 1_000  # of a set in an epoch; more is a slip in the weights, and would fill the memory


@dataclass(frozen=True)
class MixedSet:
    """What an epoch takes of one data set: `documents` of its `documents_in_all`, and how many tokens that is.

    The next epoch goes on where this one ended, in one order of the set, so that over epochs every document comes
    equally often. `tokens` is the mean over epochs, and `share` its share of the epoch. `tokens_in` and `tokens_lost`
    are of all rows.
    """

    name: str
    rows: int
    tokens_in: int
    tokens_lost: int
    documents_in_all: int
    documents: int
    tokens: float
    share: float


class Mixture:
    """The documents of each epoch, drawn from several data sets by weight.

    Args:
        sizes: the rows of each set by name; rows are numbered through all sets.
        row_lengths: `[rows]` integers, their tokens.
        plan: of all rows; an item is one document.
        weights: of each set; None: an epoch is every document once.
        weights_of: whether weights are shares of an epoch's tokens or of its documents.
        stopping_strategy: an epoch ends before a document comes twice ("first_exhausted"), or when every document
            came once ("all_exhausted").
        shuffle, seed: the order within a set, and of the sets.

    Attributes:
        sets: one `MixedSet` for each.

    Raises:
        ValueError: a set has no document to score, or an epoch takes its documents more than 1,000 times.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        row_lengths: NDArray[Any],
        plan: PackPlan,
        *,
        weights: Mapping[str, float] | None,
        weights_of: str,
        stopping_strategy: str,
        shuffle: bool,
        seed: int,
    ) -> None:
        bounds = np.cumsum([0, *sizes.values()])
        set_of_item = np.searchsorted(bounds, plan.examples, side="right") - 1
        lengths = plan.document_lengths
        self._items = [np.flatnonzero(set_of_item == index) for index in range(len(sizes))]
        if shuffle:  # one order for all epochs: no document of an epoch comes twice before all came once
            self._items = [np.random.default_rng([seed, i]).permutation(items) for i, items in enumerate(self._items)]
        self._shuffle, self._seed = shuffle, seed
        if empty := [name for name, items in zip(sizes, self._items, strict=True) if not len(items)]:
            raise ValueError(f"the set {empty[0]} has no document with a token to score")
        tokens = np.array([lengths[items].sum() for items in self._items], np.float64)
        have = np.array([len(items) for items in self._items], np.float64)
        counts = have
        if weights is not None:
            shares = np.array([weights[name] for name in sizes], np.float64)
            shares /= shares.max()
            amount = tokens if weights_of == "token" else have
            with np.errstate(divide="ignore", over="ignore"):  # of a weight that is next to nothing
                ends = amount / shares
            end = ends.min() if stopping_strategy == "first_exhausted" else ends.max()
            if end > MOST_ROUNDS * ends.min():
                raise ValueError(
                    f"weights: an epoch would take each document of {list(sizes)[ends.argmin()]} more than "
                    f"{MOST_ROUNDS:,} times: choose nearer weights, or stopping_strategy='first_exhausted'"
                )
            counts = np.maximum(np.round(end * shares / (amount / have)), 1)
        self._counts = counts.astype(np.int64)
        taken = tokens / have * self._counts
        self.sets = []
        for index, (name, size) in enumerate(sizes.items()):
            tokens_in = int(row_lengths[bounds[index] : bounds[index + 1]].sum())
            lost, part = tokens_in - int(tokens[index]), float(taken[index])
            count, share = int(self._counts[index]), part / float(taken.sum())
            self.sets.append(MixedSet(name, size, tokens_in, lost, len(self._items[index]), count, part, share))

    def __len__(self) -> int:
        """Documents in an epoch."""
        return int(self._counts.sum())

    def order(self, epoch: int) -> NDArray[np.int64]:
        """`[len]`: the items of an epoch. Without `shuffle` the sets take turns, each in its own order."""
        parts = [self._of_set(index, epoch) for index in range(len(self._items))]
        items = np.concatenate(parts)
        if self._shuffle:
            return items[np.random.default_rng([self._seed, epoch]).permutation(len(items))]
        turns = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
        return items[np.argsort(turns, kind="stable")]

    def _of_set(self, index: int, epoch: int) -> NDArray[np.int64]:
        items, count = self._items[index], int(self._counts[index])
        return items[np.arange(epoch * count, (epoch + 1) * count) % len(items)]

    def first_epoch(self, plan: PackPlan) -> PackPlan:
        """The documents of the first epoch, in their order. The account stays that of all rows."""
        items = self.order(0)
        parts = {name: getattr(plan, name)[items] for name in ("examples", "starts", "stops")}
        return replace(plan, offsets=np.arange(len(items) + 1), **parts)

    def rows_of_epoch(self) -> NDArray[np.int64]:
        """As many rows of each set as an epoch takes of its documents, those that are lost among them."""
        bounds = np.cumsum([0, *(one.rows for one in self.sets)])
        taken = [
            np.resize(
                np.random.default_rng(0).permutation(one.rows), round(one.rows * one.documents / one.documents_in_all)
            )
            for one in self.sets
        ]
        return np.concatenate([first + rows for first, rows in zip(bounds, taken, strict=False)])

    def rows(self) -> list[tuple[str, ...]]:
        """The sets and their sum as a table, with headings: their tokens, and what an epoch uses of them."""
        sets = self.sets
        names = [field.name for field in fields(MixedSet)][1:]
        total = MixedSet("all", *(sum(getattr(one, name) for one in sets) for name in names))
        headings = ("data set", "tokens", "tokens lost", "documents used", "tokens used")
        return [headings, *map(_row, [*sets, total])]


def _row(of: MixedSet) -> tuple[str, ...]:
    lost, documents = of.tokens_lost / max(1, of.tokens_in), f"{of.documents:,} of {of.documents_in_all:,}"
    return of.name, f"{of.tokens_in:,}", f"{lost:.2%}", documents, f"{of.tokens:,.0f} ({of.share:.1%})"


def check_weights(sets: Any, weights: Any, weights_of: str, stopping_strategy: str) -> None:
    """Raises ValueError for weights that do not fit the data sets (None: there is one), or another argument."""
    for name, value, allowed in (
        ("weights_of", weights_of, WEIGHTS_OF), ("stopping_strategy", stopping_strategy, STOPPING)
    ):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown, expected one of {list(allowed)}")
        if weights is None and value != allowed[0]:
            raise ValueError(f"{name}={value!r} has no effect without weights")
    if sets is not None and (not sets or not all(isinstance(name, str) for name in sets)):
        raise ValueError(f"rows is a mapping from {list(sets)}, expected one or more names of data sets")
    if weights is None:
        return
    if sets is None:
        raise ValueError("weights are of several data sets, a mapping from names to them, and there is one")
    if not isinstance(weights, Mapping) or set(weights) != set(sets):
        given = list(weights) if isinstance(weights, Mapping) else weights
        raise ValueError(f"weights are of {given}, and the sets are {list(sets)}")
    for name, weight in weights.items():
        number = isinstance(weight, (int, float, np.number)) and not isinstance(weight, bool)
        if not number or not 0 < weight < np.inf:
            raise ValueError(f"weights[{name!r}]={weight!r}: must be a number above 0, and finite")


def check_mixable(strategy: str) -> None:
    """Raises ValueError for a strategy that makes packs."""
    if strategy not in ("step", "none"):
        raise ValueError(f"strategy={strategy!r} makes packs before it is known what an epoch takes: use 'step'")


def joined(sets: Mapping[str, Dataset], check: Callable[[TokenRows], None]) -> Dataset:
    """All rows, one set after the other: `input_ids`, `labels`, and `attention_mask` if a set has it.

    Args:
        check: raises ValueError for rows that cannot be trained on.

    Raises ValueError, naming the set, for such rows.
    """
    for name, rows in sets.items():
        try:
            check(TokenRows(rows))
        except ValueError as error:
            raise ValueError(f"the set {name}: {error}") from None
    masked = any("attention_mask" in rows.column_names for rows in sets.values())
    parts = [_with_columns(rows.with_format(None), masked) for rows in sets.values()]
    if any(part.features != parts[0].features for part in parts):
        same = Features({name: List(Value("int64")) for name in parts[0].column_names})
        parts = [part.cast(same) for part in parts]
    return concatenate_datasets(parts)


def _with_columns(rows: Dataset, masked: bool) -> Dataset:
    names = [name for name in ("input_ids", "labels", "attention_mask") if name in rows.column_names]
    rows = rows.select_columns(names)
    if masked and "attention_mask" not in names:
        rows = rows.map(_ones, input_columns=["input_ids"], batched=True)
    return rows


def _ones(input_ids: list[list[int]]) -> dict[str, list[list[int]]]:
    return {"attention_mask": [[1] * len(ids) for ids in input_ids]}
