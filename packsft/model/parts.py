"""What a model of transformers is made of, whatever its class, and forwards that leave no trace in it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel


def base_model_of(model: nn.Module) -> Any:
    """The model without its PEFT wrapper."""
    return model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    if model.base_model is not model:
        return model.base_model
    # Llama 4 and Mllama: their prefix names the larger model that holds them
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) for each layer of the stack with the most parameters."""
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not stacks:
        return []
    stack_name, stack = max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [(f"{stack_name}.{index}", layer) for index, layer in enumerate(stack)]


def count_embeddings(model: PreTrainedModel) -> int:
    """Rows of the input embeddings, with or without an adapter on them."""
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "base_layer", embedding).weight
    return getattr(weight, "ds_shape", weight.shape)[0]  # under ZeRO-3 a rank holds a part of it, or nothing


def check_has_head(model: PreTrainedModel) -> None:
    """Raises ValueError for a model without a language-model head."""
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head (get_output_embeddings() is None): packsft trains "
            "causal language models; load one with AutoModelForCausalLM"
        )


def device_of(model: nn.Module) -> torch.device:
    """The device of the first weights that are on one: accelerate offloads some to "meta", and moves the inputs."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """For forwards that leave no trace: `model.eval()` within the context; each module's own flag, and the random
    generators, are restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.random.fork_rng([device] if (device := device_of(model)).type == "cuda" else []):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def watch_layers(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """(name, hidden states) of each decoder layer, in running order."""
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str, module: nn.Module, args: tuple, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor):
            outputs.append((name, hidden))

    with ExitStack() as hooks:
        for name, layer in decoder_layers(model):
            hooks.enter_context(layer.register_forward_hook(functools.partial(keep, name)))
        yield outputs
