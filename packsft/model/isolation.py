"""Checks on the user's own model, before the first step, that packed documents do not see each other.

Three documents of unequal length lie in one row. The summed squared logits of the last document, and then those of one
of its middle positions, are backpropagated to the input embeddings. The gradient must be exactly 0.0 at every other
document and at every later position, and must not be 0.0 at the source's own positions. The check needs no tolerance
and no reference run: a position that cannot be reached has a gradient of exactly zero in any dtype.

The source is the last document, because a causal leak from the first document reads 0.0.

A second forward runs the last document alone. It detects two more faults: the first layer gets other inputs than in
the packed row (positions do not restart), and windows expressed only in the mask, since packed attention has no mask.
Rotary embeddings are compared by themselves, at positions as far as a document may reach.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from packsft.compat import is_out_of_memory
from packsft.data.batch import document_lengths, model_inputs
from packsft.data.collator import PackingCollator
from packsft.model.attention import packed_forward, watch_masks
from packsft.model.parts import count_embeddings, device_of, probing, watch_layers
from packsft.model.positions import most_tokens_of
from packsft.model.rotary import Call, by_document, watch_positions, why_by_row
from packsft.model.sequence_parallel import group_of, shared_by

NOT_CHECKED = "not checked"
DOCUMENT_LENGTHS = (9, 14, 11)  # unequal, and no length equals a boundary offset
UNBOUNDED_LENGTH = 1 << 20  # checked in place of a max_length
# of a token's norm
CUT_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True)
class IsolationVerdict:
    """`isolated`, or the `reason` why documents may see each other on this model.

    `leak`: the largest gradient at a position that the source must not reach.
    """

    isolated: bool
    reason: str | None = None
    leak: float = 0.0


def check_isolation(
    model: PreTrainedModel, autocast: Callable[[], AbstractContextManager], max_length: int | None = None
) -> IsolationVerdict:
    """Run the check on a model as it will be trained. Parameters, gradients, modes and random state do not change.

    Args:
        model: the causal language model, before its forward is wrapped.
        autocast: returns the context in which training runs its forward.
        max_length: the most tokens of a document; None for any length.

    Raises:
        torch.OutOfMemoryError, RuntimeError: out of memory, which says nothing about the model.
    """
    with probing(model), autocast(), watch_positions(model) as calls:
        verdict = _verdict(lambda: _documents_apart(model, max_length or sys.maxsize))
    apart = _verdict(lambda: _rotations_apart(calls, max_length or UNBOUNDED_LENGTH))
    if verdict.isolated or apart.isolated:
        return apart if verdict.isolated else verdict
    return replace(verdict, reason=f"{verdict.reason}; {apart.reason}")


def check_cut_rows(model: PreTrainedModel) -> IsolationVerdict:
    """Whether a row that is cut over the ranks of the model's sequence group gives what it gives whole, without
    autocast: other numbers of rows round otherwise.

    A layer that hands a state or neighbouring tokens on, other than by our attention, loses them where a row is cut.
    """
    with probing(model):
        return _verdict(lambda: _cut_as_whole(model))


@torch.no_grad()
def _cut_as_whole(model: PreTrainedModel) -> IsolationVerdict:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1:
            return IsolationVerdict(False, f"{name} is a convolution over tokens, which a cut would interrupt")
    group, lengths = group_of(model), _document_lengths(model)
    assert group is not None
    ids = _random_ids(model, sum(lengths))

    def outputs(**options: Any) -> list[tuple[str, Tensor]]:
        inputs = _packed_inputs(model, ids, lengths, **options)
        with packed_forward(), by_document(document_lengths(inputs)), watch_layers(model) as layers:
            logits = model(**inputs, use_cache=False).logits
        return [(name, hidden[0]) for name, hidden in [*layers, ("the head", logits)]]

    cut = [(name, group.gather(part)) for name, part in outputs(part=group.part)]
    with shared_by(model, None):
        whole = outputs(pad_to_multiple_of=group.size)
    for (name, ours), (_, theirs) in zip(cut, whole, strict=True):
        allowed = CUT_ROUNDING.get(theirs.dtype, max(CUT_ROUNDING.values()))
        off = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-30))[: sum(lengths)].max()
        if not group.sum(off).item() <= group.size * allowed:
            return IsolationVerdict(False, f"in {name} a token depends on earlier ones other than by attention")
    return IsolationVerdict(True)


def _verdict(check: Callable[[], IsolationVerdict]) -> IsolationVerdict:
    try:
        return check()
    except (
        TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, NotImplementedError, AssertionError,
    ) as error:  # fmt: skip
        if is_out_of_memory(error):
            raise
        # on any other error, the model trains on padded rows, and the notice gives the reason
        return IsolationVerdict(False, f"a packed forward raised {type(error).__name__}: {error}")


def _documents_apart(model: PreTrainedModel, max_length: int) -> IsolationVerdict:
    lengths = _document_lengths(model)
    ids = _random_ids(model, sum(lengths))
    with _first_layer_input(model) as packed:
        verdict = _leak(model, ids, lengths)
    if verdict.isolated:
        with _first_layer_input(model) as alone:
            verdict = _lost_mask(model, ids[:, -lengths[-1] :], max_length)
        if not _same_positions(_whole_row(model, packed), alone, lengths):
            verdict = IsolationVerdict(False, "a packed document gets other positions than it has alone")
    return verdict


def _document_lengths(model: PreTrainedModel) -> list[int]:
    longest = most_tokens_of(model, max(DOCUMENT_LENGTHS)) or 0  # a table of positions may be shorter
    return [length * longest // max(DOCUMENT_LENGTHS) for length in DOCUMENT_LENGTHS]


def _whole_row(model: PreTrainedModel, hidden_1TM: list[Tensor]) -> list[Tensor]:
    group = group_of(model)
    return hidden_1TM if group is None else [group.gather(part[0])[None] for part in hidden_1TM]


def _packed_inputs(model: PreTrainedModel, ids: Tensor, lengths: list[int], **options: Any) -> dict[str, Any]:
    row = {"input_ids": ids[0].tolist(), "seq_lengths": lengths}
    batch = model_inputs(PackingCollator(pad_token_id=0, **options)([row]))
    return {k: v.to(device_of(model)) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _rotations_apart(calls: list[Call], max_length: int) -> IsolationVerdict:
    by_row = why_by_row(calls, max_length)
    return IsolationVerdict(by_row is None, by_row)


def _random_ids(model: PreTrainedModel, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(count_embeddings(model), (1, count), generator=generator)


def _leak(model: PreTrainedModel, ids: Tensor, lengths: list[int]) -> IsolationVerdict:
    """Whether another document reaches the last one, or a later position reaches one of its middle positions."""
    group = group_of(model)
    part = (0, 1) if group is None else group.part
    inputs = _packed_inputs(model, ids, lengths, part=part)
    low = part[0] * inputs["input_ids"].shape[1]  # of this rank's positions
    begin, end = sum(lengths[:-1]), sum(lengths)
    middle = begin + lengths[-1] // 2

    def gradient_of(output_1TM: Tensor, first: int, last: int) -> Tensor:
        """At each input position of the row, of these positions of an output."""
        gradient = _gradient(output_1TM[0, max(0, first - low) : max(0, last - low)], leaf[0])
        return gradient if group is None else group.gather(gradient)

    with _embedding_leaf(model) as leaf, watch_layers(model) as layers, torch.enable_grad():
        with packed_forward():
            logits = model(**inputs, use_cache=False).logits
        if not leaf:
            return IsolationVerdict(False, "inconclusive: the input embeddings were never called")
        for source, last in ((begin, end), (middle, middle + 1)):
            gradient = gradient_of(logits, source, last)
            if not gradient.isfinite().all():
                return IsolationVerdict(False, "inconclusive: gradients are not finite")
            if not gradient[begin:last].any():
                return IsolationVerdict(False, "inconclusive: a document's gradient does not reach its own input")
            if gradient[:begin].any():
                alike = [(name, output) for name, output in layers if output.shape[:2] == leaf[0].shape[:2]]
                where = _first_leak(alike, lambda output: gradient_of(output, begin, end)[:begin])
                return IsolationVerdict(False, f"documents see each other{where}", float(gradient[:begin].max()))
            if gradient[last:].any():
                return IsolationVerdict(False, "a position sees the ones after it", float(gradient[last:].max()))
    return IsolationVerdict(True)


def _same_positions(packed: list[Tensor], alone: list[Tensor], lengths: list[int]) -> bool:
    """Whether the first layer gets the same input for the last document of the row as for that document alone.

    Some models count positions through the row and ignore `position_ids` (BART's decoder); others do not start at 0
    (RoBERTa). Relative positions do not show in the input of the first layer.
    """
    if not packed or not alone or packed[0].shape[1] <= lengths[-1]:
        return True
    last = packed[0].detach()[:, sum(lengths[:-1]) : sum(lengths)]
    if last.shape != alone[0].shape:
        return True
    rounding = 4 * torch.finfo(last.dtype).eps * last.abs().max()  # RoCBert projects its embeddings
    return bool((last - alone[0]).abs().max() <= rounding)


@torch.no_grad()
def _lost_mask(model: PreTrainedModel, ids: Tensor, max_length: int) -> IsolationVerdict:
    """Whether a window is expressed only in a layer's mask, and is shorter than a document may be."""
    with watch_masks() as told_by_mask_alone:
        model(input_ids=ids.to(device_of(model)), use_cache=False)
    layer, window = min(told_by_mask_alone, key=lambda item: item[1], default=("", sys.maxsize))
    if window >= max_length:
        return IsolationVerdict(True)
    limit = f"max_length={max_length}" if max_length < sys.maxsize else "there is no max_length"
    return IsolationVerdict(
        False, f"{layer} knows of its window of {window} tokens from its mask alone, and packing has none ({limit})"
    )


def _gradient(source: Tensor, leaf: Tensor) -> Tensor:
    """`[T]`: the largest absolute gradient of the summed squares at each input position. Parameters get no gradient."""
    (gradient,) = torch.autograd.grad(source.float().square().sum(), leaf, retain_graph=True)
    return gradient[0].abs().amax(-1)


def _first_leak(layers: list[tuple[str, Tensor]], gradient_at_others: Callable[[Tensor], Tensor]) -> str:
    """ " (first in ...)" with the name of the first layer whose last document depends on another one."""
    found = (name for name, output in layers if output.requires_grad and gradient_at_others(output).any())
    return next((f" (first in {name})" for name in found), "")


@contextmanager
def _embedding_leaf(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Replaces the output of the input embeddings by a detached leaf, and adds it to the list."""
    leaf: list[Tensor] = []

    def detach(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_())
        return leaf[-1].clone()  # CTRL scales it in place, which a leaf does not allow

    with model.get_input_embeddings().register_forward_hook(detach):
        yield leaf


@contextmanager
def _first_layer_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """The input hidden states of the layer that runs first, as the only item of the list."""
    given: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not given and isinstance(hidden, Tensor):
            given.append(hidden)

    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    with ExitStack() as hooks:
        for layer in itertools.chain(*stacks):
            hooks.enter_context(layer.register_forward_pre_hook(keep, with_kwargs=True))
        yield given
