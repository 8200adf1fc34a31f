"""Compiles the cross-entropy kernel for six GPU generations, without any of them, and says what is wrong with it.

Every entry of the launch table, with the arguments and specialisations of a real launch: registers, spills, occupancy,
the width of every global access, and what is read and written against the least that would do. Knows the kernel's
arguments and what its machine code has to be; how it is compiled and read is `packsft_kernels.aot`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
import triton
from packsft_kernels import LossOptions, aot, launch
from packsft_kernels.cross_entropy_kernel import _cross_entropy_kernel, kernel_call
from packsft_kernels.cross_entropy_rows import empty_outputs

OUTPUTS = {
    "loss": LossOptions(),
    "loss, entropy, correct": LossOptions(entropy=True, correct=True),
    "every option but softcap": LossOptions(
        logit_scale=0.5, label_smoothing=0.1, z_loss=1e-4, dft=True, entropy=True, correct=True
    ),
    "every option": LossOptions(
        softcap=30.0, logit_scale=0.5, label_smoothing=0.1, z_loss=1e-4, dft=True, entropy=True, correct=True
    ),
}
# Rows of every entry of the launch table in bfloat16, held as a whole and in part
VOCABULARIES = (1024, 4096, 16_384, 32_768, 65_536, 128_256)
MOST_INSTRUCTIONS = {"loss": (12, 9), "loss, entropy, correct": (19, 10)}
"""Per column of 16 bits of a streamed block, in the first and the second pass. At 128 a clock, an SM of an H100 issues
12 + 9 for a row of 128,256 in 12 us; at its share of 3 TB/s it copies that row in 22."""


@dataclass(frozen=True)
class Case:
    """One compilation, of rows a few columns shorter than `vocab`.

    By one, as with a vocabulary of 50,257, they begin and end anywhere; by 16 bytes, they do so on multiples of 16
    bytes, but 16 does not divide their columns, and Triton does not know it by itself.
    """

    vocab: int
    capability: int
    dtype: torch.dtype
    outputs: str
    gradient: bool = True
    columns_less: int = 0

    @property
    def edges(self) -> bool:
        return self.columns_less * self.dtype.itemsize % 16 > 0

    @property
    def shape(self) -> launch.KernelShape:
        options = OUTPUTS[self.outputs]
        return launch.cross_entropy_shape(
            self.vocab - self.columns_less,
            self.dtype.itemsize,
            softcap=options.softcap is not None,
            smoothing=options.label_smoothing > 0,
        )


def cases(*, every: bool) -> Iterator[Case]:
    """Each launch of the table on each architecture, in bfloat16 and float32, for the least and the most outputs.

    The longest rows also begin and end elsewhere than on a multiple of 16 columns. `every`: also float16, all sets of
    outputs, and the loss alone without a gradient.
    """
    dtypes = (torch.bfloat16, torch.float32, *([torch.float16] if every else []))
    outputs = OUTPUTS if every else ("loss", "every option")
    for vocab, capability, dtype, wanted in product(VOCABULARIES, aot.ARCHITECTURES, dtypes, outputs):
        case = Case(vocab, capability, dtype, wanted)
        yield case
        if every and wanted == "loss":
            yield replace(case, gradient=False)
        if vocab == VOCABULARIES[-1]:
            yield replace(case, columns_less=1)
            yield replace(case, columns_less=16 // dtype.itemsize)


def compiled(case: Case) -> aot.MachineCode:
    """The machine code of a case, compiled as the launcher would have it compiled."""
    options = OUTPUTS[case.outputs]
    logits = torch.empty(64, case.vocab - case.columns_less, dtype=case.dtype, device="meta")
    arguments, compilation = kernel_call(
        logits,
        logits if case.gradient else None,
        torch.empty(64, dtype=torch.int64, device="meta"),
        torch.empty(64, device="meta") if case.outputs.startswith("every") else None,
        torch.empty((), device="meta", dtype=torch.float64),
        options,
        tuple(empty_outputs(logits, options)),
    )
    return aot.machine_code(_cross_entropy_kernel, arguments, case.capability, **compilation)


def faults(case: Case, code: aot.MachineCode) -> list[str]:
    """What is wrong with the machine code, in words; empty if nothing is."""
    wrong = []
    if code.stack or code.local_accesses:
        wrong.append(f"{code.stack} bytes of stack and {code.local_accesses} local accesses: registers are spilled")
    if not code.occupancy:
        wrong.append(f"{code.shared} bytes of shared memory: no program fits on an SM")
    if case.shape.streamed > 4 and case.outputs in MOST_INSTRUCTIONS and not case.edges:  # fewer are unrolled
        most = [count * case.dtype.itemsize // 2 for count in MOST_INSTRUCTIONS[case.outputs][: 1 + case.gradient]]
        found = streaming(case, code)
        if len(found) != len(most) or any(count > limit for count, limit in zip(found, most, strict=True)):
            wrong.append(f"{found} instructions a column, allowed are {most}")
    allowed = narrow_accesses(case)
    for kind, found in (("loads", code.loads), ("stores", code.stores)):
        narrow = Counter({width: count for width, count in found.items() if width < 128})
        if excess := narrow - allowed[kind]:
            wrong.append(f"{kind} narrower than 128 bits beyond the per-row ones: {dict(excess)}")
        if not found[128] and (kind == "loads" or case.gradient):
            wrong.append(f"no {kind} of 128 bits")
    if case.gradient and not overwrites_safely(case, code):
        wrong.append("no barrier between the loads of target and edges and the first store of a gradient")
    return wrong


def narrow_accesses(case: Case) -> dict[str, Counter]:
    """Accesses of less than 128 bits that a row needs, by width: its target, its own outputs, its edges."""
    bits = 8 * case.dtype.itemsize
    options = OUTPUTS[case.outputs]
    loads = Counter({64: 1 + case.gradient})  # the index of the target, the factor of the gradient
    loads[bits] += 2 + case.edges  # its logit, those beside it in its lane, and the columns at the edges
    loads[32] += case.outputs.startswith("every")  # the weight
    # An ignored row has its own stores of zeros: hence twice
    stores = Counter({32: 2 * (3 + options.entropy), 8: 2 * options.correct})
    stores[bits] += (1 + 2 * case.edges) * case.gradient  # the target's gradient
    return {"loads": loads, "stores": stores}


def streaming(case: Case, code: aot.MachineCode) -> list[float]:
    """Instructions per column of the loops over streamed blocks, in the order of the passes.

    Only loops in which a block is copied to shared memory while another one is used: no load there is waited for at
    once.
    """
    columns = case.shape.lines * case.shape.width / (32 * case.shape.num_warps)
    found = []
    for first, last in code.loops:
        body = [opcode for opcode, _ in code.instructions[first : last + 1]]
        copies = [opcode for opcode in body if opcode.startswith("LDGSTS") and aot.access_width(opcode) == 128]
        waits = any(opcode.startswith("LDG.") and aot.access_width(opcode) == 128 for opcode in body)
        if copies and not waits and len(copies) * 16 == columns * case.dtype.itemsize:
            found.append(round(len(body) / columns, 1))
    return found


def overwrites_safely(case: Case, code: aot.MachineCode) -> bool:
    """Whether a gradient may take its logits' place: what all threads read has been read when the first one stores.

    In Triton's own form: two barriers. After the first one no load but of blocks; before it no store of one but an
    ignored row's zeros; after the second one no store but the target's. All blocks in one layout, so that each thread
    stores what it alone reads. In the assembly: the narrow loads, a barrier, the blocks, a barrier, the target.
    """
    operation = re.compile(r"\b(tt\.(load|store)|ttg\.(async_copy_global_to_local|local_load)|(ttg|gpu)\.barrier)\b")
    lines = [line for line in code.ttgir.splitlines() if operation.search(line)]
    barriers = [i for i, line in enumerate(lines) if "barrier" in line]
    block = re.compile(r"tensor<\d+x\d+x(?:!tt\.ptr<\w+>|[bf]+\d+), (#\w+)>")
    if len(barriers) != 2 or len({layout for line in lines for layout in block.findall(line)}) != 1:
        return False
    before, between, after = lines[: barriers[0]], lines[barriers[0] : barriers[1]], lines[barriers[1] :]
    zeros = [line for line in before if "tt.store" in line and block.search(line)]
    shared_loads = [line for line in between if "tt.load" in line and not block.search(line)]
    if len(zeros) > 1 or shared_loads or len(after) != 2 or block.search(after[1]):
        return False

    opcodes = [opcode for opcode, _ in code.instructions]
    width = 8 * case.dtype.itemsize
    narrow = [i for i, op in enumerate(opcodes) if op.startswith("LDG.") and aot.access_width(op) == width]
    wide = [i for i, op in enumerate(opcodes) if op.startswith("STG.E") and aot.access_width(op) == 128]
    target = [i for i, op in enumerate(opcodes) if op.startswith("STG.E") and aot.access_width(op) == width]
    barriers = [i for i, op in enumerate(opcodes) if op.startswith("BAR.SYNC")]
    first = min(i for i in wide if i > max(narrow))
    return any(max(narrow) < i < first for i in barriers) and any(max(wide) < i < max(target) for i in barriers)


def check(case: Case) -> tuple[Case, aot.MachineCode, list[str]]:
    code = compiled(case)
    return case, code, faults(case, code)


def check_all(chosen: Iterable[Case]) -> list[tuple[Case, aot.MachineCode, list[str]]]:
    """On all cores. A process of its own for each worker, since compiling is mostly Python."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(check, chosen, chunksize=4))


def figures(checked: list[tuple[Case, aot.MachineCode, list[str]]]) -> Iterator[dict[str, Any]]:
    """What `python benchmarks/run.py --suite static` shows: registers of each launch and dtype, the most of any
    architecture and outputs, and the number of faults."""
    for vocab, dtype in dict.fromkeys((case.vocab, case.dtype) for case, _, _ in checked):
        group = [(case, code) for case, code, _ in checked if (case.vocab, case.dtype) == (vocab, dtype)]
        shape, occupancy = group[0][0].shape, [code.occupancy for _, code in group]
        counts = [streaming(case, code) for case, code in group if case.outputs == "loss" and case.gradient]
        most_of_passes = [max(passes) for passes in zip(*filter(None, counts), strict=True)]
        note = (
            f"[{shape.lines}, {shape.width}] at {shape.num_warps} warps; {shape.held} blocks held, {shape.streamed} "
            f"read twice; occupancy {min(occupancy):.0%} to {max(occupancy):.0%}, "
            f"{max(code.shared for _, code in group):,} bytes shared"
        )
        if most_of_passes:
            note += f"; at most {' + '.join(map(str, most_of_passes))} instructions a column for the loss"
        name = f"{vocab:,} columns, {str(dtype).removeprefix('torch.')}"
        most = max(code.registers for _, code in group)
        yield {"name": name, "value": most, "unit": "registers", "at_most": shape.registers, "note": note}
    failed = [f"{case}: {'; '.join(wrong)}" for case, _, wrong in checked if wrong]
    architectures = ", ".join(f"sm_{capability}" for capability in sorted({case.capability for case, _, _ in checked}))
    yield {
        "name": "compilations with a spill, a narrow access in a loop, or an unsafe order", "value": len(failed),
        "unit": f"of {len(checked)}", "at_most": 0, "parity": True,
        "note": f"Triton {triton.__version__}, {architectures}" + "".join(f"; {text}" for text in failed[:3]),
    }  # fmt: skip
