"""Rows as the user gives them, checked before TRL tokenises and labels them.

TRL stops at a bad row without naming it, or goes on: it cuts a mask that is too long, and reads a null in a mask as 0.
Knows which columns TRL reads, not what it makes of them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from packsft.data.document import check_mask, checked_tokens, short
from packsft.data.packs import is_list, masked_rows

TEXT, MESSAGES = "a text", "a list of messages with the key {!r}"
logger = logging.getLogger("packsft")

FORMS = "`input_ids`, `messages`, `prompt` and `completion`, or a text (the column of `dataset_text_field`)"
EMPTY = "are empty: there, at most the EOS token is scored"
Rows = TypeVar("Rows", Dataset, IterableDataset)


def checked_rows(dataset: Rows, *, text_field: str, completion_only: bool, name: str) -> Rows:
    """The same rows, as plain Python values whatever the data set's format.

    Args:
        dataset: rows of any form that TRL takes.
        text_field: the column of texts, if the rows hold neither tokens nor messages.
        completion_only: whether only completions are scored. Those that are empty are counted in one notice.
        name: names the data set in messages.

    Raises:
        ValueError: a row has no text, no messages or no ids, or its masks do not fit. A stream raises it when the row
            is read. Rows with `labels` are not checked here: `packs.py` and `streams.py` do it.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset  # TRL refuses it
    visible = dataset.select_columns(dataset.format["columns"]) if isinstance(dataset, Dataset) else dataset
    plain = visible.with_format(None)
    sample: dict[str, Any] = next(iter(plain), {})
    if not sample:
        return dataset
    dataset = plain
    if "input_ids" in sample:
        if "labels" in sample:
            return dataset
        masks = [*(["completion_mask"] if completion_only else []), "assistant_masks"]
        masks = [mask for mask in masks if mask in sample]
        if isinstance(dataset, Dataset):
            return masked_rows(dataset, masks)
        return dataset.map(functools.partial(_check_tokens, masks=masks, name=name), with_indices=True)
    texts, expected = _form(sample, text_field)
    scores_completions = completion_only and expected == TEXT and "completion" in texts
    if isinstance(dataset, IterableDataset):
        check = functools.partial(
            _check_texts, texts=texts, expected=expected, name=f"{name} stream", says_empty=scores_completions
        )
        return dataset.map(check, with_indices=True)
    _check_texts(sample, 0, texts, expected, f"{name} data set")  # the others have the same type, if any
    for text in texts:
        if (row := _first_missing(dataset, text)) is not None:
            raise ValueError(f"row {row} of the {name} data set: {text} is missing, or holds no message or a null")
    if scores_completions:
        is_empty = pc.equal(dataset.data.column("completion"), "").to_numpy()
        if count := len(_selected(dataset, np.flatnonzero(is_empty))):
            logger.warning("%s data set: %d of %d completions %s", name, count, len(dataset), EMPTY)
    return dataset


def formatted_rows(dataset: Rows, function: Callable[[dict], str], num_proc: int | None, name: str) -> Rows:
    """Rows with the column `text` alone, made by `formatting_func` from rows without `input_ids`.

    TRL (1.16) keeps the other columns, and then trains on messages, or on the column of `dataset_text_field`, if there
    are any. Raises ValueError, naming the row, for what is not a text.
    """
    columns = list(next(iter(dataset), {}))
    options = {"num_proc": num_proc} if isinstance(dataset, Dataset) else {}
    format_row = functools.partial(_format, function=function, name=name)
    with PartialState().main_process_first():  # the others find the result in the cache
        return dataset.map(format_row, with_indices=True, remove_columns=columns, **options)


def _format(row: dict[str, Any], index: int, function: Callable[[dict], str], name: str) -> dict[str, str]:
    text = function(row)
    if not isinstance(text, str):
        raise ValueError(
            f"row {index} of the {name} data set: formatting_func gives {short(text)}, expected a text: one per row"
        )
    return {"text": text}


def _check_tokens(row: dict[str, Any], index: int, masks: Sequence[str], name: str) -> dict[str, Any]:
    where = f"row {index} of the {name} stream"
    ids, _ = checked_tokens(row.get("input_ids"), row.get("input_ids"), where)
    for mask in masks:
        check_mask(row.get(mask), len(ids), where, mask)
    return row


def _form(sample: Mapping[str, Any], text_field: str) -> tuple[tuple[str, ...], str]:
    """The columns that TRL reads, by the first row, and what each row must hold there: a `_kind`."""
    if "prompt" in sample:
        return ("prompt", "completion"), _kind("prompt", sample["prompt"]) or f"{TEXT} or {MESSAGES.format('role')}"
    for name in ("conversations", "messages"):
        if name in sample and (text_field not in sample or _kind(name, sample[name]) not in (TEXT, None)):
            return (name,), MESSAGES.format(_key(name))
    return (text_field,), TEXT


def _key(name: str) -> str:
    return "from" if name == "conversations" else "role"


def _kind(name: str, value: Any) -> str | None:
    """What the value of a column is; None for what TRL cannot read there."""
    if isinstance(value, str):
        return TEXT
    messages = isinstance(value, list) and all(isinstance(each, dict) and _key(name) in each for each in value)
    return MESSAGES.format(_key(name)) if messages and value else None


def _check_texts(
    row: dict[str, Any], index: int, texts: Sequence[str], expected: str, name: str, says_empty: bool = False
) -> dict[str, Any]:
    for text in texts:
        if text not in row:
            raise ValueError(f"the {name} has no column {text!r}, only {', '.join(row)}: expected {FORMS}")
        if _kind(text, row[text]) != expected:
            raise ValueError(f"row {index} of the {name}: {text} is {short(row[text])}, expected {expected}")
    if says_empty and not row["completion"]:
        _say_empty(name)
    return row


@functools.cache
def _say_empty(name: str) -> None:
    """Once in a process: how many there are, a stream knows only at its end."""
    logger.warning("%s: some completions %s", name, EMPTY)


def _first_missing(dataset: Dataset, name: str) -> int | None:
    """The first row without a text, or with a list that is empty or holds a null."""
    column = dataset.data.column(name)
    missing = column.is_null()
    if is_list(column.type):
        missing = pc.or_(missing, pc.equal(pc.fill_null(pc.list_value_length(column), 0), 0))
    rows = np.flatnonzero(missing.to_numpy())
    if is_list(column.type) and (messages := pc.list_flatten(column)).null_count:
        rows = np.union1d(rows, pc.list_parent_indices(column).filter(messages.is_null()).to_numpy())
    rows = _selected(dataset, rows)
    return int(rows[0]) if len(rows) else None


def _selected(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Rows of the table as rows of the data set, which may be a selection."""
    if dataset._indices is None or not len(rows):
        return rows
    return np.flatnonzero(np.isin(dataset._indices.column(0).to_numpy(), rows))
