"""How many positions a model has, and which documents have more tokens."""

from __future__ import annotations

import logging

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

logger = logging.getLogger("packsft")


def max_positions(model: PreTrainedModel) -> int | None:
    """The positions that the model's configuration names; None if it names none."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]  # the second: MPT's
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def has_position_table(model: PreTrainedModel) -> bool:
    """Whether positions are looked up in a table, which ends: one row for each, and up to 4 more (OPT has 2)."""
    limit, ends = max_positions(model), (model.get_input_embeddings(), model.get_output_embeddings())
    if limit is None:
        return False
    of_tokens = {module for end in ends if end is not None for module in end.modules()}  # an adapter may wrap them

    def is_table(tensor: Tensor) -> bool:
        return tensor.dim() == 2 and limit <= tensor.shape[0] <= limit + 4

    for module in model.modules():
        learned = [module.weight] if isinstance(module, nn.Embedding) and module not in of_tokens else []
        fixed = [value for value in vars(module).values() if isinstance(value, Tensor)]  # CTRL's are no buffers
        if any(is_table(tensor) for tensor in [*learned, *fixed, *module.buffers(recurse=False)]):
            return True
    return False


def most_tokens_of(model: PreTrainedModel, max_length: int | None) -> int | None:
    """The most tokens that a document of the model may have: `max_length`, or the end of its table of positions."""
    limits = [max_length, max_positions(model) if has_position_table(model) else None]
    return min((limit for limit in limits if limit is not None), default=None)


def check_document_lengths(model: PreTrainedModel, lengths: np.ndarray, name: str) -> None:
    """Says how many documents have more tokens than the model has positions.

    Args:
        model: the model.
        lengths: `[documents]` integers.
        name: names the data set in messages.

    Raises:
        ValueError: the model would fail on them, since it looks up positions in a table.
    """
    limit = max_positions(model)
    if limit is None or not (longer := int(np.count_nonzero(lengths > limit))):
        return
    said = (
        f"{longer} of {len(lengths)} documents of the {name} have more tokens (up to {lengths.max()}) than the "
        f"{limit} positions of {type(model).__name__}"
    )
    if has_position_table(model):
        raise ValueError(f"{said}, which looks them up in a table: set max_length={limit} or less")
    logger.warning("%s (max_position_embeddings): the model was not made for them", said)
