"""A stream of tokenised rows to a stream of packs, resumable to the example and shared out over ranks and workers.

Knows rows of token ids, PyTorch's workers and how a `datasets.IterableDataset` divides; knows nothing of text, models
or devices. Which piece lies in which pack is decided by `packing/stream.py`, on lengths alone.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset

from packsft.collator import IGNORE_INDEX
from packsft.packing.stream import PackingBuffer, Piece

logger = logging.getLogger("packsft")

BUFFERED_PACKS = 32  # within 0.7 points of the plan over a whole data set, see docs/log.md

# What a rank gets that has no pack left while another has: nothing in it is scored, so that it adds 0 to a sum over
# scored tokens, and all ranks come to the same number of passes.
FILLER = {"input_ids": [0], "labels": [IGNORE_INDEX], "seq_lengths": [1]}

Tokens = tuple[np.ndarray, np.ndarray]


class PackedStream(torch.utils.data.IterableDataset):
    """Packs of the rows of a stream: mappings with `input_ids` and `labels` `[T]` int64 and `seq_lengths`.

    Rows are mappings with `input_ids` and `labels` of one length (-100 = not scored). At most `buffer_tokens` tokens
    wait. Examples without a scored token within the cut are left out; what is left out or cut is in `counts`, and said
    once a pass ends.

    **Workers.** A `datasets.IterableDataset` divides its shards over the workers of a data loader itself, and each
    packs its own; any other iterable must give the same rows in each, of whose packs each worker takes its share.
    **Ranks**: see `share`. **Epochs**: `set_epoch` reshuffles the stream, which then starts anew.

    Args:
        stream: the rows.
        max_length: tokens a pack holds, and where an example is cut; None only with `strategy="none"`.
        strategy: of `PackingBuffer`; "none" for one example per item.
        buffer_tokens: how many tokens may wait for a pack that they fill; default 32 * `max_length`.
        name: what the messages call the data set.
        vocab_size: ids and labels must be below it; None for no check.
        keep_end: a truncated example keeps its last tokens rather than its first.

    Attributes:
        counts: of the current pass, `rows` read, `packs` made (of all ranks, where they read the same rows), examples
            `truncated`, `unscored` and `empty`, and the `tokens_truncated`. In a worker, its own.

    Raises:
        ValueError: while iterating, for a row that is not well formed, with its number in the order of reading, and for
            a pass in which nothing is scored.
    """

    def __init__(
        self,
        stream: Iterable[Mapping[str, Any]],
        max_length: int | None,
        *,
        strategy: str = "bfd",
        buffer_tokens: int | None = None,
        name: str = "train",
        vocab_size: int | None = None,
        keep_end: bool = False,
    ) -> None:
        self.stream = stream
        self.max_length = max_length
        self.strategy = strategy
        self.buffer_tokens = BUFFERED_PACKS * (max_length or 0) if buffer_tokens is None else buffer_tokens
        self.name = name
        self._vocab_size = vocab_size
        self._keep_end = keep_end and strategy in ("bfd", "none")  # the others lose nothing
        self._place = self._rank, self._num_ranks = 0, 1  # the share is (rank, ranks) of the packs of the rows it reads
        self._endless = False
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self._resume: dict[str, Any] | None = None
        self._start_pass(0)

    def check_ids(self, vocab_size: int) -> None:
        """Every row from now on is checked for ids and labels outside the vocabulary."""
        self._vocab_size = vocab_size

    def share(self, rank: int, num_ranks: int, *, endless: bool = False) -> PackedStream:
        """This rank's share of the stream, the union of all shares being the stream.

        Every rank reads all rows and takes every `num_ranks`-th pack. All get the same number, those that come short at
        the end a pack of one token that is not scored: none waits for the others, and no example comes twice.

        With `endless`, the shards of a `datasets.IterableDataset` of at least `num_ranks` shards are divided instead,
        and each rank reads its own alone. One rank then ends before another, which for DDP must not be: so a pass is
        followed by the next, in the next epoch's order, for as long as it is asked for (`max_steps`). Streams of fewer
        shards are shared, and end, as above.
        """
        mine = copy.copy(self)
        mine._epoch = self._epoch.clone().share_memory_()
        mine._resume = None
        mine._start_pass(0)
        mine._place = mine._rank, mine._num_ranks = rank, num_ranks
        if endless and isinstance(self.stream, IterableDataset) and self.stream.num_shards >= num_ranks > 1:
            mine.stream = self.stream.shard(num_ranks, rank, contiguous=False)
            mine._rank, mine._num_ranks, mine._endless = 0, 1, True
        return mine

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch starts anew, in another order if the stream shuffles; the same one changes nothing."""
        if epoch != self.epoch:
            self._epoch.fill_(epoch)
            self._resume = None
            self._start_pass(0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        state, self._resume = self._resume, None
        if state is None:
            self._start_pass(0)
        elif state["share"] != self._share():
            raise ValueError(
                f"the state of the {self.name} stream was saved by rank, of ranks, worker, of workers "
                f"{state['share']}, and cannot go on in {self._share()}"
            )
        while True:
            yield from self._pass(state)
            if self.counts["packs"] == 0:
                if rows := self.counts["rows"]:
                    raise ValueError(
                        f"none of the {rows} examples of the {self.name} stream has a token to score within "
                        f"max_length={self.max_length}: all its labels are -100 there (or it holds a token or none)"
                    )
                return
            self._say_what_is_lost()
            if not self._endless:
                return
            self._start_pass(self._passes + 1)
            state = None

    def _start_pass(self, passes: int) -> None:
        self._passes = passes  # in this epoch
        self.counts = dict.fromkeys(("rows", "packs", "truncated", "tokens_truncated", "unscored", "empty"), 0)
        self._buffer = PackingBuffer(self.max_length, self.buffer_tokens, self.strategy)
        self._tokens: dict[int, Tokens] = {}  # of the examples in the buffer, by their number
        self._reading: Any = None

    def _pass(self, state: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        stream: Any = self.stream
        epoch = self.epoch + self._passes
        if isinstance(stream, IterableDataset):
            # A copy, whose epoch no other process sees: workers share that of the original.
            stream = stream.shard(1, 0)
            stream.set_epoch(epoch)
        elif hasattr(stream, "set_epoch"):
            stream.set_epoch(epoch)
        exact = hasattr(stream, "state_dict") and not _has_shuffle_buffer(stream)
        if exact and state is not None and state["stream"] is not None:
            stream.load_state_dict(state["stream"])
            rows = iter(stream)
        else:
            rows = itertools.islice(iter(stream), self.counts["rows"], None)
        self._reading = stream if exact else None

        group_share, groups = self._groups()
        for pack in self._packs(rows):
            index, self.counts["packs"] = self.counts["packs"], self.counts["packs"] + 1
            if index // self._num_ranks % groups == group_share and index % self._num_ranks == self._rank:
                yield pack
        index = self.counts["packs"]
        short = index % self._num_ranks  # ranks below it have one pack more
        if short:
            self.counts["packs"] += self._num_ranks - short  # before the filler, which a state must not repeat
            if index // self._num_ranks % groups == group_share and self._rank >= short:
                yield {key: np.array(value) for key, value in FILLER.items()}

    def _packs(self, rows: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        at_end = False
        while True:
            while (pieces := self._buffer.pop(at_end=at_end)) is not None:
                pack = self._gather(pieces)
                held = self._buffer.keys
                self._tokens = {key: tokens for key, tokens in self._tokens.items() if key in held}
                yield pack
            if at_end:
                return
            row = next(rows, None)
            if row is None:
                at_end = True
            else:
                self._take(row)

    def _take(self, row: Mapping[str, Any]) -> None:
        number = self.counts["rows"]
        ids, labels = self._checked(number, row)
        self.counts["rows"] += 1
        if self.strategy in ("bfd", "none") and self.max_length is not None and len(ids) > self.max_length:
            self.counts["truncated"] += 1
            self.counts["tokens_truncated"] += len(ids) - self.max_length
            cut = slice(-self.max_length, None) if self._keep_end else slice(self.max_length)
            ids, labels = ids[cut], labels[cut]
        if not (labels[1:] != IGNORE_INDEX).any():  # nothing predicts the first token
            self.counts["unscored" if len(ids) else "empty"] += 1
            return
        self._tokens[number] = ids, labels
        self._buffer.push(number, len(ids))

    def _checked(self, number: int, row: Mapping[str, Any]) -> Tokens:
        where = f"row {number} of the {self.name} stream"
        columns = []
        for name in ("input_ids", "labels"):
            if row.get(name) is None:
                raise ValueError(f"{where} has no {name}")
            try:
                column = np.asarray(row[name])
                if column.ndim != 1 or (len(column) and column.dtype.kind not in "iu"):
                    raise TypeError
            except (TypeError, ValueError):
                raise ValueError(f"{where}: {name} is not a list of integers") from None
            column = column.astype(np.int64)
            if self._vocab_size is not None:
                bad = (column < 0) | (column >= self._vocab_size)
                if name == "labels":
                    bad &= column != IGNORE_INDEX
                if bad.any():
                    raise ValueError(
                        f"{where}: {name} holds {column[bad][0]}, but the vocabulary has {self._vocab_size} entries, "
                        f"0 to {self._vocab_size - 1}" + (" (or -100, not scored)" if name == "labels" else "")
                    )
            columns.append(column)
        ids, labels = columns
        if len(ids) != len(labels):
            raise ValueError(f"{where}: {len(labels)} labels for {len(ids)} input_ids")
        return ids, labels

    def _gather(self, pieces: list[Piece]) -> dict[str, Any]:
        tokens = [[column[p.start : p.stop] for column in self._tokens[p.key]] for p in pieces]
        return {
            "input_ids": np.concatenate([ids for ids, _ in tokens]),
            "labels": np.concatenate([labels for _, labels in tokens]),
            "seq_lengths": [len(ids) for ids, _ in tokens],
        }

    def _groups(self) -> tuple[int, int]:
        """(this worker's share, of how many) of the groups of one pack per rank that come from the same rows."""
        worker = torch.utils.data.get_worker_info()
        if worker is None or isinstance(self.stream, IterableDataset):
            return 0, 1
        return worker.id, worker.num_workers

    def _share(self) -> list[int]:
        worker = torch.utils.data.get_worker_info()
        return [*self._place, *((0, 1) if worker is None else (worker.id, worker.num_workers))]

    def _say_what_is_lost(self) -> None:
        if self.counts["unscored"]:
            logger.warning(
                "%s stream: %d of %d examples have no token to score and are left out",
                self.name, self.counts["unscored"], self.counts["rows"],
            )  # fmt: skip
        if self.counts["truncated"]:
            logger.warning(
                "%s stream: %d examples are cut at max_length=%d, %d tokens are lost",
                self.name, self.counts["truncated"], self.max_length, self.counts["tokens_truncated"],
            )  # fmt: skip

    # ---- where it stands ----

    def state_dict(self) -> dict[str, Any]:
        """Where it stands after the last pack it gave, in plain lists and numbers.

        It holds the waiting tokens, and the place in the stream: the stream's own state, where it has one that is
        exact, else the number of rows read. A stream that shuffles through a buffer forgets what is in that buffer, so
        its rows are read again up to that number.
        """
        if self._resume is not None:
            return copy.deepcopy(self._resume)
        return {
            "epoch": self.epoch,
            "passes": self._passes,
            "share": self._share(),
            "counts": dict(self.counts),
            "stream": None if self._reading is None else self._reading.state_dict(),
            "buffer": self._buffer.state_dict(),
            "tokens": [[key, ids.tolist(), labels.tolist()] for key, (ids, labels) in self._tokens.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on with the pack after the last one that was given; `set_epoch` undoes it."""
        state = copy.deepcopy(state)
        self._epoch.fill_(state["epoch"])
        self._start_pass(state["passes"])
        self.counts = dict(state["counts"])
        self._buffer.load_state_dict(state["buffer"])
        self._tokens = {
            key: (np.array(ids, np.int64), np.array(labels, np.int64)) for key, ids, labels in state["tokens"]
        }
        self._resume = state


def _has_shuffle_buffer(stream: Any) -> bool:
    """Whether its `state_dict` forgets rows: those in the buffer of `datasets`' `shuffle` are lost on resuming.

    Read off the chain of what the stream was made of, which `datasets` (5.2) shows in no other way.
    """
    source = getattr(stream, "_ex_iterable", None)
    sources = [] if source is None else [source]
    while sources:
        source = sources.pop()
        if type(source).__name__ == "BufferShuffledExamplesIterable":
            return True
        sources += getattr(source, "ex_iterables", [])
        if (inner := getattr(source, "ex_iterable", None)) is not None:
            sources.append(inner)
    return False
