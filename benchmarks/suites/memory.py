"""Measures the peak memory of the language-model head on a GPU, for models and lengths of any size, on fake tensors.

Every head runs forward and backward on tensors without memory, which say that they are on CUDA, and the storages that
it allocates are counted (`allocations.py`). No GPU is needed and none is used.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from itertools import product
from typing import Any
from unittest import mock

import torch
from harness.allocations import FakeAllocations
from harness.measure import Figure, Settings, figure
from harness.peers import OURS, Head, heads
from packsft_kernels import launch
from torch._subclasses.fake_tensor import FakeTensorMode

MODELS: dict[str, tuple[int, int, float | None]] = {  # model width, vocabulary, softcap of the logits
    "Llama-3.2-1B": (2048, 128_256, None),
    "Llama-3.1-8B": (4096, 128_256, None),
    "Qwen2.5-7B": (3584, 152_064, None),
    "Gemma-2-9B": (3584, 256_000, 30.0),
}
LENGTHS = (8192, 32_768, 131_072)
SHARES = {"all": 1.0, "30%": 0.3}
GIB = 2**30
NOTE = "bfloat16, forward and backward, both gradients included, weight and hidden states not"


def bench(settings: Settings) -> Iterator[Figure]:
    """Every head for every model, length and share of scored tokens; --quick takes one model and length."""
    models, lengths = (("Llama-3.2-1B",), LENGTHS[:1]) if settings.quick else (tuple(MODELS), LENGTHS)
    absent: dict[str, str] = {}
    for model, length, scored in product(models, lengths, SHARES):
        yield from _heads(model, length, scored, absent)
    yield from (figure(name, note=f"cannot run: {reason}") for name, reason in absent.items())


def _heads(model: str, length: int, scored: str, absent: dict[str, str]) -> Iterator[Figure]:
    """A row for every head that runs on fake tensors; the others, and the reason, go into `absent`."""
    width, vocab, softcap = MODELS[model]
    count = round(length * SHARES[scored])
    name = f"{model}, {length:,} tokens, {scored} scored"
    peaks: dict[str, int] = {}
    with FakeTensorMode(), _kernels_that_only_launch():
        for peer in heads(torch.empty(count, dtype=torch.int64), softcap):
            if reason := peer.missing or ("compiled code is not traced on fake tensors" * ("compile" in peer.name)):
                absent[f"{peer.name}, {model}" if "softcap" in reason else peer.name] = reason
                continue
            assert peer.run is not None
            try:
                peaks[peer.name], temporary = _peaks(peer.run, length, width, vocab)
            except Exception as error:  # a peer that cannot be traced is no reason to lose the others
                if peer.name == OURS:
                    raise
                absent[peer.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            compared: dict[str, Any] = {"note": NOTE}
            if peer.name != OURS:
                compared = {"ratio": peaks[peer.name] / peaks[OURS], "ratio_of": "memory / packsft"}
                compared["at_least"] = 1.0 if peer.name.startswith("TRL") else None
                compared["note"] = "adds up dW in bfloat16" if peer.name.endswith("chunked") else ""
            yield figure(
                f"{name}: {peer.name}", peaks[peer.name] / GIB, "GiB", **compared, series=peer.name,
                chart=f"Peak memory of the head of {model}, {scored} tokens scored", x=float(length), x_name="tokens T",
            )  # fmt: skip
            if peer.name == OURS:
                # dX and dW as they are stored, in float32, until the upstream factor is known
                limit = launch.CHUNK_BYTES + 4 * (count + vocab) * width
                yield figure(
                    f"{name}: {OURS}, temporary", temporary / GIB, "GiB", ratio=temporary / limit,
                    ratio_of="memory / (chunk budget + dX + dW)", at_most=1.0,
                    note=f"what is not handed back, against {launch.CHUNK_BYTES / GIB:g} GiB for a chunk of logits, dX "
                    "of the scored rows and dW in float32",
                )  # fmt: skip


def _peaks(run: Head, length: int, width: int, vocab: int) -> tuple[int, int]:
    """Bytes at the peak; and of what is not handed back: in the forward everything, in the backward all but the two
    gradients that come out of it."""
    hidden_TM = torch.empty(length, width, dtype=torch.bfloat16, requires_grad=True)
    weight_VM = torch.empty(vocab, width, dtype=torch.bfloat16, requires_grad=True)
    labels_T = torch.empty(length, dtype=torch.int64)
    used = FakeAllocations(cuda=True)
    forward = 0

    def forward_and_backward() -> None:
        nonlocal forward
        loss = run(hidden_TM, weight_VM, labels_T)
        forward = used.peak
        torch.autograd.grad(loss, (hidden_TM, weight_VM))

    used.run(forward_and_backward)
    return used.peak, max(forward, used.peak - 2 * (hidden_TM.numel() + weight_VM.numel()))


@contextlib.contextmanager
def _kernels_that_only_launch() -> Any:
    """TRL launches its Triton kernels by hand, outside of any operator. They work in place and allocate nothing."""
    with contextlib.ExitStack() as patches:
        with contextlib.suppress(ImportError):
            module = importlib.import_module("trl.kernels.chunked_logprob")
            for kernel in ("_forward_kernel", "_backward_kernel"):
                patches.enter_context(mock.patch.object(module, kernel, mock.MagicMock()))
        yield
