"""Records what a piece of work allocates: the sizes of PyTorch's storages in order, and the peak of all of them.

- `Recorded` is of a run on real tensors on the CPU: the profiler sees every storage come and go, also inside custom
  operators (but not the scratch space of BLAS libraries).
- `FakeAllocations` is of a run on fake tensors, which have shapes and no memory: any model size, on any machine.

Knows storages; knows nothing of what allocates them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._library.simple_registry import singleton
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Recorded:
    """`sizes` and `peak`, in bytes, of what `run()` allocates on the CPU."""

    def __init__(self, run: Callable[[], object]) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        self.sizes = [change for change in changes if change > 0]
        self.peak = current = 0
        for change in changes:
            current += change
            self.peak = max(self.peak, current)


class FakeAllocations(TorchDispatchMode):
    """`sizes` and `peak`, in bytes, of what is allocated while this is open, inside of a `FakeTensorMode`.

    An operator that is written in Python is entered, so that the workspaces which it allocates and frees count: ours
    through its fake implementation, PyTorch's through its body, since its fakes allocate outputs only. (PyTorch's
    `MemTracker` enters neither.) An operator in C++ counts as what it returns.

    Args:
        cuda: let tensors say that they are on CUDA, to whoever asks in Python, so that code takes the path it takes
            there. (PyTorch built without CUDA has fake CUDA tensors, but no backward for them.)
    """

    def __init__(self, *, cuda: bool = False) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._cuda = cuda
        self._in_pytorch = False
        self._device = FakeTensor.device

    def run(self, work: Callable[[], object]) -> FakeAllocations:
        """Do the work with this mode open; what it returns is thrown away."""
        patches = contextlib.ExitStack()
        if self._cuda:
            patches.enter_context(mock.patch.object(FakeTensor, "device", property(self._said_device)))
            patches.enter_context(mock.patch.object(FakeTensor, "is_cuda", property(lambda t: t.device.type == "cuda")))
        with patches, self:
            work()
        return self

    def _said_device(self, tensor: FakeTensor) -> torch.device:
        return self._device.__get__(tensor) if self._in_pytorch else torch.device("cuda", 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._cuda and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = torch.device("cpu")
        known = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))} | self._live.keys()
        body = _python_body(func)
        with self if body else contextlib.nullcontext():
            outside, self._in_pytorch = self._in_pytorch, body is None
            try:
                result = (body or func)(*args, **kwargs)
            finally:
                self._in_pytorch = outside
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self._live:
                self._count(storage)
        return result

    @property
    def current(self) -> int:
        """Bytes that are allocated now."""
        return sum(size for reference, size in self._live.values() if not reference.expired())

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.sizes.append(storage.nbytes())
        self.peak = max(self.peak, self.current)


def _python_body(operator: torch._ops.OpOverload) -> Callable[..., Any] | None:
    name = operator._schema.name
    if name not in OPDEFS:
        return None
    return singleton.find(name).fake_impl.kernel if operator.namespace == "packsft" else OPDEFS[name]._init_fn


def tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
