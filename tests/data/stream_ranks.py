"""Script for the tests of streams over ranks: trains, and saves the examples of each rank's batches.

Before that, it tries data sets that are already split by rank, and saves the errors.

usage: stream_ranks.py OUTPUT_FOLDER shards batches workers strategy
"""

import os
import sys
import tempfile

import torch
from accelerate import PartialState
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from runs import losses, trainer
from streams import batch_documents, numbered_rows, stream_of

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
ROWS = Dataset.from_list(numbered_rows(41))
refused = []
for split in (
    split_dataset_by_node(stream_of(41, 2), rank, size), split_dataset_by_node(stream_of(41, 1), rank, size),
    stream_of(41, 2).shard(size, rank), split_dataset_by_node(ROWS, rank, size), ROWS.shard(size, rank),
    ROWS.shuffle(seed=rank),
):  # fmt: skip
    try:
        trainer(tempfile.mkdtemp(), train_dataset=split, max_steps=1)
    except ValueError as error:
        refused.append(str(error))
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
torch.save({"train": found, "eval": evaluated, "losses": losses(ours), "refused": refused}, f"{output}/rank{rank}.pt")
PartialState().wait_for_everyone()  # a rank that aborts below ends the others
PartialState().destroy_process_group()  # gloo's threads, still running at the end, now and then abort the process
