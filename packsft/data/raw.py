"""Rows as the user gives them, checked and brought into one of TRL's forms before TRL tokenises and labels them.

TRL stops at a bad row without naming it, or goes on: it cuts a mask that is too long, reads a null in a mask as 0, and
renders a null in a message. Knows which columns TRL reads, not what it makes of them.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Value

from packsft.data.columns import MASK, ListColumn, check_no_transform, first_of, order_of, rows_of, true_at
from packsft.data.document import IGNORE_INDEX, check_mask, checked_tokens, short
from packsft.data.messages import (
    BESIDE,
    CHATS,
    FROM_VALUE,
    ROLE_CONTENT,
    TEXT,
    check_beside,
    check_media,
    doubtful_rows,
    holds_json,
    is_unicode,
    kind_of,
    may_hold_media,
    rows_of_each_kind,
    types_of,
)
from packsft.data.pictures import holds_pictures, picture_column

logger = logging.getLogger("packsft")

EXPECTED_FORMS = "expected input_ids, prompt and completion, messages, or the texts {!r} (dataset_text_field)"
EMPTY = "are empty: there, at most the EOS token is scored"
OF_TOKENS = ("labels", "attention_mask", "position_ids", "completion_mask", "assistant_masks")
Rows = TypeVar("Rows", Dataset, IterableDataset)


def one_form(dataset: Rows, text_field: str, name: str) -> Rows:
    """The rows as plain Python values, with the columns of one form and those that go with it.

    If rows have several forms, the first of these is trained on, and a notice says so: `input_ids`; `prompt` and
    `completion`; `messages`; `conversations`; a text, whose column is then `text`.

    Raises ValueError if the rows have none, or have columns that go with `input_ids` and no `input_ids`.
    """
    if isinstance(dataset, Dataset):
        if dataset.format["type"] == "custom":
            return dataset
        if not dataset.format["output_all_columns"]:
            if hidden := sorted(set(dataset.column_names) - set(dataset.format["columns"])):
                logger.warning("%s data set: its format hides %s: not read", name, " and ".join(hidden))
            dataset = dataset.select_columns(dataset.format["columns"])
    elif hasattr(dataset, "arrow_types"):
        return dataset
    dataset = dataset.with_format(None)
    sample: dict[str, Any] = next(iter(dataset), {})
    if not sample or "input_ids" in sample:
        return dataset
    if of_tokens := [column for column in OF_TOKENS if column in sample]:
        raise ValueError(
            f"the {name} data set has the column {of_tokens[0]!r}, which goes with input_ids, but it has none: rename "
            "or remove the column"
        )
    forms: list[tuple[str, ...]] = [("prompt", "completion"), ("messages",), ("conversations",), (text_field,)]
    forms = [form for form in forms if sample.keys() >= set(form)]
    readable = [form for form in forms if form[0] not in CHATS or not isinstance(sample[form[0]], str)]
    if not readable:
        raise ValueError(
            f"the {name} data set has only the columns {', '.join(sample)}: {EXPECTED_FORMS.format(text_field)}"
        )
    chosen: tuple[str, ...] = readable[0]
    if left := [column for other in readable[1:] for column in other if column not in chosen]:
        logger.warning("%s data set: %s is trained on; %s is not read", name, " and ".join(chosen), " and ".join(left))
    named, kind = {column: column for column in chosen}, kind_of(sample[chosen[0]])
    if chosen[0] in CHATS:  # TRL reads the keys by the name of the column
        named[chosen[0]] = "conversations" if kind == FROM_VALUE else "messages"
    elif len(chosen) == 1:
        named = {text_field: "text"}
    beside: list[str] = [] if kind == TEXT else [column for column in BESIDE if column in sample]
    if isinstance(dataset, IterableDataset):  # rows may have other columns than the first
        columns = {"prompt", "completion", *CHATS, text_field, *sample, *BESIDE} - set(OF_TOKENS)
        columns -= set() if kind == TEXT else set(BESIDE) - set(named)
        rename = functools.partial(_renamed, names=named, name=name)
        rows = dataset.map(rename, with_indices=True, remove_columns=sorted(columns))
        types = None if dataset.features is None else types_of(dataset.features.arrow_schema)
        kept = dict(zip(BESIDE, BESIDE, strict=True)) | named
        rows.arrow_types = None if types is None else {new: types[old] for old, new in kept.items() if old in types}
        return rows
    rows = dataset.select_columns([*chosen, *(column for column in beside if column not in chosen)])
    return rows.rename_columns({old: new for old, new in named.items() if old != new})


def _renamed(row: dict[str, Any], index: int, names: Mapping[str, str], name: str) -> dict[str, Any]:
    if (pictures := picture_column(row)) is not None and row[pictures]:
        raise ValueError(
            f"row {index} of the {name} stream has {pictures}, which the first row has not: give it to all"
        )
    return {new: row.get(old) for old, new in names.items()}


def in_one_form(datasets: Any, text_field: str, name: str) -> Any:
    """`one_form` of a data set, or of each in a dictionary; anything else as it is."""
    if holds_pictures(datasets):
        return datasets
    if isinstance(datasets, dict):
        return {key: in_one_form(rows, text_field, key) for key, rows in datasets.items()}
    of_datasets = isinstance(datasets, (Dataset, IterableDataset))
    return one_form(datasets, text_field, name) if of_datasets else datasets


def once_of(rows: Rows, tokenizer: Any) -> tuple[int | None, int | None]:
    """The tokens with which a row of `checked_rows` begins and ends at most once: what the tokenizer adds to texts."""
    sample: dict[str, Any] = next(iter(rows), {})
    if "input_ids" in sample or not any(isinstance(sample[name], str) for name in sample if name not in BESIDE):
        return None, None
    ids, (bos, eos) = tokenizer("a")["input_ids"], (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return bos if ids[:1] == [bos] else None, eos if ids[-1:] == [eos] else None


def checked_rows(dataset: Rows, *, text_field: str, completion_only: bool, eos_token: str | None, name: str) -> Rows:
    """Rows of `one_form` as plain Python values, whatever the data set's format.

    Rows of a data set with `input_ids` get their labels here, as in `label_rows`.

    Args:
        dataset: rows of any form that TRL takes.
        text_field: the column of texts, if the rows hold neither tokens nor messages.
        completion_only: whether only completions are scored. Those that are empty are counted in one notice.
        eos_token: what TRL adds to a text that does not end with it. Blanks after one are left out. None: neither.
        name: names the data set in messages.

    Raises:
        ValueError: a row has no text, no messages or no ids, or its masks do not fit. A stream raises it when the row
            is read. Rows with `labels` are not checked here: `packs.py` and `streams.py` do it.
    """
    if isinstance(dataset, Dataset):
        check_no_transform(dataset)
    dataset = one_form(dataset, text_field, name)
    sample: dict[str, Any] = next(iter(dataset), {})
    if not sample:
        return dataset
    if "input_ids" in sample:
        if isinstance(dataset, Dataset):
            return label_rows(dataset, completion_only)
        masks = [*(["completion_mask"] if completion_only else []), "assistant_masks"]
        masks = [mask for mask in masks if mask in sample and "labels" not in sample]
        later = [column for column in (*OF_TOKENS, "seq_lengths") if column not in sample]
        check_tokens = functools.partial(_check_tokens, masks=masks, later=later, name=name)
        return dataset.map(check_tokens, with_indices=True)
    texts = sorted((column for column in sample if column not in BESIDE), reverse=True)  # the completion last
    first = texts[0]
    kinds: tuple[str, ...] = (TEXT, ROLE_CONTENT)
    if first != "prompt":
        kinds = (ROLE_CONTENT, FROM_VALUE) if first in CHATS else (TEXT,)
    kind = kind_of(sample[first])
    expected = kind if kind in kinds else " or ".join(kinds)
    check = functools.partial(_check_texts, texts=texts, expected=expected, name=name)
    strip = functools.partial(_without_blanks_at_end, text=texts[-1], eos_token=eos_token or "")
    scores_completions = completion_only and expected == TEXT and texts[-1] == "completion"
    if isinstance(dataset, IterableDataset):
        arrow_types = dataset.arrow_types
        told: list[str] | None = [] if scores_completions else None
        dataset = dataset.map(functools.partial(check, of="stream", told=told), with_indices=True)
        if expected == TEXT and eos_token is not None:
            dataset = dataset.map(strip)
        dataset.arrow_types = arrow_types
        return dataset
    check(sample, 0, of="data set")  # the others have the same type, if any
    of_any_kind = [column for column, kind in types_of(dataset.data.schema).items() if holds_json(kind)]
    if of_any_kind:
        doubtful: list[Iterable[int]] = [range(len(dataset))]
    else:
        doubtful = [doubtful_rows(dataset, text, expected) for text in texts] + [rows_of_each_kind(dataset)]
        media = expected != TEXT and any(may_hold_media(dataset, text) for text in texts)
        doubtful += [range(len(dataset))] if media else []
    for row in itertools.chain(*doubtful):
        check(dataset[row], row, of="data set")
    if expected == TEXT and of_any_kind:
        as_texts = Features(dataset.features | dict.fromkeys(of_any_kind, Value("string")))
        dataset = dataset.map(dict, features=as_texts)
    if "chat_template_kwargs" in sample and dataset.data.column("chat_template_kwargs").null_count:
        dataset = dataset.map(_with_kwargs)
    if expected != TEXT:
        return dataset
    last = _strings(dataset, texts[-1])
    if scores_completions and len(empty := rows_of(order_of(dataset), true_at(pc.equal(last, "")))):
        logger.warning("%s data set: %d of %d completions %s", name, len(empty), len(dataset), EMPTY)
    if eos_token is not None:
        blanks = pc.match_substring_regex(last, re.escape(eos_token) + r"\s+$")
        if first_of(order_of(dataset), true_at(blanks)) is not None:
            logger.warning("%s data set: blanks after an eos_token at the end of a text are left out", name)
            dataset = dataset.map(strip)
    return dataset


def _strings(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """A column of texts, of a type for which Arrow has the functions that are used here."""
    column = dataset.data.column(name)
    return column if pa.types.is_string(column.type) else column.cast(pa.large_string())


def formatted_rows(dataset: Rows, function: Callable[[dict], str], num_proc: int | None, name: str) -> Rows:
    """Rows with the column `text` alone, made by `formatting_func` from rows without `input_ids`.

    TRL (1.16) keeps the other columns, and then trains on messages, or on the column of `dataset_text_field`, if there
    are any. Raises ValueError, naming the row, for what is not a text.
    """
    columns = list(next(iter(dataset), {}))
    options = {"num_proc": num_proc} if isinstance(dataset, Dataset) else {}
    of = "data set" if isinstance(dataset, Dataset) else "stream"
    format_row = functools.partial(_format, function=function, name=f"{name} {of}")
    with PartialState().main_process_first():  # the others find the result in the cache
        return dataset.map(format_row, with_indices=True, remove_columns=columns, **options)


def _format(row: dict[str, Any], index: int, function: Callable[[dict], str], name: str) -> dict[str, str]:
    text = function(row)
    if not isinstance(text, str) or not is_unicode(text):
        raise ValueError(
            f"row {index} of the {name}: formatting_func gives {short(text)}, expected a text: one per row"
        )
    return {"text": text}


# ---- tokens ----


def label_rows(rows: Dataset, completion_only_loss: bool | None = None) -> Dataset:
    """Columns `input_ids` and `labels` of tokenised rows, labelled by their masks as in TRL, but whole columns at once.

    Existing `labels` do not change. Otherwise a label is -100 where `assistant_masks` is 0, or `completion_mask` if
    `completion_only_loss`. Other columns that `TokenRows` reads stay.

    Raises ValueError, naming the row, if a mask does not have a 0 or 1 for each of the input ids.
    """
    check_no_transform(rows)
    names = set(rows.column_names)
    kept = ["input_ids", *(name for name in ("attention_mask", "position_ids") if name in names)]
    if "labels" in names:
        return rows.select_columns([*kept, "labels"])
    if completion_only_loss is None:  # TRL's default looks only at the text columns
        completion_only_loss = {"prompt", "completion"} <= names
    applies = {"completion_mask": completion_only_loss, "assistant_masks": True}
    masks = [name for name in applies if applies[name] and name in names]
    _check_masks(rows, masks)
    if masks and rows._indices is not None:
        try:
            _check_masks(Dataset(rows.data, fingerprint="table"), masks)
        except ValueError:  # of rows that were not selected
            rows = rows.flatten_indices()
    table = rows.data.table
    labels = []
    for batch in table.select(["input_ids", *masks]).to_batches() if masks else ():  # the same rows of each column
        ids_of_batch = batch.column("input_ids")
        ids = ids_of_batch.flatten().to_numpy(zero_copy_only=False)
        values = ids.astype(np.int32 if ids.max(initial=0) < 2**31 else np.int64)  # a copy; -100 fits
        for name in masks:
            values[batch.column(name).flatten().to_numpy(zero_copy_only=False) == 0] = IGNORE_INDEX
        lengths = pc.list_value_length(ids_of_batch).to_numpy(zero_copy_only=False)
        labels.append(pa.LargeListArray.from_arrays(np.append(0, np.cumsum(lengths, dtype=np.int64)), values))
    column = pa.chunked_array(labels) if masks else table.column("input_ids")
    columns = {name: table.column(name) for name in kept} | {"labels": column}
    # a given fingerprint: computing one would read all data, and nothing here is cached
    labelled = Dataset(pa.table(columns), fingerprint="labelled")
    labelled._indices = rows._indices
    return labelled


def _check_masks(rows: Dataset, masks: Sequence[str]) -> None:
    ids = ListColumn(rows, "input_ids")
    for name in masks:
        ids.check_lengths(name, ListColumn(rows, name, MASK))


def _check_tokens(
    row: dict[str, Any], index: int, masks: Sequence[str], later: Sequence[str], name: str
) -> dict[str, Any]:
    where = f"row {index} of the {name} stream"
    if new := [column for column in later if column in row]:
        raise ValueError(f"{where} has {new[0]}, which the first row has not")
    ids, _ = checked_tokens(row.get("input_ids"), row.get("input_ids"), where)
    for mask in masks:
        check_mask(row.get(mask), len(ids), where, mask)
    return row


# ---- texts and messages ----


def _check_texts(
    row: dict[str, Any],
    index: int,
    texts: Sequence[str],
    expected: str,
    name: str,
    of: str,
    told: list[str] | None = None,
) -> dict[str, Any]:
    """`told`: filled with the first notice of an empty completion; None for no such notice."""
    where = f"row {index} of the {name} {of}"
    for of_tokens in OF_TOKENS:
        if of_tokens in row:
            raise ValueError(f"{where} has {of_tokens}, which the first row has not")
    for text in texts:
        if kind_of(row.get(text)) != expected:
            raise ValueError(f"{where}: {text} is {short(row.get(text))}, expected {expected}")
    if expected != TEXT:
        check_beside(row, where)
        for text in texts:
            check_media(row[text], f"{where}: {text}")
    if told == [] and not row[texts[-1]]:
        told.append(EMPTY)
        logger.warning("%s stream: some completions %s", name, EMPTY)
    if expected == FROM_VALUE:  # TRL renames the keys in place
        row = row | {text: [dict(message) for message in row[text]] for text in texts}
    return _with_kwargs(row) if "chat_template_kwargs" in row else row


def _without_blanks_at_end(row: dict[str, Any], text: str, eos_token: str) -> dict[str, Any]:
    """TRL would add a second `eos_token` behind them."""
    stripped = row[text].rstrip()
    return row | {text: stripped} if stripped.endswith(eos_token) else row


def _with_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"chat_template_kwargs": row["chat_template_kwargs"] or {}}
