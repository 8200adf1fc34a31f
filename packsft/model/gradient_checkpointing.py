"""Gradient checkpointing that keeps the host less busy than PyTorch's.

A layer keeps its inputs in the forward, and is computed again in the backward. As `torch.utils.checkpoint` with
`use_reentrant=False`, by hooks on saved tensors: the forward saves only their number, shapes and dtypes, and the first
tensor that the backward asks for runs the layer again. PyTorch keeps a weak reference, a handle and two entries of
dictionaries for each tensor: with its hooks, over a third of what the host does in a step with checkpointing (`--suite
step`). The host holds back a model of 1B on a fast GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint as torch_checkpoint

DEFAULTS = {"use_reentrant": False, "preserve_rng_state": True}  # the first is transformers', the other PyTorch's


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, of which only the arguments are kept for the backward.

    The backward computes it again, under the same autocast and random state, up to the last tensor it needs. Gradients
    flow to every tensor that the function uses, its arguments and others. Inside of another checkpoint, or of hooks
    that offload saved tensors, `args` are saved tensors as any.

    Raises:
        RuntimeError: in the backward, if the function computes other tensors than in the forward, or if one of `args`
            was changed in place since.
    """
    if torch.compiler.is_compiling():  # which knows PyTorch's
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
        return anchor.clone()


class _AllSaved(Exception):
    """Ends a recomputation: nothing after the last saved tensor is needed."""


class _Recomputed:
    """The tensors that `function(*args)` saves for the backward: not kept, but computed again when it needs the first.

    A tensor is let go once it was handed out. Asked for again (`retain_graph=True`), all are computed again.
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
            for kind in {"cpu", *(tensor.device.type for tensor in tensors)} - {"meta"}
        ]  # fmt: skip
        self._cuda = list({tensor.device for tensor in tensors if tensor.device.type == "cuda"})
        self._random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._cuda)]
        self._saved: list[tuple[torch.Size, torch.dtype]] = []
        self._again: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> int:
        self._saved.append((tensor.shape, tensor.dtype))
        return len(self._saved) - 1

    def unpack(self, number: int) -> Tensor:
        if number not in self._again:
            self._again = dict(enumerate(self._compute_again()))
        return self._again.pop(number)

    def _compute_again(self) -> list[Tensor]:
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            saved = self._saved[len(found)]
            if (tensor.shape, tensor.dtype) != saved:
                raise _differs(
                    f"{tensor.dtype} {list(tensor.shape)} where the forward saved {saved[1]} {list(saved[0])}"
                )
            found.append(tensor.detach())
            if len(found) == len(self._saved):
                raise _AllSaved
            return found[-1]

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
        if len(found) < len(self._saved):
            raise _differs(f"{len(found)} saved tensors, {len(self._saved)} in the forward")
        return found


def _differs(how: str) -> RuntimeError:
    return RuntimeError(
        f"gradient checkpointing: a layer does not compute the same a second time: {how}. Set "
        "gradient_checkpointing=False if it keeps a state from call to call"
    )
