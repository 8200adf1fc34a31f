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

from packsft.data.batch import StepRows
from packsft.data.collator import IGNORE_INDEX
from packsft.packing import check_losses, check_max_lost_fraction, describe_losses, plan_step, resolve_overlong
from packsft.packing.buffer import PackingBuffer, Piece

logger = logging.getLogger("packsft")

BUFFERED_PACKS = 32  # within 0.7 points of the plan over a whole data set, see docs/log.md

# What a rank gets that has no pack left while another has: nothing in it is scored, so that it adds 0 to a sum over
# scored tokens, and all ranks come to the same number of passes.
FILLER = {"input_ids": [0], "labels": [IGNORE_INDEX], "seq_lengths": [1]}

COUNTS = (
    "examples_in", "tokens_in", "packs", "segments", "examples_empty", "examples_unscored", "examples_overlong_dropped",
    "examples_truncated", "segments_unscored", "tokens_truncated", "tokens_unscored", "tokens_dropped",
)  # fmt: skip
ROWS_BEFORE_JUDGEMENT = 1000  # of a share that is lost

Tokens = tuple[np.ndarray, np.ndarray, float]  # input ids, labels, weight of each scored token


class PackedStream(torch.utils.data.IterableDataset):
    """Packs of the rows of a stream: mappings with `input_ids` and `labels` `[T]` int64 and `seq_lengths`.

    Rows are mappings with `input_ids` and `labels` of one length (-100 = not scored). At most `buffer_tokens` tokens
    wait. Segments without a scored token are left out; what is left out or cut is in `counts`, and said once a pass
    ends.

    **Workers.** A `datasets.IterableDataset` divides its shards over the workers of a data loader itself, and each
    packs its own; any other iterable must give the same rows in each, of whose packs each worker takes its share.
    **Ranks**: see `share`. **Epochs**: `set_epoch` reshuffles the stream, which then starts anew.

    Args:
        stream: the rows.
        max_length: tokens a pack holds, and where an example is cut; None only with `strategy="none"`.
        strategy: of `PackingBuffer`; "none", or "step", for one example per item.
        overlong: of `packsft.packing.cut_examples`: what becomes of an example longer than `max_length`.
        max_lost_fraction: the share of the tokens read, 0 to 1, that may be lost for whatever reason; judged from the
            1,000th row of a pass on, and at its end.
        buffer_tokens: how many tokens may wait for a pack that they fill; default 32 * `max_length`.
        name: what the messages call the data set.
        vocab_size: ids and labels must be below it; None for no check.
        keep_end: a truncated example keeps its last tokens rather than its first.
        per_example: the segments of an example together weigh 1 in the loss (`loss_weights`, one number per document).

    Attributes:
        counts: of the current pass (`COUNTS`): rows and tokens read, packs made (of all ranks, where they read the same
            rows), and what was cut or left out, for each reason. In a worker, its own.

    Raises:
        ValueError: while iterating, for a row that is not well formed, with its number in the order of reading, for one
            that is overlong with `overlong="error"`, for a pass in which nothing is scored or too much is lost.
    """

    def __init__(
        self,
        stream: Iterable[Mapping[str, Any]],
        max_length: int | None,
        *,
        strategy: str = "bfd",
        overlong: str | None = None,
        max_lost_fraction: float = 1.0,
        buffer_tokens: int | None = None,
        name: str = "train",
        vocab_size: int | None = None,
        keep_end: bool = False,
        per_example: bool = False,
    ) -> None:
        check_max_lost_fraction(max_lost_fraction)
        self.stream = stream
        self.max_length = max_length
        self.strategy = strategy
        self.buffer_tokens = BUFFERED_PACKS * (max_length or 0) if buffer_tokens is None else buffer_tokens
        self.name = name
        self._vocab_size = vocab_size
        self._keep_end, self._per_example = keep_end, per_example
        self._overlong, self._max_lost_fraction = resolve_overlong(strategy, overlong), max_lost_fraction
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
            self._judge_losses()
            if self.counts["packs"] == 0:
                if rows := self.counts["examples_in"]:
                    raise ValueError(
                        f"none of the {rows} examples of the {self.name} stream has a token to score within "
                        f"max_length={self.max_length}: all its labels are -100 there (or it holds a token or none)"
                    )
                return
            for loss in describe_losses(self.counts, self.max_length):
                logger.warning("%s stream: %s", self.name, loss)
            if not self._endless:
                return
            self._start_pass(self._passes + 1)
            state = None

    def _start_pass(self, passes: int) -> None:
        self._passes = passes  # in this epoch
        self.counts = dict.fromkeys(COUNTS, 0)
        self._buffer = PackingBuffer(self.max_length, self.buffer_tokens, self.strategy)
        self._tokens: dict[int, Tokens] = {}  # of the segments in the buffer, by their number
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
            rows = itertools.islice(iter(stream), self.counts["examples_in"], None)
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
        ids, labels = self._checked(self.counts["examples_in"], row)
        self.counts["examples_in"] += 1
        self.counts["tokens_in"] += len(ids)
        segments = self._cut(len(ids))
        scored = [
            int((labels[segment][1:] != IGNORE_INDEX).sum()) for segment in segments
        ]  # nothing predicts the first
        if len(ids) == 0:
            self.counts["examples_empty"] += 1
        elif segments and not any(scored):
            self.counts["examples_unscored"] += 1
            self.counts["tokens_unscored"] += len(ids)
        else:
            for segment, count in zip(segments, scored, strict=True):
                tokens = ids[segment], labels[segment], 1.0 / max(sum(scored), 1)
                if count:
                    self._tokens[self.counts["segments"]] = tokens
                    self._buffer.push(self.counts["segments"], len(tokens[0]))
                    self.counts["segments"] += 1
                else:
                    self.counts["segments_unscored"] += 1
                    self.counts["tokens_unscored"] += len(tokens[0])
            if segments and self._overlong == "truncate" and (cut := len(ids) - len(ids[segments[0]])):
                self.counts["examples_truncated"] += 1
                self.counts["tokens_truncated"] += cut
        if self.counts["examples_in"] >= ROWS_BEFORE_JUDGEMENT:
            self._judge_losses()

    def _cut(self, length: int) -> list[slice]:
        """The segments of an example; "wrapped" is cut in the buffer, where its packs end."""
        most = self.max_length
        if most is None or length <= most or self.strategy == "wrapped":
            return [slice(0, length)]
        if self._overlong == "split":
            return [slice(start, start + most) for start in range(0, length, most)]
        if self._overlong == "drop":
            self.counts["examples_overlong_dropped"] += 1
            self.counts["tokens_dropped"] += length
            return []
        if self._overlong == "error":
            row = self.counts["examples_in"] - 1
            raise ValueError(
                f"row {row} of the {self.name} stream has {length} tokens, more than max_length={most}: raise "
                "max_length, or choose an overlong other than 'error'"
            )
        return [slice(length - most, length) if self._keep_end else slice(0, most)]

    def _judge_losses(self) -> None:
        check_losses(self.counts, self.max_length, self._max_lost_fraction, f"{self.name} stream so far")

    def _checked(self, number: int, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
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
        ids, labels, weights = zip(*(self._tokens[piece.key] for piece in pieces), strict=True)
        parts = [slice(piece.start, piece.stop) for piece in pieces]
        pack = {
            "input_ids": np.concatenate([column[part] for column, part in zip(ids, parts, strict=True)]),
            "labels": np.concatenate([column[part] for column, part in zip(labels, parts, strict=True)]),
            "seq_lengths": [piece.length for piece in pieces],
        }
        return pack | ({"loss_weights": list(weights)} if self._per_example else {})

    def _groups(self) -> tuple[int, int]:
        """(this worker's share, of how many) of the groups of one pack per rank that come from the same rows."""
        worker = torch.utils.data.get_worker_info()
        if worker is None or isinstance(self.stream, IterableDataset):
            return 0, 1
        return worker.id, worker.num_workers

    def _share(self) -> list[int]:
        worker = torch.utils.data.get_worker_info()
        return [*self._place, *((0, 1) if worker is None else (worker.id, worker.num_workers))]

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
            "tokens": [[key, ids.tolist(), labels.tolist(), w] for key, (ids, labels, w) in self._tokens.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on with the pack after the last one that was given; `set_epoch` undoes it."""
        state = copy.deepcopy(state)
        self._epoch.fill_(state["epoch"])
        self._start_pass(state["passes"])
        self.counts = dict(state["counts"])
        self._buffer.load_state_dict(state["buffer"])
        self._tokens = {
            key: (np.array(ids, np.int64), np.array(labels, np.int64), w) for key, ids, labels, w in state["tokens"]
        }
        self._resume = state


class StepStream(torch.utils.data.IterableDataset):
    """Optimizer steps over a stream of single examples: `batch_size` examples on, packed for one rank.

    Every rank reads all rows, plans the step from their lengths and keeps its own passes. A worker makes steps of the
    examples that it reads. The state is that of the examples.

    Args:
        examples: a `PackedStream` with the strategy "step".
        batch_size: the examples of a step, on all ranks.
        tokens_per_pass: of `plan_step`, as is `padded`.
    """

    def __init__(self, examples: PackedStream, batch_size: int, tokens_per_pass: int, *, padded: bool = False) -> None:
        self.examples = examples
        self.tokens_per_pass = tokens_per_pass
        self._batch_size, self._padded = batch_size, padded
        self._rank, self._num_ranks = 0, 1

    def share(self, rank: int, num_ranks: int, *, endless: bool = False) -> StepStream:
        """This rank's share. It ends with the stream, on all ranks at once, `endless` or not."""
        mine = copy.copy(self)
        mine._rank, mine._num_ranks = rank, num_ranks
        return mine

    def longest(self) -> int:
        """Tokens of the longest example that there may be."""
        return self.examples.max_length or 0

    def most_tokens_per_rank(self) -> int:
        """An upper bound on the tokens that a step brings to a rank, if they are dealt evenly."""
        return -(-self._batch_size * self.longest() // self._num_ranks)

    def set_epoch(self, epoch: int) -> None:
        self.examples.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.examples.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.examples.load_state_dict(state)

    def __iter__(self) -> Iterator[StepRows]:
        examples = iter(self.examples)
        while rows := list(itertools.islice(examples, self._batch_size)):
            yield self.step(rows)

    def step(self, examples: list[dict[str, Any]]) -> StepRows:
        """The passes of this rank in the step that takes these examples."""
        lengths = [len(row["input_ids"]) for row in examples]
        ranks = plan_step(lengths, self.tokens_per_pass, self._num_ranks, padded=self._padded)
        passes = [[examples[i] for i in documents] for documents in ranks[self._rank]]
        items = [row.get("loss_weights", [1])[0] * int((row["labels"][1:] != IGNORE_INDEX).sum()) for row in examples]
        return StepRows(passes, examples, sum(items), self.tokens_per_pass)


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
