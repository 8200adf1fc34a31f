"""A model for any training loop: it takes the batches of `pack`, and its loss is already divided."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any, TypeVar

from packsft_kernels import LossOptions
from torch import nn

from packsft.data.batch import HOST_KEYS
from packsft.model import attention
from packsft.model.compilation import restore_layers
from packsft.model.positions import longest_document
from packsft.model.prepared import PreparedModel, base_model_of
from packsft.model.rotary import remove_rotary
from packsft.model.sequence_parallel import remove_group

Model = TypeVar("Model", bound=nn.Module)


class Packing(PreparedModel):
    """What `prepare` did to a model, and why: `print(model.packing)`. Attributes as in `PreparedModel`."""

    before: tuple[Any, str | None]  # forward and attention, for `unprepare`

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.describe().items())


def prepare(
    model: Model,
    *,
    attention_backend: str = "auto",
    check_packing: bool = True,
    on_unpackable: str = "pad",
    max_length: int | None = None,
    label_smoothing: float = 0.0,
    compile_layers: bool = False,
) -> Model:
    """Make a causal language model of transformers take the batches of `pack`: `model(**batch).loss`.

    In place; `unprepare` gives the model back. Call it before or after PEFT, and before DDP, FSDP or `torch.compile`.
    Anything else that the model is called with, as in generation, gives what it gave before. `model.packing` says what
    was done and why; is `model.packing.padded` true, documents see each other on this model, and it takes the batches
    of `data.loader(padded=True)`.

    Args:
        model: the model, or a PEFT model around it.
        attention_backend: "auto" or a name in `packsft_kernels.varlen_attention.BACKENDS`.
        check_packing: whether to check on this model that documents of a row do not see each other.
        on_unpackable: "pad" or "error", where they do.
        max_length: the most tokens of a document, for that check; None for any length.
        label_smoothing: of the loss, 0 to 1.
        compile_layers: whether to compile the decoder layers.

    Raises:
        ValueError: the model has no language-model head, or has what only the trainer handles: a prompt of PEFT, a
            router's loss; or as `PreparedModel`.
    """
    base = base_model_of(model)
    if hasattr(base, "packing"):
        unprepare(model)
    prompt = getattr(model, "active_peft_config", None)
    if getattr(prompt, "is_prompt_learning", False):
        raise ValueError(f"{type(prompt).__name__} puts tokens before a row: only PackedSFTTrainer trains it")
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            "output_router_logits=True: the router's loss is one of a step's tokens, which only PackedSFTTrainer adds: "
            "set model.config.output_router_logits = False"
        )
    limit = longest_document(base, None)
    if max_length is not None and limit is not None and max_length > limit:
        raise ValueError(f"max_length={max_length}: {type(base).__name__} has a table of {limit} positions")
    own_forward, own_attention = vars(base).get("forward"), attention.attention_of(base)
    packing = Packing(
        model,
        LossOptions(label_smoothing=label_smoothing),
        attention_backend=attention_backend,
        check=check_packing,
        on_unpackable=on_unpackable,
        max_length=max_length,
        compiles_layers=compile_layers,
    )
    packing.before = own_forward, own_attention
    _install_forward(base)
    for one in {id(model): model, id(base): base}.values():
        one.packing = packing
    return model


def unprepare(model: Model) -> Model:
    """Undo `prepare`: the model has its own forward and attention again. Weights are those of now."""
    base = base_model_of(model)
    packing: Packing | None = vars(base).pop("packing", None)
    vars(model).pop("packing", None)
    if packing is None:
        raise ValueError(f"this {type(base).__name__} was not prepared")
    own_forward, own_attention = packing.before
    del base.forward
    if own_forward is not None:
        base.forward = own_forward
    if own_attention is not None and own_attention != attention.attention_of(base):
        attention.set_attention(base, own_attention)
    restore_layers(base)
    remove_rotary(base)
    remove_group(base)
    attention.remove_backend(base)
    return model


def _install_forward(base: Any) -> None:
    """Around the forward of `install_head`: the boundaries of documents, and what only the host reads."""
    with_head: Any = base.forward.__func__

    def forward(self: Any, *positional: Any, **batch: Any) -> Any:
        if "loss_rows" not in batch:
            return with_head(self, *positional, **batch)
        packing: Packing = self.packing
        _check_rows(packing, batch)
        of_trainer = batch.pop("num_items_in_batch", None)  # transformers' trainer counts them itself
        num_items = batch.pop("num_items", of_trainer)
        inputs = {key: value for key, value in batch.items() if key not in HOST_KEYS}
        with packing.forward_on(batch):
            num_items = max(len(batch["loss_rows"]), 1) if num_items is None else num_items
            return with_head(self, *positional, **inputs, num_items=num_items)

    functools.update_wrapper(forward, with_head)
    forward.__signature__ = inspect.signature(with_head)  # type: ignore[attr-defined]
    del forward.__wrapped__  # type: ignore[attr-defined]  # as in `install_head`
    base.forward = types.MethodType(forward, base)


def _check_rows(packing: Packing, batch: Mapping[str, Any]) -> None:
    if packing.padded != ("row_lengths" in batch):
        needs, given = ("padded", "packed") if packing.padded else ("packed", "padded")
        raise ValueError(
            f"this model takes {needs} rows, and the batch has {given} ones: data.loader(padded={packing.padded})"
            + (f", because {packing.isolation.reason}" if packing.padded else "")
        )
