"""A plugin for axolotl: packed batches as packsft makes them, on a model that `prepare` has prepared.

    plugins: [packsft.axolotl]

Axolotl (0.19) chooses the documents of a pack, builds its own trainer and counts the tokens of a step. The plugin gives
it the collator, and the model's attention, head and loss.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from axolotl.integrations.base import BasePlugin

from packsft.data.batch import for_model
from packsft.data.collator import PackingCollator
from packsft.data.document import documents_of
from packsft.loops.model import Packing, prepare

logger = logging.getLogger("packsft")


class PackingPlugin(BasePlugin):
    """Hooks of axolotl, in the order in which it calls them."""

    _packing: Packing | None = None

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """The model is there, with its adapter, and not wrapped yet."""
        self._packing = prepare(model, max_length=cfg.sequence_len).packing
        logger.warning("packsft: %s", str(self._packing).replace("\n", "; "))

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> tuple[type, dict[str, Any]] | None:
        """For training and evaluation, with `sample_packing` or without."""
        if self._packing is None:  # a reward model, for instance
            return None
        return AxolotlCollator, {"padded": self._packing.padded, "max_length": cfg.sequence_len}


class AxolotlCollator:
    """Turns axolotl's examples, or its lists of the examples of packs, into one batch.

    Args:
        tokenizer: gives the token of the padding.
        padded, max_length, pad_to_multiple_of: as in `PackingCollator`.
        others: what axolotl passes to collators that pad.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        padded: bool,
        max_length: int,
        pad_to_multiple_of: int | None = None,
        **others: Any,
    ) -> None:
        self._collator = PackingCollator(
            pad_token_id=tokenizer.pad_token_id, padded=padded, max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
        )  # fmt: skip

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        examples = [one for some in features for one in (some if isinstance(some, list) else [some])]
        documents = [
            document
            for number, one in enumerate(examples)
            for document in documents_of(one, f"row {number} of the batch")
        ]
        batch = self._collator.torch_call([documents])
        return for_model(batch, "labels")
