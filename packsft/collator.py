"""Rows to one batch: the only producer of what `batch.py` describes, on the host, in the data loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from packsft.batch import IGNORE_INDEX


@dataclass
class PackingCollator(DataCollatorForLanguageModeling):
    """Lays the documents of the given rows end to end, or, with `padded=True`, one below the other.

    A row is a mapping with `input_ids`, and optionally `labels` (default: the input ids, every token scored) and
    `seq_lengths` (the lengths of the documents in it; default: it is one document). Several rows make one longer row.

    Args:
        pad_token_id: fills the padding; what it is never matters, since no document sees it and it is not scored.
        vocab_size: ids and labels must be below it; None for no check.
        padded: one right-padded row per document instead of one packed row.
        pad_to_multiple_of: pads the packed row, by one more document, or the rows of a padded batch.

    Raises:
        ValueError: labels or seq_lengths that do not fit the input ids, or an id outside the vocabulary.
    """

    vocab_size: int | None = None
    padded: bool = False

    def torch_call(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        documents = [document for row, example in enumerate(examples) for document in self._documents(row, example)]
        lengths = [len(ids) for ids, _ in documents]
        num_tokens = sum(lengths)
        if self.padded:
            return self._padded(documents, max(lengths)) | {"num_tokens": num_tokens}
        ids = np.concatenate([ids for ids, _ in documents])
        labels = np.concatenate([labels for _, labels in documents])
        if self.pad_to_multiple_of and (tail := -len(ids) % self.pad_to_multiple_of):
            ids = np.concatenate([ids, np.full(tail, self.pad_token_id)])
            labels = np.concatenate([labels, np.full(tail, IGNORE_INDEX)])
            lengths.append(tail)  # a document of its own: varlen kernels leave what is past the last boundary undefined
        return self._packed(ids, labels, np.array(lengths, dtype=np.int64)) | {"num_tokens": num_tokens}

    def _documents(self, row: int, example: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(input ids, labels) of each document in a row, the label of its first token set to -100."""
        ids = np.asarray(example["input_ids"], dtype=np.int64)
        labels = example.get("labels")
        labels = ids.copy() if labels is None else np.array(labels, dtype=np.int64)
        lengths = example.get("seq_lengths")
        lengths = np.array([len(ids)] if lengths is None else lengths, dtype=np.int64)
        if len(labels) != len(ids):
            raise ValueError(f"row {row} of the batch: {len(labels)} labels for {len(ids)} input_ids")
        if lengths.sum() != len(ids) or (lengths < 0).any():
            raise ValueError(
                f"row {row} of the batch: seq_lengths sum to {lengths.sum()}, but there are {len(ids)} input_ids"
            )
        if self.vocab_size is not None:
            _check_ids(ids, labels, self.vocab_size, row)
        lengths = lengths[lengths > 0]
        stops = np.cumsum(lengths)
        starts = stops - lengths
        labels[starts] = IGNORE_INDEX
        return [(ids[a:b], labels[a:b]) for a, b in zip(starts, stops, strict=True)]

    def _packed(self, ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
        boundaries = np.concatenate([[0], np.cumsum(lengths)])
        seq_idx = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        position_ids = np.arange(len(ids)) - boundaries[:-1][seq_idx]
        cu_seq_lens = torch.from_numpy(boundaries.astype(np.int32))
        longest = int(lengths.max())
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(position_ids)[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": torch.from_numpy(seq_idx)[None],
            "labels": torch.from_numpy(labels)[None],
            **_loss_positions(labels),
        }

    def _padded(self, documents: list[tuple[np.ndarray, np.ndarray]], longest: int) -> dict[str, Any]:
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of
        ids = np.full((len(documents), longest), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(documents), longest), IGNORE_INDEX, dtype=np.int64)
        for row, (document_ids, document_labels) in enumerate(documents):
            ids[row, : len(document_ids)] = document_ids
            labels[row, : len(document_ids)] = document_labels
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            **_loss_positions(labels.reshape(-1)),
        }


def _loss_positions(labels: np.ndarray) -> dict[str, torch.Tensor]:
    """The shift, the mask and the document boundary in one index: `labels[t + 1]` is what position t predicts.

    The first label of every document is -100, so no position predicts a token of the document after it.
    """
    scored = np.flatnonzero(labels != IGNORE_INDEX)
    return {
        "loss_rows": torch.from_numpy((scored - 1).astype(np.int32)),
        "loss_targets": torch.from_numpy(labels[scored]),
    }


def _check_ids(ids: np.ndarray, labels: np.ndarray, vocab_size: int, row: int) -> None:
    for name, values in (("input_ids", ids), ("labels", labels[labels != IGNORE_INDEX])):
        bad = (values < 0) | (values >= vocab_size)
        if bad.any():
            raise ValueError(
                f"row {row} of the batch: {name} holds {values[bad][0]}, but the vocabulary has {vocab_size} entries, "
                f"0 to {vocab_size - 1}" + (" (or -100, not scored)" if name == "labels" else "")
            )
