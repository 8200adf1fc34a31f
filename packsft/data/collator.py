"""Rows to one batch, or to the batches of a step: the only producer of what `batch.py` describes, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from packsft.data.batch import IGNORE_INDEX, StepRows

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
        round_sizes: for `torch.compile`, which makes code anew for sizes of 0 and 1 and for integers that vary:
            T, D, N and the width of padded rows are padded as `rounded_size` says, and `max_length_q` is `max_length`.
            What is added is not scored.
        max_length: the most tokens of a document, or None. A longer one has the next power of two as `max_length_q`.
        per_example: every document counts the same however many of its tokens are scored, each of which weighs one
            over their number (Bai et al., LongAlign, arXiv 2401.18058). A row's `loss_weights`, one number per
            document, take its place: of a document that is a part of an example, for instance.
        masked: a padded batch says what is padding, which attention need not know but a router's loss does.

    Raises:
        ValueError: labels or seq_lengths that do not fit the input ids, or an id outside the vocabulary.
    """

    vocab_size: int | None = None
    padded: bool = False
    round_sizes: bool = False
    max_length: int | None = None
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
        num_scored = sum(int((labels != IGNORE_INDEX).sum()) for _, labels, _ in documents)
        return batch | {
            "num_items": float(batch["loss_weights"].sum()) if self.per_example else num_scored,
            "num_scored": num_scored,
            "num_tokens": num_tokens,
            "num_documents": len(documents),
        }

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
        num_tokens = sum(len(ids) for ids, *_ in documents)
        tail = self._padded_length(num_tokens) - num_tokens
        while tail:  # documents of their own: varlen kernels leave what is past the last boundary undefined
            length = min(tail, self.max_length or tail)
            documents = [*documents, (np.full(length, self.pad_token_id), np.full(length, IGNORE_INDEX), 0.0)]
            tail -= length
        ids = np.concatenate([ids for ids, *_ in documents])
        labels = np.concatenate([labels for _, labels, _ in documents])
        lengths = np.array([len(ids) for ids, *_ in documents])
        boundaries = np.concatenate([[0], np.cumsum(lengths)])
        seq_idx = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        position_ids = np.arange(len(ids)) - boundaries[:-1][seq_idx]
        longest = int(lengths.max())
        if self.round_sizes:
            boundaries = np.pad(boundaries, (0, rounded_size(len(lengths)) - len(lengths)), mode="edge")  # empty ones
            bound = self.max_length or 0
            longest = bound if longest <= bound else 1 << (longest - 1).bit_length()
        cu_seq_lens = torch.from_numpy(boundaries.astype(np.int32))
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
        longest = self._padded_length(max(len(ids) for ids, *_ in documents))
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

    def _padded_length(self, num_tokens: int) -> int:
        length = rounded_size(num_tokens) if self.round_sizes else num_tokens
        return length + -length % (self.pad_to_multiple_of or 1)

    def _loss_positions(
        self, labels: np.ndarray, documents: list[Document], document_of: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """The shift, the mask and the document boundary in one index: `labels[t + 1]` is what position t predicts.

        The first label of every document is -100, so no position predicts a token of the document after it.
        """
        scored = np.flatnonzero(labels != IGNORE_INDEX)
        positions = {"loss_rows": (scored - 1).astype(np.int32), "loss_targets": labels[scored]}
        if self.per_example:
            weights = np.array([weight for *_, weight in documents])
            positions["loss_weights"] = weights[document_of[scored]]
        if self.round_sizes:  # rows whose target is not scored count for nothing, whatever their position and weight
            pad = (0, rounded_size(len(scored)) - len(scored))
            unscored = {"loss_targets": IGNORE_INDEX}
            positions = {k: np.pad(v, pad, constant_values=unscored.get(k, 0)) for k, v in positions.items()}
        return {key: torch.from_numpy(values) for key, values in positions.items()}


def rounded_size(size: int) -> int:
    """The next multiple of 8, and from 256 on of a sixteenth of the power of two below, which adds 6% at most."""
    step = max(8, 1 << size.bit_length() >> 5)
    return max(step, size + -size % step)


def mark_sizes(batch: Mapping[str, Any]) -> None:
    """Tell `torch.compile` that sizes vary, so that its first graph serves all of them (0 and 1 it never shares)."""
    for tensor in batch.values():
        if isinstance(tensor, torch.Tensor):
            for dim in range(tensor.dim()):
                if tensor.shape[dim] > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)


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
