"""Cross-entropy on logits that exist, loss and gradient, against a copy of them: 4 bytes read and written a logit.

The logits are bfloat16 on a GPU and what models are trained in elsewhere; every run gets fresh random ones, since ours
overwrites them. A competitor's gradient is compared with float64 before it is timed. Knows logits; knows no head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import Settings, device, figure, interleave, training_dtype
from packsft_kernels import LossOptions, cross_entropy
from torch import Tensor

COPY = "copy of the logits"
INPLACE = "packsft, inplace=True"
PLAIN = "F.cross_entropy"
Loss = Callable[[Tensor, Tensor], Tensor]


def bench_cross_entropy(settings: Settings) -> list[dict[str, Any]]:
    """8,192 rows of Llama 3's vocabulary on a GPU, 512 of SmolLM2's on a CPU; on a GPU also one of 50,257 columns."""
    on_gpu = device().type == "cuda"
    shapes = [(8192, 128_256), (8192, 50_257)] if on_gpu else [(512, 49_152)]
    return [row for num_rows, vocab in shapes for row in _one_shape(num_rows, vocab, settings.quick)]


def _one_shape(num_rows: int, vocab: int, quick: bool) -> list[dict[str, Any]]:
    on_gpu = device().type == "cuda"
    repeats, warmup = (2, 1) if quick else (10, 2)
    targets = torch.randint(vocab, (num_rows,), device=device())
    candidates: dict[str, Loss] = {
        INPLACE: lambda logits, y: cross_entropy(logits, targets=y, inplace=True, options=LossOptions()).loss,
        "packsft, inplace=True, entropy and accuracy": lambda logits, y: (
            cross_entropy(logits, targets=y, inplace=True, options=LossOptions(entropy=True, correct=True)).loss
        ),
        "packsft": lambda logits, y: cross_entropy(logits, targets=y).loss,
        PLAIN: F.cross_entropy,
    }
    if on_gpu:
        candidates["F.cross_entropy, torch.compile"] = torch.compile(F.cross_entropy)
    liger = _liger()
    if not isinstance(liger, str):
        candidates["Liger"] = liger
    wrong = _wrong(candidates, vocab)
    runs = {name: _step(loss, num_rows, vocab, targets) for name, loss in candidates.items()}
    source, destination = _logits(num_rows, vocab), _logits(num_rows, vocab)
    times = interleave({COPY: lambda: destination.copy_(source), **runs}, repeats, warmup=warmup)
    copied = times[COPY].median
    size = 2 * source.numel() * source.element_size()
    shape = f"[{num_rows:,}, {vocab:,}]"
    table = [figure(f"{COPY} {shape}", copied, "s", spread=times[COPY].spread, note=f"{size / copied / 1e9:.0f} GB/s")]
    for name in candidates:
        target = {"at_least": 0.85} if name == INPLACE and on_gpu else {}
        table.append(
            figure(
                f"{name} {shape}",
                times[name].median,
                "s",
                ratio=copied / times[name].median,
                ratio_of="of the copy's bandwidth",
                spread=times[name].spread,
                note=wrong.get(name, ""),
                **target,
            )
        )
    if isinstance(liger, str):
        table.append(figure("Liger", note=f"cannot run: {liger}"))
    return table


def _logits(num_rows: int, vocab: int) -> Tensor:
    return 3 * torch.randn(num_rows, vocab, device=device()).to(training_dtype())


def _step(loss: Loss, num_rows: int, vocab: int, targets: Tensor) -> Callable[[], None]:
    """Forward and backward. The noise is laid over a buffer outside of the clock for the next run, not for this one."""
    fresh = _logits(num_rows, vocab)
    buffer = torch.empty_like(fresh)

    def run() -> None:
        leaf = buffer.requires_grad_()
        loss(leaf.view_as(leaf), targets).backward()

    def prepare() -> None:
        nonlocal buffer
        buffer = fresh.clone()

    run.prepare = prepare  # type: ignore[attr-defined]
    return run


def _wrong(candidates: dict[str, Loss], vocab: int) -> dict[str, str]:
    """Which candidates' gradient has more than twice plain PyTorch's error, in words."""
    logits, targets = _logits(64, vocab), torch.randint(vocab, (64,), device=device())

    def gradient(loss: Loss, logits: Tensor) -> Tensor:
        leaf = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf.view_as(leaf), targets), leaf)
        return grad.double()

    truth = gradient(F.cross_entropy, logits.double())
    errors = {
        name: float((gradient(loss, logits) - truth).abs().max() / truth.abs().max())
        for name, loss in candidates.items()
    }
    allowed = 2 * errors[PLAIN] + torch.finfo(logits.dtype).eps / 4
    return {name: f"WRONG: gradient off by {error:.1e}" for name, error in errors.items() if error > allowed}


def _liger() -> Loss | str:
    """Liger's cross-entropy, or why it cannot run."""
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError as error:
        return str(error)
    return liger_cross_entropy if device().type == "cuda" else "its kernel needs a GPU"
