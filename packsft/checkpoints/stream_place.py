"""Where a run is in a stream, and whether a resumed stream is the one that was read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from packsft.data.ranks import Ranks


class StreamPlace:
    """Counts passes over a stream and the steps of each, and keeps the digests of what was read, by worker.

    Attributes:
        epoch: the current pass.
        began: the step at which it began.
    """

    def __init__(self, epoch: int = 0, began: int = 0, digests: Mapping[int, str] | None = None) -> None:
        self.epoch, self.began = epoch, began
        self._digests = dict(digests or {})
        self._saved = dict(self._digests)  # those not yet compared

    @staticmethod
    def digests_of_rank(record: Mapping[str, Any], rank: int, num_ranks: int, exact_steps: bool) -> dict[int, str]:
        """Of a saved `state`: what this rank had read; empty if it now reads another share."""
        ranks = record["digests"]
        if exact_steps:  # every rank reads everything
            rank = 0
        elif len(ranks) != num_ranks:
            return {}
        return {int(worker): digest for worker, digest in ranks[rank].items()}

    def read(self, batches: Iterable[Mapping[str, Any]]) -> tuple[str, str] | None:
        """Notes what batches come from. Returns (saved, read), if the first one after a resume follows other rows."""
        differs = None
        for batch in batches:
            if "stream_digests" in batch:
                worker, before, after = batch["stream_digests"]
                saved = self._saved.pop(worker, None)
                if saved and before and before != saved:  # "" at the beginning of a pass
                    differs = saved, before
                self._digests[worker] = after
        return differs

    def state(self, step: int, ranks: Ranks) -> dict[str, Any]:
        """For a checkpoint, with the digests of each share of the stream; all ranks call it."""
        digests = gather_object([self._digests])[:: ranks.sharing * ranks.parts]
        return {"epoch": self.epoch, "steps": step - self.began, "digests": digests}


class CountsEpochs(TrainerCallback):
    """Tells the `StreamPlace` of a trainer when a pass begins: a stream does not know how many steps it has."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._is_first = trainer, True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_first = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._is_first:
            self._trainer._place.epoch += 1
            self._trainer._place.began = state.global_step
        self._is_first = False
