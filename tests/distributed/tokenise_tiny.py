"""Script for the tests of several ranks: how many texts each rank tokenises, of rows in memory and on a disk.

usage: tokenise_tiny.py OUTPUT_FILE
"""

import sys
import tempfile

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, load_from_disk
from runs import trainer
from tiny import tiny_tokenizer

state = PartialState(cpu=True)
tokenizer = tiny_tokenizer()
encode, calls = type(tokenizer)._encode_plus, [0]


def counted(*args, **kwargs):
    calls[0] += 1
    return encode(*args, **kwargs)


type(tokenizer)._encode_plus = counted
rows = Dataset.from_list([{"text": " ".join(f"w{(i * j) % 30}" for j in range(1, 8))} for i in range(64)])
(folder,) = broadcast_object_list([tempfile.mkdtemp()])
if state.is_main_process:
    rows.save_to_disk(folder)
state.wait_for_everyone()
found = {}
for kind, data in (("in memory", rows), ("on a disk", load_from_disk(folder))):
    calls[0] = 0
    ours = trainer(tempfile.mkdtemp(), train_dataset=data, processing_class=tokenizer, packing=True)
    found[kind] = gather_object([(calls[0], len(ours.train_dataset))])
try:
    trainer(tempfile.mkdtemp(), train_dataset=rows.select(range(32 + state.process_index, 64)), packing=True)
except ValueError as error:
    found["other rows"] = gather_object([str(error)])
if state.is_main_process:
    torch.save(found, sys.argv[1])
state.wait_for_everyone()
state.destroy_process_group()
