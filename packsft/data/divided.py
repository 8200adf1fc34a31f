"""Exact steps over a stream of texts of which each process tokenises a part: every n-th row.

A step holds the same examples on any number of ranks, and is planned from the lengths of all of them. So all processes
read all rows. In the workers of a data loader, `OwnRows` tokenises those of its process. In the main process,
`DividedSteps` tells the other processes their lengths, plans the step as they do, and sends each document to the
processes that train on it.
"""

from __future__ import annotations

import itertools
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader

from packsft.data.batch import StepRows
from packsft.data.document import Document
from packsft.data.exchange import Exchange
from packsft.data.messages import BESIDE
from packsft.data.steps import StepStream
from packsft.data.stream_pack import chained_digest, digest_of
from packsft.data.streams import END, PackedStream
from packsft.packing import Account, plan_step


@dataclass
class Turn:
    """Which rows are read: those whose number in reading order is `process` modulo `processes`.

    - `checksum`: of all rows so far
    - `marks`: the checksum at every `mark_every`-th row
    """

    process: int
    processes: int
    mark_every: int
    checksum: int = 0
    marks: list[int] = field(default_factory=list)

    def takes(self, row: Mapping[str, Any], number: int) -> bool:
        texts = [row[column] for column in row if column not in BESIDE]
        self.checksum = zlib.crc32(repr(texts).encode(), self.checksum)
        if (number + self.processes) % self.mark_every == 0:  # the last turn begins: all processes reach this row
            self.marks.append(self.checksum)
        return number % self.processes == self.process


_turn: ContextVar[Turn | None] = ContextVar("turn", default=None)


def divisible(rows: IterableDataset, seed: int | None) -> IterableDataset:
    """The rows of `raw.checked_rows`, texts or messages, shuffled if there is a seed; `OwnRows` reads a part of them.

    What is costly comes after it.
    """
    shuffled = rows if seed is None else rows.shuffle(seed=seed)
    divided = shuffled.filter(_is_in_turn, with_indices=True)
    divided.arrow_types = rows.arrow_types
    return divided


def _is_in_turn(row: Mapping[str, Any], number: int) -> bool:
    turn = _turn.get()
    return turn is None or turn.takes(row, number)


@dataclass
class Chunk:
    """Some rows of a process, in order.

    - `rows`: the documents of each; an error stands for a row that has one, and nothing follows it
    - `account`: of these rows
    - `mark`: a checksum of all rows up to one in the last turn of a whole chunk
    """

    worker: int
    rows: list[list[Document] | Exception] = field(default_factory=list)
    account: Account = field(default_factory=Account)
    mark: int | None = None


class OwnRows(torch.utils.data.IterableDataset):
    """Chunks of `size` rows of a stream, of those that this process tokenises; the last has fewer rows, or none."""

    def __init__(self, stream: PackedStream, process: int, processes: int, size: int) -> None:
        self._stream, self._process, self._processes, self._size = stream, process, processes, size

    def __iter__(self) -> Iterator[Chunk]:
        worker = torch.utils.data.get_worker_info()
        turn = Turn(self._process, self._processes, self._size * self._processes)
        rows = iter(self._stream.of_epoch())
        numbers = itertools.count(self._process, self._processes)
        while True:
            chunk = Chunk(0 if worker is None else worker.id)
            before = _turn.set(turn)
            try:
                while len(chunk.rows) < self._size and (row := next(rows, END)) is not END:
                    chunk.rows.append(self._read(row, next(numbers), chunk.account))
            except ValueError as error:
                chunk.rows.append(ValueError(str(error)))
            except Exception:
                chunk.rows.append(RuntimeError(traceback.format_exc()))
            finally:
                _turn.reset(before)
            chunk.mark = turn.marks.pop() if turn.marks else None
            ends = len(chunk.rows) < self._size or isinstance(chunk.rows[-1], Exception)
            yield chunk
            if ends:
                return

    def _read(self, row: Mapping[str, Any], number: int, account: Account) -> list[Document]:
        documents = self._stream.documents(row, number, account)
        account.examples_packed += bool(documents)
        account.examples_split += len(documents) > 1
        return documents


class Notice(NamedTuple):
    """What all processes know of a document. `place`: among the documents that `process` tokenised."""

    length: int
    num_scored: int
    weight: float
    digest: bytes
    process: int
    place: int


@dataclass
class DealtStep:
    """A step that is dealt to the ranks: the lengths of each rank's documents, and the documents of this rank."""

    lengths: list[list[int]]
    documents: list[Document]
    num_items: int | float
    digests: tuple[int, str, str]


class DividedSteps(StepStream):
    """The steps of a `StepStream`, of which each process tokenises a part of the rows.

    All processes iterate together. With workers, a step is made while the one before it is trained on.

    Args:
        steps: the steps of this rank.
        load: makes the loader of `OwnRows`.
        exchange: between the main processes.
    """

    def __init__(self, steps: StepStream, load: Callable[[OwnRows], DataLoader], exchange: Exchange) -> None:
        super().__init__(steps.examples, steps.batch_size, steps.tokens_per_pass, steps.ranks, steps.padded)
        self._exchange, self._rows_per_chunk = exchange, -(-self.batch_size // exchange.size)
        self._chunks = load(OwnRows(self.examples, exchange.rank, exchange.size, self._rows_per_chunk))

    def step(self, examples: Any) -> StepRows:
        """The passes of this rank in a step that was dealt before, perhaps with another limit of tokens."""
        dealt: DealtStep = examples
        plans = [plan_step(lengths, self.tokens_per_pass, padded=self.padded)[0] for lengths in dealt.lengths]
        passes = [[dealt.documents[i] for i in chosen] for chosen in plans[self.ranks.rank]]
        passes += [[] for _ in range(max(map(len, plans)) - len(passes))]
        return StepRows(passes, dealt, dealt.num_items, self.tokens_per_pass, dealt.digests)

    def __iter__(self) -> Iterator[StepRows]:
        self._exchange.run(lambda: None).result()  # after what an iteration that was left still does
        num_workers = self._chunks.num_workers
        rows = _RowsOfAll(self.examples, self._chunks, self._rows_per_chunk, self._exchange)
        following = None
        while True:
            # with the limit as it is now, which is the same on all ranks
            made = following or self._exchange.run(self._next_step, rows, self.tokens_per_pass)
            if (step := made.result()) is None:
                return
            following = self._exchange.run(self._next_step, rows, self.tokens_per_pass) if num_workers else None
            yield step

    def _next_step(self, rows: _RowsOfAll, tokens_per_pass: int) -> StepRows | None:
        if (worker := rows.next_worker(self.batch_size)) is None:
            return None
        notices, digests = worker.take(self.batch_size)
        shares = plan_step([n.length for n in notices], tokens_per_pass, self.ranks.size, padded=self.padded)
        dealt = [[notices[i] for chosen in passes for i in chosen] for passes in shares]
        in_order = iter(documents := self._sent(worker.own, dealt))
        passes = [[next(in_order) for _ in chosen] for chosen in shares[self.ranks.rank]]
        items = sum(n.num_scored * (n.weight if self.examples.per_example else 1) for n in notices)
        step = DealtStep([[n.length for n in share] for share in dealt], documents, items, digests)
        return StepRows(passes, step, items, tokens_per_pass, digests)

    def _sent(self, own: dict[int, Document], dealt: list[list[Notice]]) -> list[Document]:
        """Sends each document to the processes of its rank. Returns those of this rank."""
        process, ranks = self._exchange.rank, self.ranks
        for_share = [[own[notice.place] for notice in share if notice.process == process] for share in dealt]
        to_each = [for_share[other // (ranks.sharing * ranks.parts)] for other in range(self._exchange.size)]
        arrived = [iter(documents) for documents in self._exchange.send(to_each)]
        for notice in itertools.chain(*dealt):
            if notice.process == process:
                del own[notice.place]
        return [next(arrived[notice.process]) for notice in dealt[ranks.rank]]

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError("steps of divided rows have no state: a run that resumes reads them again")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("steps of divided rows have no state: a run that resumes reads them again")


@dataclass
class _Worker:
    """What the workers of one number, in all processes, have read.

    - `chunks`: of this process, not yet merged
    - `own`: the documents of this process, by place, until they are sent
    - `waiting`: the documents of all, in the order of the stream
    - `digest`: of all that was taken
    """

    number: int
    chunks: deque[Chunk] = field(default_factory=deque)
    own: dict[int, Document] = field(default_factory=dict)
    num_own: int = 0
    waiting: deque[Notice] = field(default_factory=deque)
    num_documents: int = 0
    account: Account = field(default_factory=Account)
    ended: bool = False
    error: Exception | None = None
    digest: str = ""

    def take(self, count: int) -> tuple[list[Notice], tuple[int, str, str]]:
        """At most `count` documents, and `stream_pack.stream_digests`."""
        taken = [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]
        before = self.digest
        for notice in taken:
            self.digest = chained_digest(self.digest, [notice.digest])
        return taken, (self.number, before, self.digest)

    def noted(self, documents: list[Document], process: int) -> list[Notice]:
        notices = []
        for document in documents:
            self.own[self.num_own] = document
            digest = digest_of(document)
            notices.append(Notice(len(document), document.num_scored, document.weight, digest, process, self.num_own))
            self.num_own += 1
        return notices


class _RowsOfAll:
    """Brings the rows of all processes into the order of the stream, worker by worker in turn."""

    def __init__(self, stream: PackedStream, loader: DataLoader, rows_per_chunk: int, exchange: Exchange) -> None:
        self._stream, self._exchange, self._rows_per_chunk = stream, exchange, rows_per_chunk
        self._chunks: Iterator[Chunk] = iter(loader)
        self._workers = [_Worker(number) for number in range(max(1, loader.num_workers))]
        self._turns = deque(self._workers)

    def next_worker(self, count: int) -> _Worker | None:
        """The one whose turn it is, with `count` documents waiting, or at its end fewer; None at the end of all."""
        while self._turns:
            worker = self._turns[0]
            while len(worker.waiting) < count and not worker.ended:
                self._merge(worker)
            if len(worker.waiting) < count and worker.error is not None:
                raise worker.error
            if worker.waiting:
                self._turns.rotate(-1)
                return worker
            self._stream.check_end(worker.account, worker.num_documents)
            self._turns.popleft()
        return None

    def _merge(self, worker: _Worker) -> None:
        """Adds the next chunk of each process."""
        while not worker.chunks:
            chunk = next(self._chunks)
            self._workers[chunk.worker].chunks.append(chunk)
        chunk = worker.chunks.popleft()
        rows = [row if isinstance(row, Exception) else worker.noted(row, self._exchange.rank) for row in chunk.rows]
        every = self._exchange.gather((rows, chunk.account, chunk.mark))
        of_all = [rows for rows, _, _ in every]
        for turn in itertools.zip_longest(*of_all, fillvalue=[]):
            for row in turn:
                if isinstance(row, Exception):
                    worker.ended, worker.error = True, row
                    return
                worker.waiting.extend(row)
                worker.num_documents += len(row)
        self._check_same([len(rows) for rows in of_all], [mark for _, _, mark in every])
        for _, account, _ in every:
            worker.account.add(account)
        worker.ended = any(len(rows) < self._rows_per_chunk for rows in of_all)
        self._stream.check_losses_so_far(worker.account)

    def _check_same(self, num_rows: list[int], marks: list[int | None]) -> None:
        """Raises ValueError, on all processes, if they do not read the same rows."""
        descending = sorted(num_rows, reverse=True)
        if len(set(marks)) > 1 or num_rows != descending or descending[0] - descending[-1] > 1:
            raise ValueError(
                f"the {self._stream.name} stream gives other rows on one rank than on another, but packsft deals the "
                "rows to the ranks itself: give every rank the same stream, with the same shuffling"
            )
