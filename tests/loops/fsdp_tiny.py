"""A plain loop under FSDP2: `fsdp_tiny.py OUTPUT`, whose weights are saved."""

import sys

import torch
from plain_loop import PACK, loop
from runs import save_and_end
from tiny import tiny_model, token_rows
from torch import distributed
from torch.distributed.fsdp import fully_shard

import packsft

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    model = packsft.prepare(tiny_model("llama", torch.float64, tie_word_embeddings=False))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    loop(model, packsft.pack(token_rows(26), 32, **PACK))
    save_and_end({name: value.full_tensor() for name, value in model.state_dict().items()}, sys.argv[1])
