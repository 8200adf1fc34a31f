"""A stream of rows with pictures: measured as they are read, by the headers of the pictures, processed for a pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import IterableDataset

from packsft.data.document import Pack, PlannedDocument
from packsft.data.pictures import LOOKED_AT, PICTURES, MeasuredRows, PictureRows, RowProcessor
from packsft.data.streams import FIRST_ROWS, PackedStream, for_a_worker
from packsft.packing import Account

if TYPE_CHECKING:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

FIRST_WITH_PICTURES = 16


class PictureStream(PackedStream):
    """A `PackedStream` of rows of `with_hidden_pictures`.

    With exact steps, every rank reads and measures every row, and processes those that it trains on.

    Args:
        stream: the rows.
        max_length, options: as in `PackedStream`.
        collator: as in `RowProcessor`.

    Raises:
        ValueError: also if a row cannot be processed, a picture has no header, or the first `LOOKED_AT` rows have none.
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
        name = f"{self.name} stream"
        first, read_all = _first_rows(stream)
        self._process = RowProcessor.of_rows(stream, list(first[0]), collator, name)
        self._planner = self._process.planner(first, max_length, name)
        measured = [
            self._planner.measure(row, f"row {number} of the {name}", max_length) for number, row in enumerate(first)
        ]
        if not read_all and not any(one["picture_tokens"] for one in measured):
            raise ValueError(
                f"none of the first {len(first)} rows of the {name} has a picture, so that nothing shows whether "
                "pictures can be packed: shuffle it, or remove the column"
            )
        columns = {key: np.array([one[key] for one in measured]) for key in measured[0]}
        self.first_rows = MeasuredRows(first, self._process, columns, name)
        if self._vocab_size is not None:
            self.first_rows.check_ids(self._vocab_size)

    def _read(
        self, row: Mapping[str, Any], number: int, where: str, account: Account
    ) -> tuple[int, int, Callable[[int, int], Any]]:
        measured = self._planner.measure(row, where, self.max_length)
        length = measured["length"]

        def document_of(start: int, stop: int) -> PlannedDocument:
            assert start == 0
            return PlannedDocument(stop, measured["scored"], number, length, row)

        return length, measured["pictures_end"], document_of

    def digest(self, document: Any) -> bytes:
        return self._process.digest(document.given)

    def check_ids(self, vocab_size: int) -> None:
        super().check_ids(vocab_size)
        self.first_rows.check_ids(vocab_size)

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
        """SHA-256 in hex of the first rows, as of the parent."""
        rows = self.first_rows.rows[:FIRST_ROWS]
        split = repr(getattr(self.stream, "_distributed", None))
        return hashlib.sha256(split.encode() + b"".join(map(self._process.digest, rows))).hexdigest()


def _first_rows(stream: IterableDataset) -> tuple[list[dict[str, Any]], bool]:
    """Those up to the 16th with pictures, at most `LOOKED_AT`, and whether these are all."""
    rows: list[dict[str, Any]] = []
    with_pictures = 0
    for row in stream:
        if len(rows) == LOOKED_AT or with_pictures == FIRST_WITH_PICTURES:
            return rows, False
        rows.append(row)
        with_pictures += bool(row[PICTURES])
    return rows, True


def rows_with_pictures(packs: Any) -> MeasuredRows | None:
    """The rows of a packed data set, or the first ones of a stream; None without pictures."""
    if isinstance(packs, PictureStream):
        return packs.first_rows
    return rows if isinstance(rows := getattr(packs, "rows", None), PictureRows) else None


ForkingPickler.register(PictureStream, for_a_worker)
