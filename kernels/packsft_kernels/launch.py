"""How much work goes into one launch: rows per chunk, rows per block, kernel blocks and warps.

Pure Python on shapes, so that every rank and every machine can work out the same answer. Knows no tensor.
"""

from typing import NamedTuple

CHUNK_BYTES = 2**30
"""Budget for one chunk of logits. 4,096 rows of a vocabulary of 128,256 in bf16 are 1.05e9 bytes and just fit."""

_CACHED_ELEMENTS = 2**20
"""Elements of a float32 scratch block on the CPU: two such blocks are 8 MB, which stay in any server's L3, and still
make each elementwise operation long enough to outweigh the start of its threads. With 32 MB of L3 the loss of 520 rows
of 49,152 takes 1.03, 1.22 and 1.55 times as long at 2^19, 2^21 and 2^22."""


def rows_per_chunk(num_rows: int, vocab: int, itemsize: int, *, weight_grad: bool, budget: int = CHUNK_BYTES) -> int:
    """Rows of logits that the fused head makes at once.

    4,096 when the weight's gradient is wanted: every chunk after the first reads and writes all of it once more in
    float32, at [128256, 4096] 4.2 GB, about 1.4 ms of an H100's 3 TB/s, where the chunk's three GEMMs take 18 ms. 1,024
    when not: nothing is accumulated then, and so many rows fill a GEMM. The rows are spread evenly over the fewest
    chunks that respect this and `budget` bytes, by shapes alone and so alike on every rank.
    """
    most = max(1, min(4096 if weight_grad else 1024, budget // (vocab * itemsize)))
    num_chunks = -(-num_rows // most)
    return -(-num_rows // max(1, num_chunks))


def rows_per_block(num_rows: int, vocab: int) -> int:
    """Rows that the PyTorch path of `cross_entropy` works on at once, so that its scratch stays in cache."""
    return max(1, min(num_rows, _CACHED_ELEMENTS // max(1, vocab)))


class KernelShape(NamedTuple):
    """One way to launch the cross-entropy kernel: blocks of `lines` times `width` columns, 8 to each thread a line."""

    lines: int
    width: int
    num_warps: int
    registers: int
    """Most that a thread may have; said to the compiler, which otherwise spills on some architectures."""
    programs_per_sm: int
    one_read: bool
    """Whether a block holds a whole row, which is then read once and kept in registers."""


ONE_READ_SHAPES = {
    1024: KernelShape(1, 1024, 4, 128, 4, True),
    2048: KernelShape(1, 2048, 8, 128, 2, True),
    4096: KernelShape(2, 2048, 8, 128, 2, True),
    8192: KernelShape(4, 2048, 8, 128, 2, True),
    16384: KernelShape(4, 4096, 16, 128, 1, True),
}
"""By the largest vocabulary. The same for all architectures: every one from sm_80 to sm_120 has 65,536 registers an SM,
and threads * registers * programs fill them. 32,768 columns would spill."""

TWO_READ_SHAPE = KernelShape(2, 4096, 16, 128, 1, False)
"""One program an SM, so that the rows under way stay in L2 for their second read. 16 warps of which each has two
16-byte loads under way, rather than 8 with four each: more of them to run while others wait."""


def cross_entropy_shape(vocab: int, *, softcap: bool) -> KernelShape:
    """How to launch the cross-entropy kernel: from a table, so that no user's first step goes into trying variants.

    A softcap's tanh and its derivative do not fit into the registers beside a row: such rows are read twice.
    """
    fitting = [shape for most, shape in ONE_READ_SHAPES.items() if vocab <= most and not softcap]
    return fitting[0] if fitting else TWO_READ_SHAPE
