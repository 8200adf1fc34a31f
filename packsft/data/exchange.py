"""What the processes of a run tell each other while they train: a thread and a group of their own.

Knows Python objects, not what they mean.
"""

from __future__ import annotations

import functools
import pickle
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=1)  # for a process that saves or evaluates; one that ends is noticed at once


class Exchange:
    """Runs functions one after the other, in a thread, and exchanges objects between the processes that run them.

    All processes run the same functions in the same order. The thread ends with the process; one of
    `concurrent.futures` would be waited for, though another process may never come.

    Attributes:
        rank, size: of this process, among all.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="packsft exchange", daemon=True).start()

    @classmethod
    def of_run(cls) -> Exchange:
        """The one of this run. All processes make it together."""
        return _of_world(dist.group.WORLD)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """The result of a function, later."""
        future: Future = Future()
        self._jobs.put((future, lambda: function(*arguments)))
        return future

    def _work(self) -> None:
        while True:
            future, job = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
            del future, job  # holds rows, until the next one comes

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, on all."""
        return self._sent([pickle.dumps(value, pickle.HIGHEST_PROTOCOL)] * self.size)

    def send(self, values: Iterable[Any]) -> list[Any]:
        """Sends one value to each process. Returns what each has sent to this one."""
        return self._sent([pickle.dumps(value, pickle.HIGHEST_PROTOCOL) for value in values])

    def _sent(self, messages: list[bytes]) -> list[Any]:
        sizes = torch.tensor([len(message) for message in messages], device="cpu")
        sizes_in = torch.empty_like(sizes)
        dist.all_to_all_single(sizes_in, sizes, group=self._group)
        sent = torch.frombuffer(bytearray(b"".join(messages)), dtype=torch.uint8)
        arrived = torch.empty(int(sizes_in.sum()), dtype=torch.uint8, device="cpu")
        dist.all_to_all_single(arrived, sent, sizes_in.tolist(), sizes.tolist(), group=self._group)
        # Kept, so that it is not gloo's threads that free them. To do so they would enter Python, and a worker that is
        # forked at that moment hangs in CPython 3.11.
        self._kept = sizes, sizes_in, sent, arrived
        return [pickle.loads(part.numpy()) for part in arrived.split(sizes_in.tolist())]


@functools.lru_cache(maxsize=1)
def _of_world(group: Any) -> Exchange:
    return Exchange()
