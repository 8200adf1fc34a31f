"""Splits a language-model head with a PEFT adapter into a plain linear layer and low-rank products.

A LoRA adds `scaling * dropout(hidden) @ A.T @ B.T` to the logits. Training only some rows of the weight
(`trainable_token_indices`) is such a product too. Neither needs a [V, M] matrix. Knows PEFT's layers (0.16 to 0.21),
which keep their own forward for everything else. Does not know losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from packsft.compat import knows_peft

_KNOWS_PEFT = knows_peft()


class Addition(NamedTuple):
    """`down @ up.T`, added to the logits of a linear head."""

    parameters: tuple[Tensor | None, ...]
    product: Callable[..., tuple[Tensor, Tensor]]
    """(hidden states [T, M], the head's weight, the gathered parameters) -> (down, up)."""
    idle: Tensor
    """The parameter that makes the addition 0 before the first step."""
    tokens: tuple[int, ...] = ()
    """The tokens whose logits change; empty for all."""


def split_head(head: Any) -> tuple[nn.Linear, list[Addition]] | str:
    """The head's linear layer and the additions of its active adapters, or the reason why it has another form.

    Call this in each forward: adapters can be switched, merged and disabled, and wrappers replace layers.
    """
    additions: list[Addition] = []
    if _KNOWS_PEFT:  # an older PEFT: its wrappers are no nn.Linear, so the head is not fused
        from peft.tuners.lora import Linear as LoraLinear
        from peft.tuners.trainable_tokens import TrainableTokensLayer
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        if isinstance(head, ModulesToSaveWrapper):
            active = [name for name in head.active_adapters if name in head.modules_to_save]
            head = head.modules_to_save[active[0]] if active and not head.disable_adapters else head.original_module
        elif isinstance(head, TrainableTokensWrapper):
            head = head.token_adapter
        if class_of(head) in (LoraLinear, TrainableTokensLayer):
            if head.disable_adapters and head.merged:
                head.unmerge()  # as the layer's own forward does
            add = _lora if class_of(head) is LoraLinear else _trained_tokens
            for name in [] if head.disable_adapters or head.merged else head.active_adapters:
                addition = add(head, name)
                if isinstance(addition, str):
                    return addition
                additions += [] if addition is None else [addition]
            head = head.base_layer
        elif isinstance(head, BaseTunerLayer):
            return f"the adapter on the language-model head is a {_name(head)}, not a plain LoRA"
    if class_of(head) is not nn.Linear:
        return f"the head is a {_name(head)}, not a plain Linear"
    if head.weight.is_meta:
        return "the head's weight is offloaded"
    if not head.weight.is_floating_point():
        return f"the head's weight is quantised ({head.weight.dtype})"
    return head, additions


def class_of(module: nn.Module) -> type:
    """The class before FSDP2 sharded the module: it makes one of its own, such as `FSDPLinear`."""
    return next(base for base in type(module).__mro__ if not issubclass(base, FSDPModule))


def _name(module: nn.Module) -> str:
    """The class name with its module: PEFT calls most of its layers `Linear`."""
    kind = class_of(module)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("torch.nn.modules.linear.")


def _lora(layer: Any, name: str) -> Addition | str | None:
    if name not in layer.lora_A:
        return None
    if name in layer.lora_variant:
        return (
            f"the adapter on the language-model head is no plain LoRA ({layer.lora_variant[name].__class__.__name__})"
        )
    A, B, dropout, scaling = (kept[name] for kept in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.scaling))
    if not class_of(A) is class_of(B) is nn.Linear:
        return f"the LoRA on the language-model head is made of a {_name(A)} and a {_name(B)}"

    def product(hidden: Tensor, _: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if not torch.is_autocast_enabled(hidden.device.type):  # autocast would undo this cast
            hidden = hidden.to(down.dtype)
        down_TR = F.linear(dropout(hidden), down) * scaling
        if bias is None:
            return down_TR, up
        return F.pad(down_TR, (0, 1), value=scaling), torch.cat([up, bias[:, None]], 1)

    return Addition((A.weight, B.weight, B.bias), product, B.weight)


def _trained_tokens(layer: Any, name: str) -> Addition | None:
    """New rows of the weight replace old ones: their difference times one-hot rows."""
    if name not in layer.trainable_tokens_delta:
        return None
    tokens = layer.token_indices[name]

    def product(hidden: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.tensor(tokens).to(weight.device, non_blocking=True)  # waits for nothing
        up_VR = weight.new_zeros(weight.shape[0], len(tokens)).scatter_(0, index[None], 1.0)
        return F.linear(hidden, delta.to(weight.dtype) - weight[index]), up_VR

    delta = layer.trainable_tokens_delta[name]
    return Addition((delta,), product, delta, tuple(tokens))


def low_rank_of(
    additions: Sequence[Addition], gathered: Sequence[Tensor | None], hidden_TM: Tensor, weight_VM: Tensor
) -> tuple[Tensor, Tensor] | None:
    """All additions as one product; `gathered` holds the parameters of all of them, in order."""
    rest, products = list(gathered), []
    for addition in additions:
        own, rest = rest[: len(addition.parameters)], rest[len(addition.parameters) :]
        products.append(addition.product(hidden_TM, weight_VM, *own))
    if len(products) <= 1:
        return products[0] if products else None
    downs, ups = zip(*products, strict=True)
    return torch.cat(downs, 1), torch.cat(ups, 1)


@contextmanager
def exercised(additions: Sequence[Addition]) -> Iterator[None]:
    """Within the context no addition is 0: a new adapter's is, and a probe would not see it. Call under `no_grad`."""
    kept = [(addition.idle, addition.idle.clone()) for addition in additions]
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter, _ in kept:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        yield
    finally:
        for parameter, value in kept:
            parameter.copy_(value)
