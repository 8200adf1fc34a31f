"""Measures `train()` from end to end against TRL, padded and packed: tokens/s, peak memory, losses.

SmolLM2-135M on real instruction text on the CPU, models of 0.5 to 7 billion random weights on random tokens on a GPU.
`gradient_checkpointing=False` for everybody, and True beside it. Real tokens are counted, never padding. Peak memory
is the allocator's on a GPU; on the CPU that of a fresh process per competitor.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from harness.contest import Outputs, Verdict, allowed_errors, relative_errors
from harness.floors import datasheet_peak, model_gemms, training_flops
from harness.measure import (
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
from harness.shapes import MODELS, docstrings, random_documents, random_model, smollm2, tiny_tokenizer, tokenised
from harness.trainers import (
    COMPETITORS,
    EXACT,
    OURS,
    OURS_LIGER,
    TRL_OUR_ATTENTION,
    TRL_PACKED,
    TRL_PADDED,
    build_trainer,
    flash_attention,
)
from transformers import TrainerCallback

MAIN = (OURS, EXACT, TRL_PACKED, TRL_PADDED)
SHORT = (OURS, TRL_PACKED, TRL_PADDED, OURS_LIGER)  # of the models that are not looked at closely
SETTLING = 5  # steps
Targets = dict[tuple[str, str], float]  # how many times the speed of the second the first has, at least
CPU_TARGETS: Targets = {(OURS, TRL_PACKED): 1.7, (OURS, TRL_PADDED): 3.5, (EXACT, TRL_PADDED): 3.5}


def gpu_targets() -> Targets:
    """Without the flash-attn package, packsft's attention takes its place in TRL."""
    packed = TRL_PACKED if flash_attention() else TRL_OUR_ATTENTION
    return {
        (OURS, packed): 1.15,
        (OURS_LIGER, packed): 1.35,
        (OURS, TRL_PADDED): 3.0,
        (EXACT, TRL_PADDED): 3.0,
    }


@dataclass(frozen=True)
class Workload:
    """A model and what it is trained on.

    Args:
        model: makes the model in a dtype, with the same weights each time: those of the training's dtype.
        rows: examples, as `input_ids` and `labels`.
        peft: train a LoRA adapter of rank 16 on every linear layer, the head excepted.
    """

    name: str
    model: Callable[[torch.dtype], Any]
    tokenizer: Any
    rows: Any
    max_length: int
    peft: bool = False

    def lengths(self) -> list[int]:
        """Tokens of each example, as every trainer cuts it."""
        return [min(len(row), self.max_length) for row in self.rows["input_ids"]]

    def num_scored(self) -> int:
        """Targets of the loss; an example's first token is none."""
        return sum(label != -100 for row in self.rows["labels"] for label in row[1 : self.max_length])

    def shortest(self, start: int, stop: int) -> Workload:
        """Of the examples in order of length those from `start` to `stop`."""
        order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]["input_ids"]))
        return replace(self, rows=self.rows.select(order[start:stop]))


@dataclass
class Result:
    """What a competitor's runs gave, or why there are none.

    Args:
        seconds: of each timed `train()`.
        flops: useful floating-point operations of one, see `floors.training_flops`.
        steady: tokens per second of the last run after its first `SETTLING` steps; 0 where it has no more.
        mib: most memory that PyTorch had allocated on the GPU from the model to the end of the last run; 0 on the CPU.
        steps: what the trainer logged of each step of the last run.
    """

    why_not: str = ""
    seconds: list[float] = field(default_factory=list)
    flops: float = 0.0
    steady: float = 0.0
    mib: float = 0.0
    steps: list[dict[str, float]] = field(default_factory=list)
    note: str = ""


def bench(settings: Settings) -> Iterator[Figure]:
    """Tokens per second of the whole `train()`, one epoch over the same examples; peak memory; losses."""
    return on_gpu_models(settings) if settings.dry_run or torch.cuda.is_available() else on_smollm2(settings)


def on_smollm2(settings: Settings) -> Iterator[Figure]:
    """What is measured on the CPU: the main competitors on all examples, everything else on a third of them."""
    model, tokenizer = smollm2(training_dtype())
    text = tokenised(docstrings(64), tokenizer)
    work = Workload("SmolLM2-135M", lambda dtype: smollm2(training_dtype())[0].to(dtype), tokenizer, text, 1024)
    short = work.shortest(0, 2)
    if settings.quick:
        middle = work.shortest(28, 36)
        limit = gemm_rate(middle, 1, num_tokens=256)
        quick = train_all(middle, MAIN, {}, short)
        yield from speeds(middle, quick, limit)  # one pack: the targets are of 64 examples
        yield from losses(middle, quick)
        yield from same_steps(work.shortest(0, 24))
        yield figure(f"{work.name}: other competitors, peak memory", note="not run with --quick")
        return
    limit, third = gemm_rate(work, 3), replace(work, rows=text.select(range(0, 64, 3)))
    full = train_all(work, MAIN, {OURS: 2, EXACT: 2, TRL_PACKED: 2}, short)
    yield from speeds(work, full, limit, CPU_TARGETS)
    yield from losses(work, full)
    yield from same_steps(work.shortest(0, 32))
    others = [name for name in COMPETITORS if name not in MAIN]
    yield from speeds(third, train_all(third, [OURS, *others], {}, short), limit, what="a third of the examples")
    yield from checkpointed(third, short, limit)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield from memory(work, child_peaks(folder), CPU_TARGETS, 1.0)


def on_gpu_models(settings: Settings) -> Iterator[Figure]:
    """What is measured on a GPU; as a dry run the same on tiny models, wherever."""
    first, limit = yield from on_gpu_model(settings, "Llama-3.2-1B", tuple(COMPETITORS), gpu_targets(), examples=480)
    yield from on_gpu_model(settings, "Qwen2.5-7B", SHORT, {}, examples=120, peft=True)
    yield from on_gpu_model(settings, "Qwen2.5-0.5B", SHORT, {}, examples=240)
    yield from same_steps(first.shortest(0, 32))
    yield from checkpointed(first, None, limit)


def on_gpu_model(
    settings: Settings, name: str, competitors: Sequence[str], targets: Targets, *, examples: int, peft: bool = False
) -> Generator[Figure, None, tuple[Workload, float]]:
    """The table of a model. Returns what was trained on, and FLOP/s of the model's bare GEMMs."""
    shape, max_length, longest, small = MODELS[name], 4096, 1024, settings.quick or settings.dry_run
    if settings.dry_run:
        shape, max_length, longest, examples = shape.shrunk(), 128, 64, 32
    elif settings.quick:
        examples = 32
    work = Workload(
        f"{name} with LoRA" if peft else name,
        lambda dtype: random_model(shape, training_dtype(), device()).to(dtype),
        tiny_tokenizer(),
        random_documents(examples, shape.vocab_size, longest),
        max_length,
        peft,
    )
    if peft and importlib.util.find_spec("peft") is None:
        yield figure(work.name, note="cannot run: peft is not installed")
        return work, 0.0
    limit = gemm_rate(work, 1 if small else 3)
    repeats = {OURS: 2, TRL_PACKED: 2, TRL_OUR_ATTENTION: 2} if targets and not small else {}
    targets = {} if settings.dry_run else targets
    found: dict[str, Result] = {}
    warmup = replace(work, rows=work.rows.select(range(min(48, examples))))
    for competitor in competitors:  # one after the other, so that a run that is cut short has the first ones
        found |= train_all(work, [competitor], repeats, None if settings.dry_run else warmup)
        yield from speeds(work, found, limit, targets, shown=[competitor])
    yield from losses(work, found)
    if torch.cuda.is_available():
        peaks = {key: result.mib or f"cannot run: {result.why_not}" for key, result in found.items()}
        yield from memory(work, peaks, targets, 0.8)
    return work, limit


# ---- runs ----


def train_all(
    work: Workload, names: Sequence[str], repeats: dict[str, int], warmup: Workload | None, **arguments: Any
) -> dict[str, Result]:
    """Train with each competitor in the order A B C A B C, a fresh model each time, after a warm-up round.

    One that raises is left out from there on, with the error as its reason; packsft must not raise.

    Args:
        repeats: timed rounds of a competitor, 1 where it is not named.
        arguments: of the configuration, for all.
    """
    found = {name: Result(COMPETITORS[name].why_not()) for name in names}
    for repeat in range(-1 if warmup else 0, max((repeats.get(name, 1) for name in names), default=1)):
        for name, result in found.items():
            if result.why_not or repeat >= repeats.get(name, 1):
                continue
            try:
                if warmup and repeat < 0:
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
    model, peft_config = work.model(training_dtype()), None
    if work.peft:
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = {"max_length": work.max_length, **arguments}
    with tempfile.TemporaryDirectory() as folder, COMPETITORS[name].contained(model):
        trainer = build_trainer(name, model, work.tokenizer, work.rows, folder, peft_config=peft_config, **arguments)
        trainer.add_callback(settled := Settled())
        synchronize()
        start = time.perf_counter()
        output = trainer.train()
        synchronize()
        end = time.perf_counter()
    result.seconds.append(end - start)
    result.steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    attention = trainer.model.config._attn_implementation
    result.note = f"{output.global_step} steps, mean loss {output.training_loss:.3f}, attention {attention}"
    num_tokens, lengths = result.steps[-1]["num_tokens"], work.lengths()
    if num_tokens != sum(lengths):
        result.note += f"; WRONG: it trained on {num_tokens:.0f} tokens of {sum(lengths)}"
    if len(result.steps) > SETTLING:
        result.steady = (num_tokens - result.steps[SETTLING - 1]["num_tokens"]) / (end - settled.time)
    result.flops = training_flops(trainer.model, lengths, work.num_scored())
    if torch.cuda.is_available():
        result.mib = torch.cuda.max_memory_allocated() / 2**20


class Settled(TrainerCallback):
    """The time at which the first steps have ended: they set up what lasts for the run."""

    time = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == SETTLING:
            synchronize()
            self.time = time.perf_counter()


def gemm_rate(work: Workload, repeats: int, num_tokens: int | None = None) -> float:
    """FLOP/s of the model's bare GEMMs, forward and backward, on a full pack (or `num_tokens`): the fastest repeat."""
    num_tokens = num_tokens or work.max_length
    num_scored = round(num_tokens * work.num_scored() / sum(work.lengths()))
    run, flops = model_gemms(work.model(training_dtype()), num_tokens, num_scored)
    return flops / min(interleave({"gemms": run}, repeats)["gemms"].seconds)


# ---- the same steps ----


def same_steps(work: Workload) -> Iterator[Figure]:
    """Loss and gradient norm of every exact step, held to twice the error of TRL's padded batches.

    Two examples a step, and so many steps that no lucky rounding of one decides; at a learning rate of 0, so that all
    weights stay as they are. The truth is plain PyTorch on TRL's own batches, in float64, or in float32 for models in
    lower precision.
    """
    steps = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    steps |= {"learning_rate": 0.0, "optim": "sgd"}
    found: dict[str, Outputs] = {}
    for name in (EXACT, TRL_PADDED):
        train_once(work, name, result := Result(), steps)
        found[name] = outputs(result.steps)
    wide = torch.float32 if training_dtype().itemsize == 2 else torch.float64
    truth = outputs(list(plain_steps(work, wide, steps)))
    yield from compared(work.name, found[EXACT], found[TRL_PADDED], truth, str(wide).removeprefix("torch."))


def outputs(steps: Sequence[dict[str, float]]) -> Outputs:
    return {name: torch.tensor([step[name] for step in steps]) for name in ("num_tokens", "loss", "grad_norm")}


def compared(name: str, ours: Outputs, padded: Outputs, truth: Outputs, dtype: str) -> Iterator[Figure]:
    """Whether as many tokens were taken, and loss and gradient norm within twice the error of the padded batches."""
    same = [torch.equal(steps["num_tokens"], truth["num_tokens"]) for steps in (ours, padded)]
    other = "steps of exact steps that take other tokens than padded batches"
    yield figure(f"{name}: {other}", float(not all(same)), "", at_most=0, parity=True)
    if not all(same):
        return
    for what, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        mine, theirs, exact = ({what: steps[what]} for steps in (ours, padded, truth))
        own = relative_errors(theirs, exact)
        errors = relative_errors(mine, exact)
        allowed = allowed_errors(own, mine)
        row = f"{name}: error of a step's {words} against {dtype}"
        yield figure(f"{row}, {TRL_PADDED}", own[what], "relative")
        note = f"largest of {len(exact[what])} steps"
        verdict = Verdict(errors, allowed)
        yield verdict.as_figure(f"{row}, {EXACT}", value=errors[what], unit="relative", note=note)
        yield figure(f"{row}, allowed", allowed[what], "relative")


def plain_steps(work: Workload, dtype: torch.dtype, arguments: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Tokens seen, loss and gradient norm of TRL's padded batches, by their definitions."""
    model, num_tokens = work.model(dtype).to(device()), 0
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            TRL_PADDED, model, work.tokenizer, work.rows, folder, bf16=False, max_length=work.max_length, **arguments
        )
        batches = list(trainer.get_train_dataloader())
    model.train()
    for batch in batches:
        labels = batch.pop("labels")
        num_tokens += int(batch["attention_mask"].sum())
        logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        yield {"num_tokens": num_tokens, "loss": float(loss.detach()), "grad_norm": float(norm)}


# ---- figures ----


def speeds(
    work: Workload,
    found: dict[str, Result],
    limit: float,
    targets: Targets | None = None,
    what: str = "",
    shown: Sequence[str] = (),
) -> Iterator[Figure]:
    """A row of tokens per second for each competitor; before packsft's the limit: all useful operations at `limit`.

    A competitor's row has the ratio of the target it is in (as the faster one where that is not packsft, else as the
    slower one), or that of packsft's speed to its own.

    Args:
        limit: FLOP/s of the bare GEMMs.
        what: under which conditions, if not the main ones.
        shown: the competitors that get a row, all without it.
    """
    num_tokens, ending = sum(work.lengths()), f", {what}" if what else ""
    title = f"Tokens per second, {work.name}{ending}"
    times = {name: Timing(tuple(result.seconds)) for name, result in found.items() if result.seconds}
    rates = {name: num_tokens / timing.median for name, timing in times.items()}
    by_row = {slow if fast == OURS else fast: (fast, slow, least) for (fast, slow), least in (targets or {}).items()}
    for name in shown or found:
        if name == OURS:
            yield figure(
                f"{work.name}: bare GEMMs{ending}", num_tokens * limit / found[OURS].flops, "tokens/s", **rate(limit),
                note=f"the limit; {num_tokens:,} tokens in {len(work.rows)} examples", chart=title,
                series="bare GEMMs", limit=True,
            )  # fmt: skip
        result = found[name]
        row = f"{work.name}: {name}{ending}"
        if result.why_not:
            yield figure(row, note=f"cannot run: {result.why_not}")
            continue
        achieved = result.flops * rates[name] / num_tokens
        note = f"MFU {achieved / limit:.0%} of the bare GEMMs"
        if peak := datasheet_peak(device_name()):
            note += f", {achieved / peak:.0%} of the datasheet"
        note += f"; {result.note}"
        fast, slow, least = by_row.get(name, (OURS, name, None))
        judged: dict[str, Any] = {}
        if name != OURS and fast in rates and slow in rates:
            of = f"speed of {fast} / {'this' if slow == name else slow}"
            judged = {"ratio": rates[fast] / rates[slow], "ratio_of": of, "at_least": least}
        spread = times[name].spread if len(result.seconds) > 1 else None
        if result.steady:
            yield figure(
                f"{row}, after {SETTLING} steps", result.steady, "tokens/s",
                **rate(result.flops * result.steady / num_tokens),
                ratio=None if name == OURS else found[OURS].steady / result.steady, ratio_of="speed of packsft / this",
            )  # fmt: skip
        yield figure(
            row, rates[name], "tokens/s", **rate(achieved), spread=spread, note=note, chart=title, series=name, **judged
        )


def rate(flops_per_second: float) -> dict[str, Any]:
    unit, name = (1e12, "TFLOP/s") if torch.cuda.is_available() else (1e9, "GFLOP/s")
    return {"rate": flops_per_second / unit, "rate_unit": name}


def checkpointed(work: Workload, warmup: Workload | None, limit: float) -> Iterator[Figure]:
    found = train_all(work, MAIN, {}, warmup, gradient_checkpointing=True)
    return speeds(work, found, limit, what="gradient_checkpointing=True")


def losses(work: Workload, found: dict[str, Result]) -> Iterator[Figure]:
    """The loss curves of the main competitors."""
    for name in MAIN:
        if name in found and found[name].steps:
            curve = [(step["num_tokens"], step["loss"]) for step in found[name].steps]
            yield figure(
                f"{work.name}: loss of the last step, {name}", curve[-1][1], "nats", series=name, curve=curve,
                chart=f"Loss over tokens, {work.name}", x_name="tokens seen",
            )  # fmt: skip


def memory(work: Workload, peaks: dict[str, Any], targets: Targets, at_most: float) -> Iterator[Figure]:
    """A row for each competitor's peak memory, in MiB, or the reason why there is none.

    Args:
        targets: the first names the competitor whose memory is the target.
        at_most: the share of its memory that packsft may take.
    """
    span = "during train()" if reset_peak_rss() else "from start to end"  # where the system cannot count afresh
    where = "allocated on the GPU" if torch.cuda.is_available() else f"resident {span}, in a process of its own"
    ours, beside = peaks[OURS], next(iter(targets), ("", ""))[1]
    for name, peak in peaks.items():
        row = f"{work.name}: peak memory, {name}"
        if isinstance(peak, str):
            yield figure(row, note=peak)
            continue
        judged: dict[str, Any] = {}
        if name != OURS and not isinstance(ours, str):
            judged = {"ratio": ours / peak, "ratio_of": "memory of packsft / this"}
            judged["at_most"] = at_most if name == beside else None
        yield figure(row, peak, "MiB", note=where, chart=f"Peak memory, {work.name}", series=name, **judged)


# ---- memory on the CPU ----


def child_peaks(folder: str) -> dict[str, float | str]:
    """Peak memory in MiB, or why there is none, of each competitor, in a process of its own."""
    peaks: dict[str, float | str] = {}
    for name, competitor in COMPETITORS.items():
        if reason := competitor.why_not():
            peaks[name] = f"cannot run: {reason}"
        else:
            try:
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    peaks[name] = pool.submit(child, name, folder).result()
            except Exception as error:
                peaks[name] = f"cannot run: {type(error).__name__}: {error}".splitlines()[0]
    return peaks


def child(name: str, folder: str) -> float:
    """Peak resident memory, in MiB, of two steps over the longest of 64 examples.

    The second step holds weights, gradients and both states of AdamW.
    """
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), tempfile.TemporaryDirectory() as output:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=training_dtype())
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        rows = tokenised(docstrings(64), tokenizer)
        order = sorted(range(64), key=lambda i: -len(rows[i]["input_ids"]))
        with COMPETITORS[name].contained(model):
            trainer = build_trainer(name, model, tokenizer, rows.select(order[:16]), output, max_steps=2)
            gc.collect()
            reset_peak_rss()
            trainer.train()
        return peak_rss()
