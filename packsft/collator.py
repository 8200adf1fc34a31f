"""Rows to one batch, or to the batches of a step: the only producer of what `batch.py` describes, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from packsft.batch import IGNORE_INDEX, StepRows

Document = tuple[np.ndarray, np.ndarray, float]  # input ids, labels, weight of each scored token


@dataclass
class PackingCollator(DataCollatorForLanguageModeling):
    """Lays the documents of the given rows end to end, or, with `padded=True`, one below the other.

    A row is a mapping with `input_ids`, and optionally `labels` (default: the input ids, every token scored) and
    `seq_lengths` (the lengths of the documents in it; default: it is one document). Several rows make one longer row,
    a `StepRows` the batches of an optimizer step.

    Args:
        pad_token_id: fills the padding; what it is never matters, since no document sees it and it is not scored.
        vocab_size: ids and labels must be below it; None for no check.
        padded: one right-padded row per document instead of one packed row.
        pad_to_multiple_of: pads the packed row, by one more document, or the rows of a padded batch.
        per_example: every document counts the same however many of its tokens are scored, each of which weighs one
            over their number (Bai et al., LongAlign, arXiv 2401.18058). A row's `loss_weights`, one number per
            document, take its place: of a document that is a part of an example, for instance.
        masked: a padded batch says what is padding, which attention need not know but a router's loss does.

    Raises:
        ValueError: labels or seq_lengths that do not fit the input ids, or an id outside the vocabulary.
    """

    vocab_size: int | None = None
    padded: bool = False
    per_example: bool = False
    masked: bool = False

    def torch_call(self, examples: Sequence[Any]) -> dict[str, Any]:
        if isinstance(examples[0], StepRows):
            (step,) = examples
            passes = [self._batch(rows) for rows in step.passes]
            return {
                "passes": passes,
                "input_ids": join_passes([batch["input_ids"] for batch in passes], self.pad_token_id, self.padded),
                "examples": step.examples,
                "num_items": step.num_items,
                "tokens_per_pass": step.tokens_per_pass,
            }
        return self._batch(examples)

    def _batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        documents = [document for row, example in enumerate(rows) for document in self._documents(row, example)]
        num_tokens = sum(len(ids) for ids, *_ in documents)
        if not documents:  # nothing is left for this rank, but the others wait for it: one token, not scored
            documents = [(np.array([self.pad_token_id]), np.array([IGNORE_INDEX]), 0.0)]
        batch = self._padded(documents) if self.padded else self._packed(documents)
        num_items = float(batch["loss_weights"].sum()) if self.per_example else batch["loss_rows"].numel()
        return batch | {"num_items": num_items, "num_tokens": num_tokens}

    def _documents(self, row: int, example: Mapping[str, Any]) -> list[Document]:
        """The documents of a row, the label of the first token of each set to -100."""
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
        stops = np.cumsum(lengths)
        starts = stops - lengths
        labels[starts[lengths > 0]] = IGNORE_INDEX
        parts = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
        weights = example.get("loss_weights")
        if weights is None:
            weights = [1.0 / max(1, int((labels[part] != IGNORE_INDEX).sum())) for part in parts]
        documents = zip(parts, weights, strict=True)
        return [(ids[part], labels[part], weight) for part, weight in documents if part.stop > part.start]

    def _packed(self, documents: list[Document]) -> dict[str, Any]:
        if self.pad_to_multiple_of and (tail := -sum(len(ids) for ids, *_ in documents) % self.pad_to_multiple_of):
            # a document of its own: varlen kernels leave what is past the last boundary undefined
            documents = [*documents, (np.full(tail, self.pad_token_id), np.full(tail, IGNORE_INDEX), 0.0)]
        ids = np.concatenate([ids for ids, *_ in documents])
        labels = np.concatenate([labels for _, labels, _ in documents])
        lengths = np.array([len(ids) for ids, *_ in documents])
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
            **self._loss_positions(labels, documents, seq_idx),
        }

    def _padded(self, documents: list[Document]) -> dict[str, Any]:
        longest = max(len(ids) for ids, *_ in documents)
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of
        ids = np.full((len(documents), longest), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(documents), longest), IGNORE_INDEX, dtype=np.int64)
        for row, (document_ids, document_labels, _) in enumerate(documents):
            ids[row, : len(document_ids)] = document_ids
            labels[row, : len(document_ids)] = document_labels
        mask = np.arange(longest) < np.array([[len(ids)] for ids, *_ in documents])
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            **({"attention_mask": torch.from_numpy(mask.astype(np.int64))} if self.masked else {}),
            **self._loss_positions(labels.reshape(-1), documents, np.arange(labels.size) // longest),
        }

    def _loss_positions(
        self, labels: np.ndarray, documents: list[Document], document_of: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """The shift, the mask and the document boundary in one index: `labels[t + 1]` is what position t predicts.

        The first label of every document is -100, so no position predicts a token of the document after it.
        """
        scored = np.flatnonzero(labels != IGNORE_INDEX)
        positions = {
            "loss_rows": torch.from_numpy((scored - 1).astype(np.int32)),
            "loss_targets": torch.from_numpy(labels[scored]),
        }
        if self.per_example:
            weights = np.array([weight for *_, weight in documents])
            positions["loss_weights"] = torch.from_numpy(weights[document_of[scored]])
        return positions


def join_passes(parts: Sequence[torch.Tensor], value: float, padded: bool) -> torch.Tensor:
    """What passes have for each token, as one tensor: packed rows end to end, padded ones below each other."""
    if not padded:
        return torch.cat(list(parts), dim=1)
    longest = max(part.shape[1] for part in parts)
    others = [0, 0] * (parts[0].dim() - 2)  # `pad` counts dimensions from the last
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, [*others, 0, longest - part.shape[1]], value=value) for part in parts], dim=0)


def _check_ids(ids: np.ndarray, labels: np.ndarray, vocab_size: int, row: int) -> None:
    for name, values in (("input_ids", ids), ("labels", labels[labels != IGNORE_INDEX])):
        bad = (values < 0) | (values >= vocab_size)
        if bad.any():
            raise ValueError(
                f"row {row} of the batch: {name} holds {values[bad][0]}, but the vocabulary has {vocab_size} entries, "
                f"0 to {vocab_size - 1}" + (" (or -100, not scored)" if name == "labels" else "")
            )
