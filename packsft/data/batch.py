"""The contract between collator, trainer and head: the keys of a batch of packed documents.

The collator computes everything once, on the host. Nothing here reads from the device.

| key                            | shape, dtype    | meaning                                                           |
|--------------------------------|-----------------|-------------------------------------------------------------------|
| `input_ids`                    | `[1, T]` int64  | documents end to end, then padding as documents of its own        |
| `position_ids`                 | `[1, T]` int64  | restart at 0 in every document                                    |
| `cu_seq_lens_q`, `..._k`       | `[D + 1]` int32 | document boundaries, from 0 to T                                  |
| `max_length_q`, `max_length_k` | int             | longest document                                                  |
| `seq_idx`                      | `[1, T]` int32  | document number of each token, for hybrid layers                  |
| `labels`                       | `[1, T]` int64  | unshifted; -100 = not scored, as is each document's first token   |
| `loss_rows`                    | `[N]` int32     | positions t whose next token is scored                            |
| `loss_targets`                 | `[N]` int64     | `labels[t + 1]` of those positions                                |
| `loss_weights`                 | `[N]` float64   | weight of each position's loss; only if examples count equally    |
| `num_items`                    | int or float    | N, or the sum of the weights: its part of the denominator         |
| `denominator`                  | int or float    | for a user's `compute_loss`: what sums of losses are divided by   |
| `num_scored`                   | int             | N                                                                 |
| `num_tokens`                   | int             | tokens of the documents, without padding                          |
| `num_documents`                | int             | D                                                                 |
| `row_tokens`                   | int             | `num_tokens` of the whole row; only of a part of one, see below   |
| `rows`                         | `[D]` int64     | each document's row in the data set; -1 if unknown                |
| `stream_digests`               | tuple           | of a stream: see `stream_pack.stream_digests`                     |

Under sequence parallelism a rank gets a part of the row: `[1, T / P]` of what has T tokens, with the counts,
`loss_rows` and targets of its own positions. The boundaries, `max_length_q` and D are those of the whole row.

For `torch.compile` the collator pads T, D and N (`round_sizes`). Counts exclude padding.

A padded batch (for models on which packed documents see each other) has `[B, S]` `input_ids` and `labels`. Its
`loss_rows` index the flattened rows, with the virtual tokens that a PEFT prompt puts before each. It needs no
boundaries: with causal attention, no token sees the padding on its right. `row_lengths` `[B]` int64 counts the tokens
of each row's document. For a mixture of experts it has an `attention_mask`, because the router's loss must exclude
padding.

A batch without documents has one unscored token, and counts of 0: a rank with no work left still runs forward and
backward, because the other ranks wait for it.

Under exact-step packing, an item of the data loader is an optimizer step: the batches of this rank's passes, and what
all ranks share.

| key               | type          | meaning                                                                   |
|-------------------|---------------|---------------------------------------------------------------------------|
| `passes`          | list          | batches as above, the same number on every rank                           |
| `input_ids`       | int64         | the input ids of all passes, joined, for metrics that need them           |
| `examples`        | `[B]` int64   | the step's examples on all ranks: indices into the data set, or for a     |
|                   | or others     | stream, which has no indices, what `StepStream.step` takes                |
| `num_items`       | int or float  | the denominator of the step's loss, over all ranks                        |
| `tokens_per_pass` | int           | the limit that the passes were planned for                                |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packsft.data.document import Pack

LOSS_KEYS = ("loss_rows", "loss_targets", "loss_weights")  # read by the head, unknown to the models
# for the trainer: with labels, a model would compute its own loss
HOST_KEYS = (
    "labels", "num_items", "denominator", "num_scored", "num_tokens", "num_documents", "row_tokens", "rows",
    "row_lengths", "stream_digests",
)  # fmt: skip


@dataclass
class StepRows:
    """An optimizer step before collation: the documents of each pass on this rank, and what all ranks share."""

    passes: list[Pack]
    examples: Any  # what the `step` of its planner takes, to plan it again
    num_items: int | float
    tokens_per_pass: int
    stream_digests: tuple[int, str, str] | None = None


class StepBatch(dict):
    """An optimizer step, collated. A key of one of its passes is an error that says where it is."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(f"{key}: this is an optimizer step of {len(self['passes'])} passes, see batch['passes'][0]")


def part_of(num_tokens: int, part: int, parts: int) -> slice:
    """The positions of part `part` in a row of so many tokens, a multiple of `parts`."""
    return slice(num_tokens * part // parts, num_tokens * (part + 1) // parts)


def document_lengths(batch: Mapping[str, Any]) -> Any:
    """`[1, T]` or `[B, S]`: the length of each token's document, also on the padding of a padded batch."""
    if "row_lengths" in batch:
        return batch["row_lengths"][:, None].expand_as(batch["input_ids"])
    return batch["cu_seq_lens_q"].diff()[batch["seq_idx"].long()]


def longest_document(batch: Mapping[str, Any]) -> int:
    """At least the number of tokens of the longest document, known on the host."""
    return batch["input_ids"].shape[1] if "row_lengths" in batch else batch["max_length_q"]


def has_documents(batch: Mapping[str, Any]) -> bool:
    """Whether the row has any, of which this rank may have none."""
    return bool(batch.get("row_tokens", batch["num_tokens"]))


def loss_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of the head, in addition to `model_inputs`."""
    return {key: batch[key] for key in LOSS_KEYS if key in batch}


def for_model(batch: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """What a model of `packsft.prepare` takes, and `more`."""
    return {key: value for key, value in batch.items() if key in ("row_lengths", *more) or key not in HOST_KEYS}


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of the model's own forward."""
    return {key: value for key, value in batch.items() if key not in LOSS_KEYS + HOST_KEYS}
