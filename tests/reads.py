"""Reads of the device by the host in every micro-step of a real `train()`, packsft's and TRL's side by side.

A read makes the host wait for the GPU. On the CPU the profiler counts the operators that would do it, also inside
custom operators; `.tolist()`, `.numpy()` and `.cpu()` leave no trace there and are counted by wrapping them. Counted
from `on_step_begin` to `on_pre_optimizer_step`: the loader, the optimizer and the logging lie outside.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measure import Figure, Settings, figure, training_dtype
from shapes import tiny_llama, tiny_tokenizer
from trainers import EXACT, OURS, TRL_PACKED, build_trainer
from transformers import TrainerCallback

READING_OPERATORS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2")
READING_METHODS = ("tolist", "numpy", "cpu")
# The CPU attention reads the boundaries to cut the pack; the GPU back ends take them as they are.
CPU_ATTENTION = ("varlen_sdpa.py", "tolist")
STEPS, ACCUMULATION = 3, 2


class ReadCounter(TrainerCallback):
    """Counts reads by operator, or by (file of the caller, method), between the two events of every step."""

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.methods: Counter[tuple[str, str]] = Counter()
        self.steps = 0
        self._open = contextlib.ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.enter_context(self._count_methods())
        self._profiler = self._open.enter_context(torch.profiler.profile())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()
        self.steps += 1
        for event in self._profiler.key_averages():
            if event.key in READING_OPERATORS:
                self.operators[event.key] += event.count

    @contextlib.contextmanager
    def _count_methods(self) -> Iterator[None]:
        originals = {name: getattr(torch.Tensor, name) for name in READING_METHODS}

        def counted(name: str) -> Any:
            def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self.methods[Path(sys._getframe(1).f_code.co_filename).name, name] += 1
                return originals[name](tensor, *args, **kwargs)

            return method

        for name in READING_METHODS:
            setattr(torch.Tensor, name, counted(name))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(torch.Tensor, name, original)


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


def bench_reads(settings: Settings) -> list[Figure]:
    """Reads per micro-step; --quick changes nothing, it takes seconds."""
    table = []
    for name in (OURS, EXACT, TRL_PACKED):
        counter = count_reads(name)
        micro_steps = STEPS * ACCUMULATION
        attention = 0 if torch.cuda.is_available() else counter.methods.pop(CPU_ATTENTION, 0)
        reads = counter.operators.total() + counter.methods.total()
        found = {key.removeprefix("aten::"): count for key, count in counter.operators.items()}
        found |= {f"{method}() in {file}": count for (file, method), count in counter.methods.items()}
        table.append(
            figure(
                f"{name}, reads per micro-step",
                reads / micro_steps,
                "reads",
                at_most=0 if name in (OURS, EXACT) else None,
                headline="reads of the device in a micro-step" * (name == OURS),
                note=", ".join(f"{key} {count / micro_steps:g}" for key, count in found.items()),
            )
        )
        if attention:
            table.append(
                figure(
                    f"{name}, the CPU attention's own reads of the boundaries",
                    attention / micro_steps,
                    "reads",
                    note="no counterpart on a GPU",
                )
            )
    return table
