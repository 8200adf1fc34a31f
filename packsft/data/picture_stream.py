"""A stream of rows with pictures: measured as they are read, by the headers of the pictures, processed for a pass."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
from datasets import IterableDataset
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from packsft.data.document import Pack, PlannedDocument
from packsft.data.pictures import LOOKED_AT, PICTURES, MeasuredRows, PictureRows, RowProcessor
from packsft.data.streams import SAMPLED_ROWS, PackedStream, for_a_worker
from packsft.packing import Account

FIRST_WITH_PICTURES = 16


class PictureStream(PackedStream):
    """A `PackedStream` of rows of `with_hidden_pictures`. Every rank reads every row, and processes those of its own.

    Args:
        stream: the rows.
        max_length, options: as in `PackedStream`.
        collator: as in `RowProcessor`.

    Raises:
        ValueError: also if a row cannot be processed, a picture has no header, or the first rows have none.
    """

    def __init__(
        self,
        stream: IterableDataset,
        max_length: int | None,
        *,
        collator: DataCollatorForVisionLanguageModeling,
        **options: Any,
    ) -> None:
        super().__init__(stream, max_length, **options)
        self._process = RowProcessor.of_rows(stream, collator, f"{self.name} stream")
        self._planner = self._process.planner(stream, max_length, f"{self.name} stream")

    def _read(
        self, row: Mapping[str, Any], number: int, where: str, account: Account
    ) -> tuple[int, int, Callable[[int, int], Any]]:
        measured = self._planner.measure(row, where, self.max_length)
        length = measured["length"]

        def document_of(start: int, stop: int) -> PlannedDocument:
            return PlannedDocument(stop, measured["scored"], number, length, row)

        return length, measured["pictures_end"], document_of

    def digest(self, document: Any) -> bytes:
        return _digest_of(document.given)

    def processed(self, pack: Any) -> Pack:
        return [
            self._process.document(
                planned.given,
                f"row {planned.row} of the {self.name} stream",
                planned.tokens_of_row,
                (0, planned.length),
                planned.weight,
                planned.row,
                self._vocab_size,
            )
            for planned in pack
        ]

    def sample(self) -> str:
        """Adds to the parent: of a picture in memory, its pixels."""
        rows = itertools.islice(iter(self.stream), SAMPLED_ROWS)
        split = repr(getattr(self.stream, "_distributed", None))
        return hashlib.sha256(split.encode() + b"".join(map(_digest_of, rows))).hexdigest()

    def first_rows(self) -> MeasuredRows:
        """Those up to the 16th with pictures. Raises ValueError if the first `LOOKED_AT` have none."""
        rows, measured = [], []
        for number, row in enumerate(itertools.islice(iter(self.stream), LOOKED_AT)):
            rows.append(row)
            measured.append(self._planner.measure(row, f"row {number} of the {self.name} stream", self.max_length))
            if sum(one["picture_tokens"] > 0 for one in measured) == FIRST_WITH_PICTURES:
                break
        if not any(one["picture_tokens"] for one in measured):
            raise ValueError(
                f"none of the first {len(rows)} rows of the {self.name} stream has a picture, so that nothing shows "
                "whether pictures can be packed: shuffle it, or remove the column"
            )
        columns = {name: np.array([one[name] for one in measured]) for name in measured[0]}
        first = MeasuredRows(rows, self._process, columns, f"{self.name} stream")
        if self._vocab_size is not None:
            first.check_ids(self._vocab_size)
        return first

    def state_dict(self) -> dict[str, Any]:
        """Raises ValueError if rows wait in the buffer: their pictures would have to be saved."""
        if self._held and self._resume is None:
            raise ValueError(f"the state of the {self.name} stream would hold the pictures that wait for a pack")
        return super().state_dict()


def _digest_of(row: Mapping[str, Any]) -> bytes:
    """SHA-256 of texts and pictures; of a picture in a file, its path."""
    pictures = row[PICTURES] if isinstance(row[PICTURES], list) else [row[PICTURES]]
    digest = hashlib.sha256(repr({key: value for key, value in row.items() if key != PICTURES}).encode())
    for picture in pictures:
        if hasattr(picture, "tobytes"):
            digest.update(repr((picture.size, picture.mode)).encode() + picture.tobytes())
        else:
            digest.update(repr(picture).encode())
    return digest.digest()


def rows_with_pictures(packs: Any) -> MeasuredRows | None:
    """The rows of a packed data set, or the first ones of a stream; None without pictures."""
    if isinstance(packs, PictureStream):
        return packs.first_rows()
    return rows if isinstance(rows := getattr(packs, "rows", None), PictureRows) else None


ForkingPickler.register(PictureStream, for_a_worker)
