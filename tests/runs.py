"""A trainer on a tiny model, configured for tests."""

import torch
from accelerate import PartialState
from tiny import tiny_model, tiny_tokenizer, token_rows

from packsft import PackedSFTConfig, PackedSFTTrainer

DEFAULTS = {
    "bf16": False, "gradient_checkpointing": False, "report_to": "none", "max_length": 32, "save_strategy": "no",
    "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
}  # fmt: skip


def config(tmp_path, **options):
    return PackedSFTConfig(str(tmp_path), **DEFAULTS | options)


def trainer(tmp_path, model=None, train_dataset=None, eval_dataset=None, args=None, processing_class=None, **options):
    constructor = {key: options.pop(key) for key in CONSTRUCTOR_KEYS if key in options}
    return PackedSFTTrainer(
        model=tiny_model("llama") if model is None else model,
        args=config(tmp_path, **options) if args is None else args,
        train_dataset=token_rows(24) if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer() if processing_class is None else processing_class,
        **constructor,
    )


CONSTRUCTOR_KEYS = (
    "data_collator", "compute_metrics", "callbacks", "optimizers", "peft_config", "formatting_func",
    "compute_loss_func", "preprocess_logits_for_metrics",
)  # fmt: skip


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def save_and_end(found, path):
    """At the end of a script of several processes: the main one saves."""
    state = PartialState()
    if state.is_main_process:
        torch.save(found, path)
    state.wait_for_everyone()
    if state.num_processes > 1:
        state.destroy_process_group()
