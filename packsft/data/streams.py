"""Turns a stream of tokenised rows into a stream of packs, resumable at any example, shared by ranks and workers.

Knows rows of token ids, PyTorch's workers and the shards of a `datasets.IterableDataset`, not text, models or devices.
`packing/buffer.py` decides which segment lies in which pack, from lengths alone.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset

from packsft.data.document import (
    Document,
    Pack,
    check_row,
    check_single,
    checked_tokens,
    lengths_of,
    make_document,
    unpadded,
)
from packsft.data.ranks import Ranks
from packsft.data.stream_pack import StreamPack, chained_digest, digest_of
from packsft.packing import STRATEGIES, Account, Strategy, check_max_lost_fraction, cut_examples, resolve_overlong
from packsft.packing.buffer import PackingBuffer

logger = logging.getLogger("packsft")

FIRST_ROWS = 8
BUFFERED_PACKS = 32  # within 0.7 points of the plan over a whole data set, see docs/log.md
ROWS_BEFORE_JUDGEMENT = 1000  # of the share of lost tokens
END: Any = object()  # a row may be anything, None as well


class PackedStream(torch.utils.data.IterableDataset):
    """Packs (lists of `Document`s) of the rows of a stream.

    Rows are mappings with `input_ids` and `labels` of the same length (-100 = not scored). At most `buffer_tokens`
    tokens wait. Segments without a scored token are dropped. `account` counts what is dropped or cut; it is logged at
    the end of an epoch.

    **Workers.** A `datasets.IterableDataset` divides its shards over the workers of a data loader, and each worker
    packs its own. Any other iterable must give the same rows in each worker; each worker keeps every n-th pack.
    **Ranks**: see `share`. **Epochs**: `set_epoch` reshuffles the stream and restarts it.

    Args:
        stream: the rows.
        max_length: tokens in a pack; longer examples are cut here. None only with `strategy="none"`.
        strategy: a name in `STRATEGIES`; "none" and "step" give one example per item.
        overlong: as in `packsft.packing.cut_examples`: what happens to an example longer than `max_length`.
        max_lost_fraction: the share of the tokens read, 0 to 1, that may be lost for any reason. Checked from row 1,000
            of an epoch on, and at its end.
        buffer_tokens: how many tokens may wait for a pack; 32 * `max_length` by default.
        name: names the data set in messages.
        vocab_size: ids and labels must be below it; None for no check.
        keep_end: a truncated example keeps its last tokens instead of its first.
        per_example: examples weigh the same in the loss, instead of scored tokens.
        once: the tokens with which a row begins and ends at most once, or None: as in `TokenRows`.
        divisible: `stream` has gone through `divided.divisible`.

    Attributes:
        account: for the current epoch; in a worker, for its rows. Under "wrapped", whole examples without a scored
            token are dropped, but no segments.
        num_packs: packs of the current epoch, on all ranks if they read the same rows.

    Raises:
        ValueError: while iterating: a row is not well formed (named by its number in reading order), is overlong with
            `overlong="error"`, or an epoch has nothing to score or loses too much.
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
        once: tuple[int | None, int | None] = (None, None),
        divisible: bool = False,
    ) -> None:
        check_max_lost_fraction(max_lost_fraction)
        self._overlong, self._max_lost_fraction = resolve_overlong(strategy, overlong), max_lost_fraction
        self.stream = stream
        self.max_length = max_length
        self.buffer_tokens = BUFFERED_PACKS * (max_length or 0) if buffer_tokens is None else buffer_tokens
        self.name = name
        self.per_example = per_example
        self._buffer = PackingBuffer(max_length, self.buffer_tokens, strategy)  # raises for an unknown strategy
        self.strategy: Strategy = STRATEGIES[strategy]
        self._vocab_size = vocab_size
        self._keep_end, self._once = keep_end, once
        self.divisible = divisible
        self._ranks = self._reading_ranks = Ranks()  # the second: the ranks that read the same rows
        self._endless = self._told_loss = False
        self._positions, self._has_table = sys.maxsize, False
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self._resume: dict[str, Any] | None = None
        self._start_epoch(0)

    def check_ids(self, vocab_size: int) -> None:
        """Check every row from now on for ids and labels outside the vocabulary."""
        self._vocab_size = vocab_size

    def check_positions(self, limit: int | None, has_table: bool) -> None:
        """Check every document from now on: longer than `limit` is an error if the model looks positions up in a table,
        and else a notice, once."""
        self._positions, self._has_table = limit or sys.maxsize, has_table

    def sample(self) -> str:
        """SHA-256 in hex of the first rows. A stream that `datasets` has split by node has others on each."""
        rows = [dict(row) for row in itertools.islice(iter(self.stream), FIRST_ROWS)]
        as_text = json.dumps(rows, default=lambda value: value.tolist() if hasattr(value, "tolist") else repr(value))
        split = repr(getattr(self.stream, "_distributed", None))
        return hashlib.sha256((split + as_text).encode()).hexdigest()

    def share(self, ranks: Ranks, *, endless: bool = False) -> PackedStream:
        """The share of a rank. The union of all shares is the stream.

        Every rank reads all rows and keeps every n-th pack. All ranks get the same number of packs: at the end, a rank
        that has none left gets an empty pack. So no rank waits for another, and no example comes twice.

        With `endless`, a `datasets.IterableDataset` with at least `ranks.size` shards is divided by shards instead, and
        each rank reads only its own shards. Ranks then reach the end at different times, which DDP does not allow, so
        each rank continues with the next epoch until training stops (`max_steps`). A stream with fewer shards is shared
        as above, and ends.
        """
        mine = copy.copy(self)
        mine._epoch = self._epoch.clone().share_memory_()
        mine._resume = None
        mine._start_epoch(0)
        mine._ranks = mine._reading_ranks = ranks
        if endless and isinstance(self.stream, IterableDataset) and self._divides(ranks):
            mine.stream = self.stream.shard(ranks.size, ranks.rank, contiguous=False)
            mine._reading_ranks, mine._endless = Ranks(), True
        return mine

    @property
    def column_names(self) -> list[str]:
        return StreamPack().keys()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Restart the stream for another epoch, in another order if it shuffles. The same epoch changes nothing."""
        if epoch != self.epoch:
            self._epoch.fill_(epoch)
            self._resume = None
            self._start_epoch(0)

    def reading(self, num_workers: int, batch_size: int, ranks: Ranks) -> dict[str, int | None]:
        """What the order of the packs depends on: another number of these is another order."""
        shards = self.stream.num_shards if isinstance(self.stream, IterableDataset) else None
        divided = ranks.size if not self.strategy.exact_steps and self._divides(ranks) else 1
        workers = max(num_workers, 1) if shards is None else min(max(num_workers, 1), shards // divided)
        in_turn = workers > 1 and not self.strategy.exact_steps  # each batch is one worker's
        return {
            "workers that read": workers,
            "batch size of a worker": batch_size if in_turn else None,
            "ranks that divide the shards": divided,
        }

    def _divides(self, ranks: Ranks) -> bool:
        return isinstance(self.stream, IterableDataset) and self.stream.num_shards >= ranks.size > 1

    def __iter__(self) -> Iterator[StreamPack]:
        for pack in self.planned():
            yield StreamPack(self.processed(pack), pack.before, pack.after)

    def planned(self) -> Iterator[StreamPack]:
        """The packs, of what `processed` makes documents: a step does it for those that this rank trains on."""
        before = ""
        for pack in self._epochs():
            after = chained_digest(before, map(self.digest, pack))
            yield StreamPack(pack, before, after)
            before = after

    def digest(self, document: Document) -> bytes:
        """SHA-256 of what the document is made of."""
        return digest_of(document)

    def processed(self, pack: Pack) -> Pack:
        """Documents as a pass takes them."""
        return pack

    def _epochs(self) -> Iterator[Pack]:
        state, self._resume = self._resume, None
        if state is None:
            self._start_epoch(0)
        elif state["share"] != self._share():
            raise ValueError(
                f"the state of the {self.name} stream was saved by [rank, ranks, worker, workers] = "
                f"{state['share']} and cannot be loaded by {self._share()}"
            )
        while True:
            yield from self._one_epoch(state)
            self.check_end(self.account, self.num_packs)
            if self.num_packs == 0 or not self._endless:
                return
            self._start_epoch(self._epochs_done + 1)
            state = None

    def check_end(self, account: Account, num_packs: int) -> None:
        """At the end of an epoch, says what was lost. Raises ValueError if that is too much, or everything."""
        self._check_losses(account)
        if num_packs:
            for loss in account.describe_losses(self.max_length):
                logger.warning("%s stream: %s", self.name, loss)
        elif rows := account.examples_in:
            raise ValueError(
                f"none of the {rows} examples of the {self.name} stream has a token to score within "
                f"max_length={self.max_length}: all its labels are -100 there (or it holds a token or none)"
            )

    def _start_epoch(self, epochs_done: int) -> None:
        self._epochs_done = epochs_done  # since `set_epoch`: several only with `endless`
        self.account, self.num_packs = Account(), 0
        self._buffer = PackingBuffer(self.max_length, self.buffer_tokens, self._buffer.strategy.name)
        self._held: dict[int, Document] = {}  # what the buffer holds, by key
        self._next_key = 0
        self._reading: Any = None

    def of_epoch(self) -> Any:
        """The stream in the order of the epoch."""
        stream: Any = self.stream
        if isinstance(stream, IterableDataset):
            stream = stream.shard(1, 0)  # a copy: workers share the epoch of the original
        if hasattr(stream, "set_epoch"):
            stream.set_epoch(self.epoch + self._epochs_done)
        return stream

    def _one_epoch(self, state: dict[str, Any] | None) -> Iterator[Pack]:
        stream = self.of_epoch()
        exact = hasattr(stream, "state_dict") and not _has_shuffle_buffer(stream)
        if exact and state is not None and state["stream"] is not None:
            stream.load_state_dict(state["stream"])
            rows = iter(stream)
        else:
            rows = itertools.islice(iter(stream), self.account.examples_in, None)
        self._reading = stream if exact else None

        for pack in self._packs(rows):
            index, self.num_packs = self.num_packs, self.num_packs + 1
            if self._is_mine(index):
                yield pack
        first, short = self.num_packs, self.num_packs % self._reading_ranks.size  # lower ranks have one pack more
        if short:
            self.num_packs += self._reading_ranks.size - short  # before `yield`: a saved state must not repeat it
            if any(self._is_mine(index) for index in range(first, self.num_packs)):
                yield []

    def _is_mine(self, index: int) -> bool:
        """Packs go to the ranks in turn, and the packs of a rank to its workers, unless each reads its own shards."""
        worker = torch.utils.data.get_worker_info()
        turn, rank = divmod(index, self._reading_ranks.size)
        if rank != self._reading_ranks.rank:
            return False
        return worker is None or isinstance(self.stream, IterableDataset) or turn % worker.num_workers == worker.id

    def _packs(self, rows: Iterator[Mapping[str, Any]]) -> Iterator[Pack]:
        at_end = False
        while True:
            while (segments := self._buffer.pop(at_end=at_end)) is not None:
                pack = [self._held[key].part(start, stop) for key, start, stop in segments]
                for key, _, stop in segments:
                    if stop == len(self._held[key]):
                        del self._held[key]
                yield pack
            if at_end:
                return
            row = next(rows, END)
            if row is END:
                at_end = True
            else:
                self._take(row)

    def _take(self, row: Mapping[str, Any]) -> None:
        """Cut a row into documents, and push them into the buffer."""
        num_segments = 0
        for document in self.documents(row, self.account.examples_in, self.account):
            if pushed := self._buffer.push(self._next_key, len(document)):
                self._held[self._next_key] = document
            num_segments += pushed
            self._next_key += 1
        self.account.examples_packed += num_segments > 0
        self.account.examples_split += num_segments > 1
        self.check_losses_so_far(self.account)

    def documents(self, row: Mapping[str, Any], number: int, account: Account) -> list[Document]:
        """Check a row, cut it into documents, and count it, except for what becomes of its documents."""
        where = f"row {number} of the {self.name} stream"
        check_row(row, where)
        length, uncut, document_of = self._read(row, number, where, account)
        account.examples_in += 1
        account.tokens_in += length
        documents = [document_of(start, stop) for start, stop in self._cut(length, uncut, where)]
        self._check_length(max(map(len, documents), default=0), where)
        num_scored = sum(document.num_scored for document in documents)
        cut = length - sum(map(len, documents))
        if length == 0:
            account.examples_empty += 1
        elif not documents:
            account.examples_overlong_dropped += 1
            account.tokens_dropped += cut
        elif not num_scored:
            account.examples_unscored += 1
            account.tokens_unscored += length
        elif cut:
            account.examples_truncated += 1
            account.tokens_truncated += cut
        if length and (cut or not num_scored):
            self._tell_first_loss(where, length, cut if num_scored else length)
        if not num_scored:
            return []
        kept = [document for document in documents if document.num_scored]
        account.segments_unscored += len(documents) - len(kept)
        account.tokens_unscored += sum(map(len, documents)) - sum(map(len, kept))
        return [replace(document, weight=1.0 / num_scored) for document in kept]

    def _tell_first_loss(self, where: str, length: int, lost: int) -> None:
        if not self._told_loss:
            self._told_loss = True
            logger.warning(
                "%s: %d of its %d tokens are left out (max_length=%s); this is said once, and the sum at the end of an "
                "epoch", where, lost, length, self.max_length,
            )  # fmt: skip

    def _read(
        self, row: Mapping[str, Any], number: int, where: str, account: Account
    ) -> tuple[int, int, Callable[[int, int], Document]]:
        """The tokens of a row, before which of them no cut may fall, and what makes the document of some of them."""
        ids, labels = checked_tokens(row.get("input_ids"), row.get("labels"), where, self._vocab_size)
        start, stop = self._span(row, ids, where, account)
        ids, labels = ids[start:stop], labels[start:stop]
        return len(ids), 0, lambda start, stop: make_document(ids[start:stop], labels[start:stop], row=number)

    def _check_length(self, length: int, where: str) -> None:
        if length <= self._positions:
            return
        said = f"{where} gives a document of {length} tokens, but the model has {self._positions} positions"
        if self._has_table:
            raise ValueError(f"{said}, and looks them up in a table: set max_length={self._positions} or less")
        logger.warning("%s; this is said once", said)
        self._positions = sys.maxsize

    def _span(self, row: Mapping[str, Any], ids: np.ndarray, where: str, account: Account) -> tuple[int, int]:
        """Start and stop of the tokens of a row, without padding and doubled tokens."""
        span = unpadded(row["attention_mask"], len(ids), where) if "attention_mask" in row else (0, len(ids))
        if "position_ids" in row:
            check_single(lengths_of(row["position_ids"], len(ids), span, where), where)
        (start, stop), (first, last) = span, self._once
        account.tokens_padding += len(ids) - (stop - start)
        if stop - start > 1 and ids[start] == ids[start + 1] == first:
            start += 1
        if stop - start > 1 and ids[stop - 1] == ids[stop - 2] == last:
            stop -= 1
        account.texts_with_doubles += stop - start < span[1] - span[0]
        return start, stop

    def _cut(self, length: int, uncut: int, where: str) -> list[tuple[int, int]]:
        """Start and stop of each segment of an example. Under "wrapped" the buffer cuts, where its packs end."""
        if self.max_length is None or length <= self.max_length or self.strategy.end_to_end:
            return [(0, length)] if length else []
        if self._overlong == "error":
            raise ValueError(
                f"{where} has {length} tokens, more than max_length={self.max_length}: raise max_length, or choose an "
                "overlong other than 'error'"
            )
        segments = cut_examples(
            [length],
            self.max_length,
            strategy=self.strategy.name,
            overlong=self._overlong,
            keep_end=self._keep_end,
            uncut=np.array([uncut]),
        )
        return list(zip(segments.starts.tolist(), segments.stops.tolist(), strict=True))

    def check_losses_so_far(self, account: Account) -> None:
        if account.examples_in >= ROWS_BEFORE_JUDGEMENT:
            self._check_losses(account)

    def _check_losses(self, account: Account) -> None:
        account.check_lost_fraction(self._max_lost_fraction, self.max_length, f"{self.name} stream so far")

    def _share(self) -> list[int]:
        worker = torch.utils.data.get_worker_info()
        place = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return [self._ranks.rank, self._ranks.size, *place]

    # ---- resuming ----

    def state_dict(self) -> dict[str, Any]:
        """The state after the last pack given, as plain lists and numbers.

        Holds the waiting tokens and the place in the stream: the stream's own state if it is exact, otherwise the
        number of rows read. The state of a stream that shuffles through a buffer loses the rows in the buffer, so its
        rows are read again up to this number.
        """
        if self._resume is not None:
            return copy.deepcopy(self._resume)
        return {
            "epoch": self.epoch,
            "epochs_done": self._epochs_done,
            "share": self._share(),
            "account": asdict(self.account),
            "num_packs": self.num_packs,
            "stream": None if self._reading is None else self._reading.state_dict(),
            "buffer": self._buffer.state_dict(),
            "held": [[key, d.input_ids.tolist(), d.labels.tolist(), d.weight, d.row] for key, d in self._held.items()],
            "next_key": self._next_key,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration continues after the last pack that was given; `set_epoch` undoes this."""
        state = copy.deepcopy(state)
        self._epoch.fill_(state["epoch"])
        self._start_epoch(state["epochs_done"])
        self.account, self.num_packs = Account(**state["account"]), state["num_packs"]
        self._buffer.load_state_dict(state["buffer"])
        self._held = {
            key: make_document(np.array(ids, np.int64), np.array(labels, np.int64), weight, row)
            for key, ids, labels, weight, row in state["held"]
        }
        self._next_key = state["next_key"]
        self._resume = state


def _has_shuffle_buffer(stream: Any) -> bool:
    """Whether its `state_dict` loses rows: those in the buffer of `datasets`' `shuffle`.

    Reads this from the chain of iterables behind the stream; `datasets` (5.2) offers no other way.
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


def for_a_worker(stream: PackedStream) -> Any:
    """How a stream goes to a worker that is not forked: by dill, which also sends functions without a name.

    `datasets` brings dill, and TRL maps the rows of a stream with such functions.
    """
    import dill

    try:
        return dill.loads, (dill.dumps(stream, recurse=True),)
    except Exception as error:
        raise ValueError(
            "dataloader_multiprocessing_context: the stream cannot be sent to a worker that is not forked "
            f"({type(error).__name__}: {error}): set it to 'fork', or dataloader_num_workers to 0"
        ) from error


ForkingPickler.register(PackedStream, for_a_worker)
