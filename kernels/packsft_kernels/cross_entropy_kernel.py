"""Cross-entropy over rows of logits, in Triton: loss, gradient and per-row outputs in one launch.

Knows rows of logits; knows nothing of autograd or of where the logits come from. `cross_entropy_rows.py` explains the
arithmetic of a row and has the same computation in PyTorch.

Legend: N rows of logits, V vocabulary, [R, W] one block of a row: R lines of W neighbouring columns. A *lane* is the
columns of a row that are W apart: one column of every line.

A program computes one row, in two passes: the sums over the row, then its gradient. The last blocks of a row are *held*
in registers from the first pass to the second, as they are stored. The blocks before them are *streamed*: read once in
each pass, several blocks ahead of their use, the second time backwards, so that what was read last is read first, from
L2. Short rows are held as a whole.

Accesses are 16 bytes wide for every V, stride and alignment, if the rows of the gradient are aligned as those of the
logits. The *edge* of a row is the columns before its first and after its last multiple of 16 bytes: at most 7 columns
(3 in float32) at each end. It is handled separately. The *body* is the columns between.

No column is compared with the target while a block is summed. Each lane has its own sums, so the lane of the target is
dropped, and its other columns are summed apart. The target's gradient is written last, over that of its block.
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


@_triton.jit(do_not_specialize=("ignore_index", "streamed"), do_not_specialize_on_alignment=_PER_ROW)
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
    streamed,  # blocks; they lie inside of every row's body
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
    HAS_STREAMED: tl.constexpr,
    HELD: tl.constexpr,  # blocks; the last two may reach beyond the body
    LINES: tl.constexpr,  # at least the lines of a row, a power of 2
    STAGES: tl.constexpr,  # of the pipelines that read streamed blocks
    HINTS: tl.constexpr,  # ask L2 to keep what is read again, and nothing else
    PER_REGISTER: tl.constexpr,  # columns in 32 bits; 0 in the interpreter, which has no assembly
):
    FIRST_READ: tl.constexpr = "evict_last" if HINTS else ""
    SECOND_READ: tl.constexpr = "evict_first" if HINTS else ""
    ACCESS_BYTES: tl.constexpr = PER_ACCESS * logits_ptr.dtype.element_ty.primitive_bitwidth // 8
    LEAST: tl.constexpr = -3.4028234663852886e38  # of float32
    block = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    slot = tl.arange(0, 16)
    row = tl.program_id(0).to(tl.int64)  # row * stride exceeds 2^31 at 16,384 rows of 131,072
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
    if HAS_EDGE:  # slots 0 to 7 before the body, 8 to 15 after it
        edge = tl.where(slot < 8, slot, head + body + slot - 8)
        inside_edge = edge < tl.where(slot < 8, head, vocab)
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
        held = ()
        for k in tl.static_range(HELD):
            column = (streamed + k) * (R * W) + block
            if k < HELD - 2:
                raw = tl.load(body_ptr + column)
            else:
                raw = tl.load(body_ptr + column, mask=column < body, other=0.0)
            held = held + (raw,)  # type: ignore[assignment]  # noqa: RUF005  (no unpacking in kernels)

        # A target outside the vocabulary reads nothing and gives a NaN loss.
        in_range = (target >= 0) & (target < vocab)
        x_target = tl.load(row_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
        # These too are under way while blocks are summed.
        weight = 1.0
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + row).to(tl.float32)
        scale = 1.0
        if HAS_SCALE:
            scale = tl.load(scale_ptr + row * scale_stride).to(tl.float32)
        if HAS_EDGE:
            x_edge = tl.load(row_ptr + edge, mask=inside_edge, other=0.0).to(tl.float32)

        # Of a logit x the kernel sums exp(z - maximum) = 2^((y - maximum) * log2_scale), with z = y * z_scale.
        z_scale = logit_scale
        if HAS_SOFTCAP:
            z_scale = softcap
        log2_scale = z_scale * 1.4426950408889634
        least_below = -300.0 / log2_scale  # 2^-300 is 0, and so is its product with this
        z_target = _bounded(x_target, logit_scale, softcap, HAS_SOFTCAP) * z_scale

        # The columns beside the target in its lane.
        body_target = (target - head).to(tl.int32)
        in_body = in_range & (body_target >= 0) & (body_target < body)
        target_lane = tl.where(in_body, body_target % W, -1)
        beside = tl.arange(0, LINES) * W + target_lane
        is_beside = (beside < tl.where(in_body, body, -1)) & (beside != body_target)
        x_beside = tl.load(body_ptr + beside, mask=is_beside, other=0.0).to(tl.float32)
        y_beside = tl.where(is_beside, _bounded(x_beside, logit_scale, softcap, HAS_SOFTCAP), float("-inf"))

        # Of every lane: the maximum, the sum `rest` of e = exp(z - maximum), the sum `dot` of e * (y - maximum), the
        # sum of y. Maxima start at the least finite number: y - maximum is never NaN.
        lane_max = tl.full((W,), LEAST, tl.float32)
        lane_rest = tl.zeros((W,), tl.float32)
        lane_dot = tl.zeros((W,), tl.float32)
        lane_y = tl.zeros((W,), tl.float32)
        if HAS_STREAMED:
            for i in tl.range(0, streamed, num_stages=STAGES):
                x = tl.load(body_ptr + i * (R * W) + block, eviction_policy=FIRST_READ)
                y = _bounded(x.to(tl.float32), logit_scale, softcap, HAS_SOFTCAP)
                if HAS_SMOOTHING:
                    lane_y += tl.sum(y, 0)
                lane_max, lane_rest, lane_dot = _summed(
                    y, lane_max, lane_rest, lane_dot, log2_scale, least_below, HAS_ENTROPY
                )
        for k in tl.static_range(HELD):
            y = _bounded(held[k].to(tl.float32), logit_scale, softcap, HAS_SOFTCAP)
            if HAS_SMOOTHING:
                lane_y += tl.sum(y, 0)  # what lies beyond the body was read as 0
            if k >= HELD - 2:
                y = tl.where((streamed + k) * (R * W) + block < body, y, float("-inf"))
            lane_max, lane_rest, lane_dot = _summed(
                y, lane_max, lane_rest, lane_dot, log2_scale, least_below, HAS_ENTROPY
            )

        # Over all columns but the target.
        of_target = tl.arange(0, W) == target_lane
        lane_max = tl.where(of_target, LEAST, lane_max)
        lane_rest = tl.where(of_target, 0.0, lane_rest)
        y_max = tl.maximum(tl.max(lane_max, 0), tl.max(y_beside, 0))
        if HAS_EDGE:
            y_edge = _bounded(x_edge, logit_scale, softcap, HAS_SOFTCAP)
            y_edge_rest = tl.where(inside_edge & (edge != target), y_edge, float("-inf"))
            y_max = tl.maximum(y_max, tl.max(y_edge_rest, 0))
        moved = _below(lane_max, y_max, least_below, HAS_ENTROPY)
        kept = tl.exp2(moved * log2_scale)
        rest = tl.sum(kept * lane_rest, 0)
        if HAS_ENTROPY:
            lane_dot = tl.where(of_target, 0.0, lane_dot)
            dot = tl.sum(kept * (lane_dot + lane_rest * moved), 0)
        rest_beside, dot_beside = _sums(y_beside, y_max, log2_scale, least_below, HAS_ENTROPY)
        rest += rest_beside
        if HAS_ENTROPY:
            dot += dot_beside
        if HAS_EDGE:
            rest_edge, dot_edge = _sums(y_edge_rest, y_max, log2_scale, least_below, HAS_ENTROPY)
            rest += rest_edge
            if HAS_ENTROPY:
                dot += dot_edge
        if HAS_ENTROPY:
            dot *= z_scale
        if HAS_SMOOTHING:
            sum_z = tl.sum(lane_y, 0)
            if HAS_EDGE:
                sum_z += tl.sum(y_edge, 0)
            sum_z *= z_scale
        rest_max = tl.maximum(y_max * z_scale, LEAST)  # a row of -inf stays one; and no product that a difference fuses

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
            loss *= tl.div_rn(e_target, total)  # not exp(-nll): it turns the rounding of nll into a relative error
        if HAS_Z_LOSS:
            loss += z_loss * lse * lse
        tl.store(loss_ptr + row, weight * loss)
        tl.store(log_prob_ptr + row, -nll)
        tl.store(lse_ptr + row, lse)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, log_total - tl.div_rn(dot, total))
        if HAS_CORRECT:
            better = (rest_max > z_target).to(tl.int32)
            if rest_max == z_target:  # a tie: the first column wins; only here are columns compared
                for start in range(0, tl.minimum(body, body_target), R * W):
                    column = start + block
                    x = tl.load(body_ptr + column, mask=column < body, other=0.0).to(tl.float32)
                    z = _bounded(x, logit_scale, softcap, HAS_SOFTCAP) * z_scale
                    z = tl.where((column < body) & (column < body_target), z, float("-inf"))
                    better |= (tl.max(tl.max(z, 0), 0) == z_target).to(tl.int32)
                if HAS_EDGE:
                    better |= tl.max(((y_edge_rest * z_scale == z_target) & (edge < target)).to(tl.int32), 0)
            tl.store(correct_ptr + row, ((better == 0) & in_range).to(tl.int8))

        if HAS_GRAD:
            nll_factor = weight * scale * logit_scale
            z_factor = 0.0
            if HAS_Z_LOSS:
                z_factor = 2.0 * z_loss * lse * nll_factor
            if HAS_DFT:
                nll_factor *= tl.div_rn(e_target, total)
            target_grad = z_factor * tl.div_rn(e_target, total) - nll_factor * tl.div_rn(rest, total)
            uniform = 0.0
            if HAS_SMOOTHING:
                uniform = nll_factor * (smoothing / vocab)
                target_grad += nll_factor * smoothing - uniform
            if HAS_SOFTCAP:
                target_grad *= _softcap_derivative(x_target, logit_scale, softcap)
            factor = rest_scale * tl.div_rn(nll_factor + z_factor, total)  # of exp(z - rest_max)

            # The gradient may overwrite the logits. After this barrier a thread stores only to places that no other
            # thread still reads: all threads have read the shared values (the target's lane, the edge).
            tl.debug_barrier()
            if HAS_STREAMED:
                for i in tl.range(0, streamed, num_stages=STAGES):
                    start = (streamed - 1 - i) * (R * W)
                    x = tl.load(body_ptr + start + block, eviction_policy=SECOND_READ).to(tl.float32)
                    grad = _gradient(
                        x, y_max, log2_scale, factor, uniform, logit_scale, softcap, HAS_SOFTCAP, HAS_SMOOTHING
                    )
                    if ROUND_BF16:
                        grad = _triton.round_to_bf16(grad)
                    tl.store(
                        body_grad_ptr + start + block, grad.to(grad_ptr.dtype.element_ty), eviction_policy=SECOND_READ
                    )
            for k in tl.static_range(HELD):
                column = (streamed + k) * (R * W) + block
                x = _unknown(held[k], PER_REGISTER).to(tl.float32)
                grad = _gradient(
                    x, y_max, log2_scale, factor, uniform, logit_scale, softcap, HAS_SOFTCAP, HAS_SMOOTHING
                )
                if k < HELD - 2:
                    _store(body_grad_ptr + column, grad, None, ROUND_BF16)
                else:
                    _store(body_grad_ptr + column, grad, column < body, ROUND_BF16)
            if HAS_EDGE:
                grad = _gradient(
                    x_edge, y_max, log2_scale, factor, uniform, logit_scale, softcap, HAS_SOFTCAP, HAS_SMOOTHING
                )
                _store(row_grad_ptr + edge, grad, inside_edge, ROUND_BF16)
            tl.debug_barrier()
            _store(row_grad_ptr + target, target_grad, in_range, ROUND_BF16)


@_triton.jit
def _columns_before_alignment(row_ptr, vocab, PER_ACCESS: tl.constexpr):
    """Number of columns of a row before the first multiple of 16 bytes."""
    element = row_ptr.to(tl.int64) // (row_ptr.dtype.element_ty.primitive_bitwidth // 8)
    return tl.minimum((-element) & (PER_ACCESS - 1), vocab).to(tl.int32)


@_triton.jit
def _bounded(x, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """y, of which the transformed logit z is a multiple: tanh(logit_scale * x / softcap), or x itself."""
    if HAS_SOFTCAP:
        x = _triton.tanh(x * logit_scale / softcap)
    return x


@_triton.jit
def _summed(y, lane_max, lane_rest, lane_dot, log2_scale, least_below, HAS_ENTROPY: tl.constexpr):
    """The sums of every lane with one more block `y` [R, W]: rescaled once per block to the new maximum."""
    new_max = tl.maximum(lane_max, tl.max(y, 0))
    below = _below(y, new_max[None, :], least_below, HAS_ENTROPY)
    e = tl.exp2(below * log2_scale)
    moved = _below(lane_max, new_max, least_below, HAS_ENTROPY)
    kept = tl.exp2(moved * log2_scale)
    if HAS_ENTROPY:
        lane_dot = kept * (lane_dot + lane_rest * moved) + tl.sum(e * below, 0)
    return new_max, kept * lane_rest + tl.sum(e, 0), lane_dot


@_triton.jit
def _sums(y, maximum, log2_scale, least_below, HAS_ENTROPY: tl.constexpr):
    """Of a few columns: the sum of e = exp(z - maximum), and that of e * (y - maximum)."""
    below = _below(y, maximum, least_below, HAS_ENTROPY)
    e = tl.exp2(below * log2_scale)
    return tl.sum(e, 0), tl.sum(e * below, 0)


@_triton.jit
def _below(y, maximum, least_below, BOUNDED: tl.constexpr):
    """y - maximum. `BOUNDED`: no less than `least_below`, so that exp of it times itself is never 0 * -inf."""
    below = y - maximum
    if BOUNDED:
        below = tl.maximum(below, least_below, propagate_nan=tl.PropagateNan.ALL)
    return below


@_triton.jit
def _unknown(x, PER_REGISTER: tl.constexpr):
    """x, which the compiler takes for new: else it keeps the float32 of the first pass, at twice the registers."""
    if PER_REGISTER > 0:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PER_REGISTER)
    return x


@_triton.jit
def _gradient(
    x, y_max, log2_scale, factor, uniform, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr
):
    """The gradient of logits that are not the target."""
    grad = tl.exp2((_bounded(x, logit_scale, softcap, HAS_SOFTCAP) - y_max) * log2_scale) * factor
    if HAS_SMOOTHING:
        grad -= uniform
    if HAS_SOFTCAP:
        grad *= _softcap_derivative(x, logit_scale, softcap)
    return grad


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
    return tl.where(u == 1.0, x, tl.log(u) * tl.div_rn(x, tl.where(u == 1.0, 1.0, u - 1.0)))


@_triton.jit
def _scale_kernel(values_ptr, factor_ptr, num_values, BLOCK: tl.constexpr, ROUND_BF16: tl.constexpr):
    """values *= factor. Reads and writes no values if the factor is 1, as in most training loops."""
    factor = tl.load(factor_ptr).to(tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if factor == 1.0:
        start += num_values
    while start < num_values:
        index = start + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + index, mask=index < num_values).to(tl.float32) * factor
        _store(values_ptr + index, values, index < num_values, ROUND_BF16)
        start += tl.num_programs(0) * BLOCK


# ------------------------------------------------------------------------------------------------------------ launching


def rows_in_triton(logits_NV: Tensor, *others: Any) -> None:
    """Write loss and gradient of every row to the outputs and `grad_NV` in one launch. Arguments: see `kernel_call`."""
    if logits_NV.shape[0] == 0:
        return
    arguments, compilation = kernel_call(logits_NV, *others)
    with _on_device(logits_NV):
        _cross_entropy_kernel[(logits_NV.shape[0],)](**arguments, **compilation)


def kernel_call(
    logits_NV: Tensor,
    grad_NV: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor | None,
    scale: Tensor | None,
    options: LossOptions,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(kernel arguments by name, compiler options). Arguments: see `loss_rows`.

    An option that is off is None or its neutral value, and is compiled away.
    """
    vocab = logits_NV.shape[1]
    shape = launch.cross_entropy_shape(
        vocab,
        logits_NV.element_size(),
        softcap=options.softcap is not None,
        smoothing=options.label_smoothing > 0,
    )
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
        "vocab": vocab,
        "ignore_index": options.ignore_index,
        "softcap": options.softcap or 1.0,
        "logit_scale": options.logit_scale,
        "smoothing": options.label_smoothing,
        "z_loss": options.z_loss,
        "streamed": shape.streamed,
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
        "ROUND_BF16": grad_NV is not None and _rounds_bf16(grad_NV),
        "R": shape.lines,
        "W": shape.width,
        "HAS_STREAMED": shape.streamed > 0,
        "HELD": shape.held,
        "LINES": shape.most_lines,
        "STAGES": shape.stages,
        "HINTS": shape.hints,
        "PER_REGISTER": 0 if _triton.INTERPRET else 32 // (8 * logits_NV.element_size()),
    }
    # Set explicitly: the default for fusion differs between releases of Triton.
    compilation = {"num_warps": shape.num_warps, "maxnreg": shape.registers, "enable_fp_fusion": True}
    return arguments, compilation


def _rounds_bf16(tensor: Tensor) -> bool:
    """Whether the kernel rounds before it stores: the interpreter truncates."""
    return _triton.INTERPRET and tensor.dtype == torch.bfloat16


def _alignment(logits_NV: Tensor, grad_NV: Tensor) -> tuple[int, bool]:
    """(columns per access, whether rows have an edge): 1 column if the rows of the two tensors differ in alignment."""
    size = logits_NV.element_size()
    width = 16 // size

    def place(x: Tensor) -> tuple[int, int]:  # within 16 bytes: offset of row 0, step to the next row
        return x.data_ptr() // size % width, x.stride(0) % width if len(x) > 1 else 0

    if place(logits_NV) != place(grad_NV):
        return 1, False
    return width, place(logits_NV) != (0, 0) or logits_NV.shape[1] % width > 0


def _on_device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """`values *= factor` for a 0-d `factor`; almost free on CUDA if the factor is 1."""
    # the kernel walks through the storage, which a fake tensor has not
    flat = type(values) is Tensor and values.is_contiguous() and values.numel() > 0
    if not _triton.usable(values.device) or values.dtype == torch.float64 or not flat:
        return values.mul_(factor)
    with _on_device(values):
        block, most = 4096, 2
        if values.is_cuda:
            most = 4 * torch.cuda.get_device_properties(values.device).multi_processor_count
        programs = min(-(-values.numel() // block), most)
        _scale_kernel[(programs,)](
            values, factor, values.numel(), BLOCK=block, ROUND_BF16=_rounds_bf16(values), num_warps=8, maxnreg=64,
            enable_fp_fusion=True,
        )  # fmt: skip
    return values
