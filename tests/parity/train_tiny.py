"""Script for the tests of several ranks: trains a tiny GPT-2 in float64 and saves its weights.

usage: train_tiny.py OUTPUT_FILE per_device_train_batch_size gradient_accumulation_steps
"""

import sys
import tempfile

import torch
from runs import losses, trainer
from tiny import tiny_model, token_rows

output, batch_size, accumulation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ours = trainer(
    tempfile.mkdtemp(),
    model=tiny_model("gpt2", torch.float64),
    train_dataset=token_rows(64),
    packing=False,
    per_device_train_batch_size=batch_size,
    gradient_accumulation_steps=accumulation,
    num_train_epochs=2,
)
ours.train()
if ours.is_world_process_zero():
    weights = {name: p.detach() for name, p in ours.accelerator.unwrap_model(ours.model).named_parameters()}
    steps = ours.state.global_step
    history = {key: ours.state.log_history[-2][key] for key in ("num_tokens", "entropy", "mean_token_accuracy")}
    torch.save({"weights": weights, "losses": losses(ours), "steps": steps, "history": history}, output)
