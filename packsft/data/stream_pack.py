"""A pack of a stream, and the digests that tell whether a stream that is read again gives what it gave."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from packsft.data.document import Document, Pack


class StreamPack(list[Document]):
    """A pack of a stream, with the digests of all packs of this epoch and worker up to it and up to its end.

    It also reads as a row of TRL: `pack["input_ids"]`, `pack["labels"]` (the first of each document is -100) and
    `pack["seq_lengths"]` are lists of integers, `"labels" in pack` and `dict(pack)` work.
    """

    def __init__(self, documents: Iterable[Document] = (), before: str = "", after: str = "") -> None:
        super().__init__(documents)
        self.before, self.after = before, after

    def keys(self) -> list[str]:
        return ["input_ids", "labels", "seq_lengths"]

    def __contains__(self, key: object) -> bool:
        return key in self.keys() if isinstance(key, str) else super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        if key == "seq_lengths":
            return [len(document) for document in self]
        if key not in self.keys():
            raise KeyError(f"a pack of a stream has no {key!r}, only {', '.join(self.keys())}")
        return [token for document in self for token in getattr(document, key).tolist()]


def digest_of(document: Document) -> bytes:
    """SHA-256 of the tokens and labels."""
    digest = hashlib.sha256(len(document).to_bytes(8, "little"))
    for values in (document.input_ids, document.labels):
        digest.update(values.astype("<i8", copy=False).data)
    return digest.digest()


def chained_digest(before: str, digests: Iterable[bytes]) -> str:
    """The digest of all documents up to these, in hex."""
    return hashlib.sha256(before.encode() + b"".join(digests)).hexdigest()


def stream_digests(packs: list[Pack]) -> tuple[int, str, str] | None:
    """(worker, digest before, digest after) of consecutive packs of a stream; None for other packs."""
    first, last = packs[0], packs[-1]
    if not isinstance(first, StreamPack) or not isinstance(last, StreamPack) or not last.after:
        return None
    worker = torch.utils.data.get_worker_info()
    return 0 if worker is None else worker.id, first.before, last.after
