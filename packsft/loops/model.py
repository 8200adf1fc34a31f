"""A model for any training loop: it takes the batches of `pack`, and its loss is already divided."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any, TypeVar

from accelerate.utils import is_peft_model
from packsft_kernels import LossOptions
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from packsft.compat import as_before_accelerate
from packsft.config import check_choice, integer
from packsft.data.batch import HOST_KEYS, longest_document
from packsft.model import attention, positions
from packsft.model.compilation import restore_layers
from packsft.model.parts import base_model_of
from packsft.model.prepared import PreparedModel

Model = TypeVar("Model", bound=nn.Module)


class Packing(PreparedModel):
    """What `prepare` did to a model, and why: `print(model.packing)`. Attributes as in `PreparedModel`."""

    before: tuple[Any, str | None]  # forward and attention, for `unprepare`
    around: nn.Module  # the model that was given
    limit: int | None  # the most tokens of a document, where positions are looked up in a table

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
    What else the model is called with, as in generation, gives what it gave before (but no `output_attentions` where it
    had an eager attention). `model.packing` says what was done and why. If `model.packing.padded` is true, documents
    see each other on this model, and it takes the batches of `data.loader(padded=True)`.

    Args:
        model: the model, or a PEFT model around it.
        attention_backend: "auto" or a name in `packsft_kernels.varlen_attention.BACKENDS`.
        check_packing: whether to check on this model that documents of a row do not see each other.
        on_unpackable: "pad" or "error", where they do.
        max_length: the most tokens of a document, for that check; None for any length.
        label_smoothing: of the loss, 0 to 1.
        compile_layers: whether to compile the decoder layers.

    Raises:
        TypeError: it is no model of transformers, or wrapped already.
        ValueError: an argument, or the model has no language-model head, or has what only the trainer handles: a prompt
            of PEFT, a router's loss; or as `PreparedModel`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a causal language model of transformers")
    wrapped = not isinstance(model, PreTrainedModel) and not (is_peft_model(model) and hasattr(model, "get_base_model"))
    if wrapped or isinstance(model, FSDPModule):
        raise TypeError(
            f"a {type(model).__name__} cannot be prepared: prepare the model of transformers, or the PEFT model around "
            "it, before it is wrapped (DDP, FSDP, torch.compile)"
        )
    check_choice("on_unpackable", on_unpackable)
    max_length = None if max_length is None else integer("max_length", max_length, 1)
    options = LossOptions(label_smoothing=label_smoothing)
    base = base_model_of(model)
    if "_original_forward" in vars(base):
        raise ValueError("accelerator.prepare has changed the forward of this model: call packsft.prepare before it")
    prompt = getattr(model, "active_peft_config", None)
    if getattr(prompt, "is_prompt_learning", False):
        raise ValueError(f"{type(prompt).__name__} puts tokens before a row: only PackedSFTTrainer trains it")
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            "output_router_logits=True: the router's loss is one of a step's tokens, which only PackedSFTTrainer adds: "
            "set model.config.output_router_logits = False"
        )
    limit = positions.most_tokens_of(base, None)
    if max_length is not None and limit is not None and max_length > limit:
        raise ValueError(f"max_length={max_length}: {type(base).__name__} has a table of {limit} positions")
    if hasattr(base, "packing"):
        unprepare(model)
    before = vars(base).get("forward"), attention.attention_of(base)
    try:
        packing = Packing(
            model,
            options,
            attention_backend=attention_backend,
            check=check_packing,
            on_unpackable=on_unpackable,
            max_length=max_length,
            compiles_layers=compile_layers,
        )
    except BaseException:
        _restore(base, *before)
        raise
    packing.before, packing.around, packing.limit = before, model, limit
    _install_forward(base)
    for one in {id(model): model, id(base): base}.values():
        one.packing = packing
    return model


def unprepare(model: Model) -> Model:
    """Undo `prepare`: the model has its own forward and attention again. Weights are those of now."""
    base = base_model_of(model)
    packing: Packing | None = vars(base).pop("packing", None)
    if packing is None:
        raise ValueError(f"this {type(base).__name__} was not prepared")
    for one in (model, packing.around):
        vars(one).pop("packing", None)
    _restore(base, *packing.before)
    return model


def _restore(base: Any, own_forward: Any, own_attention: str | None) -> None:
    as_before_accelerate(base)
    vars(base).pop("forward", None)
    if own_forward is not None:
        base.forward = own_forward
    if own_attention is not None and own_attention != attention.attention_of(base):
        attention.set_attention(base, own_attention)
    restore_layers(base)
    for module in base.modules():  # what packsft adds to a module is an attribute, of hooks the handle
        for name in [name for name in vars(module) if name.startswith("packsft_")]:
            if isinstance(value := vars(module).pop(name), RemovableHandle):
                value.remove()


def _install_forward(base: Any) -> None:
    """Around the forward of `install_head`: the boundaries of documents, and what only the host reads."""
    with_head: Any = base.forward.__func__

    def forward(self: Any, *positional: Any, **batch: Any) -> Any:
        if "loss_rows" not in batch:
            return with_head(self, *positional, **batch)
        packing: Packing = self.packing
        _check_rows(packing, batch)
        if batch.get("input_ids") is None and not positional:
            raise ValueError("a prompt of PEFT puts tokens before a row: only PackedSFTTrainer trains it")
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
    if packing.limit is not None and (longest := longest_document(batch)) > packing.limit:
        raise ValueError(
            f"the batch has a document of up to {longest} tokens, and the model has a table of {packing.limit} "
            "positions: pack with a smaller max_length"
        )
