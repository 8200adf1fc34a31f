"""The size of a launch: rows per chunk, rows per block, kernel blocks and warps.

Pure Python on shapes, so every rank and every machine computes the same answer. Knows no tensor.
"""

import math
from typing import NamedTuple

CHUNK_BYTES = 2**30
"""Byte budget for one chunk of logits. 4,096 rows of 128,256 logits in bf16 are 1.05e9 bytes and just fit."""

_CACHED_ELEMENTS = 2**20
"""Elements of a float32 scratch block on the CPU. Two such blocks are 8 MB: they stay in the L3 cache of any server,
and each elementwise operation is still long enough to outweigh the start of its threads. With 32 MB of L3, the loss of
520 rows of 49,152 takes 1.03, 1.22 and 1.55 times as long at 2^19, 2^21 and 2^22."""


def rows_per_chunk(num_rows: int, vocab: int, itemsize: int, *, weight_grad: bool, rounded_width: int = 0) -> int:
    """Rows of logits that the fused head makes at once.

    At most 4,096 with a gradient of the weight: every chunk after the first reads and writes that gradient once more in
    float32. At [128256, 4096] this is 4.2 GB, about 1.4 ms at the 3 TB/s of an H100; the three GEMMs of a chunk take
    18 ms. At most 1,024 without: nothing is accumulated, and 1,024 rows fill a GEMM. The rows are spread evenly over
    the fewest chunks that respect this limit and `CHUNK_BYTES`. Only shapes decide: every rank gets the same answer.

    More, if the gradient of the weight is rounded to the dtype of the logits, bfloat16: `rounded_width` is then M. One
    chunk writes it in the memory of M rows of logits. Several need 2 M rows for a sum in float32, and after the last
    chunk, when the logits are gone, M rows for the rounded sum. So chunks of M rows need no more memory than smaller
    ones, and one chunk of M rows more needs no more than a larger number of rows does anyway.
    """
    most = max(1, rounded_width, min(4096 if weight_grad else 1024, CHUNK_BYTES // (vocab * itemsize)))
    if num_rows <= most + rounded_width:
        return num_rows
    num_chunks = -(-num_rows // most)
    return -(-num_rows // num_chunks)


def rows_per_block(num_rows: int, vocab: int) -> int:
    """Rows that the PyTorch path of `cross_entropy` processes at once, so that its scratch stays in cache."""
    return max(1, min(num_rows, _CACHED_ELEMENTS // max(1, vocab)))


class KernelShape(NamedTuple):
    """Launch configuration of the cross-entropy kernel for one vocabulary. A block has `lines` x `width` columns."""

    lines: int
    width: int
    num_warps: int
    registers: int
    """Limit per thread. Without it the compiler spills on some architectures."""
    streamed: int
    """Blocks of a row that are read in both passes."""
    held: int
    """Blocks that stay in registers between the passes, after the streamed ones."""
    stages: int
    """Of the pipeline of streamed blocks: all but one are under way at once, in shared memory."""
    hints: bool = False
    """Whether L2 is told which reads come again: where the rows under way are more than it holds."""

    @property
    def most_lines(self) -> int:
        """Lines of a row, rounded up to a power of 2."""
        return 1 << ((self.streamed + self.held) * self.lines - 1).bit_length()


# Most bytes of a row: lines of 16 bits, width, warps, KiB held, KiB under way, hints. An SM has 65,536 registers, and
# every architecture 99 KiB of shared memory for a program. Chosen on an H100 for rows of 4,096, 32,000, 50,304 and
# 128,256 in bfloat16, among shapes that spill on no architecture under Triton 3.6, 3.8 and 3.9.
_SHAPES = {
    2**13: (2, 1024, 4, 8, 0, False),
    2**16: (2, 2048, 8, 24, 32, False),
    2**17: (2, 2048, 8, 16, 40, True),
    math.inf: (2, 4096, 16, 32, 80, True),
}
_REGISTERS = 128


def cross_entropy_shape(vocab: int, itemsize: int, *, softcap: bool, smoothing: bool) -> KernelShape:
    """The launch configuration of the cross-entropy kernel. It comes from a table: no autotuning in the first step.

    Args:
        itemsize: bytes of a logit.
        softcap, smoothing: what they need takes the registers of all but two held blocks, of one line with a softcap.
    """
    most = min(most for most in _SHAPES if vocab * itemsize <= most)
    lines, width, num_warps, kib_held, kib_ahead, hints = _SHAPES[most]
    lines = 1 if softcap else max(1, lines * 2 // itemsize)
    kib = lines * width * itemsize / 2**10
    blocks = max(1, -(-vocab // (lines * width)))
    held = min(blocks, 2 if softcap or smoothing else max(2, int(kib_held / kib)))
    return KernelShape(lines, width, num_warps, _REGISTERS, blocks - held, held, 1 + int(kib_ahead / kib), hints)
