"""`packsft demo`: fine-tunes a real model on packed sequences, and compares with TRL on the same examples.

Runs the whole job: rows, model, packing plan, training, samples, losses, saved model, picture, page, report.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from packsft.app.comparison import PADDED_BATCH_SIZE, compare
from packsft.app.demo_rows import Row, decode, demo_rows, of_texts, prompt_ids, token_ids
from packsft.app.drawing import block_colours, draw_packs
from packsft.app.inspect import inspection_of
from packsft.app.page import check_page, html_page, write_whole
from packsft.app.rows import decoder_of, loaded
from packsft.app.tables import markdown, print_table

if TYPE_CHECKING:
    from packsft import PackedSFTTrainer

SEED = 0
HELD_OUT_EXAMPLES = 32
COMPARE_HELD_OUT = 8
SAMPLE_TOKENS = 64
SAMPLE_PROMPT_TOKENS = 256
# Most tokens to train on and to compare on: the demo then takes under five minutes on two cores. Without bfloat16
# hardware it uses float32, and each token takes about twice as long.
TOKENS_BF16, TOKENS_FLOAT32 = (20_000, 3_500), (10_000, 1_000)
WRITTEN = ("model", "training.png", "packs.html", "report.md")
REPORT_HEADING = "# packsft demo\n"  # the mark of a folder that the demo wrote
UNPACKED = "its weights unpacked from 4 bits (somewhat worse than the published ones)"


@dataclass
class Job:
    """The checked input of `run`."""

    command: str
    output_dir: Path
    scratch: Path
    model_name: str
    data_name: str
    trainer: PackedSFTTrainer
    tokenizer: PreTrainedTokenizerBase
    held_out: Dataset
    lengths: list[int]  # tokens of each of the first training examples, for the picture
    compare: Dataset  # empty: no comparison
    compare_tokens: int
    settings: dict[str, Any]  # shared by training and comparison


# ---- preparation: everything that can be bad input ----


def prepare(
    *,
    command: str,
    scratch: Path,
    output_dir: Path,
    model_name: str | None,
    data: str | None,
    max_length: int,
    max_tokens: int | None,
    compare_tokens: int | None,
    learning_rate: float,
) -> Job:
    """Read the data, load the model, plan the packs. Writes into `scratch` only.

    `command` goes into the report. A limit of None means: as many tokens as take a few minutes.

    Raises ValueError or OSError for anything that the user can fix.
    """
    _check_output_dir(output_dir)
    check_page("the demo")
    if model_name is None and importlib.util.find_spec("gguf") is None:
        raise ValueError('the demo needs the package gguf: pip install "packsft[demo]"')
    from packsft import PackedSFTConfig, PackedSFTTrainer, stdlib_docstrings
    from packsft.config import has_bf16
    from packsft.notices import PackingNotice

    defaults = TOKENS_BF16 if has_bf16() else TOKENS_FLOAT32
    max_tokens = defaults[0] if max_tokens is None else max_tokens
    compare_tokens = defaults[1] if compare_tokens is None else compare_tokens
    print("Reading the data and loading the model ...", flush=True)
    # transformers 5.23 deprecates `gradient_checkpointing`, but 5.17 does not know the new name.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    rows = stdlib_docstrings() if data is None else demo_rows(data)
    if len(rows) < 2:
        raise ValueError(f"{data} holds {len(rows)} example, but the demo needs at least 2: it holds one out")
    if model_name is None:
        from packsft.app.smollm2 import load_smollm2

        model, tokenizer = load_smollm2(torch.float32)
    else:
        # float32 master weights: rounding to bfloat16 would lose a step of 1e-4.
        model = loaded(AutoModelForCausalLM, model_name, dtype=torch.float32)
        tokenizer = loaded(AutoTokenizer, model_name, "the tokenizer of ")
    if not of_texts(rows[0]) and tokenizer.chat_template is None:
        raise ValueError(f"{data} holds messages, but the tokenizer of {model_name} has no chat template")
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {model_name} has no EOS token to end an example with")

    rows = rows.shuffle(seed=SEED)
    num_held_out = min(HELD_OUT_EXAMPLES, max(1, len(rows) // 10))
    held_out, pool = rows.select(range(num_held_out)), rows.select(range(num_held_out, len(rows)))
    lengths: list[int] = []
    for row in pool:  # only up to the limits: the trainer tokenises everything
        lengths.append(len(token_ids(row, tokenizer)))
        if sum(min(length, max_length) for length in lengths) >= max(max_tokens, compare_tokens):
            break
    train = pool.select(range(_within([min(length, max_length) for length in lengths], max_tokens)))
    # Only examples that are not cut: every method trains on every token. Only whole padded batches: a short last batch
    # would slow the padded path.
    compare = [number for number, length in enumerate(lengths) if length <= max_length]
    compare = compare[: _within([lengths[number] for number in compare], compare_tokens)] if compare_tokens else []
    compare = compare[: len(compare) // PADDED_BATCH_SIZE * PADDED_BATCH_SIZE or len(compare)]

    model.save_pretrained(scratch / "model")
    tokenizer.save_pretrained(scratch / "model")
    settings: dict[str, Any] = {
        "max_length": max_length,
        "learning_rate": learning_rate,
        "bf16": has_bf16(),
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }
    trainer = PackedSFTTrainer(
        model=model,
        args=PackedSFTConfig(
            output_dir=str(scratch / "trainer"),
            packing_strategy="bfd",
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            warmup_steps=0.1,  # a share of the run
            **settings,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(PackingNotice)  # `run` prints the same as a table
    return Job(
        command=command,
        output_dir=output_dir,
        scratch=scratch,
        model_name=model_name or f"SmolLM2-135M-Instruct, {UNPACKED}",
        data_name="the standard library's docstrings" if data is None else data,
        trainer=trainer,
        tokenizer=tokenizer,
        held_out=held_out,
        lengths=[min(length, max_length) for length in lengths[: len(train)]],
        compare=pool.select(compare),
        compare_tokens=sum(lengths[number] for number in compare),
        settings=settings,
    )


def _check_output_dir(folder: Path) -> None:
    """Raises ValueError unless the demo can write there and replaces nothing but what it wrote itself."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"--output-dir {folder!s}: the name must be UTF-8 text to save a tokenizer there") from None
    if not nearest.is_dir():
        raise ValueError(f"--output-dir {folder}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--output-dir {folder}: {nearest} is not writable")
    report = folder / "report.md"
    if report.is_file() and report.read_bytes().startswith(REPORT_HEADING.encode()):
        return
    if taken := [name for name in WRITTEN if (folder / name).exists()]:
        raise ValueError(
            f"--output-dir {folder} holds {', '.join(taken)}, not written by the demo: choose another folder"
        )


def _within(lengths: Sequence[int], tokens: int) -> int:
    """How many of the first examples fit into this many tokens, at least one."""
    return max(1, sum(total <= tokens for total in accumulate(lengths)))


# ---- the run ----


def run(job: Job) -> None:
    """Train, evaluate, compare. Prints the results and writes model, picture, page and report into `output_dir`."""
    console = Console(markup=False, emoji=False)  # names and texts stay as they are
    trainer = job.trainer
    precision = "bf16 autocast over float32 weights" if job.settings["bf16"] else "float32"
    machine = f"{_machine()}, torch {torch.__version__}, {precision}"
    console.print(f"packsft demo: {job.model_name} on {job.data_name}\n{machine}\n")
    assert trainer.packing_report is not None  # no stream here
    plan_table = [("what", "value"), *trainer.packing_report.rows()]
    print_table(console, "Packing plan", plan_table)

    job.output_dir.mkdir(parents=True, exist_ok=True)  # now, and not after the training, if it cannot be made
    example = _sample_example(job)
    with console.status("before training: an answer and the held-out loss"):
        before = _sample(trainer.model, job.tokenizer, example)
        loss_before = trainer.evaluate()["eval_loss"]
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    trainer.add_callback(ShowProgress(progress))
    with progress:
        seconds = trainer.train().metrics["train_runtime"]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens_per_second = logs[-1]["num_tokens"] / seconds
    loss_after = trainer.evaluate()["eval_loss"]
    after = _sample(trainer.model, job.tokenizer, example)

    loss_table = [
        ("loss", "before", "after"),
        ("held-out", f"{loss_before:.4f}", f"{loss_after:.4f}"),
    ]
    summary = f"{logs[-1]['num_tokens']:,.0f} tokens in {seconds:.0f} s: {tokens_per_second:,.0f} tokens/s"
    print_table(console, f"Training: {summary}", loss_table)
    prompt = prompt_ids(example, job.tokenizer)
    reference = token_ids(example, job.tokenizer)[len(prompt) :]
    sample = [
        ("prompt", decode(prompt, job.tokenizer)),
        ("before", before),
        ("after", after),
        ("in the data", decode(reference, job.tokenizer)),
    ]
    console.print("A held-out example", style="bold")
    for title, text in sample:
        console.print(f"{title}:", style="bold cyan")
        console.print(text, highlight=False)

    plan = [trainer.train_dataset.plan.seq_lengths(pack).tolist() for pack in range(len(trainer.train_dataset.plan))]
    trainer.save_model(str(job.output_dir / "model"))
    draw(job.output_dir / "training.png", job.lengths, plan, job.settings["max_length"], logs, loss_before, loss_after)
    packs = trainer.train_dataset
    inspection = inspection_of(job.data_name, packs.rows, packs.plan, trainer.packing_report)
    write_whole(job.output_dir / "packs.html", html_page(inspection, decoder_of(job.tokenizer), job.command))
    sections = [
        f"{REPORT_HEADING}\n{job.model_name}, fine-tuned on {job.data_name}.\n\n"
        f"Command: `{job.command}`. Machine: {machine}. Date: {date.today()}.",
        "## Packing plan\n\n" + markdown(plan_table) + "\n\n[The packs, block by block](packs.html), with their texts.",
        f"## Training\n\n{summary}.\n\n" + markdown(loss_table) + "\n\n![Losses and packs](training.png)",
        "## A held-out example\n\n" + "\n\n".join(f"{title}:\n\n````\n{text}\n````" for title, text in sample),
    ]
    _write_report(job, sections)  # the mark, even if the comparison is interrupted
    if len(job.compare) > 0:
        # the trained model is saved: its memory is for the competitors
        trainer.model.cpu().zero_grad()
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.accelerator.free_memory()
        torch.cuda.empty_cache()
        held_out = job.held_out.select(range(min(COMPARE_HELD_OUT, len(job.held_out))))
        note, comparison = compare(console, job.scratch, job.compare, held_out, job.compare_tokens, job.settings)
        print_table(console, "The same examples through TRL and packsft", comparison)
        console.print(note)
        sections.append("## The same examples through TRL and packsft\n\n" + markdown(comparison) + f"\n\n{note}")
        _write_report(job, sections)
    written = ", ".join(str(job.output_dir / name) for name in WRITTEN)
    console.print(f"\nWritten: {written}", soft_wrap=True)  # unbroken paths


def _write_report(job: Job, sections: Sequence[str]) -> None:
    text = "\n\n".join(sections) + "\n"
    # A path may hold bytes that are no text.
    (job.output_dir / "report.md").write_text(text, encoding="utf-8", errors="backslashreplace")


class ShowProgress(TrainerCallback):
    """Updates a progress bar with the loss and the tokens per second of the last step."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.task = self.progress.add_task("training", total=state.max_steps, numbers="")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        entry = state.log_history[-1]
        if "loss" in entry:
            numbers = f"loss {entry['loss']:.3f}  {entry['tokens_per_second']:,.0f} tokens/s"
            self.progress.update(self.task, completed=state.global_step, numbers=numbers)
            # Without a terminal the bar is drawn once, at the end.
            if not self.progress.console.is_terminal and state.global_step % max(1, state.max_steps // 10) == 0:
                self.progress.console.print(f"step {state.global_step} of {state.max_steps}: {numbers}")


def _sample_example(job: Job) -> Row:
    """The first held-out example whose prompt is neither empty nor too long to read."""
    for row in job.held_out:
        if 0 < len(prompt_ids(row, job.tokenizer)) <= SAMPLE_PROMPT_TOKENS:
            return row
    return job.held_out[0]


def _sample(model: Any, tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    """The model's own greedy continuation."""
    prompt = torch.tensor([prompt_ids(row, tokenizer)], device=model.device)
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    return decode(output[0, prompt.shape[1] :].tolist(), tokenizer)


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in _cpuinfo().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} thread(s)"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


# ---- showing ----


def draw(
    path: Path,
    lengths: Sequence[int],
    packs: Sequence[Sequence[int]],
    max_length: int,
    logs: Sequence[dict[str, float]],
    loss_before: float,
    loss_after: float,
) -> None:
    """Three panels: the first examples as padded rows, the first packs, the losses over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num_rows = 4 * PADDED_BATCH_SIZE
    figure, (padded, packed, losses) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    colours = block_colours()
    shown = lengths[:num_rows]
    for row, length in enumerate(shown):
        batch = row // PADDED_BATCH_SIZE * PADDED_BATCH_SIZE
        padded.barh(row, max(shown[batch : batch + PADDED_BATCH_SIZE]), color="lightgrey", height=0.8)
        padded.barh(row, length, color=colours[row % len(colours)], height=0.8)
    padded.set(title=f"Padded: {PADDED_BATCH_SIZE} examples a batch, grey is padding", ylabel="example")
    padded.set(xlabel="tokens", xlim=(0, max_length))
    padded.invert_yaxis()
    padded.yaxis.get_major_locator().set_params(integer=True)
    draw_packs(packed, packs[:num_rows], max_length)
    packed.set_title("Packed: hatched space is unused")
    # each step takes other examples: only their mean over some steps says how the training goes
    width = max(1, len(logs) // 4)
    smooth = np.convolve([entry["loss"] for entry in logs], np.full(width, 1 / width), mode="valid")
    steps = [entry["step"] for entry in logs][width - 1 :]
    losses.plot(steps, smooth, label="training" + (f", mean of {width} steps" if width > 1 else ""))
    losses.plot([0, logs[-1]["step"]], [loss_before, loss_after], "o--", label="held-out, before and after")
    losses.set(title="Loss", xlabel="optimizer step", ylabel="loss per scored token")
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
