"""Whole training: one step against the bare GEMMs of the model, and `train()` against TRL, padded and packed.

SmolLM2-135M on real instruction text, `gradient_checkpointing=False` for everybody. Real tokens are
counted, never padding. Peak memory is measured in a fresh process per competitor, which this file also is:
`python bench_training_step.py --child NAME`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from floors import model_gemms
from measure import Timing, figure, interleave, peak_rss, reset_peak_rss, synchronize, training_dtype
from peers import OURS, TRAINERS, TRL_PACKED, TRL_PADDED, build_trainer
from shapes import instruction_data, smollm2

SPEEDUPS = {TRL_PACKED: 1.7, TRL_PADDED: 3.5}
# Tensor operations that multiply matrices, by the names the profiler gives them
GEMM_OPERATORS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::matmul", "aten::linear")


def bench_step(quick: bool, data: str | None = None) -> list[dict[str, Any]]:
    """Forward and backward of one full pack, 512 tokens with --quick, through `PackedSFTTrainer`, against its GEMMs."""
    model, tokenizer = smollm2(training_dtype())
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            OURS, model, tokenizer, instruction_data(data, 64), folder, max_length=512 if quick else 1024
        )
        batch = typical_pack(list(trainer.get_train_dataloader()))
        step, num_tokens, num_scored = training_step(trainer, batch)
    gemms, flops = model_gemms(trainer.model, num_tokens, num_scored)
    times = interleave({"step": step, "gemms": gemms}, 1 if quick else 7)
    ours, floor = times["step"].median, times["gemms"].median
    table = [
        figure(
            f"bare GEMMs, {num_tokens} tokens, {num_scored} scored",
            floor,
            "s",
            spread=times["gemms"].spread,
            note=f"the limit, {flops / floor / 1e9:.0f} GFLOP/s",
        ),
        figure(
            "packsft, forward and backward of one pack",
            ours,
            "s",
            ratio=ours / floor,
            ratio_of="time / bare GEMMs",
            at_most=1.4,
            spread=times["step"].spread,
            note=f"{batch['cu_seq_lens_q'].numel() - 1} documents",
        ),
    ]
    if quick:
        return table
    shares = operator_shares(step)
    total = sum(shares.values())
    return table + [
        figure(f"share of {name}", 100 * share / total, "%", note="of the time inside operators, profiled")
        for name, share in shares.items()
    ]


def typical_pack(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the full packs (within 3% of the fullest) the one in the middle by attention's cost.

    Best-fit packing lays long examples together and short ones together: the first pack or the last is not typical.
    """
    fullest = max(batch["input_ids"].numel() for batch in batches)
    full = [batch for batch in batches if batch["input_ids"].numel() >= 0.97 * fullest]
    return sorted(full, key=lambda batch: int(batch["cu_seq_lens_q"].diff().square().sum()))[len(full) // 2]


def training_step(trainer: Any, batch: dict[str, Any]) -> tuple[Any, int, int]:
    """(forward and backward of one micro-step as the trainer runs it, tokens, scored tokens)."""
    model = trainer.model.train()
    inputs = trainer._prepare_inputs(batch)
    num_scored = int((inputs["labels"] != -100).sum())

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_scored)
        loss.backward()

    return run, inputs["input_ids"].numel(), num_scored


def operator_shares(step: Any) -> dict[str, float]:
    """Seconds inside attention, matrix multiplications and everything else, over one profiled step."""
    with torch.profiler.profile() as profiler:
        step()
        synchronize()
    shares = {"attention": 0.0, "matrix multiplications": 0.0, "everything else": 0.0}
    for event in profiler.key_averages():
        own = (event.self_device_time_total or event.self_cpu_time_total) / 1e6
        if "attention" in event.key or "flash" in event.key:
            shares["attention"] += own
        elif event.key in GEMM_OPERATORS:
            shares["matrix multiplications"] += own
        else:
            shares["everything else"] += own
    return shares


def bench_train(quick: bool, data: str | None = None) -> list[dict[str, Any]]:
    """Tokens per second of the whole `train()`, one epoch over the same examples, and peak memory."""
    repeats = 1 if quick else 2
    dataset = instruction_data(data, 64)
    by_length = sorted(range(64), key=lambda i: len(dataset[i]["prompt"]) + len(dataset[i]["completion"]))
    shortest = dataset.select(by_length[:2])
    if quick:
        dataset = dataset.select(by_length[28:36])  # of about the median length
    pristine, tokenizer = smollm2(training_dtype())
    num_tokens = count_tokens(dataset, tokenizer, 1024)
    seconds: dict[str, list[float]] = {name: [] for name in TRAINERS}
    notes = {}
    for repeat in range(-1, repeats):  # the first round, over two short examples, is the warm-up
        for name in TRAINERS:
            with tempfile.TemporaryDirectory() as folder:
                rows = dataset if repeat >= 0 else shortest
                trainer = build_trainer(name, copy.deepcopy(pristine), tokenizer, rows, folder)
                synchronize()
                start = time.perf_counter()
                result = trainer.train()
                synchronize()
                if repeat >= 0:
                    seconds[name].append(time.perf_counter() - start)
                    notes[name] = describe_run(trainer, result, num_tokens)
                del trainer
                gc.collect()
    times = {name: Timing(tuple(values)) for name, values in seconds.items()}
    ours = num_tokens / times[OURS].median
    table = []
    for name in TRAINERS:
        speed = num_tokens / times[name].median
        ratio: dict[str, Any] = {}
        if name != OURS:
            ratio = {"ratio": ours / speed, "ratio_of": "speed of packsft / this", "at_least": SPEEDUPS[name]}
        table.append(figure(name, speed, "tokens/s", spread=times[name].spread, note=notes[name], **ratio))
    if quick:
        return [*table, figure("peak memory", note="not measured with --quick: it takes a fresh process per trainer")]
    return table + peak_memory(data)


def count_tokens(dataset: Any, tokenizer: Any, max_length: int) -> int:
    """Tokens of the examples as every trainer sees them: with an end-of-sequence token, cut at `max_length`."""
    eos = tokenizer.eos_token
    texts = [row["prompt"] + row["completion"] for row in dataset]
    ids = tokenizer([text if text.endswith(eos) else text + eos for text in texts])["input_ids"]
    return sum(min(len(row), max_length) for row in ids)


def describe_run(trainer: Any, result: Any, num_tokens: int) -> str:
    """Steps and loss, and a warning if the trainer itself counted other tokens than `num_tokens`.

    Joining prompt and completion before or after tokenising differs by a token here and there, hence one percent.
    """
    counted = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    note = f"{result.global_step} steps, mean loss {result.training_loss:.3f}"
    if counted and abs(counted[-1] - num_tokens) > 0.01 * num_tokens:
        note += f"; WRONG: it trained on {counted[-1]:.0f} tokens of {num_tokens}"
    return note


def peak_memory(data: str | None) -> list[dict[str, Any]]:
    """Peak memory of two optimizer steps (the second holds weights, gradients and both AdamW states) per trainer."""
    peaks = {}
    table = []
    for name in TRAINERS:
        command = [sys.executable, __file__, "--child", name, *(["--data", data] if data else [])]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
            table.append(figure(f"peak memory, {name}", note=f"cannot run: {reason}"))
            continue
        report = json.loads(child.stdout.strip().splitlines()[-1])
        peaks[name] = report["mib"]
        ratio: dict[str, Any] = {}
        if name != OURS and OURS in peaks:
            ratio = {"ratio": peaks[OURS] / peaks[name], "ratio_of": "memory of packsft / this", "at_most": 1.0}
        table.append(
            figure(
                f"peak memory, {name}",
                peaks[name],
                "MiB",
                note=report["what"],
                **ratio,
            )
        )
    return table


def child(name: str, data: str | None) -> dict[str, Any]:
    """Two steps over the longest of 64 examples, and the peak memory they took."""
    model, tokenizer = smollm2(training_dtype())
    dataset = instruction_data(data, 64)
    order = sorted(range(64), key=lambda i: -len(dataset[i]["prompt"]) - len(dataset[i]["completion"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(name, model, tokenizer, dataset.select(order[:16]), folder, max_steps=2)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            return {"mib": torch.cuda.max_memory_allocated() / 2**20, "what": "allocated on the GPU"}
        alone = reset_peak_rss()
        trainer.train()
        return {"mib": peak_rss(), "what": "resident, " + ("during train()" if alone else "whole process")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=TRAINERS, required=True)
    parser.add_argument("--data")
    arguments = parser.parse_args()
    print(json.dumps(child(arguments.child, arguments.data)))
