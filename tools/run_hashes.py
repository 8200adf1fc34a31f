"""Hashes of short training runs, one line for each way to train: a refactor must leave every line as it was.

    python tools/run_hashes.py > before.txt     # then change the code
    python tools/run_hashes.py | diff before.txt -

The first hash of a line covers, bit for bit, the packing plan, every loss that `training_step` returns and the final
weights; the second covers every logged number (times left out), evaluation included, and the packing report. Hashes
compare on one machine with one set of packages only. Each strategy also runs on two processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

from packsft import PackedSFTConfig, PackedSFTTrainer

SMALL = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
WIDE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
MODELS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **SMALL),  # with dropout
    "llama": LlamaConfig(**SMALL, **WIDE),
    "mixtral": MixtralConfig(**SMALL, **WIDE, num_local_experts=4, output_router_logits=True),
    "opt": OPTConfig(  # documents see each other: trained on padded rows
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=128, **SMALL,
    ),
}  # fmt: skip
STRATEGIES = ("step", "bfd", "bfd_split", "wrapped", "none")
EVERYWHERE = {f"{strategy} {source}": {"strategy": strategy, "source": source}
              for strategy in STRATEGIES for source in ("rows", "stream")}  # fmt: skip
ALONE = {
    "step, two passes": {"tokens_per_pass": 20},
    "step, LoRA on the head": {"lora": True},
    "step, NEFTune": {"neftune_noise_alpha": 5},
    "step, label smoothing": {"label_smoothing_factor": 0.1},
    "step, dft": {"loss_type": "dft"},
    "step, bfloat16": {"bf16": True},
    "step, dropped": {"overlong": "drop"},
    "step, the end kept": {"truncation_mode": "keep_end"},
    "step, workers": {"dataloader_num_workers": 2, "source": "stream"},
    "step, resumed": {"resume": True},
    "bfd, resumed": {"strategy": "bfd", "resume": True},
    "bfd stream, resumed": {"strategy": "bfd", "source": "stream", "resume": True},
    "packs of the user's": {"strategy": "none", "source": "packs", "dataset_kwargs": {"skip_prepare_dataset": True}},
} | {
    f"{strategy} {family}, examples equal": {
        "strategy": strategy, "family": family, "loss_normalization": "example"}
    for strategy, family in (("step", "llama"), ("bfd_split", "llama"), ("bfd", "opt"), ("step", "mixtral"))
} | {f"{strategy} {family}": {"strategy": strategy, "family": family}
     for strategy in ("step", "bfd_split", "none") for family in ("opt", "mixtral", "gpt2")}  # fmt: skip


class Recording(PackedSFTTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.returned = [*getattr(self, "returned", []), loss.detach().double()]
        return loss


def rows(count: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(1, 60, (1,), generator=generator))
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return Dataset.from_list(made)


def packs(count: int) -> Dataset:
    singles = rows(2 * count, 4)
    pairs = [(singles[i], singles[i + 1]) for i in range(0, 2 * count, 2)]
    return Dataset.from_list([
        {"input_ids": a["input_ids"] + b["input_ids"], "labels": a["labels"] + b["labels"],
         "seq_lengths": [len(a["input_ids"]), len(b["input_ids"])]}
        for a, b in pairs
    ])  # fmt: skip


def run(
    strategy: str = "step", source: str = "rows", family: str = "llama", lora: bool = False, resume: bool = False,
    **options: Any,
) -> str:  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[family], dtype=torch.float32)
    numbers = {"<eos>": 1, "<pad>": 0} | {str(i): i for i in range(2, 64)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(numbers, unk_token="<eos>")), eos_token="<eos>", pad_token="<pad>"
    )
    train = packs(40) if source == "packs" else rows(70, 0)
    ending = {"max_steps": 7} if source == "stream" else {"num_train_epochs": 2}
    with tempfile.TemporaryDirectory() as folder:
        args = PackedSFTConfig(
            folder, packing=strategy != "none", packing_strategy="step" if strategy == "none" else strategy,
            report_to="none", gradient_checkpointing=False, disable_tqdm=True, logging_steps=1, learning_rate=1e-3,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=3,
            include_num_input_tokens_seen="non_padding", dataset_num_proc=None, use_cpu=True,
            **{"max_length": 32, "bf16": False, "save_strategy": "steps", "save_steps": 3} | ending | options,
        )  # fmt: skip

        def make() -> Recording:
            trainer = Recording(
                model=model, args=args, train_dataset=train.to_iterable_dataset(4) if source == "stream" else train,
                eval_dataset=packs(5) if source == "packs" else {"a": rows(9, 1), "b": rows(7, 2)},
                peft_config=LoraConfig(r=4, target_modules=["q_proj", "lm_head"]) if lora else None,
                processing_class=tokenizer,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            return trainer

        trainer = make()
        trainer.train()
        if resume:
            trainer = make()
            trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "tokens_per_second"}
    history = [
        {k: v for k, v in entry.items() if k not in timed and not k.endswith(("_runtime", "_per_second"))}
        for entry in trainer.state.log_history
    ]
    report = trainer.packing_report
    told = json.dumps([history, report and report.rows()], sort_keys=True)
    trained = hashlib.sha256(torch.stack(trainer.returned).numpy().tobytes())
    trained.update(str(getattr(getattr(trainer.train_dataset, "plan", None), "fingerprint", None)).encode())
    for name, weight in sorted(trainer.accelerator.unwrap_model(trainer.model).state_dict().items()):
        trained.update(name.encode() + weight.contiguous().numpy().tobytes())
    logged = hashlib.sha256(told.encode()).hexdigest()
    return (
        f"{trained.hexdigest()[:16]} {logged[:16]}  {trainer.state.global_step} steps, {len(trainer.returned)} losses"
    )


def main() -> None:
    chosen = [name for name in EVERYWHERE | ALONE if all(word in name for word in sys.argv[1:])]
    state = PartialState(cpu=True)
    if state.num_processes == 1:
        for name in chosen:
            print(f"{name:32} {run(**(EVERYWHERE | ALONE)[name])}", flush=True)
        two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, *sys.argv[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *two], capture_output=True, text=True, env=environment)
        print(done.stdout, end="")
        if not done.stdout:
            print(done.stderr[-2000:], file=sys.stderr)
    else:
        for name in EVERYWHERE:
            if name in chosen:
                result = run(**EVERYWHERE[name])
                if state.is_main_process:
                    print(f"{name + ', two processes':32} {result}", flush=True)
        state.destroy_process_group()


if __name__ == "__main__":
    main()
