"""Launch shapes of the loss kernel, timed on this GPU: what `_SHAPES` in `launch.py` could say of it.

    python tools/tune_cross_entropy.py                      # some minutes a vocabulary: each shape compiles
    python tools/tune_cross_entropy.py --vocab 128256

Loss and gradient of bfloat16 logits, in their place, beside a copy of them. The shape that the table has now is marked.
Shapes that spill are shown and are no candidates: they may spill more elsewhere. Without a GPU, `TRITON_INTERPRET=1`
and a few small rows show that it runs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from packsft_kernels import LossOptions, launch
from packsft_kernels._triton import INTERPRET
from packsft_kernels.cross_entropy_kernel import _cross_entropy_kernel, kernel_call
from packsft_kernels.cross_entropy_rows import empty_outputs
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness.measure import device, interleave

Row = tuple[int, int, int, int, int, bool]  # of `launch._SHAPES`


def candidates(row_bytes: int) -> Iterator[Row]:
    """A thread has 8 or 16 columns of a block, and holds 16, 32 or 48 columns. 32 to 80 KiB are under way, or none."""
    for lines, width, per_thread in itertools.product((1, 2), (1024, 2048, 4096), (8, 16)):
        warps, kib = lines * width // per_thread // 32, lines * width * 2 // 2**10
        if warps in ((4, 8, 16) if row_bytes <= 2**13 else (8, 16)):
            for columns, ahead in itertools.product((16, 32, 48), (0, 32, 40, 64, 80)):
                streams = row_bytes > columns * warps * 64
                if columns % per_thread == 0 and ahead % kib == 0 and (streams or not ahead):
                    # what all rows under way stream stays in L2 if it is less
                    yield lines, width, warps, columns // per_thread * kib, ahead, streams and row_bytes > 2**16


def tune(num_rows: int, vocab: int, repeats: int) -> Table:
    row_bytes = 2 * vocab
    key = min(most for most in launch._SHAPES if row_bytes <= most)
    now = launch._SHAPES[key]
    fresh = 3 * torch.randn(num_rows, vocab, device=device()).to(torch.bfloat16)
    logits, targets = torch.empty_like(fresh), torch.randint(vocab, (num_rows,), device=device())
    timed: dict[str, Callable[[], object]] = {"copy": lambda: logits.copy_(fresh)}
    shapes: dict[str, tuple[Row, Any]] = {}
    for shape in dict.fromkeys((now, *candidates(row_bytes))):
        with mock.patch.dict(launch._SHAPES, {key: shape}):
            run = launcher(logits, targets, lambda: logits.copy_(fresh))
        try:
            compiled = run()
        except Exception as error:  # more shared memory or registers than there are
            print(f"{shape}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        timed[str(shape)], shapes[str(shape)] = run, (shape, compiled)
    times = {name: timing.median for name, timing in interleave(timed, repeats).items()}
    copy = times.pop("copy")
    table = Table(title=f"{num_rows:,} rows of {vocab:,}: a copy takes {copy * 1e3:.3f} ms", title_justify="left")
    for column in ("lines", "width", "warps", "KiB held", "KiB ahead", "hints", "spills", "ms", "of a copy", ""):
        table.add_column(column, justify="right")
    for name in sorted(times, key=times.__getitem__):
        shape, compiled = shapes[name]
        spills = getattr(compiled, "n_spills", 0)
        numbers = [*map(str, shape), str(spills), f"{times[name] * 1e3:.3f}", f"{copy / times[name]:.1%}"]
        table.add_row(*numbers, "now" if shape == now else "", style="dim" if spills else None)
    return table


def launcher(logits: torch.Tensor, targets: torch.Tensor, prepare: Callable[[], object]) -> Callable[[], Any]:
    """A launch of the shape that the table has now; returns the compiled kernel."""
    options = LossOptions(entropy=True, correct=True)
    outputs = empty_outputs(logits, options)
    scale = torch.ones((), device=logits.device)
    arguments, compilation = kernel_call(logits, logits, targets, None, scale, options, outputs)

    def run() -> Any:
        return _cross_entropy_kernel[(len(logits),)](**arguments, **compilation)

    run.prepare = prepare  # type: ignore[attr-defined]
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 32_000, 50_304, 128_256], help="columns")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if not (torch.cuda.is_available() or INTERPRET):
        sys.exit("tune_cross_entropy: no GPU; with TRITON_INTERPRET=1 it runs, and its times mean nothing")
    for vocab in options.vocab:
        Console().print(tune(options.rows, vocab, options.repeats))


if __name__ == "__main__":
    main()
