"""Measures peak memory for models and lengths of any size, on fake tensors: of the language-model head on a GPU, and of
a training step whose row is shared by several ranks.

Work runs forward and backward on tensors without memory, and the storages that it allocates are counted
(`allocations.py`); those of the head say that they are on CUDA. No GPU is needed and none is used.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any
from unittest import mock

import torch
from harness.allocations import FakeAllocations
from harness.measure import Figure, Settings, figure
from harness.peers import OURS, Head, heads
from harness.shapes import MODELS as MODELS_OF_ROWS
from harness.shapes import ModelShape, random_model
from packsft_kernels import LossOptions, launch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from packsft.data.batch import loss_inputs, model_inputs
from packsft.data.collator import PackingCollator
from packsft.model import head
from packsft.model.attention import ATTENTION_NAME, packed_forward
from packsft.model.sequence_parallel import SequenceGroup, set_group

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
    yield from _gradients_of_passes("Llama-3.2-1B")
    yield from _shared_rows("Llama-3.1-8B", 131_072, (1, 2) if settings.quick else (1, 2, 4, 8))


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
                # dX and dW are summed in float32; at the end dW is rounded, when the chunk of logits is gone
                limit = max(launch.CHUNK_BYTES, 2 * vocab * width) + 4 * (count + vocab) * width
                yield figure(
                    f"{name}: {OURS}, temporary", temporary / GIB, "GiB", ratio=temporary / limit,
                    ratio_of="memory / (chunk or rounded dW, + dX + dW)", at_most=1.0,
                    note=f"what is not handed back, against {launch.CHUNK_BYTES / GIB:g} GiB for a chunk of logits (or "
                    "dW in bfloat16), dX of the scored rows and dW in float32",
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


def _gradients_of_passes(model: str) -> Iterator[Figure]:
    """What a rank of 8 holds of gradients in a step of two passes under FSDP2: reduced in each, or in the last."""
    with _rank_of(8):
        each, last = (_gradients(MODELS_OF_ROWS[model], in_each) for in_each in (True, False))
    name = f"{model} under FSDP2, 8 ranks, 2 passes of 512 tokens"
    yield figure(f"{name}: gradients, reduced in each pass", each / GIB, "GiB", note="at the peak; bfloat16, AdamW")
    yield figure(
        f"{name}: gradients, reduced in the last pass", last / GIB, "GiB", ratio=last / each,
        ratio_of="memory / reduced in each pass",
    )  # fmt: skip


@contextlib.contextmanager
def _rank_of(processes: int) -> Iterator[None]:
    """Rank 0 of so many processes that do not exist: nothing is sent."""
    store = importlib.import_module("torch.testing._internal.distributed.fake_pg").FakeStore()
    distributed.init_process_group("fake", rank=0, world_size=processes, store=store)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _gradients(shape: ModelShape, in_each: bool) -> int:
    mesh = init_device_mesh("cpu", (8,))
    with FakeTensorMode():
        model = random_model(shape, torch.bfloat16, torch.device("cpu"))
        model.train()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        ids = torch.zeros(1, 512, dtype=torch.long)
        with tracker:
            for last in (False, True):
                tracker.reset_mod_stats()
                model.set_requires_gradient_sync(in_each or last)
                model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.float().sum().backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return next(size for kind, size in peak.items() if str(kind).endswith("GRAD"))


def _shared_rows(model: str, length: int, sizes: Sequence[int]) -> Iterator[Figure]:
    """A training step on one document: what a rank allocates beside the weights, if P ranks share the row."""
    with _rank_of(max(sizes)):
        steps = {P: _step(MODELS_OF_ROWS[model], length, P) for P in sizes}
    whole, *_ = steps.values()
    for P, (kept, peak, sent) in steps.items():
        name = f"{model}, a document of {length:,} tokens, P = {P}"
        shared: dict[str, Any] = {"ratio_of": f"memory / (memory of one rank / {P})", "at_most": 1.1} if P > 1 else {}
        note = f"{kept / GIB:.1f} GiB from forward to backward; gradient checkpointing, weight gradients freed at once"
        shared |= {"ratio": P * peak / whole[1]} if P > 1 else {}
        yield figure(f"{name}: peak of a rank", peak / GIB, "GiB", note=note, **shared)
        if P > 1:
            note = "sent by all ranks in forward, backward and the forward again: query, key, value, output in bfloat16"
            yield figure(f"{name}: on the wire", sent / length, "bytes per token and layer", note=note)


def _step(shape: ModelShape, length: int, P: int) -> tuple[int, int, float]:
    """Bytes that live from forward to backward, at the peak, and that all ranks send for a layer."""
    batch = PackingCollator(pad_token_id=0, part=(0, P))([{"input_ids": [3] * length}])
    sent = 0
    exchange = distributed.all_to_all_single

    def counted(out: Tensor, x: Tensor, **options: Any) -> Any:
        nonlocal sent
        sent += x.numel() * x.element_size() * (P - 1)  # of P ranks, each keeps one part of P
        return exchange(out, x, **options)

    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        mock.patch.object(distributed, "all_to_all_single", counted),
    ):
        model = random_model(shape, torch.bfloat16, torch.device("cpu"))
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.set_attn_implementation(ATTENTION_NAME)
        with mock.patch.object(head, "_why_not_fused", return_value=None):  # it reads numbers, and these have none
            head.install_head(model, LossOptions())
        set_group(model, SequenceGroup(P) if P > 1 else None)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        inputs = model_inputs(batch) | loss_inputs(batch)
        inputs = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        used, kept = FakeAllocations(), 0

        def forward_and_backward() -> None:
            nonlocal kept
            with packed_forward():
                loss = model(**inputs).loss
            kept = used.current
            loss.backward()

        used.run(forward_and_backward)
    return kept, used.peak, sent / shape.num_hidden_layers


@contextlib.contextmanager
def _kernels_that_only_launch() -> Any:
    """TRL launches its Triton kernels by hand, outside of any operator. They work in place and allocate nothing."""
    with contextlib.ExitStack() as patches:
        with contextlib.suppress(ImportError):
            module = importlib.import_module("trl.kernels.chunked_logprob")
            for kernel in ("_forward_kernel", "_backward_kernel"):
                patches.enter_context(mock.patch.object(module, kernel, mock.MagicMock()))
        yield
