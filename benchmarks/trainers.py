"""Every trainer that is compared, ready for `train()` with the same settings. Knows TRL; knows no clock."""

from __future__ import annotations

from typing import Any

import torch
from measure import training_dtype

OURS = "packsft"
TRL_PACKED = "TRL, packing=True"
TRL_PADDED = "TRL, padded, batch 8"
TRAINERS = (OURS, TRL_PACKED, TRL_PADDED)


def build_trainer(name: str, model: Any, tokenizer: Any, dataset: Any, output_dir: str, **arguments: Any) -> Any:
    """One of `TRAINERS`, ready for `train()`, with the same settings for all.

    Args:
        dataset: prompt/completion examples.
        arguments: of `SFTConfig`, over the defaults here.
    """
    from trl import SFTConfig, SFTTrainer

    from packsft import PackedSFTTrainer

    packed = name != TRL_PADDED
    defaults: dict[str, Any] = {
        "output_dir": output_dir,
        "packing": packed,
        "max_length": 1024,
        "per_device_train_batch_size": 1 if packed else 8,
        "gradient_checkpointing": False,  # TRL's default is True
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": training_dtype() == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    trainer_class = PackedSFTTrainer if name == OURS else SFTTrainer
    trainer = trainer_class(
        model=model,
        args=SFTConfig(**(defaults | arguments)),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # a line of metrics per step would bury the tables
    return trainer
