"""`train()` from end to end against TRL, padded and packed: tokens/s, peak memory, losses.

SmolLM2-135M on real instruction text on the CPU, models of 0.5 to 7 billion random weights on random tokens on a GPU.
`gradient_checkpointing=False` for everybody, and True beside it. Real tokens are counted, never padding. Peak memory
is the allocator's on a GPU; on the CPU that of a fresh process per competitor, which this file also is:
`python bench_train.py --child NAME --folder MODEL`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from floors import datasheet_peak, model_gemms, training_flops
from measure import (
    Figure,
    Settings,
    Timing,
    device,
    device_name,
    figure,
    interleave,
    peak_rss,
    reset_peak_rss,
    synchronize,
    training_dtype,
)
from shapes import (
    MODELS,
    first_layers,
    instruction_data,
    random_documents,
    random_model,
    smollm2,
    tiny_tokenizer,
    tokenised,
)
from trainers import (
    COMPETITORS,
    EXACT,
    OURS,
    OURS_COMPILED,
    OURS_LIGER,
    TRL_COMPILED,
    TRL_OUR_ATTENTION,
    TRL_PACKED,
    TRL_PADDED,
    build_trainer,
    flash_attention,
)

MAIN = (OURS, EXACT, TRL_PACKED, TRL_PADDED)
COMPILED = (OURS_COMPILED, TRL_COMPILED)
SHORT = (OURS, OURS_LIGER, TRL_PACKED, TRL_PADDED)  # of the models that are not looked at closely
# Relative difference of two steps' losses that rounding may make. A normalisation that is off by 1% makes 1e-2; another
# example in the step shows in the number of tokens too. In float32 rounding itself makes 1e-6 over eight steps at a
# learning rate of 1e-5. In bfloat16 a logit is off by 2^-9 of itself, a token's loss by some hundredths of a nat in
# either direction, and the mean of a thousand tokens by a thirtieth of that: a thousandth of 2 nats or of 11.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 5e-4}


@dataclass(frozen=True)
class Workload:
    """A model and what it is trained on.

    Args:
        model: makes the model, with the same weights each time.
        rows: examples, as `input_ids` and `labels`.
        peft: train a LoRA adapter of rank 16 on every linear layer, the head excepted.
        compile_backend: of those that take `torch_compile=True`.
    """

    name: str
    model: Callable[[], Any]
    tokenizer: Any
    rows: Any
    max_length: int
    peft: bool = False
    compile_backend: str = "inductor"

    def lengths(self) -> list[int]:
        """Tokens of each example, as every trainer cuts it."""
        return [min(len(row), self.max_length) for row in self.rows["input_ids"]]

    def num_scored(self) -> int:
        """Targets of the loss; an example's first token is none."""
        return sum(label != -100 for row in self.rows["labels"] for label in row[1 : self.max_length])

    def part(self, indices: Sequence[int]) -> Workload:
        return replace(self, rows=self.rows.select(indices))

    def why_not(self) -> str:
        return "peft is not installed" if self.peft and importlib.util.find_spec("peft") is None else ""


@dataclass
class Result:
    """What a competitor's runs gave, or why there are none.

    Args:
        seconds: of each timed `train()`.
        flops: useful floating-point operations of one, see `floors.training_flops`.
        mib: most memory that PyTorch had allocated on the GPU from the model to the end of the last run; 0 on the CPU.
        curve: (tokens seen, loss) after each step of the last run.
    """

    why_not: str = ""
    seconds: list[float] = field(default_factory=list)
    flops: float = 0.0
    mib: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Target:
    """How many times the speed of `slow` is that of `fast`, at least."""

    fast: str
    slow: str
    at_least: float | None = None
    headline: str = ""


def bench_train(settings: Settings) -> Iterator[Figure]:
    """Tokens per second of the whole `train()`, one epoch over the same examples; peak memory; losses."""
    return on_gpu_models(settings) if settings.dry_run or torch.cuda.is_available() else on_smollm2(settings)


def on_smollm2(settings: Settings) -> Iterator[Figure]:
    """What is measured on the CPU: the main competitors on all examples, everything else on a third of them."""
    model, tokenizer = smollm2(training_dtype())
    text = tokenised(instruction_data(settings.data, 64), tokenizer)
    work = Workload("SmolLM2-135M", lambda: smollm2(training_dtype())[0], tokenizer, text, 1024)
    order = sorted(range(64), key=lambda i: len(text[i]["input_ids"]))
    short = work.part(order[:2])
    others = [name for name in COMPETITORS if name not in MAIN]
    if settings.quick:
        work = work.part(order[28:36])  # of about the median length
        limit = gemm_rate(work, 1, num_tokens=256)
        quick = train_all(work, MAIN, {}, short)
        yield from speeds(work, quick, limit) + losses(work, quick)  # one pack: the targets are of 64 examples
        for name in [*others, "peak memory"]:
            yield figure(f"{work.name}: {name}", note="not run with --quick")
        return
    limit, third = gemm_rate(work, 3), work.part(range(0, 64, 3))
    full = train_all(work, MAIN, {OURS: 2, EXACT: 2, TRL_PACKED: 2}, short)
    yield from speeds(work, full, limit, CPU_TARGETS) + losses(work, full)
    others = [name for name in others if name not in COMPILED]
    yield from speeds(third, train_all(third, [OURS, *others], {}, short), limit, what="a third of the examples")
    yield from checkpointed(third, short, limit)
    # to compile all 30 layers takes several minutes a time
    shallow = replace(third, name=f"{work.name}, 3 of 30 layers", model=lambda: first_layers(work.model(), 3))
    yield from speeds(shallow, train_all(shallow, [OURS, *COMPILED], {}, short), gemm_rate(shallow, 3))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield from memory(work, child_peaks(folder, settings.data), CPU_TARGETS, 1.0)


def on_gpu_models(settings: Settings) -> Iterator[Figure]:
    """What is measured on a GPU; as a dry run the same on tiny models, wherever."""
    everybody = [name for name in COMPETITORS if name not in COMPILED]
    yield from on_gpu_model(settings, "Llama-3.2-1B", everybody, examples=240)
    yield from on_gpu_model(settings, "Qwen2.5-7B", SHORT, examples=120, peft=True)
    yield from on_gpu_model(settings, "Qwen2.5-0.5B", SHORT, examples=240)
    yield from on_gpu_model(settings, "Llama-3.2-1B", [OURS, *COMPILED], examples=240, layers=3)


def on_gpu_model(
    settings: Settings, name: str, competitors: Sequence[str], *, examples: int, peft: bool = False, layers: int = 0
) -> Iterator[Figure]:
    """The table of a model. With `layers`, of its first ones alone, and speeds alone: to compile more takes minutes."""
    shape, max_length, longest = MODELS[name], 4096, 1024
    if settings.dry_run:
        shape, max_length, longest, examples = shape.shrunk(), 128, 64, 16
    elif settings.quick:
        examples = 32
    if layers:
        name, shape = f"{name}, {layers} layers", replace(shape, num_hidden_layers=layers)
    work = Workload(
        f"{name} with LoRA" if peft else name,
        lambda: random_model(shape, training_dtype(), device()),
        tiny_tokenizer(),
        random_documents(examples, shape.vocab_size, longest),
        max_length,
        peft,
        "eager" if settings.dry_run else "inductor",
    )
    if why_not := work.why_not():
        yield from (figure(f"{work.name}: {competitor}", note=f"cannot run: {why_not}") for competitor in competitors)
        return
    short = None if settings.dry_run else work  # every shape of a batch has then been seen
    first = name == "Llama-3.2-1B"
    targets = gpu_targets() if first and not settings.dry_run else ()
    limit = gemm_rate(work, 1 if settings.quick or settings.dry_run else 3)
    repeats = {} if settings.quick or settings.dry_run or not first else {OURS: 2, TRL_PACKED: 2, TRL_OUR_ATTENTION: 2}
    found = train_all(work, competitors, repeats, short)
    yield from speeds(work, found, limit, targets)
    if layers:
        return
    yield from losses(work, found)
    if torch.cuda.is_available():
        peaks = {key: result.mib or f"cannot run: {result.why_not}" for key, result in found.items()}
        yield from memory(work, peaks, targets, 0.8)
    if first:
        yield from checkpointed(work, None, limit)


CPU_TARGETS = (
    Target(OURS, TRL_PACKED, 1.7, "tokens per second of `train()`, against TRL's `packing=True`"),
    Target(OURS, TRL_PADDED, 3.5, "tokens per second of `train()`, against TRL's padded batches"),
    Target(
        EXACT,
        TRL_PADDED,
        3.5,
        "tokens per second of `train()` with exact steps, against TRL's padded batches, whose losses they have",
    ),
)


def gpu_targets() -> tuple[Target, ...]:
    """Without the flash-attn package, packsft's attention takes its place in TRL."""
    packed = TRL_PACKED if flash_attention() else TRL_OUR_ATTENTION
    against = "TRL's `packing=True` with " + ("flash attention" if flash_attention() else "packsft's attention")
    return (
        Target(OURS, packed, 1.15, f"tokens per second of `train()`, against {against}"),
        Target(OURS_LIGER, packed, 1.35, f"with Liger's layer kernels, against {against} and without them"),
        Target(OURS, TRL_PADDED, 3.0, "tokens per second of `train()`, against TRL's padded batches"),
        Target(
            EXACT,
            TRL_PADDED,
            3.0,
            "tokens per second of `train()` with exact steps, against TRL's padded batches, whose losses they have",
        ),
    )


# ---- runs ----


def train_all(
    work: Workload, names: Sequence[str], repeats: dict[str, int], warmup: Workload | None, **arguments: Any
) -> dict[str, Result]:
    """Train with each competitor in the order A B C A B C, a fresh model each time, after a warm-up round.

    One that raises is left out from there on, with the error as its reason; packsft must not raise.

    Args:
        repeats: timed rounds of a competitor, 1 where it is not named. A compiled one has a single round, in which it
            trains on everything twice to compile, and a third time for the clock.
        arguments: of the configuration, for all.
    """
    found = {name: Result(COMPETITORS[name].why_not()) for name in names}
    for repeat in range(-1 if warmup else 0, max((repeats.get(name, 1) for name in names), default=1)):
        for name, result in found.items():
            rounds = 1 if name in COMPILED else repeats.get(name, 1)
            if result.why_not or repeat >= rounds or (repeat < 0 and name in COMPILED):
                continue
            try:
                if repeat < 0:
                    train_once(warmup, name, Result(), arguments)
                else:
                    train_once(work, name, result, arguments)
            except Exception as error:
                if name == OURS:
                    raise
                result.why_not = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            gc.collect()
            torch.cuda.empty_cache()
    return found


def train_once(work: Workload, name: str, result: Result, arguments: dict[str, Any]) -> None:
    """One epoch with a fresh model; adds to `result`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model, peft_config = work.model(), None
    if work.peft:
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = {"max_length": work.max_length, **arguments}
    compiled = COMPETITORS[name].compiled
    if compiled:
        arguments["torch_compile_backend"] = work.compile_backend
    with tempfile.TemporaryDirectory() as folder, COMPETITORS[name].contained(model):
        trainer = build_trainer(name, model, work.tokenizer, work.rows, folder, peft_config=peft_config, **arguments)
        for _ in range(2 * compiled):  # it takes half a dozen packs until every size of the graph is dynamic
            trainer.train()
        counted = trainer._total_train_tokens
        synchronize()
        start = time.perf_counter()
        output = trainer.train()
        synchronize()
        result.seconds.append(time.perf_counter() - start)
    result.curve = [
        (entry["num_tokens"] - counted, entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
    ]
    attention = trainer.model.config._attn_implementation
    result.note = f"{output.global_step} steps, mean loss {output.training_loss:.3f}, attention {attention}"
    num_tokens, lengths = result.curve[-1][0], work.lengths()
    if num_tokens != sum(lengths):
        result.note += f"; WRONG: it trained on {num_tokens:.0f} tokens of {sum(lengths)}"
    result.flops = training_flops(trainer.model, lengths, work.num_scored())
    if torch.cuda.is_available():
        result.mib = torch.cuda.max_memory_allocated() / 2**20


def gemm_rate(work: Workload, repeats: int, num_tokens: int | None = None) -> float:
    """FLOP/s of the model's bare GEMMs, forward and backward, on a full pack (or `num_tokens`): the fastest repeat."""
    num_tokens = num_tokens or work.max_length
    num_scored = round(num_tokens * work.num_scored() / sum(work.lengths()))
    run, flops = model_gemms(work.model(), num_tokens, num_scored)
    return flops / min(interleave({"gemms": run}, repeats)["gemms"].seconds)


# ---- figures ----


def speeds(
    work: Workload, found: dict[str, Result], limit: float, targets: Sequence[Target] = (), what: str = ""
) -> list[Figure]:
    """A row of tokens per second for each competitor, and the limit: all useful operations at the rate `limit`.

    A competitor's row has the ratio of the target it is in (`fast` where that is not packsft, else `slow`), or that of
    packsft's speed to its own.

    Args:
        limit: FLOP/s of the bare GEMMs.
        what: under which conditions, if not the main ones.
    """
    num_tokens = sum(work.lengths())
    title = f"Tokens per second, {work.name}" + (f", {what}" if what else "")
    times = {name: Timing(tuple(result.seconds)) for name, result in found.items() if result.seconds}
    rates = {name: num_tokens / timing.median for name, timing in times.items()}
    by_row = {target.slow if target.fast == OURS else target.fast: target for target in targets}
    table = [
        figure(
            f"{work.name}: bare GEMMs" + (f", {what}" if what else ""),
            num_tokens * limit / found[OURS].flops,
            "tokens/s",
            **rate(limit),
            note=f"the limit; {num_tokens:,} tokens in {len(work.rows)} examples",
            chart=title,
            series="bare GEMMs",
            limit=True,
        )
    ]
    for name, result in found.items():
        row = f"{work.name}: {name}" + (f", {what}" if what else "")
        if result.why_not:
            table.append(figure(row, note=f"cannot run: {result.why_not}"))
            continue
        achieved = result.flops * rates[name] / num_tokens
        note = f"MFU {achieved / limit:.0%} of the bare GEMMs"
        if peak := datasheet_peak(device_name()):
            note += f", {achieved / peak:.0%} of the datasheet"
        note += f"; {result.note}" + ("; without the time to compile" if name in COMPILED else "")
        target = by_row.get(name, Target(OURS, name))
        judged: dict[str, Any] = {}
        if name != OURS and target.fast in rates and target.slow in rates:
            judged = {
                "ratio": rates[target.fast] / rates[target.slow],
                "ratio_of": f"speed of {target.fast} / {'this' if target.slow == name else target.slow}",
                "at_least": target.at_least,
                "headline": target.headline,
            }
        table.append(
            figure(
                row,
                rates[name],
                "tokens/s",
                **rate(achieved),
                spread=times[name].spread if len(result.seconds) > 1 else None,
                note=note,
                chart=title,
                series=name,
                **judged,
            )
        )
    return table


def rate(flops_per_second: float) -> dict[str, Any]:
    unit, name = (1e12, "TFLOP/s") if torch.cuda.is_available() else (1e9, "GFLOP/s")
    return {"rate": flops_per_second / unit, "rate_unit": name}


def checkpointed(work: Workload, warmup: Workload | None, limit: float) -> list[Figure]:
    found = train_all(work, MAIN, {}, warmup, gradient_checkpointing=True)
    return speeds(work, found, limit, what="gradient_checkpointing=True")


def losses(work: Workload, found: dict[str, Result]) -> list[Figure]:
    """The loss curves of the main competitors, and whether the exact steps are those of the padded batches."""
    curves = {name: found[name].curve for name in MAIN if name in found and found[name].curve}
    table = [
        figure(
            f"{work.name}: loss of the last step, {name}",
            curve[-1][1],
            "nats",
            chart=f"Loss over tokens, {work.name}",
            series=name,
            x_name="tokens seen",
            curve=curve,
        )
        for name, curve in curves.items()
    ]
    if EXACT in curves and TRL_PADDED in curves:
        table.append(
            figure(
                f"{work.name}: losses of exact steps against padded batches",
                loss_difference(curves[EXACT], curves[TRL_PADDED]),
                "relative",
                at_most=ROUNDING[training_dtype()],
                parity=True,
                note=f"largest of {len(curves[EXACT])} steps; each took as many tokens",
            )
        )
    return table


def loss_difference(ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> float:
    """Largest relative difference of the losses of the same steps; infinite where a step took other tokens."""
    if [tokens for tokens, _ in ours] != [tokens for tokens, _ in theirs]:
        return float("inf")
    return float(np.max([abs(a - b) / abs(b) for (_, a), (_, b) in zip(ours, theirs, strict=True)]))


def memory(work: Workload, peaks: dict[str, float | str], targets: Sequence[Target], at_most: float) -> list[Figure]:
    """A row for each competitor's peak memory, in MiB, or the reason why there is none.

    Args:
        targets: the first names the competitor whose memory is the target.
        at_most: the share of its memory that packsft may take.
    """
    span = "during train()" if reset_peak_rss() else "from start to end"  # where the system cannot count afresh
    where = "allocated on the GPU" if torch.cuda.is_available() else f"resident {span}, in a process of its own"
    ours, table = peaks[OURS], []
    for name, peak in peaks.items():
        row = f"{work.name}: peak memory, {name}"
        if isinstance(peak, str):
            table.append(figure(row, note=peak))
            continue
        judged: dict[str, Any] = {}
        if name != OURS and not isinstance(ours, str):
            judged = {"ratio": ours / peak, "ratio_of": "memory of packsft / this"}
            if targets and name == targets[0].slow:
                judged |= {"at_most": at_most, "headline": f"peak memory of `train()`, against {name}"}
        chart = f"Peak memory, {work.name}"
        table.append(figure(row, peak, "MiB", note=where, chart=chart, series=name, **judged))
    return table


# ---- memory on the CPU ----


def child_peaks(folder: str, data: str | None) -> dict[str, float | str]:
    """Peak memory in MiB, or why there is none, of each competitor that can run, in a process of its own."""
    peaks: dict[str, float | str] = {}
    for name, competitor in COMPETITORS.items():
        if competitor.compiled:
            peaks[name] = "not measured: the compiler's own memory would be counted"
        elif not (reason := competitor.why_not()):
            command = [sys.executable, __file__, "--child", name, "--folder", folder]
            ended = subprocess.run([*command, *(["--data", data] if data else [])], capture_output=True, text=True)
            if ended.returncode:
                error = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
                peaks[name] = f"cannot run: {error}"
            else:
                peaks[name] = json.loads(ended.stdout.strip().splitlines()[-1])
        else:
            peaks[name] = f"cannot run: {reason}"
    return peaks


def child(name: str, folder: str, data: str | None) -> float:
    """Peak resident memory, in MiB, of two steps over the longest of 64 examples.

    The second step holds weights, gradients and both states of AdamW.
    """
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=training_dtype())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = tokenised(instruction_data(data, 64), tokenizer)
    order = sorted(range(64), key=lambda i: -len(rows[i]["input_ids"]))
    with tempfile.TemporaryDirectory() as output, COMPETITORS[name].contained(model):
        trainer = build_trainer(name, model, tokenizer, rows.select(order[:16]), output, max_steps=2)
        gc.collect()
        reset_peak_rss()
        trainer.train()
        return peak_rss()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=COMPETITORS, required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--data")
    asked = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        peak = child(asked.child, asked.folder, asked.data)
    print(json.dumps(peak))
