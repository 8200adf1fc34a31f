"""Forwards that a user's own `compute_loss` calls on a batch of the collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from packsft.data.batch import loss_inputs, model_inputs


@dataclass
class GivenBatch:
    """A batch that a user's own `compute_loss` is given, for the forwards that it calls.

    Args:
        batch: of the collator.
        forward_on: makes the context for a forward on it.
        packed: whether it is one row of several documents.
        virtual_tokens: how many a PEFT prompt puts before those of the batch.
        router_share: what the router's loss is multiplied with; 0 without one.
    """

    batch: Mapping[str, Any]
    forward_on: Callable[[], AbstractContextManager]
    packed: bool
    virtual_tokens: int
    router_share: float

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises ValueError for the tokens of a packed row without a word about its documents."""
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next((tensor for tensor in given if tensor is not None), None)
        told = any(kwargs.get(key) is not None for key in ("position_ids", "cu_seq_lens_q"))
        if self.packed and not told and tokens is not None and tokens.shape[:2] == self.batch["input_ids"].shape:
            raise ValueError(
                "the forward got the tokens of a row of several documents, which would see each other: give it all "
                "inputs of the batch, model(**inputs), or the position_ids as well"
            )


def for_logits(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of the model's own forward, of a batch without labels. Raises ValueError for a part of a row."""
    if "row_tokens" in batch:
        raise ValueError(
            "with sequence_parallel_size above 1 a rank has the logits of a part of a row, of which a shift by one "
            "would lose a token: take the loss of model(**inputs), with labels"
        )
    return {"use_cache": False} | model_inputs(batch)


def for_loss(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a forward with a loss: that of a pass is its part of the step's."""
    left_out = ("use_cache", "return_dict", "num_items_in_batch")
    counts = (batch.get(key) for key in ("num_items_in_batch", "denominator", "num_items"))
    num_items = next(count for count in counts if count is not None)
    inputs = {key: value for key, value in model_inputs(batch).items() if key not in left_out}
    return inputs | loss_inputs(batch) | {"num_items": num_items if isinstance(num_items, Tensor) else num_items or 1}
