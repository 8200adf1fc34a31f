"""The contract between collator, trainer and head: which keys a batch of packed documents has, and what they mean.

Everything about a pack is worked out once, on the host, by the collator. Nothing here reads a device.

| key                            | shape, dtype    | meaning                                                           |
|--------------------------------|-----------------|-------------------------------------------------------------------|
| `input_ids`                    | `[1, T]` int64  | documents end to end, the pad a document of its own at the end    |
| `position_ids`                 | `[1, T]` int64  | restart at 0 in every document                                    |
| `cu_seq_lens_q`, `..._k`       | `[D + 1]` int32 | document boundaries, from 0 to T                                  |
| `max_length_q`, `max_length_k` | int             | longest document                                                  |
| `seq_idx`                      | `[1, T]` int32  | document number of each token, for hybrid layers                  |
| `labels`                       | `[1, T]` int64  | unshifted; -100 = not scored, as is each document's first token   |
| `loss_rows`                    | `[N]` int32     | positions t whose next token is scored                            |
| `loss_targets`                 | `[N]` int64     | `labels[t + 1]` of those positions                                |
| `loss_weights`                 | `[N]` float64   | weight of each position's loss; only where examples count equally |
| `num_items`                    | int or float    | N, or the sum of the weights: what alone the loss is divided by   |
| `num_scored`                   | int             | N                                                                 |
| `num_tokens`                   | int             | tokens of the documents, without padding                          |
| `num_documents`                | int             | D                                                                 |

For `torch.compile` the collator pads T, D and N (`round_sizes`): the counts are those without what is padded.

A padded batch (for models that cannot keep packed documents apart) has `[B, S]` `input_ids` and `labels`, and its
`loss_rows` count through the flattened rows; it has no boundaries, since right padding comes after what it could hurt.
For a mixture of experts it has an `attention_mask`: the router's loss is not to count padding.

Under exact-step packing an item of the data loader is an optimizer step: the batches of its passes on this rank, and
what is common to all ranks.

| key               | type         | meaning                                                                        |
|-------------------|--------------|--------------------------------------------------------------------------------|
| `passes`          | list         | batches as above, as many on every rank                                        |
| `input_ids`       | int64        | those of the passes, joined, for metrics that want them                        |
| `examples`        | `[B]` int64  | the step's examples on all ranks, by their place in the data set; of a stream, |
|                   | or list      | which has no places, their rows                                                |
| `num_items`       | int or float | what the step's loss is divided by, on all ranks                               |
| `tokens_per_pass` | int          | the bound that the passes were planned for                                     |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORE_INDEX = -100  # a label that is not scored
LOSS_KEYS = ("loss_rows", "loss_targets", "loss_weights")  # read by the head, unknown to the models
# for the trainer; labels would make the model compute its own loss
HOST_KEYS = ("labels", "num_items", "num_scored", "num_tokens", "num_documents")


@dataclass
class StepRows:
    """An optimizer step before it is collated: the rows of each pass on this rank, and the keys common to all ranks."""

    passes: list[list[dict[str, Any]]]
    examples: np.ndarray | list[dict[str, Any]]
    num_items: int | float
    tokens_per_pass: int


def document_lengths(batch: Mapping[str, Any]) -> Any:
    """`[1, T]` tokens of the document that each token is in; None for a padded batch."""
    if "cu_seq_lens_q" not in batch:
        return None
    return batch["cu_seq_lens_q"].diff()[batch["seq_idx"].long()]


def loss_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the head takes beside the model's own inputs."""
    return {key: batch[key] for key in LOSS_KEYS if key in batch}


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's own forward takes."""
    return {key: value for key, value in batch.items() if key not in LOSS_KEYS + HOST_KEYS}
