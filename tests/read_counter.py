"""Counts the reads of tensors by the host in a training step, where a GPU would be waited for."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

READING_OPERATORS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2")
READING_METHODS = ("tolist", "numpy", "cpu")
# The CPU attention reads the boundaries to cut the pack; the GPU back ends take them as they are.
CPU_ATTENTION = ("varlen_sdpa.py", "tolist")


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
