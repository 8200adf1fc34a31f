"""No tensor's value is read back by the host in a training micro-step: counted over a real run, TRL's beside ours.

A read makes the host wait for the GPU. On the CPU the profiler counts the operators that would do it, also inside
custom operators; `.tolist()`, `.numpy()` and `.cpu()` leave no trace there and are counted by wrapping them. Counted
from `on_step_begin` to `on_pre_optimizer_step`: the loader, the optimizer and the logging lie outside.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from harness.measure import training_dtype
from harness.shapes import tiny_llama, tiny_tokenizer
from harness.trainers import EXACT, OURS, TRL_PACKED, TRL_PADDED, build_trainer
from read_counter import CPU_ATTENTION, ReadCounter

STEPS, ACCUMULATION = 3, 2


def count_reads(name: str) -> ReadCounter:
    """Train a tiny model with the trainer called `name` and count."""
    words = " ".join(f"w{i}" for i in range(12))
    dataset = Dataset.from_list([{"prompt": words[: 6 + i % 5 * 3], "completion": " " + words} for i in range(64)])
    counter = ReadCounter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            name,
            tiny_llama(training_dtype() if torch.cuda.is_available() else torch.float32),
            tiny_tokenizer(),
            dataset,
            folder,
            max_length=64,
            max_steps=STEPS,
            gradient_accumulation_steps=ACCUMULATION,
            bf16=torch.cuda.is_available(),
        )
        trainer.add_callback(counter)
        trainer.train()
    assert counter.steps == STEPS, f"{counter.steps} steps were counted, {STEPS} were to be made"
    return counter


def record(name: str, counter: ReadCounter, record_property: Callable[[str, str], None]) -> None:
    """The figures that `python benchmarks/run.py --suite reads` shows."""
    micro_steps = STEPS * ACCUMULATION
    methods = dict(counter.methods)
    attention = 0 if torch.cuda.is_available() else methods.pop(CPU_ATTENTION, 0)
    found = {key.removeprefix("aten::"): count for key, count in counter.operators.items()}
    found |= {f"{method}() in {file}": count for (file, method), count in methods.items()}
    note = ", ".join(f"{key} {count / micro_steps:g}" for key, count in found.items())
    value = {"value": sum(found.values()) / micro_steps, "unit": "reads"}
    target = {"at_most": 0, "parity": True} if name in (OURS, EXACT) else {}
    record_property("figure", json.dumps({"name": f"{name}, reads per micro-step", "note": note} | value | target))
    if attention:
        what = f"{name}, the CPU attention's own reads of the boundaries"
        value = {"value": attention / micro_steps, "unit": "reads", "note": "no counterpart on a GPU"}
        record_property("figure", json.dumps({"name": what} | value))


@pytest.mark.parametrize("trainer", [OURS, EXACT])
def test_a_micro_step_reads_nothing_back(trainer, record_property):
    counter = count_reads(trainer)
    record(trainer, counter, record_property)
    assert counter.operators.total() == 0, counter.operators
    # per-document SDPA cuts the row on the host, which no GPU back end does
    assert set(counter.methods) <= {CPU_ATTENTION}


@pytest.mark.parametrize("trainer", [TRL_PACKED, TRL_PADDED])
def test_the_counter_sees_the_reads_of_trl(trainer, record_property):
    counter = count_reads(trainer)
    record(trainer, counter, record_property)
    assert counter.operators["aten::_local_scalar_dense"] > 0
