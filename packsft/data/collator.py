"""Turns documents into one batch, or into the passes of a step, on the host. `batch.py` describes the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from packsft.data.batch import StepBatch, StepRows, part_of
from packsft.data.document import IGNORE_INDEX, Document, Pack, documents_of
from packsft.data.joined_pictures import JoinedPictures
from packsft.data.stream_pack import stream_digests


@dataclass
class PackingCollator(DataCollatorForLanguageModeling):
    """Lays the documents of the given items end to end in one row, or in one row each with `padded=True`.

    An item is a pack (a list of `Document`s), a row that the user made (see `documents_of`), or a `StepRows`, which
    becomes the passes of an optimizer step.

    Args:
        pad_token_id: fills the padding. Any id will do: no document sees padding, and padding is not scored.
        vocab_size: ids and labels of user rows must be below it; None for no check.
        padded: one right-padded row per document instead of one packed row.
        pad_to_multiple_of: pads the packed row, with documents of padding, or the rows of a padded batch.
        round_sizes: for `torch.compile`, which recompiles for sizes of 0 and 1 and for integers that vary. Pads T, D,
            N and the width of padded rows to `rounded_size`, and sets `max_length_q` to `max_length`.
        max_length: the most tokens of a document, or None. With `round_sizes`, a longer document sets `max_length_q`
            to the next power of two.
        per_example: every example counts the same in the loss: each scored token gets its document's `weight` (Bai et
            al., LongAlign, arXiv 2401.18058).
        masked: adds an attention mask to a padded batch. Attention does not need it, but a router's loss does.
        table_of_positions: the most tokens of a document of user rows, or None.
        virtual_tokens: how many the model puts before each row of a padded batch; `loss_rows` count them.
        pictures: puts the pictures of a pass together; None for rows of text.
        filler: an unscored document with a picture, added to a batch that has none; or None.
        part: (p, P) for part p of P parts of each packed row, see `model/sequence_parallel.py`.

    Raises:
        ValueError: a user row is not well formed.
    """

    vocab_size: int | None = None
    padded: bool = False
    round_sizes: bool = False
    max_length: int | None = None
    per_example: bool = False
    masked: bool = False
    virtual_tokens: int = 0
    table_of_positions: int | None = None
    pictures: JoinedPictures | None = None
    filler: Document | None = None
    part: tuple[int, int] = (0, 1)

    def torch_call(self, examples: Sequence[Any]) -> dict[str, Any]:
        if not isinstance(examples[0], StepRows):
            documents = [document for row, item in enumerate(examples) for document in self._pack(row, item)]
            return self._batch(documents) | _known(stream_digests(list(examples)))
        (step,) = examples
        passes = [self._batch(documents) for documents in step.passes]
        return StepBatch(
            passes=passes,
            input_ids=torch.cat([batch["input_ids"].flatten() for batch in passes])[None],
            examples=step.examples,
            num_items=step.num_items,
            tokens_per_pass=step.tokens_per_pass,
            **_known(step.stream_digests),
        )

    def _pack(self, row: int, item: Any) -> Pack:
        if isinstance(item, list):
            return item
        documents = documents_of(item, where := f"row {row} of the batch", self.vocab_size)
        longest, limit = max(map(len, documents), default=0), self.table_of_positions
        if limit is not None and longest > limit:
            raise ValueError(
                f"{where} has a document of {longest} tokens, but the model has a table of {limit} positions"
            )
        return documents

    def _batch(self, documents: Pack) -> dict[str, Any]:
        filled = documents
        if self.filler is not None and not any(document.of_pictures for document in documents):
            filled = [*documents, self.filler]
        filled = filled or [self._padding(1)]  # a rank without documents: the others wait for it
        batch = self._padded(filled) if self.padded else self._packed(filled)
        num_tokens = sum(map(len, documents))
        if self.part[1] > 1:
            part = part_of(len(batch["input_ids"][0]) * self.part[1], *self.part)
            batch["row_tokens"], num_tokens = num_tokens, len(range(num_tokens)[part])
        return batch | {
            "num_items": float(batch["loss_weights"].sum()) if self.per_example else batch["num_scored"],
            "num_tokens": num_tokens,
            "num_documents": len(documents),
            "rows": np.array([document.row for document in documents], np.int64),
        }

    def _padding(self, length: int) -> Document:
        return Document(np.full(length, self.pad_token_id), np.full(length, IGNORE_INDEX), 0, 0.0)

    def _packed(self, documents: Pack) -> dict[str, Any]:
        num_tokens = sum(map(len, documents))
        tail = self._padded_length(num_tokens) - num_tokens
        while tail:  # as documents: varlen kernels leave what follows the last boundary undefined
            length = min(tail, self.max_length or tail)
            documents = [*documents, self._padding(length)]
            tail -= length
        ids = np.concatenate([document.input_ids for document in documents])
        labels = np.concatenate([document.labels for document in documents])
        lengths = np.array([len(document) for document in documents])
        boundaries = np.concatenate([[0], np.cumsum(lengths)])
        seq_idx = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        position_ids = np.arange(len(ids)) - boundaries[:-1][seq_idx]
        longest = int(lengths.max())
        if self.round_sizes:
            boundaries = np.pad(boundaries, (0, rounded_size(len(lengths)) - len(lengths)), mode="edge")  # empty ones
            bound = self.max_length or 0
            longest = bound if longest <= bound else 1 << (longest - 1).bit_length()
        cu_seq_lens = torch.from_numpy(boundaries.astype(np.int32))
        part = part_of(len(ids), *self.part)
        return {
            "input_ids": torch.from_numpy(ids[part])[None],
            "position_ids": torch.from_numpy(position_ids[part])[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": torch.from_numpy(seq_idx[part])[None],
            "labels": torch.from_numpy(labels[part])[None],
            **self._loss_positions(labels, documents, seq_idx, part),
            **({} if self.pictures is None else self.pictures.of_row(documents)),
        }

    def _padded(self, documents: Pack) -> dict[str, Any]:
        longest = self._padded_length(max(map(len, documents)))
        ids = np.full((len(documents), longest), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(documents), longest), IGNORE_INDEX, dtype=np.int64)
        for row, document in enumerate(documents):
            ids[row, : len(document)] = document.input_ids
            labels[row, : len(document)] = document.labels
        mask = np.arange(longest) < np.array([[len(document)] for document in documents])
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "row_lengths": torch.tensor([len(document) for document in documents]),
            **({"attention_mask": torch.from_numpy(mask.astype(np.int64))} if self.masked else {}),
            **({} if self.pictures is None else self.pictures.of_rows(documents, longest)),
            **self._loss_positions(labels.reshape(-1), documents, np.arange(labels.size) // longest),
        }

    def _padded_length(self, num_tokens: int) -> int:
        length = rounded_size(num_tokens) if self.round_sizes else num_tokens
        return length + -length % math.lcm(self.pad_to_multiple_of or 1, self.part[1])

    def _loss_positions(
        self, labels: np.ndarray, documents: Pack, document_of: np.ndarray, part: slice = slice(None)
    ) -> dict[str, Any]:
        """The positions t in `part` that predict a scored token, `labels[t + 1]`, with their targets and weights.

        The first label of every document is -100, so no position predicts a token of the next document.
        """
        begin, end, _ = part.indices(len(labels))
        scored = np.flatnonzero(labels[begin + 1 : end + 1] != IGNORE_INDEX) + begin + 1
        rows = scored - begin - 1
        if self.virtual_tokens:
            rows += self.virtual_tokens * (document_of[scored] + 1)
        positions = {"loss_rows": rows.astype(np.int32), "loss_targets": labels[scored]}
        if self.per_example:
            weights = np.array([document.weight for document in documents])
            positions["loss_weights"] = weights[document_of[scored]]
        if self.round_sizes:  # a target of -100 adds nothing to the loss
            pad = (0, rounded_size(len(scored)) - len(scored))
            unscored = {"loss_targets": IGNORE_INDEX}
            positions = {k: np.pad(v, pad, constant_values=unscored.get(k, 0)) for k, v in positions.items()}
        tensors = {key: torch.from_numpy(values) for key, values in positions.items()}
        return {**tensors, "num_scored": len(scored)}


def _known(digests: tuple[int, str, str] | None) -> dict[str, Any]:
    return {} if digests is None else {"stream_digests": digests}


def rounded_size(size: int) -> int:
    """The next multiple of 8; from 256 on, of 1/16 of the next lower power of two, which adds at most 6%."""
    step = max(8, 1 << size.bit_length() >> 5)
    return max(step, size + -size % step)
