"""Cross-entropy over rows of logits: its outputs, its PyTorch path, and the choice of the path.

On CUDA a Triton kernel computes it (`cross_entropy_kernel.py`). The PyTorch path here serves the CPU, float64, and CUDA
without Triton; it works in place on blocks that stay in cache. Knows rows of logits; knows nothing of autograd or of
where the logits come from.

Legend: N rows of logits, V vocabulary, R rows of one cache-sized block.

The arithmetic of a row. z are the transformed logits, m is their maximum, t is the target:

    e_j = exp(z_j - m),   rest = sum of e_j over j != t,   total = rest + e_t

    -log p_t = log1p(rest)                   if z_t = m,
               (m - z_t) + log(total)        otherwise (e_t may underflow),
    d(-log p_t) / dz_j = e_j / total,        and -rest / total for j = t.

`p_t - 1` and `lse - z_t` are equal to these in theory, but cancel: in float32 both are 0 when the probability of the
target is within 4e-7 of 1. `rest` is summed without the target and keeps six digits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from packsft_kernels import _triton, launch
from packsft_kernels.cross_entropy_kernel import rows_in_triton
from packsft_kernels.loss_options import LossOptions


class RowOutputs(NamedTuple):
    """Outputs per row, [N]. `entropy` and `correct` are empty unless requested."""

    loss: Tensor
    log_prob: Tensor
    entropy: Tensor
    correct: Tensor
    lse: Tensor


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the per-row outputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_outputs(logits: Tensor, options: LossOptions) -> RowOutputs:
    def empty(wanted: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty(logits.shape[0] if wanted else 0, dtype=dtype, device=logits.device)

    dtype = row_dtype(logits.dtype)
    return RowOutputs(
        empty(True, dtype),
        empty(True, dtype),
        empty(options.entropy, dtype),
        empty(options.correct, torch.bool),
        empty(True, dtype),
    )


def rows_in_torch(
    logits_NV: Tensor,
    grad_NV: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor | None,
    scale: Tensor | None,
    options: LossOptions,
    *,
    finite: bool = False,
) -> RowOutputs:
    """Loss and gradient of every row. `grad_NV` may be `logits_NV` itself. Arguments: see `loss_rows`.

    Every operation works in place on one of two float32 blocks that stay in cache. At V = 49,152 and M = 576 in bf16
    this takes about a tenth of the time of the head's three GEMMs, half of it in `exp`.
    `finite=True` promises that ignored rows hold finite numbers, so they need not be cleared.
    """
    num_rows, vocab = logits_NV.shape
    dtype = row_dtype(logits_NV.dtype)
    device = logits_NV.device
    scored_N = targets_N != options.ignore_index
    targets_N1 = torch.where(scored_N, targets_N, 0)[:, None]
    weight_N = scored_N.to(dtype) if weights_N is None else torch.where(scored_N, weights_N.to(dtype), 0.0)
    factor_N1 = (weight_N if scale is None else weight_N * scale.to(dtype))[:, None] * options.logit_scale
    smoothing = options.label_smoothing

    block = launch.rows_per_block(num_rows, vocab)
    scratch_RV = torch.empty(block, vocab, dtype=dtype, device=device)
    exp_scratch_RV = torch.empty(block, vocab, dtype=dtype, device=device)
    # Per-row sums, filled block by block. Work that is only per row is done after the loop.
    max_N1, below_N1, rest_N1, exp_target_N1, entropy_N1, mean_N1 = torch.zeros(
        6, num_rows, 1, dtype=dtype, device=device
    )
    correct_N = torch.empty(num_rows if options.correct else 0, dtype=torch.bool, device=device)

    for start in range(0, num_rows, block):
        block_rows = slice(start, min(start + block, num_rows))
        target = targets_N1[block_rows]
        z = scratch_RV[: len(target)].copy_(logits_NV[block_rows])
        e = exp_scratch_RV[: len(target)]
        if not finite:
            z.masked_fill_(~scored_N[block_rows, None], 0.0)
        if options.logit_scale != 1.0:
            z.mul_(options.logit_scale)
        if options.softcap is not None:
            z.div_(options.softcap).tanh_().mul_(options.softcap)

        first, maximum = _first_argmax(z)
        if options.correct:
            torch.eq(first, target.squeeze(-1), out=correct_N[block_rows])
        z.sub_(maximum)
        max_N1[block_rows] = maximum
        below_target = below_N1[block_rows] = z.gather(-1, target)
        if smoothing:
            torch.mean(z, -1, keepdim=True, out=mean_N1[block_rows])
        if options.entropy:
            z.clamp_(min=-1e4)  # exp and p log p are 0 there; -inf would make p log p NaN

        torch.exp(z, out=e)
        exp_target = exp_target_N1[block_rows] = e.gather(-1, target)
        e.scatter_(-1, target, 0.0)
        rest = torch.sum(e, -1, keepdim=True, out=rest_N1[block_rows])
        total = rest + exp_target
        if options.entropy:
            below = below_target.clamp(min=-1e4)
            dot = z.mul_(e).sum(-1, keepdim=True).add_(exp_target * below)
            entropy_N1[block_rows] = total.log() - dot / total
        if grad_NV is None:
            continue

        nll_factor = factor_N1[block_rows]
        z_factor = 2 * options.z_loss * (maximum + total.log()) * nll_factor if options.z_loss else None
        if options.dft:
            nll_factor = nll_factor * (exp_target / total)
        e.mul_((nll_factor if z_factor is None else nll_factor + z_factor) / total)
        target_grad = -nll_factor * (rest / total)
        if z_factor is not None:
            target_grad += z_factor * (exp_target / total)
        if smoothing:
            e.sub_(nll_factor * (smoothing / vocab))
            target_grad += nll_factor * (smoothing - smoothing / vocab)
        e.scatter_(-1, target, target_grad)
        if options.softcap is not None:
            # The derivative of the softcap, 1 - tanh^2, from the logits again: z has lost digits to the maximum.
            z.copy_(logits_NV[block_rows]).mul_(options.logit_scale).div_(options.softcap)
            if not finite:
                z.masked_fill_(~scored_N[block_rows, None], 0.0)
            e.mul_(z.tanh_().square_().neg_().add_(1.0))
        grad_NV[block_rows] = e

    # Choose the form by the maximum, not by exp_target: it already rounds to 1 a little below the maximum.
    below_N, exp_target_N, rest_N = (-below_N1).squeeze(-1), exp_target_N1.squeeze(-1), rest_N1.squeeze(-1)
    log_total_N = torch.where(below_N == 0, rest_N.log1p(), (rest_N + exp_target_N).log())
    nll_N = below_N + log_total_N
    lse_N = max_N1.squeeze(-1) + log_total_N
    log_prob_N = -nll_N
    if smoothing:
        nll_N = (1 - smoothing) * nll_N + smoothing * (log_total_N - mean_N1.squeeze(-1))
    if options.dft:
        # Not exp(-nll): it turns the rounding of nll into a relative error.
        nll_N = exp_target_N / (rest_N + exp_target_N) * nll_N
    if options.z_loss:
        nll_N = nll_N + options.z_loss * lse_N.square()

    def of_scored(value_N: Tensor) -> Tensor:
        return torch.where(scored_N, value_N, 0)

    return RowOutputs(
        of_scored(weight_N * nll_N),
        of_scored(log_prob_N),
        of_scored(entropy_N1.squeeze(-1)) if options.entropy else entropy_N1.new_empty(0),
        correct_N & scored_N if options.correct else correct_N,
        of_scored(lse_N),
    )


def _first_argmax(z_RV: Tensor) -> tuple[Tensor, Tensor]:
    """(first argmax [R], maximum [R, 1]).

    On the CPU `argmax` costs as much as `exp`, `amax` a tenth of it. So first take the maxima of blocks of 256 columns,
    then `argmax` over these maxima and within the first block that holds the largest.
    """
    width = 256
    whole = z_RV.shape[1] // width * width
    if whole == 0:
        maximum, first = z_RV.max(-1, keepdim=True)
        return first.squeeze(-1), maximum
    blocks = z_RV[:, :whole].unflatten(-1, (-1, width))
    maximum, index = blocks.amax(-1).max(-1, keepdim=True)
    inside = blocks.gather(1, index[:, :, None].expand(-1, 1, width)).squeeze(1).argmax(-1, keepdim=True)
    first = index * width + inside
    if whole < z_RV.shape[1]:
        tail_max, tail_first = z_RV[:, whole:].max(-1, keepdim=True)
        # `not <=` and not `>`: a NaN in the tail must become the maximum.
        later = ~(tail_max <= maximum)
        first = torch.where(later, tail_first + whole, first)
        maximum = torch.where(later & ~maximum.isnan(), tail_max, maximum)
    return first.squeeze(-1), maximum


def loss_rows(
    logits_NV: Tensor,
    grad_NV: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor | None,
    scale: Tensor | None,
    options: LossOptions,
    *,
    finite: bool = False,
) -> RowOutputs:
    """Per-row outputs; and the gradient of `(scale * loss).sum()`, written to `grad_NV` if given.

    Args:
        logits_NV: any floating dtype, unit stride along V.
        grad_NV: receives the gradient, rounded once to its dtype. None: no gradient. `logits_NV`: overwrite the logits.
        targets_N: int64.
        weights_N: factor of the loss and the gradient of each row.
        scale: 0-d or [N], factor of the gradient only.
        finite: ignored rows hold no NaN and no infinity.
    """
    if _triton.usable(logits_NV.device) and logits_NV.dtype != torch.float64:
        outputs = empty_outputs(logits_NV, options)
        rows_in_triton(logits_NV, grad_NV, targets_N, weights_N, scale, options, outputs)
        return outputs
    return rows_in_torch(logits_NV, grad_NV, targets_N, weights_N, scale, options, finite=finite)


def has_symbolic_size(*tensors: Tensor) -> bool:
    return any(isinstance(size, torch.SymInt) for tensor in tensors for size in tensor.shape)


def loss_rows_fake(
    logits_NV: Tensor,
    grad_NV: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor | None,
    scale: Tensor | None,
    options: LossOptions,
    *,
    finite: bool = False,
) -> RowOutputs:
    """Allocate and free on fake tensors what `loss_rows` allocates and frees.

    The Triton path allocates only its outputs. The PyTorch path uses the same scratch for all blocks of rows, so one
    block of rows is enough."""
    outputs = empty_outputs(logits_NV, options)
    in_triton = _triton.usable(logits_NV.device) and logits_NV.dtype != torch.float64
    if not in_triton and not has_symbolic_size(logits_NV) and logits_NV.numel():
        rows = slice(launch.rows_per_block(*logits_NV.shape))
        rows_in_torch(
            logits_NV[rows],
            None if grad_NV is None else grad_NV[rows],
            targets_N[rows],
            None if weights_N is None else weights_N[rows],
            scale[rows] if scale is not None and scale.dim() else scale,
            options,
            finite=finite,
        )
    return outputs
