"""The machine code of the Triton kernel for real targets: the interpreter accepts much that the compiler refuses.

No GPU is needed. `python benchmarks/run.py --suite static` shows what is recorded here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
import machine_code
from machine_code import Case
from packsft_kernels import launch

LLAMA_ON_HOPPER = Case(128_256, 90, torch.bfloat16, "loss, entropy, correct")


def assert_right(cases: Iterable[Case], record_property: Callable[[str, str], None]) -> list[Case]:
    checked = machine_code.check_all(cases)
    for figure in machine_code.figures(checked):
        record_property("figure", json.dumps(figure))
    assert {case: wrong for case, _, wrong in checked if wrong} == {}
    return [case for case, _, _ in checked]


def test_long_rows_compile_without_spills_and_with_wide_accesses_on_hopper(record_property) -> None:
    every = machine_code.cases(every=False)
    long_rows = [case for case in every if case.vocab == LLAMA_ON_HOPPER.vocab and case.capability == 90]
    assert len(assert_right(long_rows, record_property)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, True], ids=["main", "complete"])
def test_every_launch_does_so_on_six_architectures(every: bool, record_property) -> None:
    assert_right(machine_code.cases(every=every), record_property)


def test_a_vocabulary_of_one_column_compiles() -> None:
    """Triton makes a constant of the 1."""
    assert machine_code.compiled(Case(1, 90, torch.bfloat16, "every option")).occupancy


def test_a_block_that_spills_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """131,072 columns do not fit into 65,536 registers beside the sums."""
    monkeypatch.setattr(launch, "cross_entropy_shape", lambda *_, **__: launch.KernelShape(2, 4096, 16, 128, 0, 16, 1))
    assert any(
        "spilled" in fault for fault in machine_code.faults(LLAMA_ON_HOPPER, machine_code.compiled(LLAMA_ON_HOPPER))
    )


def test_a_loop_that_waits_for_its_loads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cross_entropy_shape", lambda *_, **__: launch.KernelShape(2, 4096, 16, 128, 14, 2, 1))
    (fault,) = machine_code.faults(LLAMA_ON_HOPPER, machine_code.compiled(LLAMA_ON_HOPPER))
    assert fault.startswith("[] instructions a column")


def test_narrow_accesses_and_a_missing_barrier_are_found() -> None:
    code = machine_code.compiled(replace(LLAMA_ON_HOPPER, columns_less=1))
    narrow = machine_code.faults(LLAMA_ON_HOPPER, code)  # held to what a row without edges may do
    assert any("loads narrower" in fault for fault in narrow)
    assert any("stores narrower" in fault for fault in narrow)
    assert machine_code.overwrites_safely(replace(LLAMA_ON_HOPPER, columns_less=1), code)
    without = "\n".join(line for line in code.ttgir.splitlines() if "barrier" not in line)
    assert not machine_code.overwrites_safely(LLAMA_ON_HOPPER, replace(code, ttgir=without))
    without = tuple(x for x in code.instructions if not x[0].startswith("BAR"))
    assert not machine_code.overwrites_safely(LLAMA_ON_HOPPER, replace(code, instructions=without))
