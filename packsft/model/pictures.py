"""Checks on the user's own model and rows, before the first step, that a document's pictures stay its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from packsft.data.batch import model_inputs
from packsft.data.collator import PackingCollator
from packsft.data.document import Document
from packsft.model.attention import BOUNDARIES, packed_forward
from packsft.model.isolation import CUT_ROUNDING, IsolationVerdict
from packsft.model.parts import backbone_of, probing
from packsft.model.prepared import PreparedModel

OF_PACKED_ROWS = (*BOUNDARIES, "position_ids")


def prepare_for_pictures(
    prepared: PreparedModel,
    documents: list[Document],
    collator: PackingCollator,
    to_device: Callable[[dict[str, Any]], dict[str, Any]],
    each_module_waits: bool,
) -> None:
    """Decides whether rows with pictures are packed or padded, as some of them run through the model.

    Args:
        prepared, collator: are changed if rows are padded.
        documents: with pictures, and one without.
        to_device: moves a batch.
        each_module_waits: whether ranks wait for each other in every module with weights (ZeRO-3).

    Raises:
        ValueError: rows with pictures cannot be trained on, even padded.
    """
    model = prepared.base_model
    with prepared.autocast():
        if not prepared.padded:
            try:
                verdict = check_pictures(model, documents, collator, to_device)
            except ValueError as error:
                verdict = IsolationVerdict(False, str(error))
            if not verdict.isolated:
                prepared.pad(verdict)
        if prepared.padded:
            assert collator.pictures is not None
            collator.padded = collator.masked = bool(collator.pictures.places_in_rows)
            check_padded_pictures(model, documents, collator, to_device)
        if each_module_waits and (name := run_by_picture(model, documents, collator, to_device)):
            raise ValueError(
                f"{type(model).__name__} runs {name} more often for more pictures, and under ZeRO-3 ranks with other "
                "pictures would wait for each other in it without end: choose ZeRO-2, or FSDP2"
            )


def check_pictures(
    model: PreTrainedModel,
    documents: list[Document],
    collator: PackingCollator,
    to_device: Callable[[dict[str, Any]], dict[str, Any]],
) -> IsolationVerdict:
    """Whether documents with pictures, packed, give what each gives alone, as the model itself runs it.

    And whether the last document's hidden states have a gradient of exactly 0.0 at the pictures of the others.
    """
    documents = [_with_leaves(document) for document in documents]
    with probing(model), torch.enable_grad():
        with packed_forward():
            hidden = _hidden(model, to_device(collator.torch_call([documents])))
        lengths = [len(document) for document in documents]
        parts = hidden[0, : sum(lengths)].split(lengths)  # behind them there may be padding
        for document, packed in zip(documents, parts, strict=True):
            off = _off(packed, _alone(model, document, collator, to_device))
            if off is not None:
                said = f"row {document.row} gives other hidden states in a pack than alone, by {off:.1e}"
                return IsolationVerdict(False, said)
        *others, own = [[x for x in document.of_pictures.values() if x.requires_grad] for document in documents]
        leaves = [*own, *(x for xs in others for x in xs)]
        gradients = torch.autograd.grad(parts[-1].float().square().sum(), leaves, allow_unused=True)
    if not any(gradient is not None and gradient.any() for gradient in gradients[: len(own)]):
        return IsolationVerdict(False, "inconclusive: a document's gradient does not reach its own pictures")
    leak = max((float(g.abs().max()) for g in gradients[len(own) :] if g is not None), default=0.0)
    if leak:
        return IsolationVerdict(False, "a document sees the pictures of another", leak)
    return IsolationVerdict(True)


def check_padded_pictures(
    model: PreTrainedModel,
    documents: list[Document],
    collator: PackingCollator,
    to_device: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Raises ValueError if documents on padded rows give something else than each alone, as the model runs it."""
    with probing(model), torch.no_grad():
        hidden = _hidden(model, to_device(collator.torch_call([documents])))
        for document, padded in zip(documents, hidden, strict=True):
            off = _off(padded[: len(document)], _alone(model, document, collator, to_device))
            if off is not None:
                raise ValueError(
                    f"row {document.row} gives other hidden states beside other rows than alone, by {off:.1e}, packed "
                    f"and padded: {type(model).__name__} lets pictures of other rows change it, in TRL's batches, too"
                )


def run_by_picture(
    model: PreTrainedModel,
    documents: list[Document],
    collator: PackingCollator,
    to_device: Callable[[dict[str, Any]], dict[str, Any]],
) -> str | None:
    """The name of a module with weights that does not run equally often for any pictures, if there is one.

    Tried on documents alone, and together.
    """
    some = [document for document in documents if document.of_pictures]
    names = {module: name for name, module in model.named_modules() if any(True for _ in module.parameters(False))}
    first, *others = (
        _count_runs(model, names, to_device(collator.torch_call([part])))
        for part in (some, *([document] for document in some))
    )
    return next((name for module, name in names.items() if any(runs[module] != first[module] for runs in others)), None)


def _count_runs(model: PreTrainedModel, modules: Iterable[nn.Module], batch: dict[str, Any]) -> Counter[nn.Module]:
    runs: Counter[nn.Module] = Counter()
    with ExitStack() as hooks, probing(model), torch.no_grad(), packed_forward():
        for module in modules:
            hooks.enter_context(module.register_forward_hook(lambda module, *_: runs.update([module])))
        _hidden(model, batch)
    return runs


def _alone(
    model: PreTrainedModel, document: Document, collator: PackingCollator, to_device: Callable[..., dict[str, Any]]
) -> Tensor:
    """The hidden states of a document, `[L, D]`, without gradient."""
    with torch.no_grad():
        batch = to_device(collator.torch_call([[document]]))
        unpacked = {key: value for key, value in batch.items() if key not in OF_PACKED_ROWS}
        return _hidden(model, unpacked | {"attention_mask": torch.ones_like(batch["input_ids"])})[0, : len(document)]


def _off(found: Tensor, alone: Tensor) -> float | None:
    """The mean relative distance of hidden states, if it is more than rounding explains."""
    allowed = CUT_ROUNDING.get(alone.dtype, max(CUT_ROUNDING.values()))
    found = found.detach()
    off = ((found - alone).norm(dim=-1) / found.norm(dim=-1).clamp(min=1e-30)).mean()
    return None if off <= allowed else float(off)


def _with_leaves(document: Document) -> Document:
    pictures = {
        key: value.detach().clone().requires_grad_() if value.is_floating_point() else value
        for key, value in document.of_pictures.items()
    }
    return replace(document, of_pictures=pictures)


def _hidden(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    return backbone_of(model)(**model_inputs(batch), use_cache=False).last_hidden_state
