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

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from packsft_kernels import launch
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

    Every operation works in place on one of two float32 blocks that stay in cache: at V = 49,152 all of it takes a
    thirteenth of the time of the GEMM that made the logits, half of that in `exp`.
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
        if options.entropy and options.softcap is None:
            z.clamp_(min=-1e4)  # exp is 0 there and so is p log p, which -inf would turn into NaN

        torch.exp(z, out=e)
        exp_target = exp_target_N1[block_rows] = e.gather(-1, target)
        e.scatter_(-1, target, 0.0)
        rest = torch.sum(e, -1, keepdim=True, out=rest_N1[block_rows])
        total = rest + exp_target
        if options.entropy:
            below = below_target.clamp(min=-1e4)
            dot = torch.linalg.vecdot(e, z).unsqueeze(-1).add_(exp_target * below)
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
            # The derivative of the cap, 1 - tanh^2, from z = capped - maximum.
            z.add_(maximum).div_(options.softcap).square_().neg_().add_(1.0)
            e.mul_(z)
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
        nll_N = log_prob_N.exp() * nll_N
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
    """Per-row outputs, and the gradient of `scale * loss.sum()` in `grad_NV` if given.

    Args:
        logits_NV: any floating dtype, unit stride along V.
        grad_NV: where the gradient goes, rounded to its dtype once; None for none; `logits_NV` to overwrite it.
        targets_N: int64.
        weights_N: factor of each row's loss and gradient.
        scale: 0-d or [N], factor of the gradient only.
        finite: ignored rows are known to hold no NaN or infinity.
    """
    return rows_in_torch(logits_NV, grad_NV, targets_N, weights_N, scale, options, finite=finite)


# ------------------------------------------------------------------------------------------------ operators and fakes
# An operator takes the fields of `LossOptions` one by one, in their order: `*dataclasses.astuple(options)`.


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


@_cross_entropy_op.register_fake
def _(logits: Tensor, targets: Tensor, weights: Tensor | None, *fields: Any) -> tuple[Tensor, ...]:
    return tuple(empty_outputs(logits, LossOptions(*fields)))


@_gradient_op.register_fake
def _(logits: Tensor, targets: Tensor, weights: Tensor | None, scale: Tensor, *fields: Any) -> Tensor:
    return torch.empty_like(logits)


@_cross_entropy_inplace_op.register_fake
def _(
    logits: Tensor, targets: Tensor, weights: Tensor | None, scale: Tensor | None, *fields: Any
) -> tuple[Tensor, ...]:
    return tuple(empty_outputs(logits, LossOptions(*fields)))


# ----------------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, weights, *fields = inputs
    ctx.save_for_backward(logits, targets, weights)
    ctx.fields = fields[:-2]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
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
            *torch.ops.packsft.cross_entropy_(logits_NV, targets_N, weights_N, folded, *dataclasses.astuple(options))
        )
        ctx.grad = logits_NV.detach()
        ctx.scale = scale if folded is None else None
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        loss = outputs.loss if scale is None else outputs.loss.sum() * scale
        return (loss, *outputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> Any:
        if ctx.grad is None:
            raise RuntimeError(
                "cross_entropy(inplace=True) allows one backward: its gradient was handed over by the first"
            )
        grad, ctx.grad = ctx.grad, None
        if upstream is None:
            return None, None, None, None, None
        factor = upstream if ctx.scale is None else upstream * ctx.scale
        return grad.mul_(factor.unsqueeze(-1) if factor.dim() else factor), None, None, None, None


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
    """Cross-entropy of logits with labels, ignored rows left out: `F.cross_entropy(logits[..., :-1, :], labels[..., 1:])`.

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
    check_rows(rows, targets, weights, num_rows)

    dtype = row_dtype(logits.dtype)
    inverse = inverse_items(targets, options, num_items, dtype) if reduction == "mean" else None
    if rows is not None:
        # All other rows are ignored ones: one kernel for both forms, and its zeros are their gradient.
        rows = rows.long()
        scored = targets
        targets = targets.new_full((logits_TV.shape[0],), options.ignore_index).scatter(0, rows, scored)
        if weights is not None:
            weights = weights.new_zeros(logits_TV.shape[0]).scatter(0, rows, weights)

    if inplace and torch.is_grad_enabled() and logits.requires_grad and not torch.compiler.is_compiling():
        check_argument(not logits.is_leaf, "inplace", "a leaf that requires grad", "logits that an operation made")
        check_argument(
            logits_TV.data_ptr() == logits.data_ptr(), "inplace", f"strides {logits.stride()}", "rows without a gap"
        )
        scale = (
            inverse
            if reduction == "mean"
            else torch.ones((), dtype=dtype, device=logits.device)
            if reduction == "sum"
            else None
        )
        outputs = RowOutputs(*_CrossEntropyInplace.apply(logits_TV, targets, weights, scale, options))
        loss = outputs.loss
    else:
        outputs = RowOutputs(
            *torch.ops.packsft.cross_entropy(logits_TV, targets, weights, *dataclasses.astuple(options))
        )
        loss = outputs.loss
        if reduction != "none":
            loss = loss.sum() if inverse is None else loss.sum() * inverse
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


def inverse_items(
    targets_N: Tensor, options: LossOptions, num_items: int | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """1 / num_items as a 0-d tensor on the device; 0 for no items, so that a batch without a scored row has loss 0."""
    device = targets_N.device
    if num_items is None:
        items = (targets_N != options.ignore_index).sum()
    elif isinstance(num_items, Tensor):
        items = num_items.detach().to(device, non_blocking=True).reshape(())
    else:
        items = torch.full((), num_items, dtype=dtype, device=device)  # a fill, where a copy would wait
    items = items.to(dtype)
    return torch.where(items > 0, items.reciprocal(), 0.0)


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


def check_rows(rows: Tensor | None, targets: Tensor, weights: Tensor | None, num_rows: int) -> None:
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
