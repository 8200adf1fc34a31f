"""Cross-entropy on logits that exist: loss, gradient and per-row outputs, with the shift done by index arithmetic.

A ladder, read downwards: what one pass computes (in PyTorch, in Triton), the registered operators and their fakes,
autograd, the public function. Knows rows of logits; knows nothing of the projection that made them, of documents or
of models.

Legend: N rows of logits, V vocabulary, R rows of one cache-sized block.

The arithmetic of a row, with z the transformed logits, m their maximum and t the target:

    e_j = exp(z_j - m),   rest = sum of e_j over j != t,   total = rest + e_t

    -log p_t = log1p(rest)                   if z_t = m,
               (m - z_t) + log(total)        else (there e_t may underflow),
    d(-log p_t) / dz_j = e_j / total,        and -rest / total for j = t.

`p_t - 1` and `lse - z_t` say the same and cancel: in float32 both are 0 once the target's probability is within 4e-7
of 1. `rest`, summed without the target, keeps six digits.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packsft_kernels import _triton, launch
from packsft_kernels._triton import tl
from packsft_kernels.options import LossOptions, LossOutput

_DEFAULT_OPTIONS = LossOptions()


class RowOutputs(NamedTuple):
    """What one pass gives per row; `entropy` and `correct` are empty unless asked for."""

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


# ---------------------------------------------------------------------------------------------- one pass, in PyTorch


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
    """Loss and gradient of every row; `grad_NV` may be `logits_NV` itself. See `loss_rows` for the arguments.

    Every operation works in place on one of two float32 blocks that stay in cache: at V = 49,152 and M = 576 in bf16
    all of it takes about a tenth of the time of the head's three GEMMs, half of that in `exp`.
    `finite=True` promises that ignored rows hold numbers, which saves the pass that clears them.
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
    # Per-row sums, filled block by block; everything that is only per row waits until after the loop.
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
            z.clamp_(min=-1e4)  # exp is 0 there and so is p log p, which -inf would turn into NaN

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
            # The derivative of the cap, 1 - tanh^2, from the logits once more: z is rounded by the maximum.
            z.copy_(logits_NV[block_rows]).mul_(options.logit_scale).div_(options.softcap)
            if not finite:
                z.masked_fill_(~scored_N[block_rows, None], 0.0)
            e.mul_(z.tanh_().square_().neg_().add_(1.0))
        grad_NV[block_rows] = e

    # Which of the two forms: by the maximum itself, since exp_target rounds to 1 a little below it.
    below_N, exp_target_N, rest_N = (-below_N1).squeeze(-1), exp_target_N1.squeeze(-1), rest_N1.squeeze(-1)
    log_total_N = torch.where(below_N == 0, rest_N.log1p(), (rest_N + exp_target_N).log())
    nll_N = below_N + log_total_N
    lse_N = max_N1.squeeze(-1) + log_total_N
    log_prob_N = -nll_N
    if smoothing:
        nll_N = (1 - smoothing) * nll_N + smoothing * (log_total_N - mean_N1.squeeze(-1))
    if options.dft:
        # Not exp(-nll), which turns the rounding of nll into a relative error.
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

    `argmax` costs as much as `exp` on the CPU and `amax` a tenth: so maxima of 256 columns first, then `argmax` over
    the maxima and within the first block that holds the largest.
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
        # `not <=` instead of `>`: a NaN in the tail has to become the maximum.
        later = ~(tail_max <= maximum)
        first = torch.where(later, tail_first + whole, first)
        maximum = torch.where(later & ~maximum.isnan(), tail_max, maximum)
    return first.squeeze(-1), maximum


# ------------------------------------------------------------------------------------------------- one pass, in Triton


@_triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    grad_ptr,  # may be logits_ptr
    targets_ptr,
    weights_ptr,
    scale_ptr,
    loss_ptr,
    log_prob_ptr,
    entropy_ptr,
    correct_ptr,
    lse_ptr,
    logits_stride,
    grad_stride,
    scale_stride,
    vocab,
    ignore_index,
    softcap,
    logit_scale,
    smoothing,
    z_loss,
    HAS_GRAD: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    HAS_DFT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_CORRECT: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row, which it reads twice: maximum and sums, then the gradient (from cache, if the row fits)."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 at 16,384 rows of 131,072
    logits_ptr += row * logits_stride
    grad_ptr += row * grad_stride
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)

    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(log_prob_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if HAS_CORRECT:
            tl.store(correct_ptr + row, 0)
        if HAS_GRAD:
            zeros = tl.zeros((BLOCK,), dtype=grad_ptr.dtype.element_ty)
            for start in range(0, vocab, BLOCK):
                tl.store(grad_ptr + start + columns, zeros, mask=start + columns < vocab)
        return

    # A target outside of the vocabulary reads nothing and gives a NaN loss.
    in_range = (target >= 0) & (target < vocab)
    x_target = tl.load(logits_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
    z_target = _transformed(x_target, logit_scale, softcap, HAS_SOFTCAP)

    # Maximum and sums over all columns but the target, each lane for itself: reduced once, after the loop. The maximum
    # starts at a finite number so that a difference to -inf is -inf, never NaN.
    lane_max = tl.full((BLOCK,), -3.0e38, tl.float32)
    lane_sum = tl.zeros((BLOCK,), tl.float32)
    lane_dot = tl.zeros((BLOCK,), tl.float32)  # of exp(z - max) and z - max
    lane_z = tl.zeros((BLOCK,), tl.float32)
    lane_better = tl.zeros((BLOCK,), tl.int32)  # columns that argmax would rather take than the target
    for start in range(0, vocab, BLOCK):
        column = start + columns
        inside = column < vocab
        x = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
        z = _transformed(x, logit_scale, softcap, HAS_SOFTCAP)
        if HAS_SMOOTHING:
            lane_z += tl.where(inside, z, 0.0)
        z = tl.where(inside & (column != target), z, float("-inf"))
        if HAS_CORRECT:
            lane_better |= ((z > z_target) | ((z == z_target) & (column < target))).to(tl.int32)
        # One exp for both cases: either z is the new maximum and what was summed shrinks, or z is what shrinks.
        above = z - lane_max
        e = tl.exp(-tl.abs(above))
        grows = above > 0
        if HAS_ENTROPY:
            product = tl.where(e > 0, e * above, 0.0)
            lane_dot = tl.where(grows, e * (lane_dot - lane_sum * above), lane_dot + product)
        lane_sum = tl.where(grows, lane_sum * e + 1.0, lane_sum + e)
        lane_max = tl.where(grows, z, lane_max)

    rest_max = tl.max(lane_max, 0)
    lane_shift = lane_max - rest_max
    lane_scale = tl.exp(lane_shift)
    rest = tl.sum(lane_sum * lane_scale, 0)
    maximum = tl.maximum(rest_max, z_target)
    # By comparison, not by `below == 0`: a fused multiply-subtract of a scaled logit would leave its rounding there.
    is_max = z_target >= rest_max
    shift, shift_error = _difference(rest_max, maximum)
    # exp(shift) amplifies the rounding of `shift` into a relative error of `rest`: hence the first-order correction.
    rest_scale = tl.where(rest > 0, tl.exp(shift) * (1.0 + shift_error), 1.0)
    below = tl.where(is_max, 0.0, rest_max - z_target)
    e_target = tl.exp(-below)
    if HAS_ENTROPY:
        dot = tl.sum(lane_scale * tl.where(lane_sum > 0, lane_dot + lane_sum * lane_shift, 0.0), 0)
        dot = tl.where(rest > 0, rest_scale * (dot + rest * shift), 0.0)
        dot -= tl.where(e_target > 0, e_target * below, 0.0)
    rest *= rest_scale
    total = rest + e_target

    log_total = tl.where(is_max, _log1p(rest), tl.log(total))
    nll = below + log_total
    lse = maximum + log_total
    loss = nll
    if HAS_SMOOTHING:
        loss = (1.0 - smoothing) * nll + smoothing * (lse - tl.sum(lane_z, 0) / vocab)
    if HAS_DFT:
        loss *= e_target / total  # not exp(-nll), which turns the rounding of nll into a relative error
    if HAS_Z_LOSS:
        loss += z_loss * lse * lse
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    tl.store(loss_ptr + row, weight * loss)
    tl.store(log_prob_ptr + row, -nll)
    tl.store(lse_ptr + row, lse)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, log_total - dot / total)
    if HAS_CORRECT:
        tl.store(correct_ptr + row, ((tl.max(lane_better, 0) == 0) & in_range).to(tl.int8))

    if HAS_GRAD:
        nll_factor = weight * logit_scale
        if HAS_SCALE:
            nll_factor *= tl.load(scale_ptr + row * scale_stride).to(tl.float32)
        z_factor = 0.0
        if HAS_Z_LOSS:
            z_factor = 2.0 * z_loss * lse * nll_factor
        if HAS_DFT:
            nll_factor *= e_target / total
        target_grad = z_factor * (e_target / total) - nll_factor * (rest / total)
        uniform = 0.0
        if HAS_SMOOTHING:
            uniform = nll_factor * (smoothing / vocab)
            target_grad += nll_factor * smoothing - uniform
        factor = (nll_factor + z_factor) / total

        # The gradient may overwrite the logits. Every thread stores only what it alone reads from here on; the one
        # logit that all of them have read is the target's, so all have to have it before anyone stores.
        tl.debug_barrier()
        for start in range(0, vocab, BLOCK):
            column = start + columns
            inside = column < vocab
            x = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
            z = _transformed(x, logit_scale, softcap, HAS_SOFTCAP)
            grad = tl.exp(z - maximum) * factor - uniform
            grad = tl.where(column == target, target_grad, grad)
            if HAS_SOFTCAP:
                # 1 - tanh^2, which cancels where tanh is large: there as 1 / cosh^2.
                capped = z / softcap
                decay = tl.exp(-2.0 * tl.abs(x * logit_scale / softcap))
                derivative = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
                grad *= tl.where(tl.abs(capped) < 0.5, 1.0 - capped * capped, derivative)
            if ROUND_BF16:
                grad = _triton.round_to_bf16(grad)
            tl.store(grad_ptr + column, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@_triton.jit
def _transformed(x, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    z = x * logit_scale
    if HAS_SOFTCAP:
        z = softcap * _triton.tanh(z / softcap)
    return z


@_triton.jit
def _difference(a, b):
    """(a - b rounded, what the rounding took away), Knuth's two-sum."""
    rounded = a - b
    back = a - rounded
    return rounded, (a - (rounded + back)) + (back - b)


@_triton.jit
def _log1p(x):
    """Kahan's form: the error of `1 + x` enters the logarithm and the quotient alike."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@_triton.jit
def _scale_kernel(values_ptr, factor_ptr, num_values, BLOCK: tl.constexpr):
    """values *= factor, and nothing read or written where the factor is 1, as in most training loops."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_values
    values = tl.load(values_ptr + index, mask=inside).to(tl.float32) * factor
    tl.store(values_ptr + index, values.to(values_ptr.dtype.element_ty), mask=inside)


def rows_in_triton(
    logits_NV: Tensor,
    grad_NV: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor | None,
    scale: Tensor | None,
    options: LossOptions,
) -> RowOutputs:
    """Loss and gradient of every row in one launch. See `loss_rows` for the arguments."""
    num_rows, vocab = logits_NV.shape
    outputs = empty_outputs(logits_NV, options)
    if num_rows == 0:
        return outputs
    block, num_warps = launch.kernel_block(vocab)
    with _on_device(logits_NV):
        _cross_entropy_kernel[(num_rows,)](
            logits_NV,
            logits_NV if grad_NV is None else grad_NV,
            targets_N.contiguous(),
            None if weights_N is None else weights_N.contiguous(),
            scale,
            outputs.loss,
            outputs.log_prob,
            outputs.entropy,
            outputs.correct.view(torch.int8),
            outputs.lse,
            logits_NV.stride(0),
            0 if grad_NV is None else grad_NV.stride(0),
            scale.stride(0) if scale is not None and scale.dim() else 0,
            vocab,
            options.ignore_index,
            options.softcap or 1.0,
            options.logit_scale,
            options.label_smoothing,
            options.z_loss,
            HAS_GRAD=grad_NV is not None,
            HAS_WEIGHTS=weights_N is not None,
            HAS_SCALE=scale is not None,
            HAS_SOFTCAP=options.softcap is not None,
            HAS_SMOOTHING=options.label_smoothing > 0,
            HAS_Z_LOSS=options.z_loss > 0,
            HAS_DFT=options.dft,
            HAS_ENTROPY=options.entropy,
            HAS_CORRECT=options.correct,
            ROUND_BF16=_triton.INTERPRET and grad_NV is not None and grad_NV.dtype == torch.bfloat16,
            BLOCK=block,
            num_warps=num_warps,
            enable_fp_fusion=True,  # said, so that no release of Triton decides it
        )
    return outputs


def _on_device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _scale_(values: Tensor, factor: Tensor) -> Tensor:
    """`values *= factor` for a 0-d `factor`, free on CUDA where the factor is 1."""
    flat = values.is_contiguous() and values.numel() > 0  # the kernel counts through storage
    if not _triton.usable(values.device) or values.dtype == torch.float64 or not flat:
        return values.mul_(factor)
    with _on_device(values):
        block = 4096
        _scale_kernel[(-(-values.numel() // block),)](
            values, factor, values.numel(), BLOCK=block, num_warps=8, enable_fp_fusion=True
        )
    return values


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
    """Per-row outputs, and the gradient of `(scale * loss).sum()` in `grad_NV` if given.

    Args:
        logits_NV: any floating dtype, unit stride along V.
        grad_NV: where the gradient goes, rounded to its dtype once; None for none; `logits_NV` to overwrite it.
        targets_N: int64.
        weights_N: factor of each row's loss and gradient.
        scale: 0-d or [N], factor of the gradient only.
        finite: ignored rows are known to hold no NaN or infinity.
    """
    if _triton.usable(logits_NV.device) and logits_NV.dtype != torch.float64:
        return rows_in_triton(logits_NV, grad_NV, targets_N, weights_N, scale, options)
    return rows_in_torch(logits_NV, grad_NV, targets_N, weights_N, scale, options, finite=finite)


# ------------------------------------------------------------------------------------------------ operators and fakes
# An operator takes the fields of `LossOptions` one by one, in their order: `*options.fields()`.


@torch.library.custom_op("packsft::cross_entropy", mutates_args=())
def _cross_entropy_op(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    dft: bool,
    entropy: bool,
    correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = LossOptions(ignore_index, softcap, logit_scale, label_smoothing, z_loss, dft, entropy, correct)
    return tuple(loss_rows(logits, None, targets, weights, None, options))  # type: ignore[return-value]


@torch.library.custom_op("packsft::cross_entropy_gradient", mutates_args=())
def _gradient_op(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    scale: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    dft: bool,
) -> Tensor:
    options = LossOptions(ignore_index, softcap, logit_scale, label_smoothing, z_loss, dft)
    grad = torch.empty_like(logits)
    loss_rows(logits, grad, targets, weights, scale, options)
    return grad


@torch.library.custom_op("packsft::cross_entropy_", mutates_args=("logits",))
def _cross_entropy_inplace_op(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    dft: bool,
    entropy: bool,
    correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = LossOptions(ignore_index, softcap, logit_scale, label_smoothing, z_loss, dft, entropy, correct)
    return tuple(loss_rows(logits, logits, targets, weights, scale, options))  # type: ignore[return-value]


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
    """What `loss_rows` allocates and frees, on fake tensors. The Triton pass allocates its outputs only; the PyTorch
    pass uses one block of scratch for all blocks of rows, so one block of rows is enough."""
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


@_cross_entropy_op.register_fake
def _(logits: Tensor, targets: Tensor, weights: Tensor | None, *fields: Any) -> tuple[Tensor, ...]:
    return tuple(loss_rows_fake(logits, None, targets, weights, None, LossOptions(*fields)))


@_gradient_op.register_fake
def _(logits: Tensor, targets: Tensor, weights: Tensor | None, scale: Tensor, *fields: Any) -> Tensor:
    grad = torch.empty_like(logits)
    loss_rows_fake(logits, grad, targets, weights, scale, LossOptions(*fields))
    return grad


@_cross_entropy_inplace_op.register_fake
def _(
    logits: Tensor, targets: Tensor, weights: Tensor | None, scale: Tensor | None, *fields: Any
) -> tuple[Tensor, ...]:
    return tuple(loss_rows_fake(logits, logits, targets, weights, scale, LossOptions(*fields)))


# ----------------------------------------------------------------------------------------------------------- autograd


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("packsft_kernels: the losses can be differentiated once; there is no second derivative")


def differentiable_once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Let `create_graph=True` pass and differentiating its result raise.

    PyTorch's own `once_differentiable` raises only where the upstream gradient needs a derivative. Ours depends on the
    inputs as well, and a missing second derivative would be a silent 0.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return grads
        return tuple(None if g is None else _NoSecondDerivative.apply(g.detach().requires_grad_()) for g in grads)

    return wrapped


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, weights, *fields = inputs
    ctx.save_for_backward(logits, targets, weights)
    ctx.fields = fields[:-2]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _backward(ctx: Any, upstream_N: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradient from the logits, once more: 2 bytes read twice and 2 written, but rounded only once, after
    `upstream / num_items`, whatever that is; and nothing as large as the logits is kept between the passes."""
    grad = None
    if upstream_N is not None:
        logits, targets, weights = ctx.saved_tensors
        grad = torch.ops.packsft.cross_entropy_gradient(logits, targets, weights, upstream_N, *ctx.fields)
    return grad, *[None] * (2 + len(dataclasses.fields(LossOptions)))


_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)


class _CrossEntropyInplace(torch.autograd.Function):
    """The gradient over the logits, in the forward: one launch, no further memory, and one backward only."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        targets_N: Tensor,
        weights_N: Tensor | None,
        scale: Tensor | None,
        options: LossOptions,
    ) -> Any:
        # In float16 a gradient divided by the number of items would underflow: there the division waits for the
        # backward, when a gradient scaler's factor has come in.
        folded = None if logits_NV.dtype == torch.float16 else scale
        outputs = RowOutputs(
            *torch.ops.packsft.cross_entropy_(logits_NV, targets_N, weights_N, folded, *options.fields())
        )
        ctx.grad = logits_NV.detach()
        ctx.scale = scale if folded is None else None
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        loss = outputs.loss if scale is None else scaled_sum(outputs.loss, scale)
        return (loss, *outputs[1:])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> Any:
        if ctx.grad is None:
            raise RuntimeError(
                "cross_entropy(inplace=True) allows one backward: its gradient was handed over by the first"
            )
        grad, ctx.grad = ctx.grad, None
        if upstream is None:
            return None, None, None, None, None
        factor = upstream if ctx.scale is None else upstream * ctx.scale
        grad = grad.mul_(factor.unsqueeze(-1)) if factor.dim() else _scale_(grad, factor)
        return grad, None, None, None, None


# ----------------------------------------------------------------------------------------------------------- public


def cross_entropy(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    shift: bool = True,
    rows: Tensor | None = None,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    options: LossOptions = _DEFAULT_OPTIONS,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    inplace: bool = False,
) -> LossOutput:
    """Cross-entropy of logits: `F.cross_entropy(logits[..., :-1, :], labels[..., 1:])`, without the copies.

    Two forms: `labels` [...] beside `logits` [..., V], in transformers' convention (unshifted, `ignore_index` for what
    is not scored); or `targets` [N], one for each of the N rows of `logits`, or for those listed in `rows`.

    Args:
        logits: [..., V], float64, float32, bfloat16 or float16. Arithmetic is in float32 (float64 for float64).
        labels: [...] int64.
        shift: whether position t predicts `labels[..., t + 1]` (the last one nothing) or `labels[..., t]`.
        rows: [N] int32 or int64, distinct positions in `logits` flattened to [T, V]; None for all of them.
        targets: [N] int64.
        weights: factor of each row's loss: [...] for the first form (of the row, not of the label), [N] for the second.
        options: see `LossOptions`.
        num_items: what "mean" divides by, an int or a 0-d tensor on the device (never read back); by default the
            number of rows that are not ignored. 0 gives a loss of 0.
        reduction: "mean" (sum / num_items), "sum" or "none" ([N]).
        inplace: let the gradient overwrite `logits`. Saves their size in memory and a pass over them; the logits are
            gone afterwards (autograd raises if an earlier operation had saved them), and one backward is allowed.

    Returns:
        LossOutput, per-row outputs in the order of the rows.

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or combination.
    """
    check_argument(labels is not None or targets is not None, "labels or targets", "neither", "one of them")
    check_argument(
        labels is None or (targets is None and rows is None), "labels", "labels with rows or targets", "one form"
    )
    check_argument(
        logits.is_floating_point() and logits.dim() >= 2, "logits", describe(logits), "floating point, [..., V]"
    )
    check_reduction(reduction, num_items)
    if labels is not None:
        check_argument(
            labels.shape == logits.shape[:-1],
            "labels",
            describe(labels),
            f"{list(logits.shape[:-1])}, as logits[..., 0]",
        )
        if shift:
            labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=options.ignore_index)
        targets = labels.flatten()
    assert targets is not None
    logits_TV = logits.flatten(0, -2)
    if logits_TV.stride(-1) != 1:
        logits_TV = logits_TV.contiguous()
    weights = None if weights is None else weights.detach().flatten()
    num_rows = logits_TV.shape[0] if rows is None else rows.numel()
    check_rows(rows, targets, weights, num_rows, logits.device)

    scale = None  # for "none"
    if reduction == "mean":
        scale = inverse_items(targets, options, num_items)
    elif reduction == "sum":
        scale = torch.ones((), dtype=torch.float64, device=logits.device)
    if rows is not None:
        # All other rows are ignored ones: one kernel for both forms, and its zeros are their gradient.
        rows = rows.long()
        scored = targets
        targets = targets.new_full((logits_TV.shape[0],), options.ignore_index).scatter(0, rows, scored)
        if weights is not None:
            weights = weights.new_zeros(logits_TV.shape[0]).scatter(0, rows, weights)

    if inplace and torch.is_grad_enabled() and logits.requires_grad and not torch.compiler.is_compiling():
        check_argument(not logits.is_leaf, "inplace", "a leaf that requires grad", "logits that an operation made")
        apart = logits.dim() == 2 and logits.stride(0) >= logits.shape[1]  # rows that share no storage
        rowwise = logits.stride(-1) == 1 and (apart or logits.is_contiguous())
        check_argument(rowwise, "inplace", f"logits with strides {logits.stride()}", "contiguous logits")
        outputs = RowOutputs(*_CrossEntropyInplace.apply(logits_TV, targets, weights, scale, options))
        loss = outputs.loss
    else:
        outputs = RowOutputs(*torch.ops.packsft.cross_entropy(logits_TV, targets, weights, *options.fields()))
        loss = outputs.loss
        if scale is not None:
            loss = scaled_sum(loss, scale)
    if rows is not None:
        if loss.dim():
            loss = loss.index_select(0, rows)
        outputs = RowOutputs(*(value.index_select(0, rows) if value.numel() else value for value in outputs))
    return to_loss_output(loss, outputs, options)


def to_loss_output(loss: Tensor, outputs: RowOutputs, options: LossOptions) -> LossOutput:
    return LossOutput(
        loss,
        outputs.log_prob,
        outputs.entropy if options.entropy else None,
        outputs.correct if options.correct else None,
        outputs.lse,
    )


def inverse_items(targets_N: Tensor, options: LossOptions, num_items: int | Tensor | None) -> Tensor:
    """1 / num_items, 0-d float64 on the device; 0 for no items, so that a batch without a scored row has loss 0."""
    device = targets_N.device
    if num_items is None:
        items = (targets_N != options.ignore_index).sum()
    elif isinstance(num_items, Tensor):
        items = num_items.detach().to(device, non_blocking=device.type == "cuda").reshape(())
    else:
        items = torch.full((), num_items, device=device)  # a fill, where a copy would wait
    items = items.double()
    return torch.where(items > 0, items.reciprocal(), 0.0)


def scaled_sum(loss_N: Tensor, scale: Tensor) -> Tensor:
    """`(loss * scale).sum()`, in float64 until the end: it costs nothing and 10^5 rows add up to one rounding."""
    return (loss_N.double() * scale).sum().to(loss_N.dtype)


def check_reduction(reduction: str, num_items: int | Tensor | None) -> None:
    check_argument(reduction in ("mean", "sum", "none"), "reduction", repr(reduction), '"mean", "sum" or "none"')
    check_argument(
        num_items is None or reduction == "mean", "num_items", f"reduction={reduction!r}", 'reduction="mean"'
    )
    if isinstance(num_items, Tensor):
        check_argument(
            num_items.numel() == 1, "num_items", describe(num_items), "a number or a tensor with one element"
        )
    elif num_items is not None:
        check_argument(num_items >= 0, "num_items", repr(num_items), "0 or more")


def check_rows(
    rows: Tensor | None, targets: Tensor, weights: Tensor | None, num_rows: int, device: torch.device
) -> None:
    for name, tensor in (("rows", rows), ("targets", targets), ("weights", weights)):
        if tensor is not None:
            check_argument(tensor.device == device, name, f"a tensor on {tensor.device}", f"one on {device}")
    if rows is not None:
        check_argument(
            rows.dtype in (torch.int32, torch.int64) and rows.dim() == 1, "rows", describe(rows), "[N] int32 or int64"
        )
    check_argument(targets.dtype == torch.int64, "targets", describe(targets), "int64")
    check_argument(targets.shape == (num_rows,), "targets", describe(targets), f"[{num_rows}], one for each row")
    if weights is not None:
        check_argument(weights.shape == (num_rows,), "weights", describe(weights), f"[{num_rows}], one for each row")


def check_argument(condition: bool, argument: str, given: str, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{argument}: got {given}, allowed: {allowed}")


def describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
