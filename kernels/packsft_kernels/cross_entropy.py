"""Cross-entropy on given logits: loss, gradient and per-row outputs. The shift is done with indices, without copies.

Holds the registered operators and their fakes, autograd, and the public function. `cross_entropy_rows.py` computes the
rows. Knows nothing of documents, of models, or of the projection that made the logits.

Legend: N rows of logits, V vocabulary.
"""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor

from packsft_kernels.autograd import differentiable_once
from packsft_kernels.cross_entropy_kernel import scale_
from packsft_kernels.cross_entropy_rows import RowOutputs, loss_rows, loss_rows_fake
from packsft_kernels.loss_options import OPTIONS_SCHEMA, LossOptions, LossOutput

_DEFAULT_OPTIONS = LossOptions()


# ------------------------------------------------------------------------------------------------ operators and fakes

_OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"  # the fields of `RowOutputs`


@torch.library.custom_op(
    "packsft::cross_entropy",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, Tensor? weights, {OPTIONS_SCHEMA}) -> {_OUTPUTS}",
)
def _cross_entropy_op(logits: Tensor, targets: Tensor, weights: Tensor | None, *fields: Any) -> tuple[Tensor, ...]:
    return tuple(loss_rows(logits, None, targets, weights, None, LossOptions(*fields)))


@torch.library.custom_op(
    "packsft::cross_entropy_gradient",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, Tensor? weights, Tensor scale, {OPTIONS_SCHEMA}) -> Tensor",
)
def _gradient_op(logits: Tensor, targets: Tensor, weights: Tensor | None, scale: Tensor, *fields: Any) -> Tensor:
    grad = _empty_gradient(logits)
    loss_rows(logits, grad, targets, weights, scale, LossOptions(*fields))
    return grad


@torch.library.custom_op(
    "packsft::cross_entropy_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, Tensor targets, Tensor? weights, Tensor? scale, {OPTIONS_SCHEMA}) -> {_OUTPUTS}",
)
def _cross_entropy_inplace_op(
    logits: Tensor, targets: Tensor, weights: Tensor | None, scale: Tensor | None, *fields: Any
) -> tuple[Tensor, ...]:
    return tuple(loss_rows(logits, logits, targets, weights, scale, LossOptions(*fields)))


def _empty_gradient(logits: Tensor) -> Tensor:
    """An empty gradient whose rows have the same alignment within 16 bytes as the rows of the logits.

    Not `empty_like`: it would drop the padding of rows that are padded to a multiple.
    """
    (num_rows, vocab), per_access = logits.shape, 16 // logits.element_size()
    offset = logits.storage_offset() % per_access
    stride = vocab + (logits.stride(0) - vocab) % per_access
    return logits.new_empty(offset + num_rows * stride).as_strided((num_rows, vocab), (stride, 1), offset)


@_cross_entropy_op.register_fake
def _(logits: Tensor, targets: Tensor, weights: Tensor | None, *fields: Any) -> tuple[Tensor, ...]:
    return tuple(loss_rows_fake(logits, None, targets, weights, None, LossOptions(*fields)))


@_gradient_op.register_fake
def _(logits: Tensor, targets: Tensor, weights: Tensor | None, scale: Tensor, *fields: Any) -> Tensor:
    grad = _empty_gradient(logits)
    loss_rows_fake(logits, grad, targets, weights, scale, LossOptions(*fields))
    return grad


@_cross_entropy_inplace_op.register_fake
def _(
    logits: Tensor, targets: Tensor, weights: Tensor | None, scale: Tensor | None, *fields: Any
) -> tuple[Tensor, ...]:
    return tuple(loss_rows_fake(logits, logits, targets, weights, scale, LossOptions(*fields)))


# ----------------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, weights, *fields = inputs
    ctx.save_for_backward(logits, targets, weights)
    ctx.fields = LossOptions(*fields).loss_alone().fields()
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _backward(ctx: Any, upstream_N: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Recompute the gradient from the logits: two reads and one write of 2 bytes per logit.

    It is rounded only once, after the factor `upstream / num_items`. Nothing as large as the logits is kept between
    forward and backward."""
    grad = None
    if upstream_N is not None:
        logits, targets, weights = ctx.saved_tensors
        grad = torch.ops.packsft.cross_entropy_gradient(logits, targets, weights, upstream_N, *ctx.fields)
    return grad, *[None] * (2 + len(dataclasses.fields(LossOptions)))


_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)


class _CrossEntropyInplace(torch.autograd.Function):
    """Overwrites the logits with their gradient in the forward: one launch, no extra memory, one backward only."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        targets_N: Tensor,
        weights_N: Tensor | None,
        scale: Tensor | None,
        options: LossOptions,
    ) -> Any:
        # In float16 a gradient divided by the number of items would underflow. So the division waits for the backward,
        # where the factor of a gradient scaler is known.
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
                "cross_entropy(inplace=True) allows one backward; the first one has already returned the gradient"
            )
        grad, ctx.grad = ctx.grad, None
        if upstream is None:
            return None, None, None, None, None
        factor = upstream if ctx.scale is None else upstream * ctx.scale
        grad = grad.mul_(factor.unsqueeze(-1)) if factor.dim() else scale_(grad, factor)
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
    num_items: float | Tensor | None = None,
    reduction: str = "mean",
    inplace: bool = False,
) -> LossOutput:
    """Cross-entropy of logits: `F.cross_entropy(logits[..., :-1, :], labels[..., 1:])`, without the copies.

    There are two forms:

    - `labels` [...] for `logits` [..., V], in transformers' convention: unshifted, `ignore_index` means not scored;
    - `targets` [N], one for each row of `logits`, or one for each row listed in `rows`.

    Args:
        logits: [..., V], float64, float32, bfloat16 or float16. Arithmetic is in float32 (float64 for float64).
        labels: [...] int64.
        shift: True: position t predicts `labels[..., t + 1]`, the last position predicts nothing. False: position t
            predicts `labels[..., t]`.
        rows: [N] int32 or int64, distinct positions in `logits` flattened to [T, V]; None for all positions.
        targets: [N] int64.
        weights: factor of each row's loss: [...] in the first form (by row, not by label), [N] in the second.
        options: see `LossOptions`.
        num_items: divisor of "mean", a number or a tensor of one element on the device (never read back). Default: the
            number of rows that are not ignored. 0 gives a loss of 0.
        reduction: "mean" (sum / num_items), "sum" or "none" ([N]).
        inplace: let the gradient overwrite `logits`. This saves memory of their size and one read of them. The logits
            are lost (autograd raises if an earlier operation has saved them), and only one backward is allowed.

    Returns:
        LossOutput, per-row outputs in the order of the rows.

    Raises:
        ValueError: for a wrong shape, dtype or combination; the message names the argument. Rows and targets out of
            range give an error on the CPU and a NaN loss on CUDA. With PACKSFT_CHECK_VALUES=1 in the environment
            they raise a ValueError too, which reads the device in every call.
    """
    check_argument(labels is not None or targets is not None, "labels or targets", "neither", "one of them")
    check_argument(
        labels is None or (targets is None and rows is None), "labels", "labels with rows or targets", "labels alone"
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
    weights = None if weights is None else weights.flatten()
    num_rows = logits_TV.shape[0] if rows is None else rows.numel()
    check_rows(rows, targets, weights, num_rows, logits.device)
    check_values(rows, targets, logits_TV.shape[0], logits_TV.shape[1], options)

    scale = None  # for "none"
    if reduction == "mean":
        scale = inverse_items(targets, options, num_items)
    elif reduction == "sum":
        scale = torch.ones((), dtype=torch.float64, device=logits.device)
    if rows is not None:
        # All other rows become ignored rows. So one kernel serves both forms, and its zeros are their gradient.
        rows = rows.long()
        scored = targets
        targets = targets.new_full((logits_TV.shape[0],), options.ignore_index).scatter(0, rows, scored)
        if weights is not None:
            weights = weights.new_zeros(logits_TV.shape[0]).scatter(0, rows, weights)

    if inplace and torch.is_grad_enabled() and logits.requires_grad and not torch.compiler.is_compiling():
        check_argument(not logits.is_leaf, "inplace", "a leaf that requires grad", "logits that an operation made")
        apart = logits.dim() == 2 and logits.stride(0) >= logits.shape[1]  # rows do not share storage
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


def inverse_items(targets_N: Tensor, options: LossOptions, num_items: float | Tensor | None) -> Tensor:
    """1 / num_items as 0-d float64 on the device; 0 for no items, so a batch without scored rows has loss 0."""
    device = targets_N.device
    if num_items is None:
        items = (targets_N != options.ignore_index).sum()
    elif isinstance(num_items, Tensor):
        items = num_items.detach().to(device, non_blocking=device.type == "cuda").reshape(())
    else:
        items = torch.full((), num_items, dtype=torch.float64, device=device)  # a fill: a copy would wait
    items = items.double()
    return torch.where(items > 0, items.reciprocal(), 0.0)


def scaled_sum(loss_N: Tensor, scale: Tensor) -> Tensor:
    """`(loss * scale).sum()`, added in float64: it costs nothing, and 10^5 rows are rounded only once."""
    return (loss_N.double() * scale).sum().to(loss_N.dtype)


def check_reduction(reduction: str, num_items: float | Tensor | None) -> None:
    check_argument(reduction in ("mean", "sum", "none"), "reduction", repr(reduction), '"mean", "sum" or "none"')
    check_argument(
        num_items is None or reduction == "mean", "num_items", f"reduction={reduction!r}", 'reduction="mean"'
    )
    if isinstance(num_items, Tensor):
        check_argument(
            num_items.numel() == 1, "num_items", describe(num_items), "a number or a tensor with one element"
        )
        check_constant("num_items", num_items)
    elif num_items is not None:
        check_argument(num_items >= 0, "num_items", repr(num_items), "0 or more")


def check_rows(
    rows: Tensor | None, targets: Tensor, weights: Tensor | None, num_rows: int, device: torch.device
) -> None:
    for name, tensor in (("rows", rows), ("targets", targets), ("weights", weights)):
        if tensor is not None:
            check_argument(tensor.device == device, name, f"a tensor on {tensor.device}", f"one on {device}")
            check_constant(name, tensor)
    if rows is not None:
        check_argument(
            rows.dtype in (torch.int32, torch.int64) and rows.dim() == 1, "rows", describe(rows), "[N] int32 or int64"
        )
    check_argument(targets.dtype == torch.int64, "targets", describe(targets), "int64")
    for name, tensor in (("targets", targets), ("weights", weights)):
        # Format the message only on error: torch.compile specialises a graph on each size that is put into a string.
        if tensor is not None and tensor.shape != (num_rows,):
            check_argument(False, name, describe(tensor), f"[{num_rows}], one for each row")


CHECK_VALUES = os.environ.get("PACKSFT_CHECK_VALUES") == "1"
"""For debugging: also check the values in rows and targets. This reads the device in every call."""


def check_values(rows: Tensor | None, targets: Tensor, num_tokens: int, vocab: int, options: LossOptions) -> None:
    """Only with `CHECK_VALUES`."""
    if not CHECK_VALUES:
        return
    for name, values, limit in (("rows", rows, num_tokens), ("targets", targets, vocab)):
        if values is None:
            continue
        bad = (values < 0) | (values >= limit)
        if name == "targets":
            bad &= values != options.ignore_index
        if bad.any():
            given = f"{int(values[bad][0])} at {int(bad.nonzero()[0])}"
            or_ignored = f" or {options.ignore_index}, ignored" if name == "targets" else ""
            check_argument(False, name, given, f"0 to {limit - 1}{or_ignored}")


def check_constant(argument: str, tensor: Tensor) -> None:
    """There is no gradient for it: a weight that is learned would silently stay as it is."""
    learned = tensor.requires_grad and torch.is_grad_enabled()
    check_argument(not learned, argument, "a tensor that requires grad", "a constant: detach() it")


def check_argument(condition: bool, argument: str, given: str, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{argument}: got {given}, allowed: {allowed}")


def describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
