"""Options of a loss (`LossOptions`) and its result (`LossOutput`).

Shared by the public functions, their implementations, and their definitions in `reference`. Knows no kernel, no model.
A new option is a field here, a term in `reference.py`, and its value and derivative in `cross_entropy_rows.py`
(PyTorch) and `cross_entropy_kernel.py` (Triton).
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class LossOptions:
    """The loss of one row, with `z = softcap * tanh(logit_scale * logits / softcap)` and `log_p = log_softmax(z)`:

        nll = -(1 - label_smoothing) * log_p[target] - label_smoothing * log_p.mean()
        loss = weight * ((exp(log_p[target]).detach() if dft else 1) * nll + z_loss * logsumexp(z) ** 2)

    Args:
        ignore_index: the target that marks a row as ignored. It may lie inside the vocabulary.
        softcap: bound on the logits as in Gemma, applied after `logit_scale`. None: no bound.
        logit_scale: factor of the logits (as in Cohere, or 1 / temperature).
        label_smoothing: share of the target's probability that is spread evenly over the vocabulary, in [0, 1].
        z_loss: weight of the squared log-partition (PaLM, arXiv:2204.02311), 0 or more.
        dft: weight each row by the probability of its target, without a gradient through the weight
            (Dynamic Fine-Tuning, arXiv:2508.05629).
        entropy: also return the entropy of each row.
        correct: also return whether the target of each row is the first argmax.

    Raises:
        ValueError: for a value outside its range; the message names the field.
    """

    ignore_index: int = -100
    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dft: bool = False
    entropy: bool = False
    correct: bool = False

    def fields(self) -> tuple[Any, ...]:
        """The fields in order, the arguments of an operator. torch 2.10 cannot trace `dataclasses.astuple`."""
        return tuple([getattr(self, name) for name in FIELD_NAMES])

    def loss_alone(self) -> "LossOptions":
        """The same loss, without entropy and `correct`."""
        return replace(self, entropy=False, correct=False)

    def __post_init__(self) -> None:
        if not isinstance(self.ignore_index, int):
            raise ValueError(f"LossOptions.ignore_index must be an int, got {self.ignore_index!r}")
        if self.softcap is not None and not 0.0 < self.softcap < math.inf:
            raise ValueError(f"LossOptions.softcap must be None or a positive finite number, got {self.softcap!r}")
        if not 0.0 < self.logit_scale < math.inf:
            raise ValueError(f"LossOptions.logit_scale must be a positive finite number, got {self.logit_scale!r}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"LossOptions.label_smoothing must lie in [0, 1], got {self.label_smoothing!r}")
        if not 0.0 <= self.z_loss < math.inf:
            raise ValueError(f"LossOptions.z_loss must be 0 or more and finite, got {self.z_loss!r}")


FIELD_NAMES = tuple(field.name for field in fields(LossOptions))
_SCHEMA_TYPES: dict[Any, str] = {int: "int", float: "float", float | None: "float?", bool: "bool"}
OPTIONS_SCHEMA = ", ".join(f"{_SCHEMA_TYPES[field.type]} {field.name}" for field in fields(LossOptions))
"""`LossOptions` as separate arguments of an operator: pass `*options.fields()`."""


class LossOutput(NamedTuple):
    """The loss and the outputs computed with it. Only `loss` is differentiable.

    All but `loss` are per row and unweighted, in float32 (float64 for float64 inputs; `correct` is bool). They are 0
    for an ignored row.
    """

    loss: torch.Tensor
    """Scalar, or [N] for `reduction="none"`."""
    log_prob: torch.Tensor
    """[N] log-probability of the target, without smoothing, z-loss or weights."""
    entropy: torch.Tensor | None
    """[N] entropy of the prediction in nats, if requested."""
    correct: torch.Tensor | None
    """[N] whether the target is the first argmax, if requested."""
    lse: torch.Tensor
    """[N] logsumexp of the transformed logits."""
