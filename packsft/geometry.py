"""Proof that how a step is cut is no part of the training: the same weights from every geometry, in float64.

A geometry is the tokens that go through at once, the micro-batches a configuration speaks of, and the processes. The
same steps are trained in each, on the CPU, and the weights compared with the first one's.

What is compared: elements that moved. Where an element's gradient is zero but for rounding (the bias of a key changes
no softmax), AdamW follows the rounding, by far less than a millionth of its learning rate a step; where both weights
stayed within that, they are left out.

    python -m packsft.geometry FOLDER   # what each process runs: the geometries of FOLDER/job.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

EXACT, ROUNDING = 1e-12, 1e-9  # in float64, and for a model that itself rounds to float32
LEARNING_RATE = 1e-4  # AdamW turns the rounding of a gradient near zero into a share of it
_MOVED = 1e-6 * LEARNING_RATE


@dataclass(frozen=True)
class Geometry:
    """At most `tokens_per_pass` tokens at once (None: unpacked, a micro-batch at once), `accumulation` micro-batches a
    step, on so many `processes`."""

    tokens_per_pass: int | None
    accumulation: int
    processes: int


GEOMETRIES = (
    Geometry(None, 8, 1),
    *(
        Geometry(tokens, accumulation, processes)
        for processes in (1, 2)
        for tokens in (512, 1024, 4096)
        for accumulation in (1, 8)
    ),
)


@dataclass(frozen=True)
class GeometryResult:
    """`passes`: of a step, on each process, on average. `difference`: the largest of any weight from the first
    geometry's, relative to the largest weight of its tensor; `loss_difference`: of any step's loss, relative to it.
    `allowed`: what the difference may be."""

    model: str
    geometry: Geometry
    passes: float
    difference: float
    loss_difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed and self.loss_difference <= self.allowed  # False for what is no number

    def row(self) -> tuple[str, ...]:
        """Texts of a table's line."""
        sizes = tuple("unpacked" if value is None else f"{value:,}" for value in asdict(self.geometry).values())
        return (self.model, *sizes, f"{self.passes:.1f}", f"{self.difference:.1e}", f"{self.allowed:.0e}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"agrees": self.agrees}


def certificate(model: str | None, num_steps: int) -> list[GeometryResult]:
    """`certify` for a model by folder or name, its dropout off, on random tokens; or for the two small ones."""
    if model is None:
        models = small_models()
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        _without_dropout(loaded.config.get_text_config())
        models = {model: (loaded, AutoTokenizer.from_pretrained(model))}
    results = []
    for name, (network, tokenizer) in models.items():
        config = network.config.get_text_config()
        max_length = min(512, getattr(config, "max_position_embeddings", None) or 512)
        rows = random_rows(16 * num_steps, max_length, config.vocab_size)
        results += certify(network, tokenizer, rows, name=name, max_length=max_length, num_steps=num_steps)
    return results


def _without_dropout(config: Any) -> None:
    """Its draws depend on the shape of a pass: the same training, but other numbers."""
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
    geometries: Sequence[Geometry] = GEOMETRIES,
) -> list[GeometryResult]:
    """Train the same steps in every geometry, and compare each with the first.

    Args:
        model: a causal language model; a float64 copy of it is trained. Dropout would differ and has to be off.
        rows: what `PackedSFTTrainer` takes.
        name: of the model, in the results.
        examples_per_step: over all processes and micro-batches; a multiple of accumulation * processes.

    Raises:
        ValueError: an `examples_per_step` that a geometry cannot divide.
        RuntimeError: a process that failed, with the end of what it printed.
    """
    for geometry in geometries:
        if examples_per_step % (geometry.accumulation * geometry.processes):
            raise ValueError(
                f"examples_per_step={examples_per_step}: must be a multiple of accumulation * processes, in {geometry}"
            )
    allowed = ROUNDING if rounds_to_float32(model.to(torch.float64)) else EXACT
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        rows.save_to_disk(f"{folder}/rows")
        options = {"max_length": max_length, "max_steps": num_steps, "examples_per_step": examples_per_step}
        runs: list[dict[str, Any]] = []
        for processes in sorted({geometry.processes for geometry in geometries}):
            job = options | {"geometries": [asdict(g) for g in geometries if g.processes == processes]}
            Path(folder, "job.json").write_text(json.dumps(job))
            runs += _launch(folder, processes)
        start = {name: weight.detach() for name, weight in model.named_parameters()}
    found = {Geometry(**run["geometry"]): run for run in runs}
    first = found[geometries[0]]
    return [
        GeometryResult(
            name,
            geometry,
            passes=found[geometry]["passes"],
            difference=float(np.max([*_difference(found[geometry]["weights"], first["weights"], start).values()])),
            loss_difference=float(((found[geometry]["losses"] - first["losses"]) / first["losses"]).abs().max()),
            allowed=allowed,
        )
        for geometry in geometries
    ]


def small_models() -> dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """Two layers of GPT-2, exact in float64, and of Llama, whose RMSNorm rounds; random weights, 512 positions."""
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
    """For rows of token ids: every number is its own token, but for 0, the end."""
    vocabulary = {"<eos>": 0} | {str(i): i for i in range(1, vocab_size)}
    model = WordLevel(vocabulary, unk_token="<eos>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<eos>", pad_token="<eos>")


def random_rows(count: int, max_length: int, vocab_size: int) -> Dataset:
    """Tokens at random, the first third of each row a prompt that is not scored; lengths log-normal, about 220."""
    generator = np.random.default_rng(0)
    rows = []
    for length in np.clip(generator.lognormal(5.2, 0.8, count), 8, max_length).astype(int):
        ids = generator.integers(1, vocab_size, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return Dataset.from_list(rows)


def rounds_to_float32(model: PreTrainedModel) -> bool:
    """Whether the forward of a float64 model casts to a lower precision, as transformers' RMSNorm does."""

    class Casts(TorchDispatchMode):
        seen = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64 and out.is_floating_point():
                Casts.seen |= out.dtype != torch.float64
            return out

    with torch.no_grad(), Casts():
        ids = torch.tensor([[0, 1, 2]], device=model.device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return Casts.seen


def _difference(
    weights: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> dict[str, float]:
    off = {}
    for name, other in reference.items():
        stayed = torch.maximum((weights[name] - start[name]).abs(), (other - start[name]).abs()) <= _MOVED
        largest = other.abs().max().clamp(min=_MOVED)  # of a bias that began at zero and stayed there
        off[name] = float(torch.where(stayed, 0.0, (weights[name] - other).abs()).max() / largest)
    return off


def _launch(folder: str, processes: int) -> list[dict[str, Any]]:
    """One process as a child as well: a process group cannot be made in a process that has trained without one."""
    results = Path(folder, "runs.pt")
    results.unlink(missing_ok=True)
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    threads = max(1, torch.get_num_threads() // processes)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": str(threads),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, *ranks, "-m", "packsft.geometry", folder], env=environment, capture_output=True, text=True
    )
    if not results.exists():  # a process that aborts while gloo is taken down has done its work
        raise RuntimeError(f"the run on {processes} processes failed:\n{done.stderr[-3000:]}")
    return torch.load(results)


def _work(folder: str) -> None:
    """Train every geometry of the job; rank 0 leaves the weights in `runs.pt`."""
    from packsft import PackedSFTConfig, PackedSFTTrainer

    class Recording(PackedSFTTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss, step = super().training_step(*args, **kwargs), self.state.global_step
            self.losses[step] = self.losses.get(step, 0.0) + loss
            self.passes[step] = self.current_gradient_accumulation_steps
            return loss

    job = json.loads(Path(folder, "job.json").read_text())
    rows = Dataset.load_from_disk(f"{folder}/rows")
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    runs = []
    for geometry in job["geometries"]:
        micro_batches = geometry["accumulation"] * geometry["processes"]
        args = PackedSFTConfig(
            output_dir=f"{folder}/out", use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            disable_tqdm=True, max_length=job["max_length"], max_steps=job["max_steps"],
            per_device_train_batch_size=job["examples_per_step"] // micro_batches,
            gradient_accumulation_steps=geometry["accumulation"], tokens_per_pass=geometry["tokens_per_pass"],
            packing=geometry["tokens_per_pass"] is not None,
            learning_rate=LEARNING_RATE, weight_decay=0.01, gradient_checkpointing=False, logging_strategy="no",
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float64)
        trainer = Recording(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.losses, trainer.passes = {}, {}
        trainer.train()
        losses = trainer.accelerator.reduce(torch.stack(list(trainer.losses.values())), reduction="mean")
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
        weights = {name: weight.detach() for name, weight in unwrapped.named_parameters()}
        passes = float(np.mean(list(trainer.passes.values())))
        runs.append({"geometry": geometry, "weights": weights, "losses": losses, "passes": passes})
    if trainer.is_world_process_zero():
        torch.save(runs, f"{folder}/runs.pt")
    PartialState().destroy_process_group()  # gloo's threads, still running at the end, now and then abort the process


if __name__ == "__main__":
    _work(sys.argv[1])
