"""Rotary embeddings whose frequencies depend on a document's length, by document instead of by row.

Of type "longrope" (Phi-3) and "dynamic", transformers takes the frequencies of the longest position in the row, so that
documents in one row turn each other's tokens; "dynamic" also remembers the longest row so far. Here a row goes through
the model's own module once for each group of documents with the same frequencies. While no document is as long as the
limit, nothing changes. Knows modules of `transformers.modeling_rope_utils`; of others it finds out whether they depend
on the row.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

logger = logging.getLogger("packsft")

_ALIKE = 1e-5  # of cosines and sines in float32; other frequencies differ by far more at the end of a document


class _Row:
    """The documents of the forward that runs, or in a backward, which may run layers again, of the last one."""

    lengths: Tensor | None = None
    is_open = False

    def documents(self) -> Tensor | None:
        return self.lengths if self.is_open or torch._C._current_graph_task_id() != -1 else None


_row = _Row()


@contextmanager
def by_document(lengths: Tensor | None) -> Iterator[None]:
    """Within the context, and in its backward, rotary embeddings go by these lengths; None: by the row.

    Args:
        lengths: `[B, S]` int, the length of each token's document; those of a document follow each other from
            position 0, and what comes after them is padding.
    """
    _row.lengths, _row.is_open = lengths, True
    try:
        yield
    finally:
        _row.is_open = False


def install_rotary(model: nn.Module) -> int:
    """Make the rotary embeddings of a model follow `by_document`. A second call changes nothing.

    Returns:
        The shortest document that may need it, in tokens; `sys.maxsize` if none does.
    """
    limits = [sys.maxsize]
    for rope in model.modules():
        own = [limit for kind in _layer_types(rope) if (limit := _limit(rope, kind)) is not None]
        if own:
            rope.packsft_warned = False  # type: ignore[assignment]
        if own and not hasattr(rope, "packsft_rotary"):
            rope.packsft_rotary = rope.register_forward_hook(_turn_by_document, with_kwargs=True)  # type: ignore
        limits += own
    return min(limits)


@torch.no_grad()
def forget(model: nn.Module) -> None:
    """Take the frequencies of rotary embeddings back to those of a model that was just loaded."""
    for rope in model.modules():
        for kind in _layer_types(rope):
            if _limit(rope, kind) is not None:
                buffer = next(rope.buffers())
                _forget(rope, (buffer, buffer), {} if kind is None else {"layer_type": kind}, buffer.device)


def _turns_positions(module: nn.Module) -> bool:
    """Whether it makes something of positions alone, and has nothing to learn."""
    takes = inspect.signature(module.forward).parameters
    return "position_ids" in takes and next(module.parameters(), None) is None


def _layer_types(rope: Any) -> list[str | None]:
    """The layer types with frequencies of their own; [None] if all layers share them, [] if this is no such module."""
    types = getattr(rope, "rope_type", None) if _turns_positions(rope) else None
    return list(types) if isinstance(types, dict) else [None] if isinstance(types, str) else []


def _limit(rope: Any, layer_type: str | None) -> int | None:
    """The longest document with the frequencies of a short one; None if all documents have the same."""
    rope_type = rope.rope_type if layer_type is None else rope.rope_type[layer_type]
    if "dynamic" in rope_type:
        return getattr(rope, "original_max_seq_len", None)
    if rope_type != "longrope":
        return None
    parameters = getattr(getattr(rope, "config", None), "rope_parameters", None) or {}
    return (parameters if layer_type is None else parameters[layer_type]).get("original_max_position_embeddings")


def _turn_by_document(rope: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook of a rotary embedding: its output for each group of documents with the same frequencies.

    The module gets the positions of one group, and 0 elsewhere: it takes the frequencies that the group has alone.
    """
    run = _outside_of_graphs if torch.compiler.is_compiling() else _each_group
    return run(rope, args, kwargs, output)


def _each_group(rope: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    lengths = _row.documents()
    layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
    limit = _limit(rope, layer_type)
    if lengths is None or limit is None:
        return None
    position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    lengths = lengths.to(position_ids.device)
    if position_ids.dim() < 2 or position_ids.shape[-1] != lengths.shape[-1]:
        if not rope.packsft_warned:
            rope.packsft_warned = True
            logger.warning(
                "%s turns each document by the longest one of its batch: it got positions %s for %s tokens, which do "
                "not say whose they are", type(rope).__name__, tuple(position_ids.shape), tuple(lengths.shape),
            )  # fmt: skip
        return output
    groups = [lengths <= limit]
    grows = "dynamic" in (rope.rope_type if layer_type is None else rope.rope_type[layer_type])
    if grows:  # each length has its own frequencies; a longer one may follow a shorter one, but not the reverse
        _forget(rope, args, kwargs, position_ids.device)
        groups += [lengths == length for length in lengths[lengths > limit].unique().tolist()]
    else:
        groups += [lengths > limit]
    for group in groups:
        own = position_ids.where(group & (position_ids < lengths), 0)
        # The end of its longest document, from which the module takes the frequencies, may lie on another rank.
        last = (lengths.where(group, 1).amax() - 1).expand(*own.shape[:-1], 1)
        own_args, own_kwargs = _with_positions(args, kwargs, torch.cat([own, last.to(own.dtype)], dim=-1))
        found = tree_map(lambda x: x[..., :-1, :], rope.forward(*own_args, **own_kwargs))
        output = tree_map(lambda new, old, group=group: torch.where(group[..., None], new, old), found, output)
    if grows:
        _forget(rope, args, kwargs, position_ids.device)
    return output


# `torch.compiler.disable` imports the compiler (1.2 s) at once; this imports it only when it is called.
_outside_of_graphs = torch._disable_dynamo(_each_group)


def _with_positions(
    args: tuple[Any, ...], kwargs: dict[str, Any], position_ids: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "position_ids" in kwargs:
        return args, kwargs | {"position_ids": position_ids}
    return (args[0], position_ids, *args[2:]), kwargs


def _forget(rope: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> None:
    """A row of one token is short: the module takes up the frequencies that it was loaded with."""
    args, kwargs = _with_positions(args, kwargs, torch.zeros(1, 1, dtype=torch.long, device=device))
    rope.forward(*args, **kwargs)


# ---- modules that nothing is known of ----

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@contextmanager
def watch_positions(model: nn.Module) -> Iterator[list[Call]]:
    """The calls of the modules that turn positions into something, and have no weights to learn."""
    calls: list[Call] = []
    seen = set()

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kind = id(module), kwargs.get("layer_type", args[2:])
        if kind not in seen:
            seen.add(kind)
            calls.append((module, args, kwargs))

    with ExitStack() as hooks:
        for module in filter(_turns_positions, model.modules()):
            hooks.enter_context(module.register_forward_pre_hook(keep, with_kwargs=True))
        yield calls


@torch.no_grad()
def why_by_row(calls: list[Call], max_length: int) -> str | None:
    """Why documents of up to `max_length` tokens turn each other's rotary embeddings in a row, or None if they do not.

    Each module of `watch_positions` gets the first and last positions of documents of several lengths, in one row and
    alone. It must give the same.
    """
    lengths = [1 << power for power in range(1, max_length.bit_length()) if 1 << power < max_length] + [max_length]
    for module, args, kwargs in calls:
        if (longest := _longest_apart(module, args, kwargs, lengths)) < max_length:
            return (
                f"{type(module).__name__} turns each document by the longest one of its row, also on padded rows, if "
                f"that has more than {longest} tokens"
            )
    return None


def _longest_apart(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], lengths: list[int]) -> int:
    """The longest of these lengths so that documents of up to so many tokens get in one row what they get alone."""
    given = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    if args:
        args = (args[0].new_zeros((1, 1, 1), dtype=torch.float32), *args[1:])

    def turned(*documents: int) -> list[Tensor]:
        fresh = copy.deepcopy(module)
        forget(fresh)
        ends = given.new_tensor([position for length in documents for position in (0, length - 1)])
        own_args, own_kwargs = _with_positions(args, kwargs, ends.expand(*given.shape[:-1], -1))
        return [y for y in tree_leaves(fresh(*own_args, **own_kwargs)) if isinstance(y, Tensor)]

    each = [turned(length) for length in lengths]

    def are_apart(count: int) -> bool:
        with by_document(torch.tensor([[length for length in lengths[:count] for _ in range(2)]])):
            row = turned(*lengths[:count])
        pairs = ((together, torch.cat(apart, -2)) for together, *apart in zip(row, *each[:count], strict=True))
        return all(bool((together - apart).abs().max() <= _ALIKE) for together, apart in pairs)

    count = len(lengths)
    while count > 1 and not are_apart(count):
        count -= 1
    return lengths[count - 1]
