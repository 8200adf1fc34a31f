"""State of a model that its weights do not hold, and that the next steps depend on.

- AdaLoRA's rank allocator averages the importance of each rank over the steps. PEFT saves it not at all, and of the
  weights only the ranks in use, which no longer fit the adapter that is trained (PEFT 0.21).
- Of a prompt or prefix PEFT saves what its encoder gives, not the encoder that is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

FILE = "packsft_state.pt"


def model_state(model: nn.Module) -> dict[str, Any]:
    """Plain dictionaries of numbers and tensors on the CPU; empty for most models."""
    state: dict[str, Any] = {}
    allocator: Any = getattr(getattr(model, "base_model", None), "rankallocator", None)
    if allocator is not None:
        state["adalora"] = {kind: _on_cpu(getattr(allocator, kind)) for kind in _ADALORA} | {
            "weights": _trained(model),
            "rank_pattern": allocator.peft_config.rank_pattern,
        }
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        state["prompt"] = _trained(model)
    return state


_ADALORA = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return _on_cpu({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Restores what `model_state` gave."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in {**state.get("adalora", {}).get("weights", {}), **state.get("prompt", {})}.items():
            parameters[name].copy_(weight)
    if "adalora" in state:
        base_model: Any = model.base_model
        saved = state["adalora"]
        devices = {name: parameter.device for name, parameter in base_model.model.named_parameters()}
        for kind in _ADALORA:
            values = {name: value.to(devices[name]) for name, value in saved[kind].items()}
            setattr(base_model.rankallocator, kind, values)
        base_model.rankallocator.peft_config.rank_pattern = saved["rank_pattern"]
