"""Compile a Triton kernel for any GPU, without a GPU, and read the result: registers, spills, access widths.

Triton can compile for a target that is not present, and ships the tools that read the machine code. Works for any
kernel and its arguments; knows no kernel by name.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities, without the dot: A100; RTX 30, A10; RTX 40, L4; H100; B200; RTX 50."""

_THREADS_PER_SM = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
_SHARED_PER_SM = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}


@dataclass(frozen=True)
class MachineCode:
    """Properties of one compiled kernel.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread. More than 0 means spills; `cuobjdump`'s LOCAL is 0 even then.
        local_accesses: number of LDL and STL instructions, that is, spills.
        shared: bytes of shared memory per program.
        occupancy: share of an SM's threads that can be resident at once.
        loads, stores: number of global accesses by width in bits.
        instructions: the machine code as (opcode, operands), in order.
        loops: of each loop, the indices of its first and its last instruction.
        ttgir: Triton's last own form of the kernel, in which tensors still have layouts.
    """

    registers: int
    stack: int
    local_accesses: int
    shared: int
    occupancy: float
    loads: Counter
    stores: Counter
    instructions: tuple[tuple[str, str], ...]
    loops: tuple[tuple[int, int], ...]
    ttgir: str


def machine_code(
    kernel: Any, arguments: Mapping[str, Any], capability: int, *, num_warps: int, **options: Any
) -> MachineCode:
    """Compile a kernel as a launch with these arguments would, for one of `ARCHITECTURES`, and read the result.

    Args:
        kernel: a `triton.jit` function.
        arguments: its arguments by name. Tensors may be on any device; only their dtype and alignment matter.
        capability: one of `ARCHITECTURES`.
        num_warps, options: as at a launch (`maxnreg`, `enable_fp_fusion`).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, *_specialised(kernel, arguments))
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": num_warps, **options})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        assembly = _tool("nvdisasm", "-c", str(cubin))
    registers, stack = (int(_found(rf"\b{name}:(\d+)", usage)) for name in ("REG", "STACK"))
    instructions, loops = _parsed(assembly)
    opcodes = [opcode for opcode, _ in instructions]
    threads = 32 * num_warps
    shared = compiled.metadata.shared
    # A warp gets registers in units of 256.
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * num_warps)
    by_shared = _SHARED_PER_SM[capability] * 1024 // (shared + 1024)
    resident = min(by_registers, by_shared, _THREADS_PER_SM[capability] // threads)
    return MachineCode(
        registers=registers,
        stack=stack,
        local_accesses=sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes),
        shared=shared,
        occupancy=resident * threads / _THREADS_PER_SM[capability],
        loads=Counter(access_width(opcode) for opcode in opcodes if opcode.split(".")[0] in ("LDG", "LDGSTS")),
        stores=Counter(access_width(opcode) for opcode in opcodes if opcode.split(".")[0] == "STG"),
        instructions=instructions,
        loops=loops,
        ttgir=compiled.asm["ttgir"],
    )


def _parsed(assembly: str) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[int, int], ...]]:
    """(instructions, loops) of a disassembly. A loop is what lies between a label and a later branch to it."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops = []
    instruction = re.compile(r"\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\d+\s+)?([A-Z][\w.]*)\s*(.*?);")
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := instruction.match(line):
            opcode, operands = found.groups()
            goal = re.search(r"\.L_x_\d+", operands) if opcode.startswith("BRA") else None
            # a branch to itself ends every kernel
            if goal and labels.get(goal[0], len(instructions)) < len(instructions):
                loops.append((labels[goal[0]], len(instructions)))
            instructions.append((opcode, operands))
    return tuple(instructions), tuple(loops)


def _specialised(kernel: Any, arguments: Mapping[str, Any]) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) as a launch specialises them: on None, on 1 and on divisibility by 16."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        aligned = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            if aligned and value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if aligned and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def _tool(name: str, *arguments: str) -> str:
    from triton import knobs

    command = [getattr(knobs.nvidia, name).path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} is not in:\n{text}"
    return match.group(1)


def access_width(opcode: str) -> int:
    """Width of an access in bits, from its opcode: `LDG.E.128` 128, `STG.E.U16` 16, `LDG.E` 32."""
    for part in reversed(opcode.split(".")):
        if part in ("256", "128", "64"):
            return int(part)
        if part in ("U16", "S16", "U8", "S8"):
            return int(part[1:])
    return 32
