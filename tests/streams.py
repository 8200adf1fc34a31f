"""Small streams in which every example can be told from every other, and the examples that came out of them."""

from datasets import Dataset, IterableDataset
from tiny import VOCAB


def numbered_rows(count):
    """Example i begins with two tokens that say i; lengths 3 to 9, all scored."""
    base = len(VOCAB) - 3
    rows = []
    for i in range(count):
        ids = [3 + i // base, 3 + i % base, *[5] * (1 + i * 5 % 7)]
        rows.append({"input_ids": ids, "labels": ids})
    return rows


def stream_of(count, shards=1) -> IterableDataset:
    return Dataset.from_list(numbered_rows(count)).to_iterable_dataset(num_shards=shards)


def documents(pack):
    """The input ids of each document of a pack."""
    return [tuple(document.input_ids.tolist()) for document in pack]


def batch_documents(batch):
    """The input ids of each document of a batch, or of the passes of a step; a batch without documents pads itself."""
    if "passes" in batch:
        return [document for part in batch["passes"] for document in batch_documents(part)]
    if not batch["num_documents"]:
        return []
    return [tuple(ids.tolist()) for ids in batch["input_ids"][0].split(batch["cu_seq_lens_q"].diff().tolist())]
