"""transformers' own `Trainer`: `python examples/transformers_trainer.py MODEL OUTPUT`.

It wants the same number of micro-batches in every step: packs, not exact steps. What divides the loss it counts itself.
"""

import sys

import torch
from docstrings import tokenised_docstrings
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import packsft


def main(name, output, *, num_rows=240, batch_size=4, epochs=1, learning_rate=1e-5, dtype=torch.float32, **arguments):
    rows = tokenised_docstrings(AutoTokenizer.from_pretrained(name), num_rows)
    data = packsft.pack(rows, max_length=1024, batch_size=batch_size, strategy="bfd", shuffle=False)
    model = packsft.prepare(AutoModelForCausalLM.from_pretrained(name, dtype=dtype), on_unpackable="error")
    args = TrainingArguments(
        output, per_device_train_batch_size=1, gradient_accumulation_steps=batch_size, num_train_epochs=epochs,
        learning_rate=learning_rate, save_strategy="no", report_to="none", **arguments,
    )  # fmt: skip
    Trainer(model, args, train_dataset=data.packs, data_collator=data.collator).train()
    packsft.unprepare(model).save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:3])
