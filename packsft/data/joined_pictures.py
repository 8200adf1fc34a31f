"""Puts the pictures of the documents of a pass into one row, as the user's processor puts those of one row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packsft.data.document import Document, Pack
from packsft.data.pictures import drawn, tried

TRIED_SIZES = ((224, 160), (160, 224), (320, 224))  # width, height: of one document, and of another with two


@dataclass(frozen=True)
class Places:
    """Where an input of several documents has the pictures of each.

    Attributes:
        axis: that counts pictures, or their parts; or rows.
        missing: for an input with one entry for each row, and in it one for each picture: that of a picture which a row
            does not have.
    """

    axis: int
    missing: Tensor | None = None

    def joined(self, parts: list[Tensor | None]) -> Tensor:
        """One part for each document, None for one without pictures. Other axes are padded with 0."""
        if self.missing is None:
            return _joined([part for part in parts if part is not None], self.axis)
        count = max(part.shape[1] for part in parts if part is not None)
        rows = [[] if part is None else list(part[0]) for part in parts]
        return torch.stack([torch.stack(row + [self.missing] * (count - len(row))) for row in rows])


class JoinedPictures:
    """What the pictures of several documents add to a batch: of one row, or of padded rows.

    Which axis counts pictures is found by trial: the processor gets the pictures of two documents apart, and together.
    Other axes are padded with 0.

    Args:
        processor: of the user.
        positions: gives the positions of a document alone, or None for those of text.
    """

    def __init__(self, processor: Any, positions: RotaryPositions | None) -> None:
        self._processor, self._positions = processor, positions

    @cached_property
    def places_in_row(self) -> dict[str, Places]:
        """Of each input. Raises ValueError if the processor puts pictures together in another way."""
        return self._places(lambda one, two: [one + two])

    @cached_property
    def places_in_rows(self) -> dict[str, Places]:
        """Likewise, for padded rows of one document each."""
        return self._places(lambda one, two: [one, two])

    def _places(self, together: Callable[[list, list], list[list]]) -> dict[str, Places]:
        pictures = drawn(TRIED_SIZES)
        rows = pictures[:1], pictures[1:]
        one, two = (_processed(self._processor, [some]) for some in rows)
        both = _processed(self._processor, together(*rows))
        return {key: _places_of(key, [one[key], two[key]], both[key]) for key in both}

    def of_row(self, documents: Pack) -> dict[str, Tensor]:
        """The inputs of the model beside ids and boundaries, of documents end to end."""
        parts_of = _of_tokens(documents)
        if relations := [key for key, parts in parts_of.items() if parts[0].dim() > 1]:
            raise ValueError(f"pictures cannot be packed: {relations[0]} relates tokens to the pictures of their row")
        batch = {key: torch.cat(parts)[None] for key, parts in parts_of.items()}
        batch |= _pictures(documents, self.places_in_row)
        if self._positions is not None:
            batch["position_ids"] = torch.cat([self._positions(document) for document in documents], dim=1)[:, None]
        return batch

    def of_rows(self, documents: Pack, length: int) -> dict[str, Tensor]:
        """Those of documents in rows of `length` tokens."""
        padded = {
            key: torch.stack([_of_shape(part, [length, *part.shape[1:]]) for part in parts])
            for key, parts in _of_tokens(documents).items()
        }
        return padded | _pictures(documents, self.places_in_rows)


def _pictures(documents: Pack, places: dict[str, Places]) -> dict[str, Tensor]:
    batch = {}
    for key in {key: None for document in documents for key in document.of_pictures}:
        if key not in places:
            raise ValueError(f"the processor gives {key} for the pictures of a row, which it did not on trial")
        batch[key] = places[key].joined([document.of_pictures.get(key) for document in documents])
    return batch


def _of_tokens(documents: Pack) -> dict[str, list[Tensor]]:
    """What the processor says of each token, `[L, ...]` of each document; 0 for those that it does not give."""
    parts = {}
    for key in {key: None for document in documents for key in document.of_tokens}:
        given = [document.of_tokens.get(key) for document in documents]
        shape = np.max([part.shape[1:] for part in given if part is not None], axis=0).astype(int).tolist()
        parts[key] = [_of_shape(part, [len(document), *shape]) for part, document in zip(given, documents, strict=True)]
    return parts


def _of_shape(part: Tensor | None, shape: list[int]) -> Tensor:
    """Padded with 0 at the end of each axis."""
    if part is None:
        return torch.zeros(shape, dtype=torch.int64)
    missing = [size - had for size, had in zip(shape, part.shape, strict=True)]
    pad = [size for dim in reversed(missing) for size in (0, dim)]
    return torch.nn.functional.pad(part, pad) if any(missing) else part


def _processed(processor: Any, rows: list[list]) -> dict[str, Tensor]:
    """What the processor gives for the pictures of rows, beside what it says of each token."""
    batch = tried(processor, rows)
    length = batch["input_ids"].shape
    return {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.shape[:2] != length}


def _places_of(key: str, parts: list[Tensor], expected: Tensor) -> Places:
    """`parts` are of one picture and of two."""
    possible = [Places(axis) for axis in range(expected.dim())]
    if expected.dim() > 1 and [part.shape[:2] for part in (*parts, expected)] == [(1, 1), (1, 2), (2, 2)]:
        possible.insert(0, Places(0, missing=expected[0, 1]))
    for places in possible:
        if sum(part.shape[places.axis] for part in parts) == expected.shape[places.axis]:
            found = places.joined(list(parts))
            if found.shape == expected.shape and torch.equal(found, expected):
                return places
    shapes = [tuple(part.shape) for part in (*parts, expected)]
    raise ValueError(f"pictures cannot be packed: the processor gives {key} of the shapes {shapes[0]} and {shapes[1]} "
                     f"for two rows and {shapes[2]} for one with the pictures of both")  # fmt: skip


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    largest = [max(part.shape[dim] for part in parts) for dim in range(parts[0].dim())]
    shapes = [[part.shape[dim] if dim == axis else size for dim, size in enumerate(largest)] for part in parts]
    return torch.cat([_of_shape(part, shape) for part, shape in zip(parts, shapes, strict=True)], dim=axis)


class RotaryPositions:
    """The positions of a document alone, `[3, L]` int64, of a model that counts in time, height and width.

    Runs the model's own `get_rope_index`, which reads its configuration, on the host.
    """

    def __init__(self, model: nn.Module) -> None:
        without_weights: Any = type(model).__new__(type(model))  # a worker may get a copy of it
        nn.Module.__init__(without_weights)
        own = set(vars(without_weights))
        vars(without_weights).update({name: value for name, value in vars(model).items() if name not in own})
        self._index = without_weights.get_rope_index
        self._inputs = frozenset(inspect.signature(self._index).parameters)

    @classmethod
    def of(cls, model: nn.Module) -> RotaryPositions | None:
        """None for a model whose positions are those of text."""
        inner = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
        return None if inner is None else cls(inner)

    def __call__(self, document: Document) -> Tensor:
        inputs = {
            "input_ids": torch.from_numpy(document.input_ids)[None],
            "attention_mask": torch.ones(1, len(document), dtype=torch.int64),
            "mm_token_type_ids": torch.zeros(1, len(document), dtype=torch.int64),
        }
        inputs |= {key: value[None] for key, value in document.of_tokens.items()} | dict(document.of_pictures)
        known = {key: value for key, value in inputs.items() if key in self._inputs}
        positions, _ = self._index(**known)
        return positions[:, 0]
