"""`train()` from end to end against TRL, padded and packed: tokens/s, peak memory, losses.

SmolLM2-135M on real instruction text, `gradient_checkpointing=False` for everybody. Real tokens are
counted, never padding. Peak memory is measured in a fresh process per competitor, which this file also is:
`python bench_train.py --child NAME`.
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
from measure import Figure, Settings, Timing, figure, peak_rss, reset_peak_rss, synchronize, training_dtype
from shapes import instruction_data, smollm2
from trainers import OURS, TRAINERS, TRL_PACKED, TRL_PADDED, build_trainer

SPEEDUPS = {TRL_PACKED: 1.7, TRL_PADDED: 3.5}


def bench_train(settings: Settings) -> list[Figure]:
    """Tokens per second of the whole `train()`, one epoch over the same examples, and peak memory."""
    repeats = 1 if settings.quick else 2
    dataset = instruction_data(settings.data, 64)
    by_length = sorted(range(64), key=lambda i: len(dataset[i]["prompt"]) + len(dataset[i]["completion"]))
    shortest = dataset.select(by_length[:2])
    if settings.quick:
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
    if settings.quick:
        return [*table, figure("peak memory", note="not measured with --quick: it takes a fresh process per trainer")]
    return table + peak_memory(settings.data)


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
