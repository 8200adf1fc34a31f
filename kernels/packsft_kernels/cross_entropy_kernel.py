"""Cross-entropy over rows of logits, in Triton: loss, gradient and per-row outputs in one launch.

Knows rows of logits; knows nothing of autograd or of where the logits come from. `cross_entropy_rows.py` explains the
arithmetic of a row and has the same computation in PyTorch.

Legend: N rows of logits, V vocabulary, [R, W] one block of a row: R lines of W neighbouring columns.

The grid is persistent: as many programs as fit on the device at once, and each takes one row after another. A row that
fits into the registers of a program (up to 16,384 columns) is read once. A longer row is read twice. The second read
should hit L2: 132 rows of 256 KB, one for each SM of an H100, are 34 of its 50 MB.

Accesses are 16 bytes wide for every V, stride and alignment. The *edge* of a row is the columns before its first and
after its last multiple of 16 bytes: at most 7 columns (3 in float32) at each end. It is handled separately. The *body*
is the columns between.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from packsft_kernels import _triton, launch
from packsft_kernels._triton import tl
from packsft_kernels.loss_options import LossOptions

# Per-row tensors may start anywhere in a chunk, and the number of rows changes in each step. Neither may trigger a
# recompilation during training.
_PER_ROW = tuple(
    f"{name}_ptr" for name in ("targets", "weights", "scale", "loss", "log_prob", "entropy", "correct", "lse")
)


@_triton.jit(do_not_specialize=("num_rows", "ignore_index"), do_not_specialize_on_alignment=_PER_ROW)
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
    num_rows,
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
    HAS_EDGE: tl.constexpr,  # some row starts or ends off a multiple of 16 bytes
    PER_ACCESS: tl.constexpr,  # columns in 16 bytes; 1 if gradient rows and logit rows differ in alignment
    ROUND_BF16: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    ONE_READ: tl.constexpr,  # one block holds a whole row
):
    ACCESS_BYTES: tl.constexpr = PER_ACCESS * logits_ptr.dtype.element_ty.primitive_bitwidth // 8
    LEAST: tl.constexpr = -3.4028234663852886e38  # of float32
    block = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    lane = tl.arange(0, 16)
    row = tl.program_id(0).to(tl.int64)  # row * stride exceeds 2^31 at 16,384 rows of 131,072
    while row < num_rows:
        row_ptr = logits_ptr + row * logits_stride
        row_grad_ptr = grad_ptr + row * grad_stride
        head = 0
        if HAS_EDGE:
            head = _columns_before_alignment(row_ptr, vocab, PER_ACCESS)
        else:  # needed here too: the compiler folds `+ head` away, and the hint on the sum with it
            row_ptr = tl.multiple_of(row_ptr, ACCESS_BYTES)
            row_grad_ptr = tl.multiple_of(row_grad_ptr, ACCESS_BYTES)
        body = (vocab - head) // PER_ACCESS * PER_ACCESS
        body_ptr = tl.multiple_of(row_ptr + head, ACCESS_BYTES)
        body_grad_ptr = tl.multiple_of(row_grad_ptr + head, ACCESS_BYTES)
        if HAS_EDGE:  # lanes 0 to 7 before the body, 8 to 15 after it
            edge = tl.where(lane < 8, lane, head + body + lane - 8)
            inside_edge = edge < tl.where(lane < 8, head, vocab)
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
                for start in range(0, body, R * W):
                    _store(body_grad_ptr + start + block, tl.zeros((R, W), tl.float32), start + block < body, False)
                if HAS_EDGE:
                    _store(row_grad_ptr + edge, tl.zeros((16,), tl.float32), inside_edge, False)
        else:
            # A target outside the vocabulary reads nothing and gives a NaN loss.
            in_range = (target >= 0) & (target < vocab)
            x_target = tl.load(row_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
            z_target = _transformed(x_target, logit_scale, softcap, HAS_SOFTCAP)
            body_target = (target - head).to(tl.int32)  # its column in the body

            # Over all columns but the target: the maximum, the sum `rest` of e = exp(z - maximum), the sum `dot` of
            # e * (z - maximum). And the sum of z. Maxima start at the least finite number: z - maximum is never NaN.
            rest_max = LEAST
            sum_z = 0.0
            if HAS_EDGE:
                x_edge = tl.load(row_ptr + edge, mask=inside_edge, other=0.0).to(tl.float32)
                z_edge = _transformed(x_edge, logit_scale, softcap, HAS_SOFTCAP)
                if HAS_SMOOTHING:
                    sum_z += tl.sum(tl.where(inside_edge, z_edge, 0.0), 0)
                z_edge = tl.where(inside_edge & (edge != target), z_edge, float("-inf"))
                rest_max = tl.maximum(rest_max, tl.max(z_edge, 0))
            if ONE_READ:
                x = tl.load(body_ptr + block, mask=block < body, other=0.0).to(tl.float32)
                z = _transformed(x, logit_scale, softcap, HAS_SOFTCAP)
                if HAS_SMOOTHING:
                    sum_z += _sum(tl.where(block < body, z, 0.0))
                z = tl.where((block < body) & (block != body_target), z, float("-inf"))
                rest_max = tl.maximum(rest_max, tl.max(tl.max(z, 0), 0))
                e = tl.exp(z - rest_max)  # only this stays in registers until the gradient is written
                rest = _sum(e)
                if HAS_ENTROPY:
                    dot = _sum(tl.where(e > 0, e * (z - rest_max), 0.0))
            else:
                # Each of the W lanes has its own sums: rescaled once per block, reduced to one number once per row.
                lane_max = tl.full((W,), LEAST, tl.float32)
                lane_rest = tl.zeros((W,), tl.float32)
                lane_dot = tl.zeros((W,), tl.float32)
                lane_z = tl.zeros((W,), tl.float32)
                for start in range(0, body, R * W):
                    column = start + block
                    x = tl.load(body_ptr + column, mask=column < body, other=0.0).to(tl.float32)
                    z = _transformed(x, logit_scale, softcap, HAS_SOFTCAP)
                    if HAS_SMOOTHING:
                        lane_z += tl.sum(tl.where(column < body, z, 0.0), 0)
                    z = tl.where((column < body) & (column != body_target), z, float("-inf"))
                    new_max = tl.maximum(lane_max, tl.max(z, 0))
                    e = tl.exp(z - new_max[None, :])
                    kept = tl.exp(lane_max - new_max)
                    if HAS_ENTROPY:
                        moved = tl.where(lane_rest > 0, lane_dot + lane_rest * (lane_max - new_max), 0.0)
                        lane_dot = tl.where(kept > 0, kept * moved, 0.0) + tl.sum(
                            tl.where(e > 0, e * (z - new_max[None, :]), 0.0), 0
                        )
                    lane_rest = kept * lane_rest + tl.sum(e, 0)
                    lane_max = new_max
                rest_max = tl.maximum(rest_max, tl.max(lane_max, 0))
                kept = tl.exp(lane_max - rest_max)
                rest = tl.sum(kept * lane_rest, 0)
                if HAS_ENTROPY:
                    moved = tl.where(lane_rest > 0, lane_dot + lane_rest * (lane_max - rest_max), 0.0)
                    dot = tl.sum(tl.where(kept > 0, kept * moved, 0.0), 0)
                if HAS_SMOOTHING:
                    sum_z += tl.sum(lane_z, 0)
            if HAS_EDGE:
                e_edge = tl.exp(z_edge - rest_max)
                rest += tl.sum(e_edge, 0)
                if HAS_ENTROPY:
                    dot += tl.sum(tl.where(e_edge > 0, e_edge * (z_edge - rest_max), 0.0), 0)

            maximum = tl.maximum(rest_max, z_target)
            # Not `below == 0`: a fused multiply-subtract of a scaled logit would leave a rounding error there.
            is_max = z_target >= rest_max
            shift, shift_error = _difference(rest_max, maximum)
            # exp(shift) turns the rounding of `shift` into a relative error of `rest`, so it is corrected. If `rest`
            # vanishes, the scale is 0, but NaN for an infinite target.
            rest_scale = tl.where(shift > -200.0, _exp(shift) * (1.0 + shift_error), maximum - maximum)
            rest_scale = tl.where(rest > 0, rest_scale, 1.0)
            below = tl.where(is_max, 0.0, rest_max - z_target)
            e_target = _exp(-below)
            if HAS_ENTROPY:
                dot = tl.where((rest > 0) & (rest_scale > 0), rest_scale * (dot + rest * shift), 0.0)
                dot -= tl.where(e_target > 0, e_target * below, 0.0)
            rest *= rest_scale
            total = rest + e_target

            log_total = tl.where(is_max, _log1p(rest), tl.log(total))
            nll = below + log_total
            lse = maximum + log_total
            loss = nll
            if HAS_SMOOTHING:
                loss = (1.0 - smoothing) * nll + smoothing * (lse - sum_z / vocab)
            if HAS_DFT:
                loss *= e_target / total  # not exp(-nll): it turns the rounding of nll into a relative error
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
                better = (rest_max > z_target).to(tl.int32)
                if rest_max == z_target:  # a tie: the first column wins; only here are columns compared
                    for start in range(0, tl.minimum(body, body_target), R * W):
                        column = start + block
                        x = tl.load(body_ptr + column, mask=column < body, other=0.0).to(tl.float32)
                        z = _transformed(x, logit_scale, softcap, HAS_SOFTCAP)
                        z = tl.where((column < body) & (column < body_target), z, float("-inf"))
                        better |= (tl.max(tl.max(z, 0), 0) == z_target).to(tl.int32)
                    if HAS_EDGE:
                        better |= tl.max(((z_edge == z_target) & (edge < target)).to(tl.int32), 0)
                tl.store(correct_ptr + row, ((better == 0) & in_range).to(tl.int8))

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
                if HAS_SOFTCAP:
                    target_grad *= _softcap_derivative(x_target, logit_scale, softcap)
                factor = rest_scale * ((nll_factor + z_factor) / total)  # of exp(z - rest_max)

                # The gradient may overwrite the logits. After this barrier a thread stores only to places that no other
                # thread still reads: all threads have read the shared values (the target's logit, the edge).
                tl.debug_barrier()
                for start in range(0, body, R * W):
                    column = start + block
                    if not ONE_READ or HAS_SOFTCAP:
                        x = tl.load(body_ptr + column, mask=column < body, other=0.0).to(tl.float32)
                    if not ONE_READ:
                        e = tl.exp(_transformed(x, logit_scale, softcap, HAS_SOFTCAP) - rest_max)
                    grad = e * factor - uniform
                    if HAS_SOFTCAP:
                        grad *= _softcap_derivative(x, logit_scale, softcap)
                    grad = tl.where(column == body_target, target_grad, grad)
                    _store(body_grad_ptr + column, grad, column < body, ROUND_BF16)
                if HAS_EDGE:
                    grad = e_edge * factor - uniform
                    if HAS_SOFTCAP:
                        grad *= _softcap_derivative(x_edge, logit_scale, softcap)
                    grad = tl.where(edge == target, target_grad, grad)
                    _store(row_grad_ptr + edge, grad, inside_edge, ROUND_BF16)
        row += tl.num_programs(0)


@_triton.jit
def _columns_before_alignment(row_ptr, vocab, PER_ACCESS: tl.constexpr):
    """Number of columns of a row before the first multiple of 16 bytes."""
    element = row_ptr.to(tl.int64) // (row_ptr.dtype.element_ty.primitive_bitwidth // 8)
    return tl.minimum((-element) & (PER_ACCESS - 1), vocab).to(tl.int32)


@_triton.jit
def _transformed(x, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    z = x * logit_scale
    if HAS_SOFTCAP:
        z = softcap * _triton.tanh(z / softcap)
    return z


@_triton.jit
def _softcap_derivative(x, logit_scale, softcap):
    """1 - tanh^2. Where tanh is large this cancels, so 1 / cosh^2 is used there."""
    ratio = x * logit_scale / softcap
    decay = tl.exp(-2.0 * tl.abs(ratio))
    tanh = _triton.tanh(ratio)
    return tl.where(tl.abs(tanh) < 0.5, 1.0 - tanh * tanh, 4.0 * decay / ((1.0 + decay) * (1.0 + decay)))


@_triton.jit
def _exp(x):
    """exp(x) for x <= 0, accurate to two units in the last place.

    The exp of a GPU rounds x * log2(e), so its relative error is 4e-8 * |x|. This one is Cody and Waite's: it takes out
    whole powers of 2, and splits ln 2 into two parts such that `n` times the first part is exact.
    """
    x = tl.where(x < -200.0, -200.0, x)  # a NaN stays one
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    return tl.exp((x - n * 0.693359375) + n * 2.12194440e-4) * tl.exp2(n)


@_triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 0), 0)


@_triton.jit
def _store(ptr, value, mask, ROUND_BF16: tl.constexpr):
    if ROUND_BF16:
        value = _triton.round_to_bf16(value)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@_triton.jit
def _difference(a, b):
    """(a - b rounded, its rounding error), by Knuth's two-sum."""
    rounded = a - b
    back = a - rounded
    return rounded, (a - (rounded + back)) + (back - b)


@_triton.jit
def _log1p(x):
    """log(1 + x) in Kahan's form: the error of `1 + x` enters the logarithm and the quotient equally, and cancels."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@_triton.jit
def _scale_kernel(values_ptr, factor_ptr, num_values, BLOCK: tl.constexpr):
    """values *= factor. Reads and writes no values if the factor is 1, as in most training loops."""
    factor = tl.load(factor_ptr).to(tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if factor == 1.0:
        start += num_values
    while start < num_values:
        index = start + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + index, mask=index < num_values).to(tl.float32) * factor
        tl.store(values_ptr + index, values.to(values_ptr.dtype.element_ty), mask=index < num_values)
        start += tl.num_programs(0) * BLOCK


# ------------------------------------------------------------------------------------------------------------ launching


def rows_in_triton(logits_NV: Tensor, *others: Any) -> None:
    """Write loss and gradient of every row to the outputs and `grad_NV` in one launch. Arguments: see `kernel_call`."""
    if logits_NV.shape[0] == 0:
        return
    arguments, compilation, programs_per_sm = kernel_call(logits_NV, *others)
    with _on_device(logits_NV):
        grid = (min(logits_NV.shape[0], _programs_at_once(logits_NV.device, programs_per_sm)),)
        _cross_entropy_kernel[grid](**arguments, **compilation)


def kernel_call(
    logits_NV: Tensor,
    grad_NV: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor | None,
    scale: Tensor | None,
    options: LossOptions,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(kernel arguments by name, compiler options, programs per SM). Arguments: see `loss_rows`.

    An option that is off is None or its neutral value, and is compiled away.
    """
    num_rows, vocab = logits_NV.shape
    shape = launch.cross_entropy_shape(vocab, softcap=options.softcap is not None)
    per_access, has_edge = _alignment(logits_NV, logits_NV if grad_NV is None else grad_NV)
    loss, log_prob, entropy, correct, lse = outputs
    arguments = {
        "logits_ptr": logits_NV,
        "grad_ptr": logits_NV if grad_NV is None else grad_NV,
        "targets_ptr": targets_N.contiguous(),
        "weights_ptr": None if weights_N is None else weights_N.contiguous(),
        "scale_ptr": scale,
        "loss_ptr": loss,
        "log_prob_ptr": log_prob,
        "entropy_ptr": entropy,
        "correct_ptr": correct.view(torch.int8),
        "lse_ptr": lse,
        "logits_stride": logits_NV.stride(0),
        "grad_stride": 0 if grad_NV is None else grad_NV.stride(0),
        "scale_stride": scale.stride(0) if scale is not None and scale.dim() else 0,
        "num_rows": num_rows,
        "vocab": vocab,
        "ignore_index": options.ignore_index,
        "softcap": options.softcap or 1.0,
        "logit_scale": options.logit_scale,
        "smoothing": options.label_smoothing,
        "z_loss": options.z_loss,
        "HAS_GRAD": grad_NV is not None,
        "HAS_WEIGHTS": weights_N is not None,
        "HAS_SCALE": scale is not None,
        "HAS_SOFTCAP": options.softcap is not None,
        "HAS_SMOOTHING": options.label_smoothing > 0,
        "HAS_Z_LOSS": options.z_loss > 0,
        "HAS_DFT": options.dft,
        "HAS_ENTROPY": options.entropy,
        "HAS_CORRECT": options.correct,
        "HAS_EDGE": has_edge,
        "PER_ACCESS": per_access,
        "ROUND_BF16": _triton.INTERPRET and grad_NV is not None and grad_NV.dtype == torch.bfloat16,
        "R": shape.lines,
        "W": shape.width,
        "ONE_READ": shape.one_read,
    }
    # Set explicitly: the default for fusion differs between releases of Triton.
    compilation = {"num_warps": shape.num_warps, "maxnreg": shape.registers, "enable_fp_fusion": True}
    return arguments, compilation, shape.programs_per_sm


def _alignment(logits_NV: Tensor, grad_NV: Tensor) -> tuple[int, bool]:
    """(columns per access, whether rows have an edge): 1 column if the rows of the two tensors differ in alignment."""
    size = logits_NV.element_size()
    width = 16 // size

    def place(x: Tensor) -> tuple[int, int]:  # within 16 bytes: offset of row 0, step to the next row
        return x.data_ptr() // size % width, x.stride(0) % width if len(x) > 1 else 0

    if place(logits_NV) != place(grad_NV):
        return 1, False
    return width, place(logits_NV) != (0, 0) or logits_NV.shape[1] % width > 0


def _programs_at_once(device: torch.device, programs_per_sm: int) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: two programs, so that each takes several rows
    return programs_per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def _on_device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """`values *= factor` for a 0-d `factor`; almost free on CUDA if the factor is 1."""
    flat = values.is_contiguous() and values.numel() > 0  # the kernel walks through storage
    if not _triton.usable(values.device) or values.dtype == torch.float64 or not flat:
        return values.mul_(factor)
    with _on_device(values):
        block = 4096
        programs = min(-(-values.numel() // block), _programs_at_once(values.device, 4))
        _scale_kernel[(programs,)](
            values, factor, values.numel(), BLOCK=block, num_warps=8, maxnreg=64, enable_fp_fusion=True
        )
    return values
