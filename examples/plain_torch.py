"""A loop in plain PyTorch, on one device or on several:

python examples/plain_torch.py MODEL OUTPUT
torchrun --nproc-per-node 2 examples/plain_torch.py MODEL OUTPUT
"""

import contextlib
import os
import sys

import torch
from docstrings import tokenised_docstrings
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import packsft


def main(name, output, *, num_rows=240, batch_size=16, epochs=1, learning_rate=1e-5, dtype=torch.bfloat16):
    several = "WORLD_SIZE" in os.environ
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if several:
        distributed.init_process_group()
    rows = tokenised_docstrings(AutoTokenizer.from_pretrained(name), num_rows)
    data = packsft.pack(rows, max_length=1024, batch_size=batch_size, tokens_per_pass=4096)
    print(data)

    model = packsft.prepare(AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)).train()
    print(model.packing)
    network = DistributedDataParallel(model) if several else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    loader = data.loader(padded=model.packing.padded, device=device, num_workers=2)
    for epoch in range(epochs):
        for step in loader:
            loss = 0.0
            for batch in step:
                last = batch is step[-1]  # gradients are averaged over the ranks once
                with contextlib.nullcontext() if last or not several else network.no_sync():
                    part = network(**batch).loss  # divided by the scored tokens of the whole step
                    part.backward()
                loss += part.detach()
            optimizer.step()
            optimizer.zero_grad()
            print(f"epoch {epoch}, {step.num_items} scored tokens: loss {loss:.4f}")
    if not several or distributed.get_rank() == 0:
        packsft.unprepare(model).save_pretrained(output)
    if several:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
