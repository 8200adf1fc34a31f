"""Script for the tests of streams over ranks: trains, and saves the examples of each rank's batches.

usage: stream_ranks.py OUTPUT_FOLDER shards batches workers strategy
"""

import sys
import tempfile

import torch
from accelerate import PartialState
from runs import losses, trainer
from streams import batch_documents, stream_of

output, shards, batches, workers = sys.argv[1], *map(int, sys.argv[2:5])
ours = trainer(
    tempfile.mkdtemp(), train_dataset=stream_of(41, shards), eval_dataset=stream_of(13, 1), max_length=16,
    max_steps=batches, per_device_train_batch_size=2, dataloader_num_workers=workers, packing_strategy=sys.argv[5],
)  # fmt: skip
loader = ours.get_train_dataloader()
found = [batch_documents(batch) for batch, _ in zip(loader, range(batches), strict=False)]
evaluated = [batch_documents(batch) for batch in ours.get_eval_dataloader()]
ours.train()  # an uneven end would hang here
ours.evaluate()
torch.save(
    {"train": found, "eval": evaluated, "losses": losses(ours)}, f"{output}/rank{ours.accelerator.process_index}.pt"
)
PartialState().wait_for_everyone()  # a rank that aborts below ends the others
PartialState().destroy_process_group()  # gloo's threads, still running at the end, now and then abort the process
