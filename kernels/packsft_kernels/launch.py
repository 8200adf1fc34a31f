"""The size of a launch: rows per chunk, rows per block, kernel blocks and warps.

Pure Python on shapes, so every rank and every machine computes the same answer. Knows no tensor.
"""

from typing import NamedTuple

CHUNK_BYTES = 2**30
"""Byte budget for one chunk of logits. 4,096 rows of 128,256 logits in bf16 are 1.05e9 bytes and just fit."""

_CACHED_ELEMENTS = 2**20
"""Elements of a float32 scratch block on the CPU. Two such blocks are 8 MB: they stay in the L3 cache of any server,
and each elementwise operation is still long enough to outweigh the start of its threads. With 32 MB of L3, the loss of
520 rows of 49,152 takes 1.03, 1.22 and 1.55 times as long at 2^19, 2^21 and 2^22."""


def rows_per_chunk(num_rows: int, vocab: int, itemsize: int, *, weight_grad: bool, budget: int = CHUNK_BYTES) -> int:
    """Rows of logits that the fused head makes at once.

    At most 4,096 with a gradient of the weight: every chunk after the first reads and writes that gradient once more in
    float32. At [128256, 4096] this is 4.2 GB, about 1.4 ms at the 3 TB/s of an H100; the three GEMMs of a chunk take
    18 ms. At most 1,024 without: nothing is accumulated, and 1,024 rows fill a GEMM. The rows are spread evenly over
    the fewest chunks that respect this limit and `budget` bytes. Only shapes decide: every rank gets the same answer.
    """
    most = max(1, min(4096 if weight_grad else 1024, budget // (vocab * itemsize)))
    num_chunks = -(-num_rows // most)
    return -(-num_rows // max(1, num_chunks))


def rows_per_block(num_rows: int, vocab: int) -> int:
    """Rows that the PyTorch path of `cross_entropy` processes at once, so that its scratch stays in cache."""
    return max(1, min(num_rows, _CACHED_ELEMENTS // max(1, vocab)))


class KernelShape(NamedTuple):
    """Launch configuration of the cross-entropy kernel: blocks of `lines` x `width` columns, 8 per thread and line."""

    lines: int
    width: int
    num_warps: int
    registers: int
    """Limit per thread. Without it the compiler spills on some architectures."""
    programs_per_sm: int
    one_read: bool
    """Whether a block holds a whole row: the row is then read once and kept in registers."""


ONE_READ_SHAPES = {
    1024: KernelShape(1, 1024, 4, 128, 4, True),
    2048: KernelShape(1, 2048, 8, 128, 2, True),
    4096: KernelShape(2, 2048, 8, 128, 2, True),
    8192: KernelShape(4, 2048, 8, 128, 2, True),
    16384: KernelShape(4, 4096, 16, 128, 1, True),
}
"""Key: the largest vocabulary that fits. The same for all architectures: from sm_80 to sm_120 an SM has 65,536
registers, and threads * registers * programs fill them. 32,768 columns would spill."""

TWO_READ_SHAPE = KernelShape(2, 4096, 16, 128, 1, False)
"""One program per SM, so that the rows in flight stay in L2 for their second read. 16 warps with two 16-byte loads in
flight each, not 8 warps with four: more warps can run while others wait."""


def cross_entropy_shape(vocab: int, *, softcap: bool) -> KernelShape:
    """The launch configuration of the cross-entropy kernel. It comes from a table: no autotuning in the first step.

    With a softcap, tanh and its derivative do not fit into the registers together with a row, so the row is read twice.
    """
    fitting = [shape for most, shape in ONE_READ_SHAPES.items() if vocab <= most and not softcap]
    return fitting[0] if fitting else TWO_READ_SHAPE
