"""A loop with accelerate: `accelerate launch examples/accelerate_loop.py MODEL OUTPUT`, on one device or on several."""

import sys

import torch
from accelerate import Accelerator
from docstrings import tokenised_docstrings
from transformers import AutoModelForCausalLM, AutoTokenizer

import packsft


def main(name, output, *, num_rows=240, batch_size=16, epochs=1, learning_rate=1e-5, dtype=torch.float32):
    accelerator = Accelerator()
    with accelerator.main_process_first():
        rows = tokenised_docstrings(AutoTokenizer.from_pretrained(name), num_rows)
    data = packsft.pack(rows, max_length=1024, batch_size=batch_size, tokens_per_pass=4096)
    accelerator.print(data)

    model = packsft.prepare(AutoModelForCausalLM.from_pretrained(name, dtype=dtype)).train()
    accelerator.print(model.packing)
    padded = model.packing.padded
    model, optimizer = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    )
    # not prepared: it gives each process its own batches already
    loader = data.loader(
        accelerator.process_index, accelerator.num_processes, padded=padded, device=accelerator.device, num_workers=2
    )
    for epoch in range(epochs):
        for step in loader:
            for batch in step:
                with accelerator.accumulate(model) if batch is step[-1] else accelerator.no_sync(model):
                    accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.print(f"epoch {epoch}: {step.num_items} scored tokens")
    if accelerator.is_main_process:
        packsft.unprepare(accelerator.unwrap_model(model)).save_pretrained(output)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:3])
