"""Names the rank that failed first in the errors of all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from packsft import compat

_runs = itertools.count()  # the same number on every rank


@contextmanager
def naming_failed_rank(accelerator: Any) -> Iterator[None]:
    """An error of one rank breaks off what the others wait for: their errors then name this rank and its error.

    With gloo. With NCCL the others raise nothing: the launcher ends them.
    """
    if accelerator.num_processes == 1:
        yield
        return
    key = f"packsft/failed/{next(_runs)}"
    try:
        yield
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        own = f"rank {accelerator.process_index} failed: {words}"
        try:
            first = compat.store_of_ranks().compare_set(key, "", own).decode()  # the first one stays
        except (distributed.DistError, ValueError):  # its host has ended, or there is no process group
            first = own
        waited = isinstance(error, distributed.DistError) or type(error) is RuntimeError  # for another rank, perhaps
        if waited and not first.endswith(f" failed: {words}"):
            raise RuntimeError(first) from error
        raise
