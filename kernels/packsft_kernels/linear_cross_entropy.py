"""The fused LM head: projection and cross-entropy of the scored rows, one chunk of logits at a time.

The gradients are computed in the forward, while the logits of a chunk exist: three GEMMs with a trained head, two with
a frozen head, one under `no_grad`. It has no Triton kernel of its own: `loss_rows` processes the logits of a chunk in
place. A low-rank addition to the weight (a LoRA on the head) adds two narrow products to each GEMM, and no [V, M].
Knows hidden states and matrices; knows nothing of the model around them.

Legend: T tokens, N scored rows, V vocabulary, M model width, R rank of the addition, C rows of one chunk.

Memory besides the inputs: one chunk of logits (`launch.rows_per_chunk`), the stored gradients dX [N, M] and dW [V, M]
(the latter in float32 while several chunks add to it), a few numbers per row, and the weight in the autocast dtype if
that differs. The hidden states of a chunk are stored where their gradient will be. They take memory of their own only
if no gradient is wanted, or while they are cast.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from packsft_kernels import launch
from packsft_kernels.autograd import differentiable_once
from packsft_kernels.cross_entropy import (
    check_argument,
    check_reduction,
    check_rows,
    check_values,
    describe,
    inverse_items,
    scaled_sum,
    to_loss_output,
)
from packsft_kernels.cross_entropy_kernel import scale_
from packsft_kernels.cross_entropy_rows import (
    RowOutputs,
    empty_outputs,
    has_symbolic_size,
    loss_rows,
    loss_rows_fake,
    row_dtype,
)
from packsft_kernels.loss_options import OPTIONS_SCHEMA, LossOptions, LossOutput

_DEFAULT_OPTIONS = LossOptions()
_NUM_FIELDS = len(dataclasses.fields(LossOptions))


class Gradients(NamedTuple):
    """Gradients of the loss, each empty unless wanted. `hidden` has one row per scored row (N), not per token."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor


_NUM_GRADIENTS = len(Gradients._fields)


class Wanted(NamedTuple):
    """Which gradients are wanted: the same fields."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    down: bool = False
    up: bool = False


def _empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    num_rows: int,
    wanted: Wanted,
    *,
    summed: bool = False,
) -> Gradients:
    """`summed`: over several chunks, for which bfloat16 is too narrow."""

    def empty(shape: tuple[int, ...], is_wanted: bool, dtype: torch.dtype) -> Tensor:
        return hidden.new_empty(shape if is_wanted else (0,) * len(shape), dtype=dtype)

    def like(matrix: Tensor | None, is_wanted: bool, rows: int | None = None) -> Tensor:
        matrix = hidden if matrix is None else matrix
        dtype = _stored_dtype(matrix)
        if summed and rows is None and dtype == torch.bfloat16:
            dtype = torch.float32
        return empty((matrix.shape[0] if rows is None else rows, matrix.shape[1]), is_wanted, dtype)

    return Gradients(
        like(hidden, wanted.hidden, num_rows),
        like(weight, wanted.weight),
        empty((weight.shape[0],), wanted.bias, row_dtype(weight.dtype)),  # V elements only: wide enough to add in
        like(down, wanted.down, num_rows),
        like(up, wanted.up),
    )


def _stored_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which a gradient is stored until its upstream factor is known.

    float32 where a small gradient would underflow (float16), else the parameter's dtype. The factor is 1 in most
    training loops: what a GEMM writes in bfloat16 is then the gradient, and no pass over it follows."""
    if parameter.dtype == torch.float16:
        return torch.float32
    return parameter.dtype


def _chunk_loop(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, *others: Any,
    row_pass: Callable[..., RowOutputs] = loss_rows,
) -> tuple[RowOutputs, Gradients]:  # fmt: skip
    """Per-row outputs and the gradients of `(scale * loss).sum()`. Arguments: see `_summed_over_chunks`.

    The fakes of the operators run the same loop with `row_pass=loss_rows_fake`, so they allocate and free the same.
    """
    outputs, gradients = _summed_over_chunks(hidden, weight, bias, down, up, *others, row_pass=row_pass)
    # Sums are rounded here, where the chunk of logits has been freed.
    gradients = gradients._replace(weight=gradients.weight.to(_stored_dtype(weight)))
    return outputs, gradients if up is None else gradients._replace(up=gradients.up.to(_stored_dtype(up)))


def _summed_over_chunks(
    hidden_TM: Tensor,
    weight_VM: Tensor,
    bias_V: Tensor | None,
    down_TR: Tensor | None,
    up_VR: Tensor | None,
    targets_N: Tensor,
    rows_N: Tensor | None,
    weights_N: Tensor | None,
    scale: Tensor | None,
    options: LossOptions,
    dtype: torch.dtype,
    wanted: Wanted,
    *,
    row_pass: Callable[..., RowOutputs],
) -> tuple[RowOutputs, Gradients]:
    """Per-row outputs, and the gradients as the chunks leave them. GEMMs run in `dtype`; `scale` is 0-d or [N]."""
    num_rows, vocab = targets_N.shape[0], weight_VM.shape[0]
    device = hidden_TM.device
    # GEMMs on CUDA can write float32 from 16-bit inputs; on the CPU they cannot.
    writes_float32 = hidden_TM.is_cuda and dtype in (torch.bfloat16, torch.float16)

    # On CUDA, rows start on a multiple of 16 elements, so that the kernel's accesses are wide for every V.
    stride = -(-vocab // 16) * 16 if hidden_TM.is_cuda else vocab
    rounded = wanted.weight and weight_VM.dtype == dtype == torch.bfloat16
    chunk = launch.rows_per_chunk(
        num_rows, stride, dtype.itemsize,
        weight_grad=wanted.weight, rounded_width=weight_VM.shape[1] if rounded else 0,
    )  # fmt: skip
    buffer_CV = torch.empty(chunk, stride, dtype=dtype, device=device)[:, :vocab]
    outputs = empty_outputs(hidden_TM.new_empty(num_rows, 0, dtype=dtype), options)
    gradients = _empty_gradients(
        hidden_TM, weight_VM, bias_V, down_TR, up_VR, num_rows, wanted, summed=chunk < num_rows
    )
    if num_rows == 0:
        gradients.weight.zero_()
        gradients.up.zero_()
    gradients.bias.zero_()
    weight_VM = weight_VM.to(dtype)
    bias_V = None if bias_V is None else bias_V.to(dtype)
    up_VR = None if up_VR is None else up_VR.to(dtype)

    for start in range(0, num_rows, max(1, chunk)):
        chunk_rows = slice(start, min(start + chunk, num_rows))
        # An ignored row may hold anything, and 0 * NaN would reach the weight's gradient. Zeros make its logits finite.
        ignored_C1 = (targets_N[chunk_rows] == options.ignore_index)[:, None]
        hidden_CM = _chunk_of(hidden_TM, chunk_rows, rows_N, ignored_C1, gradients.hidden, dtype)
        logits_CV = buffer_CV[: len(hidden_CM)]
        if bias_V is None:
            torch.mm(hidden_CM, weight_VM.t(), out=logits_CV)
        else:
            torch.addmm(bias_V, hidden_CM, weight_VM.t(), out=logits_CV)
        if down_TR is not None and up_VR is not None:
            down_CR = _chunk_of(down_TR, chunk_rows, rows_N, ignored_C1, gradients.down, dtype)
            torch.addmm(logits_CV, down_CR, up_VR.t(), out=logits_CV)
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

        grad_CV = logits_CV  # overwritten by `row_pass`
        if wanted.weight:
            _matmul(grad_CV.t(), hidden_CM, gradients.weight, writes_float32, accumulate=start > 0)
        if wanted.up:
            _matmul(grad_CV.t(), down_CR, gradients.up, writes_float32, accumulate=start > 0)
        if wanted.hidden:  # last: it overwrites hidden_CM
            _matmul(grad_CV, weight_VM, gradients.hidden[chunk_rows], writes_float32)
        if wanted.down and up_VR is not None:  # overwrites down_CR
            _matmul(grad_CV, up_VR, gradients.down[chunk_rows], writes_float32)
        if wanted.bias:
            for rows_RV in grad_CV.split(_cast_rows(grad_CV)):
                gradients.bias.add_(rows_RV.sum(0, dtype=row_dtype(dtype)))
    return outputs, gradients


def _chunk_of(
    matrix_TM: Tensor,
    chunk_rows: slice,
    rows_N: Tensor | None,
    ignored_C1: Tensor,
    gradient_NM: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The rows [C, M] of the chunk in `dtype`, 0 if ignored, stored in the memory of their own gradient if possible."""
    shape = len(ignored_C1), matrix_TM.shape[1]
    if gradient_NM.shape[1] == 0 or gradient_NM.dtype.itemsize < dtype.itemsize:
        chunk_CM = matrix_TM.new_empty(shape, dtype=dtype)
    else:
        gradient_CM = gradient_NM[chunk_rows]
        chunk_CM = gradient_CM.view(-1).view(dtype)[: gradient_CM.numel()].view(shape)
    if rows_N is None:
        chunk_CM.copy_(matrix_TM[chunk_rows])
    elif matrix_TM.dtype == dtype:
        torch.index_select(matrix_TM, 0, rows_N[chunk_rows], out=chunk_CM)
    else:
        chunk_CM.copy_(matrix_TM.index_select(0, rows_N[chunk_rows]))
    return chunk_CM.masked_fill_(ignored_C1, 0.0)


def _matmul(a: Tensor, b: Tensor, out: Tensor, writes_float32: bool, *, accumulate: bool = False) -> None:
    """`out = a @ b` or `out += a @ b`, without rounding below the precision of `out` if the GEMM allows it.

    Operands keep their layout. On the CPU, `G.t() @ X` is the fastest layout tried for the weight's gradient: in bf16
    `X.t() @ G` takes 1.2 times as long, and a transposed copy of G first takes 1.3 times.
    """
    if writes_float32 and out.dtype == torch.float32:
        if not accumulate:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        elif not isinstance(out, FakeTensor):  # of which torch 2.11 raises; nothing would be allocated
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        block = _cast_rows(out)
        for sums, product in zip(out.split(block), (a @ b).split(block), strict=True):
            sums.add_(product)
    else:
        out.copy_(a @ b)


def _cast_rows(matrix: Tensor) -> int:
    """Rows to add at once if dtypes differ. On the CPU, PyTorch first casts the whole operand; on CUDA it does not."""
    return len(matrix) if matrix.is_cuda else launch.rows_per_block(*matrix.shape)


# ------------------------------------------------------------------------------------------------ operators and fakes

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, Tensor targets, Tensor? rows, "
    "Tensor? weights"
)
_NUM_INPUTS = _INPUTS.count(",") + 1
_OUTPUTS = "Tensor, Tensor, Tensor, Tensor, Tensor"  # the fields of `RowOutputs`


@torch.library.custom_op(
    "packsft::linear_cross_entropy",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor scale, {OPTIONS_SCHEMA}, ScalarType dtype, bool hidden_grad, bool weight_grad, "
    f"bool bias_grad, bool down_grad, bool up_grad) -> ({_OUTPUTS}, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _reduced_op(*args: Any) -> tuple[Tensor, ...]:
    """`(scale * loss).sum()`, the per-row outputs, and the wanted gradients."""
    return _reduced(_chunk_loop, *args)


@_reduced_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return _reduced(_fake_chunk_loop, *args)


def _reduced(loop: Callable[..., tuple[RowOutputs, Gradients]], *args: Any) -> tuple[Tensor, ...]:
    inputs, scale, others = args[:_NUM_INPUTS], args[_NUM_INPUTS], args[_NUM_INPUTS + 1 :]
    fields, (dtype, *wanted) = others[:_NUM_FIELDS], others[_NUM_FIELDS:]
    factor = scale if _folds(scale, dtype) else None
    with torch.autocast(scale.device.type, enabled=False):
        outputs, gradients = loop(*inputs, factor, LossOptions(*fields), dtype, Wanted(*wanted))
    return (scaled_sum(outputs.loss, scale), *outputs[1:], *gradients)


def _folds(scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether the factor is applied to the gradient of the logits, before its only rounding, or in the backward.

    In float16 it waits for the backward: a gradient divided by the number of items underflows, unless the factor of a
    gradient scaler is applied first."""
    return dtype != torch.float16 or scale.dim() > 0


@torch.library.custom_op(
    "packsft::linear_cross_entropy_rows",
    mutates_args=(),
    schema=f"({_INPUTS}, {OPTIONS_SCHEMA}, ScalarType dtype) -> ({_OUTPUTS})",
)
def _rows_op(*args: Any) -> tuple[Tensor, ...]:
    """The per-row outputs alone. Upstream gradients differ by row, so the backward computes the logits again."""
    return _per_row(_chunk_loop, *args)


@_rows_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return _per_row(_fake_chunk_loop, *args)


def _per_row(loop: Callable[..., tuple[RowOutputs, Gradients]], *args: Any) -> tuple[Tensor, ...]:
    inputs, fields, dtype = args[:_NUM_INPUTS], args[_NUM_INPUTS:-1], args[-1]
    with torch.autocast(inputs[0].device.type, enabled=False):
        outputs, _ = loop(*inputs, None, LossOptions(*fields), dtype, Wanted())
    return tuple(outputs)


def _fake_chunk_loop(*args: Any) -> tuple[RowOutputs, Gradients]:
    """The chunk loop on fake tensors.

    With a symbolic size the number of chunks is symbolic too, and no bytes can be counted. Then only the results are
    allocated, and no guard is put on the sizes."""
    hidden, weight, bias, down, up, targets, *_, options, dtype, wanted = args
    if has_symbolic_size(hidden, weight, targets):
        outputs = empty_outputs(hidden.new_empty(targets.shape[0], 0, dtype=dtype), options)
        return outputs, _empty_gradients(hidden, weight, bias, down, up, targets.shape[0], wanted)
    return _chunk_loop(*args, row_pass=loss_rows_fake)


# ----------------------------------------------------------------------------------------------------------- autograd


def _reduced_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    parameters, (rows, _, scale) = inputs[:_NUM_GRADIENTS], inputs[_NUM_GRADIENTS + 1 : _NUM_INPUTS + 1]
    dtype = inputs[_NUM_INPUTS + 1 + _NUM_FIELDS]
    # Attributes, not saved tensors: hooks that offload saved tensors would copy dW to the host and back. Detached: a
    # node that holds its own output is never freed.
    ctx.gradients = Gradients(*(gradient.detach() for gradient in output[5:]))
    ctx.scale = None if _folds(scale, dtype) else scale
    ctx.rows, ctx.num_tokens, ctx.dtypes = rows, parameters[0].shape[0], _dtypes(parameters)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


# Private function of PyTorch, present in 2.10 to 2.13. Without it, gradients are kept and multiplied out of place.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


@differentiable_once
def _reduced_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = (None,) * _NUM_GRADIENTS
    if upstream is not None:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: a second backward needs retain_graph=True in the first one, which otherwise "
                "frees the gradients"
            )
        # The node lives as long as the loss is referenced; its gradients should not.
        keep = _keeps_graph()
        gradients, factor = list(ctx.gradients), upstream if ctx.scale is None else upstream * ctx.scale
        if not keep:
            ctx.gradients = None
        grads = _scaled_gradients(gradients, factor, keep, ctx.needs_input_grad, ctx.rows, ctx.num_tokens, ctx.dtypes)
    return (*grads, *[None] * (4 + _NUM_FIELDS + 1 + _NUM_GRADIENTS))


def _dtypes(parameters: tuple[Tensor | None, ...]) -> list[torch.dtype | None]:
    return [None if parameter is None else parameter.dtype for parameter in parameters]


def _scaled_gradients(
    gradients: list[Tensor | None],
    factor: Tensor | None,
    keep: bool,
    needed: tuple[bool, ...],
    rows: Tensor | None,
    num_tokens: int,
    dtypes: list[torch.dtype | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of hidden [T, M], weight and so on, times `factor` (None: 1), in the dtypes of the parameters.

    Each is taken out of the list `gradients`, so that it is freed before the next one is scaled. The largest is first.
    """

    def scaled(index: int) -> Tensor | None:
        gradient, dtype, gradients[index] = gradients[index], dtypes[index], None
        if gradient is None or not needed[index]:
            return None
        if factor is None:
            return gradient.to(dtype)
        # In place only if nothing is traced: a tracer would see an output of the operator change.
        if gradient.dtype == dtype and not keep and type(gradient) in (Tensor, FakeTensor):
            return scale_(gradient, factor)
        # Multiplied in float32.
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))

    def to_tokens(gradient: Tensor | None) -> Tensor | None:
        if gradient is None or rows is None:
            return gradient
        return gradient.new_zeros(num_tokens, gradient.shape[1]).index_add_(0, rows, gradient)

    weight, hidden, bias, down, up = (scaled(index) for index in (1, 0, 2, 3, 4))
    return to_tokens(hidden), weight, bias, to_tokens(down), up


_reduced_op.register_autograd(_reduced_backward, setup_context=_reduced_setup_context)


def _rows_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_INPUTS])
    ctx.fields, ctx.dtype = inputs[_NUM_INPUTS:-1], inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _rows_backward(ctx: Any, upstream_N: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = (None,) * _NUM_GRADIENTS
    if upstream_N is not None:
        inputs = ctx.saved_tensors
        parameters, rows = inputs[:_NUM_GRADIENTS], inputs[_NUM_GRADIENTS + 1]
        fields = LossOptions(*ctx.fields).loss_alone().fields()
        needed = ctx.needs_input_grad[:_NUM_GRADIENTS]
        operator = torch.ops.packsft.linear_cross_entropy
        gradients = list(operator(*inputs, upstream_N, *fields, ctx.dtype, *needed)[5:])
        grads = _scaled_gradients(gradients, None, False, needed, rows, parameters[0].shape[0], _dtypes(parameters))
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
    low_rank: tuple[Tensor, Tensor] | None = None,
    options: LossOptions = _DEFAULT_OPTIONS,
    num_items: float | Tensor | None = None,
    reduction: str = "mean",
) -> LossOutput:
    """Cross-entropy of `(F.linear(hidden, weight, bias) + down @ up.T)[rows]` with `targets`, `low_rank = (down, up)`.

    It makes the logits in chunks and keeps none. For the scalar reductions, gradients are computed in the forward.
    "none" computes the logits again in the backward (four GEMMs), because the upstream gradient is only known there.
    Under autocast the GEMMs run in its dtype. Each gradient has the dtype of its parameter. float16 on the CPU is
    computed in float32.

    Args:
        hidden: [T, M], float64, float32, bfloat16 or float16.
        weight: [V, M], in the dtype of `hidden` unless autocast is on.
        targets: [N] int64. A row with the target `options.ignore_index` is ignored.
        rows: [N] int32 or int64, positions in `hidden`, which may repeat. None: all T rows, so N = T.
        bias: [V] or None.
        weights: [N] factor of each row's loss.
        low_rank: `down` [T, R] and `up` [V, R], in any floating dtype. For a LoRA these are
            `scaling * F.linear(hidden, A)` and `B`. Both are differentiable, so autograd handles the way from the
            hidden states to `down`.
        options: see `LossOptions`.
        num_items: divisor of "mean", a number or a tensor of one element on the device (never read back). Default: the
            number of rows that are not ignored (not the sum of the weights). 0 gives a loss of 0.
        reduction: "mean" (sum / num_items), "sum" or "none" ([N]).

    Returns:
        LossOutput, with the loss in float32 (float64 for float64).

    Raises:
        ValueError: for a wrong shape, dtype or combination; the message names the argument.
        RuntimeError: on a second backward without retain_graph, and on a second derivative by `backward()`. Asked for
            the gradients of certain tensors alone, PyTorch takes the first gradients for constants.
    """
    check_argument(
        hidden.dim() == 2 and hidden.is_floating_point(), "hidden", describe(hidden), "floating point [T, M]"
    )
    width = hidden.shape[1]
    fits = weight.dim() == 2 and weight.shape[1] == width and weight.shape[0] > 0
    check_argument(fits, "weight", describe(weight), f"[V, {width}], V of 1 or more")
    if bias is not None:
        check_argument(bias.shape == weight.shape[:1], "bias", describe(bias), f"[{weight.shape[0]}]")
    down, up = (None, None) if low_rank is None else low_rank
    if (down is None) != (up is None):
        raise ValueError("low_rank: got one matrix, allowed: [T, R] and [V, R]")
    if down is not None and up is not None:
        for matrix, length in ((down, hidden.shape[0]), (up, weight.shape[0])):
            fits = matrix.dim() == 2 and matrix.is_floating_point() and matrix.shape[1] == up.shape[-1]
            if not fits or matrix.shape[0] != length:  # format only on error: else T is a constant of the graph
                raise ValueError(f"low_rank: got {describe(down)} and {describe(up)}, allowed: [T, R] and [V, R]")
    check_reduction(reduction, num_items)
    check_rows(rows, targets, weights, hidden.shape[0] if rows is None else rows.numel(), hidden.device)
    check_values(rows, targets, hidden.shape[0], weight.shape[0], options)

    device = hidden.device.type
    dtype = hidden.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        check_argument(weight.dtype == dtype, "weight", describe(weight), f"{dtype}, as hidden, or autocast")
    if device == "cpu" and dtype == torch.float16:
        dtype = torch.float32
    fields = options.fields()
    parameters = hidden, weight, bias, down, up

    if reduction == "none":
        outputs = RowOutputs(
            *torch.ops.packsft.linear_cross_entropy_rows(*parameters, targets, rows, weights, *fields, dtype)
        )
        return to_loss_output(outputs.loss, outputs, options)
    if reduction == "mean":
        scale = inverse_items(targets, options, num_items)
    else:
        scale = torch.ones((), dtype=torch.float64, device=hidden.device)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in parameters]
    outputs = RowOutputs(
        *torch.ops.packsft.linear_cross_entropy(*parameters, targets, rows, weights, scale, *fields, dtype, *wanted)[:5]
    )
    return to_loss_output(outputs.loss, outputs, options)
