"""Gradient checkpointing that keeps the host less busy than PyTorch's.

A layer keeps its inputs in the forward, and is computed again in the backward. As `torch.utils.checkpoint` with
`use_reentrant=False`, by hooks on saved tensors: the forward saves a slot in place of each tensor, and the first slot
that the backward asks for runs the layer again, which fills them. PyTorch keeps entries in three dictionaries for each
tensor; one slot is enough. Its hooks and dictionaries take over a third of the host's time in a step with checkpointing
(`--suite step`), and the host holds back a model of 1B on a fast GPU.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint as torch_checkpoint

KINDS = {"cpu", "cuda"}
Form = tuple[torch.Size, torch.dtype, torch.device]
DEFAULTS = {"use_reentrant": False, "preserve_rng_state": True}  # the first is transformers', the other PyTorch's


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, of which only the arguments are kept for the backward.

    The backward computes it again, under the same autocast and random state, up to the last tensor it needs. Gradients
    flow to every tensor that the function uses, its arguments and others. Inside of another checkpoint, or of hooks
    that offload saved tensors, `args` are saved tensors as any. PyTorch's checkpoint is called where it knows more:
    while `torch.compile` traces, under `with torch.device(...)`, without tensors on a CPU or NVIDIA GPU in `args`.

    Raises:
        RuntimeError: in the backward, if the function computes other tensors than in the forward, or if one of `args`
            was changed in place since.
    """
    devices = {value.device.type for value in args if isinstance(value, Tensor)}
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() or not devices or devices - KINDS:
        return torch_checkpoint(function, *args, use_reentrant=False, **kwargs)
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    layer = _Recomputed(functools.partial(function, **kwargs), args)
    with saved_tensors_hooks(layer.pack, layer.unpack):
        return function(*args, **kwargs)


def install_checkpoint(model: nn.Module) -> None:
    """Put `checkpoint` where transformers has put PyTorch's with its defaults; with other arguments, it stays."""
    for module in model.modules():
        installed = getattr(module, "_gradient_checkpointing_func", None)
        if (
            isinstance(installed, functools.partial)
            and installed.func is torch_checkpoint
            and {"preserve_rng_state": True} | installed.keywords == DEFAULTS
        ):
            module._gradient_checkpointing_func = checkpoint  # type: ignore[assignment]


class _SavedInputs(torch.autograd.Function):
    """Saves tensors as any operation does: hooks see them, and a change in place is an error."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.detach()


class _Slot:
    """In place of a saved tensor: `tensor` was computed again, for the backward number `backward`."""

    __slots__ = ("__weakref__", "backward", "tensor")
    tensor: Tensor | None
    backward: int

    def __init__(self) -> None:
        self.tensor, self.backward = None, -1


class _AllSaved(Exception):
    """Ends a recomputation: nothing after the last saved tensor is needed. Hooks with `always_call` see it."""


class _Recomputed:
    """The tensors that `function(*args)` saves for the backward: not kept, but computed again when it needs the first.

    A tensor is let go once it was handed out, or its graph is gone. A second backward computes all of them again.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        tensors = [value for value in args if isinstance(value, Tensor)]
        self._function = function
        self._args = [None if isinstance(value, Tensor) else value for value in args]
        self._places = [place for place, value in enumerate(args) if isinstance(value, Tensor)]
        self._inputs: Any = _SavedInputs.apply(torch.empty(0, requires_grad=True), *tensors).grad_fn
        self._autocasts = [
            functools.partial(
                torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind),
                torch.is_autocast_cache_enabled(),
            )
            for kind in {"cpu", *(tensor.device.type for tensor in tensors)}
        ]  # fmt: skip
        self._cuda = list({tensor.device for tensor in tensors if tensor.device.type == "cuda"})
        self._random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._cuda)]
        self._saved: list[tuple[weakref.ref[_Slot], Form]] = []

    def pack(self, tensor: Tensor) -> _Slot:
        slot = _Slot()
        self._saved.append((weakref.ref(slot), (tensor.shape, tensor.dtype, tensor.device)))
        return slot

    def unpack(self, slot: _Slot) -> Tensor:
        backward = torch._C._current_graph_task_id()
        if slot.tensor is None or slot.backward != backward:
            self._compute_again(backward)
        tensor, slot.tensor = slot.tensor, None
        assert tensor is not None
        return tensor

    def _compute_again(self, backward: int) -> None:
        # The graph of this run has `keep`, and a layer may keep a part of that graph: no tensor, and not `self`, in it
        saved, count, differences = self._saved, itertools.count(1), list[str]()

        def keep(tensor: Tensor) -> Tensor:
            if (number := next(count)) > len(saved):  # the function went on behind `_AllSaved`
                raise _AllSaved
            reference, expected = saved[number - 1]
            if (form := (tensor.shape, tensor.dtype, tensor.device)) != expected:
                differences.append(f"{_describe(*form)} where the forward saved {_describe(*expected)}")
                raise _AllSaved
            tensor = tensor.detach()
            if (slot := reference()) is not None:
                slot.tensor, slot.backward = tensor, backward
            if number == len(saved):
                raise _AllSaved
            return tensor

        args = self._args.copy()
        for place, tensor in zip(self._places, self._inputs.saved_tensors, strict=True):
            args[place] = tensor
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self._cuda))
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._cuda, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            for autocast in self._autocasts:
                stack.enter_context(autocast())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(keep, lambda tensor: tensor))
            stack.enter_context(contextlib.suppress(_AllSaved))
            self._function(*args)
        if (num_saved := next(count) - 1) < len(saved):
            differences.append(f"{num_saved} saved tensors, {len(saved)} in the forward")
        if differences:
            raise RuntimeError(
                f"gradient checkpointing: a layer does not compute the same a second time: {differences[0]}. Set "
                "gradient_checkpointing=False if it keeps a state from call to call"
            )


def _describe(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{dtype} {[*shape]} on {device}"
