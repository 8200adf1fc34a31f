"""What a loss can be asked for (`LossOptions`), what it gives back (`LossOutput`), what attention is asked for.

Shared by the public functions, what computes them, and their definitions in `reference`. Knows no kernel and no model.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

OPTIONS_SCHEMA = (
    "int ignore_index, float? softcap, float logit_scale, float label_smoothing, float z_loss, bool dft, "
    "bool entropy, bool correct"
)
"""The fields of `LossOptions` as an operator takes them, one by one: `*options.fields()`."""


@dataclass(frozen=True)
class LossOptions:
    """The loss of one row, with `z = softcap * tanh(logit_scale * logits / softcap)` and `log_p = log_softmax(z)`:

        nll = -(1 - label_smoothing) * log_p[target] - label_smoothing * log_p.mean()
        loss = weight * ((exp(log_p[target]).detach() if dft else 1) * nll + z_loss * logsumexp(z) ** 2)

    Args:
        ignore_index: the target of a row that counts for nothing; it may lie inside the vocabulary.
        softcap: Gemma's bound on the logits, applied after `logit_scale`; None for none.
        logit_scale: factor on the logits (Cohere's, or 1 / temperature).
        label_smoothing: share of the target's probability spread evenly over the vocabulary, in [0, 1].
        z_loss: weight of the squared log-partition (PaLM, arXiv:2204.02311), not negative.
        dft: weight each row by its target's probability, without a gradient through the weight
            (Dynamic Fine-Tuning, arXiv:2508.05629).
        entropy: also return each row's entropy.
        correct: also return whether each row's target is the first argmax.

    Raises:
        ValueError: naming the field, for a value outside of its range.
    """

    ignore_index: int = -100
    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dft: bool = False
    entropy: bool = False
    correct: bool = False

    def fields(self) -> tuple[int, float | None, float, float, float, bool, bool, bool]:
        """The fields in their order, as operators take them: torch 2.10 cannot trace `dataclasses.astuple`."""
        return (
            self.ignore_index, self.softcap, self.logit_scale, self.label_smoothing, self.z_loss, self.dft,
            self.entropy, self.correct,
        )  # fmt: skip

    def __post_init__(self) -> None:
        if not isinstance(self.ignore_index, int):
            raise ValueError(f"LossOptions.ignore_index must be an int, got {self.ignore_index!r}")
        if self.softcap is not None and not 0.0 < self.softcap < math.inf:
            raise ValueError(f"LossOptions.softcap must be None or a positive number, got {self.softcap!r}")
        if not 0.0 < self.logit_scale < math.inf:
            raise ValueError(f"LossOptions.logit_scale must be a positive number, got {self.logit_scale!r}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"LossOptions.label_smoothing must lie in [0, 1], got {self.label_smoothing!r}")
        if not 0.0 <= self.z_loss < math.inf:
            raise ValueError(f"LossOptions.z_loss must not be negative, got {self.z_loss!r}")


class LossOutput(NamedTuple):
    """The loss and what else came out of the same pass. Only `loss` is differentiable.

    All but `loss` are per row and unweighted, in float32 (float64 for float64 inputs; `correct` is bool), and 0 for
    a row that is ignored.
    """

    loss: torch.Tensor
    """Scalar, or [N] for `reduction="none"`."""
    log_prob: torch.Tensor
    """[N] log-probability of the target, without smoothing, z-loss or weights."""
    entropy: torch.Tensor | None
    """[N] entropy of the prediction in nats, if asked for."""
    correct: torch.Tensor | None
    """[N] whether the target is the first argmax, if asked for."""
    lse: torch.Tensor
    """[N] logsumexp of the transformed logits."""


HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionSpec:
    """What a call asks of a back end: everything that decides whether it can run, and nothing that is data.

    `head_dim` is that of q and k, or of v where that is larger; `equal_head_dims` whether the two are the same.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    equal_head_dims: bool = True
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
