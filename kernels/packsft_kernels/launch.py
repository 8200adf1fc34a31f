"""How much work goes into one launch: rows per chunk, rows per block, kernel blocks and warps.

Pure Python on shapes, so that every rank and every machine can work out the same answer. Knows no tensor.
"""

CHUNK_BYTES = 2**30
"""Budget for one chunk of logits. 4,096 rows of a vocabulary of 128,256 in bf16 are 1.05e9 bytes and just fit."""

_CACHED_ELEMENTS = 2**20
"""Elements of a float32 scratch block on the CPU: two such blocks are 8 MB, which stay in any server's L3, and still
make each elementwise operation long enough to outweigh the start of its threads. With 32 MB of L3 the loss of 520 rows
of 49,152 takes 1.03, 1.22 and 1.55 times as long at 2^19, 2^21 and 2^22."""


def rows_per_chunk(num_rows: int, vocab: int, itemsize: int, *, weight_grad: bool, budget: int = CHUNK_BYTES) -> int:
    """Rows of logits that the fused head makes at once.

    4,096 when the weight's gradient is wanted, since every chunk reads and writes all of it once more in float32;
    1,024 when not. The rows are spread evenly over the fewest chunks that respect this and `budget` bytes.
    """
    most = max(1, min(4096 if weight_grad else 1024, budget // (vocab * itemsize)))
    num_chunks = -(-num_rows // most)
    return -(-num_rows // max(1, num_chunks))


def rows_per_block(num_rows: int, vocab: int) -> int:
    """Rows that the PyTorch path of `cross_entropy` works on at once, so that its scratch stays in cache."""
    return max(1, min(num_rows, _CACHED_ELEMENTS // max(1, vocab)))


def kernel_block(vocab: int) -> tuple[int, int]:
    """(block, warps) of the cross-entropy kernel: 8 elements per thread, the widest access there is in bf16."""
    warps = 4 if vocab <= 1024 else 8 if vocab <= 32768 else 16
    return 8 * 32 * warps, warps
