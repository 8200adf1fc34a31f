"""Times one training step against the bare GEMMs of the model, and says where the rest of its time goes.

SmolLM2-135M on real instruction text, on a GPU a model of 1B random weights on random tokens; through
`PackedSFTTrainer`'s own `compute_loss`, `gradient_checkpointing=False`. And what checkpointing takes of the host.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from harness.floors import model_gemms
from harness.measure import Figure, Settings, device, figure, interleave, synchronize, training_dtype
from harness.shapes import MODELS, docstrings, random_documents, random_model, smollm2, tiny_tokenizer
from harness.trainers import OURS, build_trainer
from torch.autograd import DeviceType
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from packsft.model.compilation import compile_layers, restore_layers
from packsft.model.gradient_checkpointing import checkpoint

# Tensor operations that multiply matrices, by the names the profiler gives them
GEMM_OPERATORS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::matmul", "aten::linear")


def bench(settings: Settings) -> list[Figure]:
    """Forward and backward of one full pack, 512 tokens with --quick, against the model's GEMMs."""
    on_gpu = device().type == "cuda"
    max_length = 8192 if on_gpu else 512 if settings.quick else 1024
    if on_gpu:
        shape = MODELS["Llama-3.2-1B"]
        model, tokenizer = random_model(shape, training_dtype(), device()), tiny_tokenizer()
        rows = random_documents(240, shape.vocab_size, 1024)
    else:
        (model, tokenizer), rows = smollm2(training_dtype()), docstrings(64)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(OURS, model, tokenizer, rows, folder, max_length=max_length)
        batch = typical_pack(list(trainer.get_train_dataloader()))
        step, num_tokens, num_scored = training_step(trainer, batch)
    gemms, flops = model_gemms(trainer.model, num_tokens, num_scored)
    candidates: dict[str, Callable[[], None]] = {"step": step, "gemms": gemms}
    if not settings.short:
        step()
        candidates |= {"compiled": with_compiled_layers(model, step)}
        start = time.perf_counter()
        candidates["compiled"]()
        first = time.perf_counter() - start
    times = interleave(candidates, 1 if settings.quick else 7)
    ours, floor = times["step"].median, times["gemms"].median
    table = [
        figure(
            f"bare GEMMs, {num_tokens} tokens, {num_scored} scored", floor, "s", spread=times["gemms"].spread,
            note=f"the limit, {flops / floor / 1e9:.0f} GFLOP/s",
        ),
        figure(
            "packsft, forward and backward of one pack", ours, "s", ratio=ours / floor, ratio_of="time / bare GEMMs",
            at_most=1.35, spread=times["step"].spread, note=f"{batch['cu_seq_lens_q'].numel() - 1} documents",
        ),
    ]  # fmt: skip
    if settings.quick:
        return table
    if on_gpu:
        table += launching(trainer)
    table += checkpointing()
    if "compiled" in times:
        compiled = times["compiled"]
        table.append(figure(
            "packsft, the same with compiled layers", compiled.median, "s", ratio=compiled.median / floor,
            ratio_of="time / bare GEMMs", at_most=1.35, spread=compiled.spread,
            note=f"the first step takes {first:.0f} s",
        ))  # fmt: skip
    shares = operator_shares(step)
    total = sum(shares.values())
    return table + [
        figure(f"share of {name}", 100 * share / total, "%", note="of the time inside operators, profiled")
        for name, share in shares.items()
    ]


def with_compiled_layers(model: Any, step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        compile_layers(model)  # takes no time: the layers are compiled when they first run
        step()
        restore_layers(model)

    return run


def launching(trainer: Any, repeats: int = 15) -> list[Figure]:
    """Forward and backward of 16 tokens, which no card takes long for: what the host takes to launch a step, beside the
    model's own forward and backward of as many tokens, with SDPA and its own loss. And what one launch takes."""
    model = trainer.model.train()
    number = torch.zeros((), device=model.device)
    ids = torch.full((1, 16), 5, device=model.device)
    step, *_ = training_step(trainer, trainer.data_collator([{"input_ids": ids[0].tolist(), "seq_lengths": [16]}]))

    def own() -> None:
        model.zero_grad(set_to_none=True)
        with trainer.compute_loss_context_manager():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    def launch() -> None:
        for _ in range(1000):
            number.add_(1)

    times = interleave({"own": own, "packsft": step, "launch": launch}, repeats, launches=True)
    limit, ours = times["own"].median, times["packsft"].median
    with torch.profiler.profile() as profiler:
        step()
        synchronize()
    kernels = sum(event.count for event in profiler.key_averages() if event.device_type == DeviceType.CUDA)
    return [
        figure("a step of 16 tokens, the model alone", limit, "s", spread=times["own"].spread, note="launches"),
        figure(
            "a step of 16 tokens, packsft", ours, "s", ratio=ours / limit, ratio_of="time / the model alone",
            at_most=1.1, spread=times["packsft"].spread,
        ),
        figure(
            "a launch of the smallest kernel", times["launch"].median / 1000, "s", spread=times["launch"].spread,
            note=f"of 1,000 in a row; the step of 16 tokens has {kernels}",
        ),
    ]  # fmt: skip


def checkpointing(repeats: int = 25) -> list[Figure]:
    """What gradient checkpointing takes of the host: forward and backward of 16 tokens through 16 layers that are so
    small that nothing else takes time. It must take one more forward."""
    shape = replace(MODELS["Llama-3.2-1B"].shrunk(), num_hidden_layers=16)
    model = random_model(shape, training_dtype(), device()).train()
    ids = torch.full((1, 16), 5, device=model.device)

    def forward(function: Callable[..., Any] | None = None) -> torch.Tensor:
        for layer in model.model.layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = function is not None, function
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def step(function: Callable[..., Any] | None) -> Callable[[], None]:
        return lambda: forward(function).backward()

    pytorchs = functools.partial(torch_checkpoint, use_reentrant=False)
    candidates = {"forward": forward, "none": step(None), "pytorch": step(pytorchs), "packsft": step(checkpoint)}
    times = interleave(candidates, repeats, launches=True)
    limit = times["none"].median + times["forward"].median
    return [
        figure("16 tiny layers, a step and a forward", limit, "s", spread=times["none"].spread, note="host"),
        *(
            figure(
                f"16 tiny layers, a step with {name} gradient checkpointing", times[key].median, "s",
                ratio=times[key].median / limit, ratio_of="time / a step and a forward", spread=times[key].spread,
                at_most=times["pytorch"].median / limit if key == "packsft" else None,
            )
            for name, key in {"PyTorch's": "pytorch", "packsft's": "packsft"}.items()
        ),
    ]  # fmt: skip


def typical_pack(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the full packs (within 3% of the fullest) the one in the middle by attention's cost.

    Best-fit packing lays long examples together and short ones together: the first pack or the last is not typical.
    """
    fullest = max(batch["input_ids"].numel() for batch in batches)
    full = [batch for batch in batches if batch["input_ids"].numel() >= 0.97 * fullest]
    return sorted(full, key=lambda batch: int(batch["cu_seq_lens_q"].diff().square().sum()))[len(full) // 2]


def training_step(trainer: Any, batch: dict[str, Any]) -> tuple[Callable[[], None], int, int]:
    """(forward and backward of one micro-step as the trainer runs it, but without autocast; tokens, scored tokens)."""
    model = trainer.model.train()
    inputs = trainer._prepare_inputs(batch)
    num_scored = int((inputs["labels"] != -100).sum())

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_scored)
        loss.backward()

    return run, inputs["input_ids"].numel(), num_scored


def operator_shares(step: Callable[[], None]) -> dict[str, float]:
    """Seconds inside attention, matrix multiplications and everything else, over one profiled step."""
    with torch.profiler.profile() as profiler:
        step()
        synchronize()
    shares = {"attention": 0.0, "matrix multiplications": 0.0, "everything else": 0.0}
    for event in profiler.key_averages():
        attention = "attention" in event.key or "flash" in event.key
        multiplies = event.key in GEMM_OPERATORS
        kind = "attention" if attention else "matrix multiplications" if multiplies else "everything else"
        shares[kind] += (event.self_device_time_total or event.self_cpu_time_total) / 1e6
    return shares
