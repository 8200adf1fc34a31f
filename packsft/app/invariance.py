"""Batch invariance: training gives the same weights, however a step is split into micro-batches and processes.

Trains the same steps in every layout, in float64 on the CPU, and compares the weights with those of the first layout.

Only weights that moved are compared. Where a gradient is zero except for rounding (the bias of a key changes no
softmax), AdamW follows the rounding, by far less than a millionth of its learning rate per step. Weights that stay
within this limit in both runs are ignored.

    python -m packsft.app.invariance FOLDER    # one process
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from packsft import compat
from packsft.app.rows import loaded
from packsft.config import PackedSFTConfig
from packsft.model.claims import rounds_to_float32
from packsft.model.parts import decoder_layers
from packsft.trainer import PackedSFTTrainer

# allowed: in float64; for a model that itself rounds to float32; in float32, which DeepSpeed trains in
EXACT, ROUNDING, SINGLE = 1e-12, 1e-9, 1e-4
LEARNING_RATE = 1e-4  # for a gradient near zero, AdamW turns rounding into a part of this
_MOVED = 1e-6 * LEARNING_RATE


@dataclass(frozen=True)
class Layout:
    """How a step is split: gradient accumulation, processes, and passes of at most `tokens_per_pass` tokens (None: not
    packed, one pass per accumulation step); and the engine of several processes: see `engine_fields`."""

    tokens_per_pass: int | None
    accumulation: int
    processes: int
    engine: str = ""


LAYOUTS = (
    Layout(None, 8, 1),
    *(
        Layout(tokens, accumulation, processes)
        for processes in (1, 2)
        for tokens in (512, 1024, 4096)
        for accumulation in (1, 8)
    ),
)


def layouts_of(engine: str | None) -> tuple[Layout, ...]:
    """The first layout, and those of two processes with this engine; all of them without one."""
    if engine is None:
        return LAYOUTS
    return (LAYOUTS[0], *(replace(layout, engine=engine) for layout in LAYOUTS if layout.processes == 2))


@dataclass(frozen=True)
class InvarianceResult:
    """How far a layout's weights are from the first layout's.

    - `passes`: mean number of passes per step and process
    - `difference`: the largest difference of a weight, relative to the largest weight of its tensor
    - `loss_difference`: the largest relative difference of a step's loss
    - `allowed`: the limit for both
    """

    model: str
    layout: Layout
    passes: float
    difference: float
    loss_difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed and self.loss_difference <= self.allowed  # False for NaN

    def row(self) -> tuple[str, ...]:
        """The texts of a table row."""
        *numbers, engine = asdict(self.layout).values()
        sizes = ["unpacked" if value is None else f"{value:,}" for value in numbers]
        sizes[-1] += engine and f" {engine}"
        return (self.model, *sizes, f"{self.passes:.1f}", f"{self.difference:.1e}", f"{self.allowed:.0e}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"agrees": self.agrees}


def check_batch_invariance(model: str | None, num_steps: int, engine: str | None = None) -> list[InvarianceResult]:
    """`certify` on random tokens, for a model by folder or name (dropout off); None for the two small models.

    Raises:
        ValueError: the model cannot be loaded, or the engine is not installed.
    """
    if engine in ("zero2", "zero3") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"--engine {engine} needs the package deepspeed, which is not installed")
    if model is None:
        models = small_models()
    else:
        network = loaded(AutoModelForCausalLM, model, dtype=torch.float64)
        _without_dropout(network.config.get_text_config())
        models = {model: (network, loaded(AutoTokenizer, model, "the tokenizer of "))}
    results = []
    for name, (network, tokenizer) in models.items():
        config = network.config.get_text_config()
        max_length = min(512, getattr(config, "max_position_embeddings", None) or 512)
        rows = random_rows(16 * num_steps, max_length, config.vocab_size)
        results += certify(
            network, tokenizer, rows, name=name, max_length=max_length, num_steps=num_steps,
            layouts=layouts_of(engine),
        )  # fmt: skip
    return results


def _without_dropout(config: Any) -> None:
    """Turns dropout off: its random numbers depend on the shape of a pass."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            setattr(config, name, 0.0)


def certify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    name: str = "",
    max_length: int,
    examples_per_step: int = 16,
    num_steps: int = 10,
    layouts: Sequence[Layout] = LAYOUTS,
) -> list[InvarianceResult]:
    """Train the same steps in every layout, and compare each with the first.

    Args:
        model: a causal language model, trained in float64, or in float32 under DeepSpeed. Dropout must be off.
        rows: a data set for `PackedSFTTrainer`.
        name: the model's name in the results.
        examples_per_step: over all processes and micro-batches; a multiple of accumulation * processes.

    Raises:
        ValueError: a layout does not divide `examples_per_step`.
        RuntimeError: a process failed; the message holds the end of its stderr.
    """
    for layout in layouts:
        if examples_per_step % (layout.accumulation * layout.processes):
            raise ValueError(
                f"examples_per_step={examples_per_step}: must be a multiple of accumulation * processes, in {layout}"
            )
    allowed = ROUNDING if rounds_to_float32(model.to(torch.float64)) else EXACT
    (engine,) = {layout.engine for layout in layouts} - {""} or {""}
    if single := engine.startswith("zero"):
        allowed = SINGLE
    layer = type(decoder_layers(model)[0][1]).__name__
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        rows.save_to_disk(f"{folder}/rows")
        options: dict[str, Any] = {"max_length": max_length, "max_steps": num_steps}
        options |= {"examples_per_step": examples_per_step}
        options |= {"dtype": "float32" if single else "float64", "layer": layer}
        runs: list[dict[str, Any]] = []
        for processes in sorted({layout.processes for layout in layouts}):
            job = options | {"layouts": [asdict(g) for g in layouts if g.processes == processes]}
            Path(folder, "job.json").write_text(json.dumps(job))
            runs += _launch(folder, processes, engine if processes > 1 else "")
        start = {name: weight.detach() for name, weight in model.named_parameters()}
    found = {Layout(**run["layout"]): run for run in runs}
    first = found[layouts[0]]
    return [
        InvarianceResult(
            name,
            layout,
            passes=found[layout]["passes"],
            difference=float(np.max([*_difference(found[layout]["weights"], first["weights"], start).values()])),
            loss_difference=float(((found[layout]["losses"] - first["losses"]) / first["losses"]).abs().max()),
            allowed=allowed,
        )
        for layout in layouts
    ]


def small_models() -> dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """A GPT-2, exact in float64, and a Llama, whose RMSNorm rounds: two layers, random weights, 512 positions."""
    tokenizer = number_tokenizer(256)
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ids = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    configs = {
        "GPT-2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=512, **no_dropout, **ids),
        "Llama": LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=512, **ids,
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    return {
        name: (AutoModelForCausalLM.from_config(config, dtype=torch.float64), tokenizer)
        for name, config in configs.items()
    }


def number_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer for rows of token ids: each number is its own token; 0 is EOS."""
    vocabulary = {"<eos>": 0} | {str(i): i for i in range(1, vocab_size)}
    model = WordLevel(vocabulary, unk_token="<eos>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<eos>", pad_token="<eos>")


def random_rows(count: int, max_length: int, vocab_size: int) -> Dataset:
    """Random tokens; the first third of each row is an unscored prompt; lengths are log-normal, about 220."""
    generator = np.random.default_rng(0)
    rows = []
    for length in np.clip(generator.lognormal(5.2, 0.8, count), 8, max_length).astype(int):
        ids = generator.integers(1, vocab_size, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return Dataset.from_list(rows)


def _difference(
    weights: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> dict[str, float]:
    off = {}
    for name, other in reference.items():
        stayed = torch.maximum((weights[name] - start[name]).abs(), (other - start[name]).abs()) <= _MOVED
        largest = other.abs().max().clamp(min=_MOVED)  # a bias may start at zero and stay there
        off[name] = float(torch.where(stayed, 0.0, (weights[name] - other).abs()).max() / largest)
    return off


def _launch(folder: str, processes: int, engine: str) -> list[dict[str, Any]]:
    """Even a single process is a child: a process that has trained without a process group cannot create one."""
    results = Path(folder, "runs.pt")
    results.unlink(missing_ok=True)
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    threads = max(1, torch.get_num_threads() // processes)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        **({"ACCELERATE_USE_CPU": "true"} if engine in ("", "sp") else {}),
        **({"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"} if engine.startswith("zero") else {}),
    }
    done = subprocess.run(
        [sys.executable, *ranks, "-m", "packsft.app.invariance", folder],
        env=environment,
        capture_output=True,
        text=True,
    )
    if not results.exists():  # a process that aborts while gloo shuts down has finished its work
        raise RuntimeError(f"the run on {processes} processes failed:\n{done.stderr[-3000:]}")
    return torch.load(results)


def engine_fields(engine: str, layer: str) -> dict[str, Any]:
    """Fields of a configuration: "fsdp2" with this class of layers, "zero2", "zero3", "sp" over two ranks, or ""."""
    if engine == "fsdp2":
        config = {"version": 2, "transformer_layer_cls_to_wrap": [layer], "reshard_after_forward": True}
        return {"fsdp": True, "fsdp_config": config}
    if engine.startswith("zero"):
        automatic = ("gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        options: dict[str, Any] = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        options |= {"zero_optimization": {"stage": int(engine[-1])}} | dict.fromkeys(automatic, "auto")
        return {"deepspeed": options}
    return {"sequence_parallel_size": 2} if engine == "sp" else {}


def train_layouts(folder: str) -> None:
    """Train every layout of FOLDER/job.json; rank 0 writes the weights to FOLDER/runs.pt."""

    class Recording(PackedSFTTrainer):
        losses: dict[int, Any]
        passes: dict[int, int]

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss, step = super().training_step(*args, **kwargs), self.state.global_step
            self.losses[step] = self.losses.get(step, 0.0) + loss
            self.passes[step] = self.current_gradient_accumulation_steps
            return loss

    job = json.loads(Path(folder, "job.json").read_text())
    rows = Dataset.load_from_disk(f"{folder}/rows")
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    runs = []
    for layout in job["layouts"]:
        micro_batches = layout["accumulation"] * (1 if layout["engine"] == "sp" else layout["processes"])
        args = PackedSFTConfig(
            output_dir=f"{folder}/out", use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            disable_tqdm=True, max_length=job["max_length"], max_steps=job["max_steps"],
            per_device_train_batch_size=job["examples_per_step"] // micro_batches,
            gradient_accumulation_steps=layout["accumulation"], tokens_per_pass=layout["tokens_per_pass"],
            packing=layout["tokens_per_pass"] is not None,
            learning_rate=LEARNING_RATE, weight_decay=0.01, gradient_checkpointing=False, logging_strategy="no",
            **engine_fields(layout["engine"], job["layer"]),
        )  # fmt: skip
        compat.engine_on_cpu(layout["engine"], args)
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=getattr(torch, job["dtype"]))
        trainer = Recording(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.losses, trainer.passes = {}, {}
        trainer.train()
        losses = trainer.accelerator.reduce(torch.stack(list(trainer.losses.values())), reduction="mean")
        weights = compat.whole_parameters(trainer.accelerator.unwrap_model(trainer.model))
        passes = float(np.mean(list(trainer.passes.values())))
        runs.append({"layout": layout, "weights": weights, "losses": losses, "passes": passes})
    if trainer.is_world_process_zero():
        torch.save(runs, f"{folder}/runs.pt")
    PartialState().destroy_process_group()  # gloo's threads may abort the process at exit


if __name__ == "__main__":
    train_layouts(sys.argv[1])
