"""LoRA with `PackedSFTTrainer`: `pip install peft`, then `python examples/lora.py MODEL OUTPUT`.

On several devices: accelerate launch --config_file examples/fsdp2.yaml examples/lora.py MODEL OUTPUT
"""

import sys

from peft import LoraConfig
from transformers import AutoTokenizer

from packsft import PackedSFTConfig, PackedSFTTrainer, stdlib_docstrings


def main(name, output, *, num_rows=1000, **options):
    args = PackedSFTConfig(
        output,
        max_length=1024,
        per_device_train_batch_size=16,  # examples of a step on each device, as without packing
        tokens_per_pass=8192,  # packed into passes of at most so many tokens
        learning_rate=2e-4,
        num_train_epochs=1,
        completion_only_loss=True,
        **options,
    )
    trainer = PackedSFTTrainer(
        name,
        args,
        train_dataset=stdlib_docstrings().select(range(num_rows)),
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(output)  # the adapter
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:3])
