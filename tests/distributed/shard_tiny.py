"""Script for the tests of several ranks: ten steps of a tiny GPT-2 under FSDP2, with compiled layers and without.

usage: shard_tiny.py OUTPUT_FILE (every rank trains on the same packs)
"""

import sys

import torch
from packsft_kernels import LossOptions
from tiny import tiny_model, token_rows
from torch import distributed
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from packsft.data.collator import PackingCollator
from packsft.data.packs import pack_dataset
from packsft.model.prepared import PreparedModel


def trained(compiled, checkpointing):
    model = tiny_model("gpt2", torch.float64, num_hidden_layers=3)
    if checkpointing:
        model.gradient_checkpointing_enable()
    prepared = PreparedModel(model, LossOptions(), compiles_layers=compiled)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.transformer.h:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    packs, collator, losses = pack_dataset(token_rows(61), 30, strategy="bfd", name="rows"), PackingCollator(0), []
    for index in range(10):
        batch = collator([packs.pack(index)])
        loss = prepared.loss(model, batch, batch["num_items"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "names": list(model.state_dict())}


distributed.init_process_group("gloo")
results = {}
for checkpointing in (False, True):
    clear_compilation_metrics()
    plain, compiled = (trained(on, checkpointing) for on in (False, True))
    graphs = len(get_compilation_metrics()), len(counters["graph_break"])
    results[checkpointing] = {"plain": plain, "compiled": compiled, "graphs and breaks": graphs}
if distributed.get_rank() == 0:
    torch.save(results, sys.argv[1])
distributed.destroy_process_group()
