"""Puts the pictures of the documents of a pass into one row, as the user's processor puts those of one row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packsft.data.document import Document, Pack
from packsft.data.pictures import placeholder_of

TRIED_SIZES = ((224, 160), (160, 224), (320, 224))  # width, height: of one document, and of another with two


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
    def axes_of_row(self) -> dict[str, int]:
        """The axis of each input. Raises ValueError if the processor puts pictures together in another way."""
        return self._axes(lambda one, two: [one + two])

    @cached_property
    def axes_of_rows(self) -> dict[str, int]:
        """Likewise, for padded rows of one document each."""
        return self._axes(lambda one, two: [one, two])

    def _axes(self, together: Callable[[list, list], list[list]]) -> dict[str, int]:
        from PIL.Image import fromarray

        generator = np.random.default_rng(0)
        pictures = [
            fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in TRIED_SIZES
        ]
        rows = pictures[:1], pictures[1:]
        one, two = (_processed(self._processor, [some]) for some in rows)
        both = _processed(self._processor, together(*rows))
        return {key: _axis_of(key, [one[key], two[key]], both[key]) for key in both}

    def of_row(self, documents: Pack) -> dict[str, Tensor]:
        """The inputs of the model beside ids and boundaries, of documents end to end."""
        batch = {key: torch.cat(parts)[None] for key, parts in _of_tokens(documents).items()}
        batch |= _pictures(documents, self.axes_of_row)
        if self._positions is not None:
            batch["position_ids"] = torch.cat([self._positions(document) for document in documents], dim=1)[:, None]
        return batch

    def of_rows(self, documents: Pack, length: int) -> dict[str, Tensor]:
        """Those of documents in rows of `length` tokens."""
        padded = {
            key: torch.stack([torch.nn.functional.pad(part, (0, length - len(part))) for part in parts])
            for key, parts in _of_tokens(documents).items()
        }
        return padded | _pictures(documents, self.axes_of_rows)


def _pictures(documents: Pack, axes: dict[str, int]) -> dict[str, Tensor]:
    batch = {}
    for key in {key: None for document in documents for key in document.of_pictures}:
        if key not in axes:
            raise ValueError(f"the processor gives {key} for the pictures of a row, which it did not on trial")
        parts = [document.of_pictures[key] for document in documents if key in document.of_pictures]
        batch[key] = _joined(parts, axes[key])
    return batch


def _of_tokens(documents: Pack) -> dict[str, list[Tensor]]:
    return {
        key: [document.of_tokens.get(key, torch.zeros(len(document), dtype=torch.int64)) for document in documents]
        for key in {key: None for document in documents for key in document.of_tokens}
    }


def _processed(processor: Any, rows: list[list]) -> dict[str, Tensor]:
    """What the processor gives for the pictures of rows, beside tokens."""
    texts = [placeholder_of(processor) * len(pictures) for pictures in rows]
    batch = processor(images=rows, text=texts, return_tensors="pt", add_special_tokens=False, padding=True)
    length = batch["input_ids"].shape
    return {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.shape != length}


def _axis_of(key: str, parts: list[Tensor], expected: Tensor) -> int:
    for axis in range(expected.dim()):
        if sum(part.shape[axis] for part in parts) == expected.shape[axis]:
            found = _joined(parts, axis)
            if found.shape == expected.shape and torch.equal(found, expected):
                return axis
    shapes = [tuple(part.shape) for part in (*parts, expected)]
    raise ValueError(f"pictures cannot be packed: the processor gives {key} of the shapes {shapes[0]} and {shapes[1]} "
                     f"for two rows and {shapes[2]} for one with the pictures of both")  # fmt: skip


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    largest = [max(part.shape[dim] for part in parts) for dim in range(parts[0].dim())]
    padded = []
    for part in parts:
        missing = [0 if dim == axis else largest[dim] - part.shape[dim] for dim in range(part.dim())]
        pad = [size for dim in reversed(missing) for size in (0, dim)]
        padded.append(torch.nn.functional.pad(part, pad) if any(missing) else part)
    return torch.cat(padded, dim=axis)


class RotaryPositions:
    """The positions of a document alone, `[3, L]` int64, of a model that counts in time, height and width.

    Runs the model's own `get_rope_index`, which reads its configuration, on the host.
    """

    def __init__(self, model: nn.Module) -> None:
        without_weights: Any = type(model).__new__(type(model))  # a worker may get a copy of it
        nn.Module.__init__(without_weights)
        without_weights.config = model.config
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
