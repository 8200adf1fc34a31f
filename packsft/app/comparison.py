"""One optimizer step of the same examples through TRL, padded and packed, and through packsft.

`python -m packsft.app.comparison` runs one of them. Each is a new process, because the peak memory of a process never
falls.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from packsft.app.demo_rows import token_ids

PADDED_BATCH_SIZE = 8  # TRL's default
REPEATS, REPEAT_WITHIN = 3, 20.0  # of the step of a competitor, and seconds
METHODS = {"trl_padded": "TRL, padded, batch 8", "trl_packed": "TRL, packed", "packsft": "packsft"}


def compare(
    console: Console, scratch: Path, rows: Dataset, held_out: Dataset, tokens: int, settings: dict[str, Any]
) -> tuple[str, list[tuple[str, ...]]]:
    """The note that describes the comparison, and the table.

    Args:
        scratch: a folder that holds `model`, with its tokenizer.
        rows, held_out: what is trained on, and what is evaluated after it.
        tokens: those of `rows`.
        settings: of the training.
    """
    for name, part in (("compare", rows), ("held_out", held_out)):
        part.save_to_disk(scratch / name)
    (scratch / "settings.json").write_text(json.dumps(settings))
    results: dict[str, dict[str, Any]] = {}
    for method, title in METHODS.items():
        with console.status(f"comparing: {title}"):
            results[method] = _run_competitor(scratch, method)
    table: list[tuple[str, ...]] = [("", "tokens/s", "speed", "peak memory", "loss", "largest difference")]
    base = results["trl_padded"]
    for method, title in METHODS.items():
        result = results[method]
        if "error" in result:
            table.append((title, "failed", "", "", "", result["error"]))
            continue
        # Without the padded path there is no reference.
        speed = difference = "-"
        if "error" not in base:
            speed = f"{base['seconds'] / result['seconds']:.2f}x"
            gap = f"{max(abs(a - b) for a, b in zip(result['losses'], base['losses'], strict=True)):.1e}"
            difference = "reference" if method == "trl_padded" else gap
        memory = f"{result['peak_bytes'] / 2**30:.2f} GiB"
        rate, loss = f"{tokens / result['seconds']:,.0f}", f"{result['losses'][0]:.4f}"
        table.append((title, rate, speed, memory, loss, difference))
    where = "GPU" if torch.cuda.is_available() else "process"
    note = (
        f"One optimizer step on the same {len(rows)} examples ({tokens:,} tokens) from the same weights, each "
        "in its own process, without gradient checkpointing. Tokens/s counts tokens without padding over all of "
        f"train(), the fastest of at most {REPEATS} within {REPEAT_WITHIN:.0f} s. Peak memory is of the {where}. "
        "Loss is the loss of the step. The largest difference to the padded path is over this loss and, with the "
        "weights after the step, the losses of "
        f"{len(held_out)} held-out examples, each run alone in float32."
    )
    return note, table


def _run_competitor(scratch: Path, method: str) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-m", "packsft.app.comparison", method, str(scratch)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if child.returncode != 0:
        return {"error": (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]}
    return json.loads((scratch / f"{method}.json").read_text())


def compete(method: str, scratch: Path) -> None:
    """One optimizer step of one method on the prepared examples; writes its numbers to `<method>.json`.

    A step that is over soon is repeated from the same weights, and the fastest one counts.
    """
    from trl import SFTConfig, SFTTrainer

    from packsft import PackedSFTConfig, PackedSFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(scratch / "model")
    rows = load_from_disk(scratch / "compare")
    settings = json.loads((scratch / "settings.json").read_text()) | {
        "output_dir": str(scratch / "trainer"),
        "packing": method != "trl_padded",
        "per_device_train_batch_size": PADDED_BATCH_SIZE if method == "trl_padded" else 1,
        # No method has more batches than examples, so all its batches make one step.
        "gradient_accumulation_steps": len(rows),
        "lr_scheduler_type": "constant",
    }
    trainer_class, config = (PackedSFTTrainer, PackedSFTConfig) if method == "packsft" else (SFTTrainer, SFTConfig)
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < REPEAT_WITHIN:
        model = AutoModelForCausalLM.from_pretrained(scratch / "model", dtype=torch.float32)
        trainer = trainer_class(model, config(**settings), train_dataset=rows, processing_class=tokenizer)
        seconds.append(trainer.train().metrics["train_runtime"])
        assert trainer.state.global_step == 1
        if len(seconds) == 1:
            peak_bytes = _peak_bytes()
    result = {"seconds": min(seconds), "peak_bytes": peak_bytes}
    # Evaluate the trained weights on a plain model: the same evaluation for every method.
    plain = AutoModelForCausalLM.from_pretrained(scratch / "model", dtype=torch.float32)
    plain.load_state_dict(trainer.model.state_dict())
    plain.eval()
    losses = [trainer.state.log_history[0]["loss"]]
    for row in load_from_disk(scratch / "held_out"):
        ids = torch.tensor([token_ids(row, tokenizer)[: settings["max_length"]]])
        with torch.no_grad():
            losses.append(plain(input_ids=ids, labels=ids).loss.item())
    (scratch / f"{method}.json").write_text(json.dumps(result | {"losses": losses}))


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not getrusage: its peak includes that of the parent process.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    compete(sys.argv[1], Path(sys.argv[2]))
