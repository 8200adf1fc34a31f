"""The fused LM head: projection and cross-entropy of the scored rows, a chunk of logits at a time.

Gradients are made in the forward, while a chunk's logits are at hand: three GEMMs with a trained head, two with a
frozen one, one under `no_grad`. No Triton of its own: a chunk's logits go through `loss_rows`, in place.
Knows hidden states and a matrix; knows nothing of the model around them.

Legend: T tokens, N scored rows, V vocabulary, M model width, C rows of one chunk.

Memory beside the inputs: one chunk of logits (`launch.CHUNK_BYTES`), the gradients dX [N, M] and dW [V, M] as they are
stored, a few numbers per row, and the weight in the autocast dtype if that differs. A chunk's rows of hidden states lie
where their gradient will be; they are memory of their own only where no gradient is wanted, or while they are cast.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from packsft_kernels import launch
from packsft_kernels.cross_entropy import (
    check_argument,
    check_reduction,
    check_rows,
    describe,
    differentiable_once,
    inverse_items,
    scaled_sum,
    to_loss_output,
)
from packsft_kernels.cross_entropy_rows import (
    RowOutputs,
    empty_outputs,
    has_symbolic_size,
    loss_rows,
    loss_rows_fake,
    row_dtype,
)
from packsft_kernels.options import OPTIONS_SCHEMA, LossOptions, LossOutput

_DEFAULT_OPTIONS = LossOptions()
_NUM_FIELDS = len(dataclasses.fields(LossOptions))


class Gradients(NamedTuple):
    """Of the loss, each empty unless wanted. `hidden` has a row for each of the N scored rows, not for each token."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, num_rows: int, wanted: tuple[bool, bool, bool]
) -> Gradients:
    def empty(shape: tuple[int, ...], is_wanted: bool, dtype: torch.dtype) -> Tensor:
        return hidden.new_empty(shape if is_wanted else (0,) * len(shape), dtype=dtype)

    return Gradients(
        empty((num_rows, hidden.shape[1]), wanted[0], _stored_dtype(hidden)),
        empty(tuple(weight.shape), wanted[1], _stored_dtype(weight)),
        empty((weight.shape[0],), wanted[2], row_dtype(weight.dtype)),  # V elements: wide enough to add up in
    )


def _stored_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which a gradient waits for its upstream factor: float32 where a GEMM can write it from 16-bit
    inputs (CUDA) and where a small gradient would underflow (float16); else the parameter's own, as on the CPU a bf16
    GEMM writes bf16."""
    if parameter.dtype == torch.float16 or (parameter.dtype == torch.bfloat16 and parameter.is_cuda):
        return torch.float32
    return parameter.dtype


def _chunk_loop(
    hidden_TM: Tensor,
    weight_VM: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    rows_N: Tensor | None,
    weights_N: Tensor | None,
    scale: Tensor | None,
    options: LossOptions,
    dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
    *,
    row_pass: Callable[..., RowOutputs] = loss_rows,
) -> tuple[RowOutputs, Gradients]:
    """Per-row outputs and the gradients of `(scale * loss).sum()`, GEMMs in `dtype`; `scale` is 0-d or [N].

    The operators' fakes run this loop too, with `row_pass=loss_rows_fake`: what they allocate and free is the same.
    """
    num_rows, vocab = targets_N.shape[0], weight_VM.shape[0]
    device = hidden_TM.device
    gradients = _empty_gradients(hidden_TM, weight_VM, bias_V, num_rows, wanted)
    weight_VM = weight_VM.to(dtype)
    bias_V = None if bias_V is None else bias_V.to(dtype)
    # CUDA's GEMMs write float32 from 16-bit inputs; the CPU's cannot.
    writes_float32 = hidden_TM.is_cuda and dtype in (torch.bfloat16, torch.float16)

    # Rows start on a multiple of 16 elements on CUDA, so that the kernel's accesses stay wide whatever V is.
    stride = -(-vocab // 16) * 16 if hidden_TM.is_cuda else vocab
    chunk = launch.rows_per_chunk(num_rows, stride, dtype.itemsize, weight_grad=wanted[1])
    buffer_CV = torch.empty(chunk, stride, dtype=dtype, device=device)[:, :vocab]
    outputs = empty_outputs(hidden_TM.new_empty(num_rows, 0, dtype=dtype), options)
    # The weight's accumulator: its stored gradient, unless that is 16 bits wide and several chunks add up in it.
    weight_sum = gradients.weight
    if wanted[1] and chunk < num_rows and weight_sum.dtype == torch.bfloat16:
        weight_sum = torch.empty_like(weight_sum, dtype=torch.float32)
    if num_rows == 0:
        weight_sum.zero_()
    gradients.bias.zero_()

    for start in range(0, num_rows, max(1, chunk)):
        chunk_rows = slice(start, min(start + chunk, num_rows))
        hidden_CM = _storage_of_rows(gradients.hidden[chunk_rows], targets_N[chunk_rows], hidden_TM, dtype)
        if rows_N is None:
            hidden_CM.copy_(hidden_TM[chunk_rows])
        elif hidden_TM.dtype == dtype:
            torch.index_select(hidden_TM, 0, rows_N[chunk_rows], out=hidden_CM)
        else:
            hidden_CM.copy_(hidden_TM.index_select(0, rows_N[chunk_rows]))
        # An ignored row may hold anything, and 0 * NaN would reach the weight's gradient. Its logits are then numbers.
        hidden_CM.masked_fill_((targets_N[chunk_rows] == options.ignore_index)[:, None], 0.0)
        logits_CV = buffer_CV[: len(hidden_CM)]
        if bias_V is None:
            torch.mm(hidden_CM, weight_VM.t(), out=logits_CV)
        else:
            torch.addmm(bias_V, hidden_CM, weight_VM.t(), out=logits_CV)
        chunk_outputs = row_pass(
            logits_CV,
            logits_CV if any(wanted) else None,
            targets_N[chunk_rows],
            None if weights_N is None else weights_N[chunk_rows],
            scale[chunk_rows] if scale is not None and scale.dim() else scale,
            options,
            finite=True,
        )
        for whole, part in zip(outputs, chunk_outputs, strict=True):
            whole[chunk_rows][: len(part)].copy_(part)

        grad_CV = logits_CV  # from here on
        if wanted[1]:
            _matmul(grad_CV.t(), hidden_CM, weight_sum, writes_float32, accumulate=start > 0)
        if wanted[0]:  # last, since it takes the place of hidden_CM
            _matmul(grad_CV, weight_VM, gradients.hidden[chunk_rows], writes_float32)
        if wanted[2]:
            for rows_RV in grad_CV.split(_cast_rows(grad_CV)):
                gradients.bias.add_(rows_RV.sum(0, dtype=row_dtype(dtype)))
    if weight_sum is not gradients.weight:
        gradients.weight.copy_(weight_sum)
    return outputs, gradients


def _storage_of_rows(grad_CM: Tensor, targets_C: Tensor, hidden_TM: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, M] in `dtype` for a chunk's hidden states: in the memory of their own gradient, if there is to be one."""
    shape = targets_C.shape[0], hidden_TM.shape[1]
    if grad_CM.shape != shape:
        return hidden_TM.new_empty(shape, dtype=dtype)
    return grad_CM.view(-1).view(dtype)[: grad_CM.numel()].view(shape)


def _matmul(a: Tensor, b: Tensor, out: Tensor, writes_float32: bool, *, accumulate: bool = False) -> None:
    """`out = a @ b`, or `out += a @ b`, never rounding to less than `out` has where the GEMM can help it.

    The operands come as they lie. On the CPU the weight's gradient as `G.t() @ X` is the fastest layout tried:
    `X.t() @ G` takes 1.2 times as long in bf16 and a transposed copy of G first 1.3 times.
    """
    if writes_float32 and out.dtype == torch.float32:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        block = _cast_rows(out)
        for sums, product in zip(out.split(block), (a @ b).split(block), strict=True):
            sums.add_(product)
    else:
        out.copy_(a @ b)


def _cast_rows(matrix: Tensor) -> int:
    """Rows to add up at once where dtypes differ: on the CPU PyTorch first casts all of what it adds, on CUDA none."""
    return len(matrix) if matrix.is_cuda else launch.rows_per_block(*matrix.shape)


# ------------------------------------------------------------------------------------------------ operators and fakes

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? rows, Tensor? weights"
_OUTPUTS = "Tensor, Tensor, Tensor, Tensor, Tensor"  # the fields of `RowOutputs`


@torch.library.custom_op(
    "packsft::linear_cross_entropy",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor scale, {OPTIONS_SCHEMA}, ScalarType dtype, bool hidden_grad, bool weight_grad, "
    f"bool bias_grad) -> ({_OUTPUTS}, Tensor, Tensor, Tensor)",
)
def _reduced_op(*args: Any) -> tuple[Tensor, ...]:
    """`(scale * loss).sum()`, the per-row outputs, and the gradients wanted."""
    return _reduced(_chunk_loop, *args)


@_reduced_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return _reduced(_fake_chunk_loop, *args)


def _reduced(loop: Callable[..., tuple[RowOutputs, Gradients]], *args: Any) -> tuple[Tensor, ...]:
    (*inputs, scale), fields, (dtype, *wanted) = args[:7], args[7 : 7 + _NUM_FIELDS], args[7 + _NUM_FIELDS :]
    factor = scale if _folds(scale, dtype) else None
    with torch.autocast(scale.device.type, enabled=False):
        outputs, gradients = loop(*inputs, factor, LossOptions(*fields), dtype, tuple(wanted))
    return (scaled_sum(outputs.loss, scale), *outputs[1:], *gradients)


def _folds(scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether the factor enters the gradient of the logits, before its one rounding, or waits for the backward: in
    float16 a gradient divided by the number of items underflows unless a gradient scaler's factor comes first."""
    return dtype != torch.float16 or scale.dim() > 0


@torch.library.custom_op(
    "packsft::linear_cross_entropy_rows",
    mutates_args=(),
    schema=f"({_INPUTS}, {OPTIONS_SCHEMA}, ScalarType dtype) -> ({_OUTPUTS})",
)
def _rows_op(*args: Any) -> tuple[Tensor, ...]:
    """The per-row outputs alone: their upstream gradients differ, so the backward makes the logits once more."""
    return _per_row(_chunk_loop, *args)


@_rows_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return _per_row(_fake_chunk_loop, *args)


def _per_row(loop: Callable[..., tuple[RowOutputs, Gradients]], *args: Any) -> tuple[Tensor, ...]:
    inputs, fields, dtype = args[:6], args[6:-1], args[-1]
    with torch.autocast(inputs[0].device.type, enabled=False):
        outputs, _ = loop(*inputs, None, LossOptions(*fields), dtype, (False, False, False))
    return tuple(outputs)


def _fake_chunk_loop(*args: Any) -> tuple[RowOutputs, Gradients]:
    """The chunk loop on fake tensors. Where a size is a symbol, so is the number of chunks, and no byte can be counted:
    there only what is returned is allocated, and no guard is laid on the sizes."""
    hidden, weight, bias, targets, *_, options, dtype, wanted = args
    if has_symbolic_size(hidden, weight, targets):
        outputs = empty_outputs(hidden.new_empty(targets.shape[0], 0, dtype=dtype), options)
        return outputs, _empty_gradients(hidden, weight, bias, targets.shape[0], wanted)
    return _chunk_loop(*args, row_pass=loss_rows_fake)


# ----------------------------------------------------------------------------------------------------------- autograd


def _reduced_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, _targets, rows, _weights, scale = inputs[:7]
    dtype = inputs[7 + _NUM_FIELDS]
    # Attributes, not saved tensors: hooks that offload saved tensors would carry dW to the host and back. Detached,
    # since an output that knows its node, held by that node, is never freed.
    ctx.gradients = Gradients(*(gradient.detach() for gradient in output[5:]))
    ctx.scale = None if _folds(scale, dtype) else scale
    ctx.rows, ctx.num_tokens = rows, hidden.shape[0]
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


# Private, seen in torch 2.10 to 2.13. Without it every gradient is kept and multiplied out of place.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


@differentiable_once
def _reduced_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if upstream is not None:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: a second backward needs retain_graph=True in the first, which otherwise gives "
                "its gradients away"
            )
        # The node outlives the backward for as long as someone holds the loss; its gradients should not.
        keep = _keeps_graph()
        gradients, factor = list(ctx.gradients), upstream if ctx.scale is None else upstream * ctx.scale
        if not keep:
            ctx.gradients = None
        grads = _scaled_gradients(gradients, factor, keep, ctx.needs_input_grad, ctx.rows, ctx.num_tokens, ctx.dtypes)
    return (*grads, *[None] * (4 + _NUM_FIELDS + 4))


def _scaled_gradients(
    gradients: list[Tensor | None],
    factor: Tensor | None,
    keep: bool,
    needed: tuple[bool, ...],
    rows: Tensor | None,
    num_tokens: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of hidden [T, M], weight and bias: times `factor` (None for 1), in the parameters' dtypes.

    Takes each out of the list `gradients`, so that it is freed before the next one is scaled; the largest first.
    """

    def scaled(index: int) -> Tensor | None:
        gradient, dtype, gradients[index] = gradients[index], dtypes[index], None
        if gradient is None or not needed[index]:
            return None
        if factor is None:
            return gradient.to(dtype)
        # In place only where nothing is traced: a tracer would see an output of the operator change.
        if gradient.dtype == dtype and not keep and type(gradient) in (Tensor, FakeTensor):
            return gradient.mul_(factor)
        # Multiplied in float32, rounded once.
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))

    weight, hidden, bias = scaled(1), scaled(0), scaled(2)
    if hidden is not None and rows is not None:
        hidden = hidden.new_zeros(num_tokens, hidden.shape[1]).index_add_(0, rows, hidden)
    return hidden, weight, bias


_reduced_op.register_autograd(_reduced_backward, setup_context=_reduced_setup_context)


def _rows_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, dtype = inputs[:6] + inputs[-1:]
    ctx.save_for_backward(*tensors)
    ctx.fields, ctx.dtype = inputs[6:-1], dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _rows_backward(ctx: Any, upstream_N: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if upstream_N is not None:
        hidden, weight, bias, targets, rows, weights = ctx.saved_tensors
        fields = (*ctx.fields[:-2], False, False)
        needed = ctx.needs_input_grad[:3]
        operator = torch.ops.packsft.linear_cross_entropy
        args = hidden, weight, bias, targets, rows, weights, upstream_N, *fields, ctx.dtype, *needed
        gradients = list(operator(*args)[5:])
        dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        grads = _scaled_gradients(gradients, None, False, needed, rows, hidden.shape[0], dtypes)
    return (*grads, *[None] * (3 + _NUM_FIELDS + 1))


_rows_op.register_autograd(_rows_backward, setup_context=_rows_setup_context)


# ------------------------------------------------------------------------------------------------------------- public


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    options: LossOptions = _DEFAULT_OPTIONS,
    num_items: float | Tensor | None = None,
    reduction: str = "mean",
) -> LossOutput:
    """Cross-entropy of `F.linear(hidden, weight, bias)[rows]` with `targets`, without ever holding all the logits.

    The gradients of the scalar reductions are made in the forward. "none" makes the logits again in the backward
    (four GEMMs), since the upstream gradient is not known before. Under autocast the GEMMs run in its dtype; gradients
    come back in the dtypes of `hidden`, `weight` and `bias`. float16 on the CPU is computed in float32.

    Args:
        hidden: [T, M], float64, float32, bfloat16 or float16.
        weight: [V, M], the dtype of `hidden` unless autocast is on.
        targets: [N] int64; a row whose target is `options.ignore_index` counts for nothing.
        rows: [N] int32 or int64 positions in `hidden`; None for all T, then N = T. May repeat.
        bias: [V] or None.
        weights: [N] factor of each row's loss.
        options: see `LossOptions`.
        num_items: what "mean" divides by, a number or a tensor of one element on the device (never read back); by
            default the number of rows that are not ignored (not the sum of the weights). 0 gives a loss of 0.
        reduction: "mean" (sum / num_items), "sum" or "none" ([N]).

    Returns:
        LossOutput, its loss in float32 (float64 for float64).

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or combination.
        RuntimeError: on a second backward without retain_graph, and on differentiating twice.
    """
    check_argument(
        hidden.dim() == 2 and hidden.is_floating_point(), "hidden", describe(hidden), "floating point [T, M]"
    )
    width = hidden.shape[1]
    check_argument(weight.dim() == 2 and weight.shape[1] == width, "weight", describe(weight), f"[V, {width}]")
    if bias is not None:
        check_argument(bias.shape == weight.shape[:1], "bias", describe(bias), f"[{weight.shape[0]}]")
    check_reduction(reduction, num_items)
    check_rows(rows, targets, weights, hidden.shape[0] if rows is None else rows.numel(), hidden.device)

    device = hidden.device.type
    dtype = hidden.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        check_argument(weight.dtype == dtype, "weight", describe(weight), f"{dtype}, as hidden, or autocast")
    if device == "cpu" and dtype == torch.float16:
        dtype = torch.float32
    weights = None if weights is None else weights.detach()
    fields = options.fields()

    if reduction == "none":
        outputs = RowOutputs(
            *torch.ops.packsft.linear_cross_entropy_rows(hidden, weight, bias, targets, rows, weights, *fields, dtype)
        )
        return to_loss_output(outputs.loss, outputs, options)
    if reduction == "mean":
        scale = inverse_items(targets, options, num_items)
    else:
        scale = torch.ones((), dtype=torch.float64, device=hidden.device)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    outputs = RowOutputs(
        *torch.ops.packsft.linear_cross_entropy(
            hidden, weight, bias, targets, rows, weights, scale, *fields, dtype, *wanted
        )[:5]
    )
    return to_loss_output(outputs.loss, outputs, options)
