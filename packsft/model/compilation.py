"""Compiles the decoder layers of a model, each by itself: one graph for all layers of a kind and packs of any size.

What the layers have in common is compiled once, in seconds; the whole model would take minutes. Checkpointing and the
hooks of DDP and FSDP stay outside of the graph, packed attention is inside. Knows `torch.compile` and layers.
"""

# Not accelerate's regional compilation (1.15). `compile_regions` wraps layers, and checkpoints then say `_orig_mod`;
# `compile_regions_fsdp2` compiles their hooks and checkpointing; both compile embeddings, norm and head too.

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from packsft.compat import recording
from packsft.model import attention
from packsft.model.parts import decoder_layers

LONGEST = ("max_length_q", "max_length_k")


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the decoder layers of a model in place. Call this after PEFT, before the model is wrapped (DDP, FSDP).

    Only training on packed documents runs compiled. Evaluation, generation and padded rows run as before, and so does
    a row of a single token, which would be a graph of its own. Names of parameters do not change.

    Raises:
        ValueError: the model has no layers that can be compiled. In a forward: a layer cannot be compiled.
    """
    layers = [layer for _, layer in decoder_layers(model)]
    if not layers:
        raise ValueError(f"compile_layers=True: {type(model).__name__} has no list of decoder layers")
    if any("forward" in vars(layer) for layer in layers):
        raise ValueError(
            f"compile_layers=True: the forward of {type(layers[0]).__name__} has been replaced (as device_map does): "
            "load the model without, or set compile_layers=False"
        )
    if attention.attention_of(model) == attention.ATTENTION_NAME:
        backend, spec = attention.backend_of(model)
        if backend == "sdpa" and spec.dropout:
            raise ValueError(
                f"compile_layers=True: attention dropout of {spec.dropout} cannot be compiled with the attention "
                "backend sdpa: set it to 0 in the configuration of the model, or set compile_layers=False"
            )
    for layer in layers:
        parameters = ((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        kind: Any = type(layer)
        layer.__class__ = _compiled(kind, tuple(parameters))


def restore_layers(model: nn.Module) -> None:
    """Undo `compile_layers`, as of an earlier trainer of this model."""
    for _, layer in decoder_layers(model):
        layer.__class__ = getattr(type(layer), "uncompiled", type(layer))


@functools.cache
def _compiled(kind: type[nn.Module], parameters: tuple[Any, ...]) -> type[nn.Module]:
    """A subclass of a layer's class whose forward is compiled: one for all layers with the same parameters.

    A class, not a function on each layer: transformers wraps the forward of a class for checkpointing, and FSDP2
    derives a class of its own from it. A later model in the process with such layers finds them compiled.
    """

    def packed(layer: nn.Module, longest: Tensor, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(layer, *args, **dict.fromkeys(LONGEST, longest.shape[0]), **kwargs)

    # Recompilations are limited for each code object: without its own, a process could train only a few models.
    own_code = packed.__code__.replace()
    own = types.FunctionType(own_code, packed.__globals__, closure=packed.__closure__)
    # Inductor fuses two sums in a norm's backward from 4,096 tokens and 5 * 2**20 numbers on (until torch 2.13 also
    # only from twice the width on). Packs on both sides would be compiled apart, for a kernel that saves one read.
    options = {"triton.mix_order_reduction": False}
    compiled = torch.compile(own, fullgraph=True, options={k: v for k, v in options.items() if k in _known_options()})

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden: Any = args[0] if args else kwargs.get("hidden_states")
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is None or not self.training or hidden.shape[1] == 1:
            return kind.forward(self, *args, **kwargs)
        # A graph keeps an integer, but not a size: the longest document is the size of a tensor without elements.
        longest = hidden.new_empty(kwargs["max_length_q"], 0)
        rest = {name: value for name, value in kwargs.items() if name not in LONGEST}
        _mark_sizes({longest.shape[0]}, longest)
        _mark_sizes({hidden.shape[1], cu_seqlens.shape[0]}, args, rest)
        try:
            with recording("router_logits"):
                return compiled(self, longest, *args, **rest)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:500]
            raise ValueError(
                f"compile_layers=True: {kind.__name__} cannot be compiled: set compile_layers=False ({reason})"
            ) from error

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """For `pickle` and `deepcopy`: a layer that is not compiled. No module holds this class by its name."""
        _, _, *state = tuple(kind.__reduce_ex__(self, protocol))
        return object.__new__, (kind,), *state

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    methods = {"forward": forward, "uncompiled": kind, "__reduce_ex__": reduce}
    return type(kind.__name__, (kind,), methods | names)


def _known_options() -> list[str]:
    import torch._inductor  # takes a second, and only a compiled model needs it

    return torch._inductor.list_options()


def mark_all_sizes(batch: dict[str, Any]) -> None:
    """Tell `torch.compile` that sizes vary: its first graph then serves all sizes except 0 and 1."""
    for tensor in batch.values():
        if isinstance(tensor, Tensor):
            for dim in range(tensor.dim()):
                if tensor.shape[dim] > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _mark_sizes(varying: set[int], *inputs: Any) -> None:
    """Tell `torch.compile` that each tensor's first dimension of such a size varies: one graph then serves all packs.

    Only the first: the width of the model may happen to be the number of tokens.
    """
    for tensor in tree_leaves(inputs):
        if isinstance(tensor, Tensor):
            dim = next((dim for dim, size in enumerate(tensor.shape) if size in varying), None)
            if dim is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
