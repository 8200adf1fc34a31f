"""For tests of rows: the documents of packs as plain lists, rows as a stream, and what was logged."""

from datasets import IterableDataset

from packsft.data.packs import PackedDataset


def documents(packs):
    """(input ids, labels) of each document."""
    packs = packs.packs() if isinstance(packs, PackedDataset) else packs
    return [(d.input_ids.tolist(), d.labels.tolist()) for pack in packs for d in pack]


def ids_of(packs):
    return [ids for ids, _ in documents(packs)]


def streamed(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def said(caplog, part):
    return [record.message for record in caplog.records if part in record.message]
