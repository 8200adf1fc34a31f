"""Rows as the user gives them, checked and brought into one of TRL's forms before TRL tokenises and labels them.

TRL stops at a bad row without naming it, or goes on: it cuts a mask that is too long, reads a null in a mask as 0, and
renders a null in a message. Knows which columns TRL reads, not what it makes of them.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from packsft.data.columns import MASK, ListColumn, check_no_transform, first_of, is_list, order_of, rows_of, where
from packsft.data.document import IGNORE_INDEX, check_mask, checked_tokens, short

logger = logging.getLogger("packsft")

TEXT = "a text"
MESSAGES = "a list of messages, each with a {} and {}"
ROLE_CONTENT, FROM_VALUE = MESSAGES.format("role", "content"), MESSAGES.format("from", "value")
KEYS = {ROLE_CONTENT: ("role", "content"), FROM_VALUE: ("from", "value")}
FORMS = "expected input_ids, prompt and completion, messages, or the texts {!r} (dataset_text_field)"
CHATS, BESIDE = ("messages", "conversations"), ("tools", "chat_template_kwargs")
EMPTY = "are empty: there, at most the EOS token is scored"
OF_TOKENS = ("labels", "attention_mask", "position_ids", "completion_mask", "assistant_masks")
Rows = TypeVar("Rows", Dataset, IterableDataset)


def one_form(dataset: Rows, text_field: str, name: str) -> Rows:
    """The rows with the columns of one form, and those that go with it.

    If rows have several forms, the first of these is trained on, and a notice says so: `input_ids`; `prompt` and
    `completion`; `messages`; `conversations`; a text.

    Raises ValueError if the rows have none, or have columns that go with `input_ids` and no `input_ids`.
    """
    if isinstance(dataset, Dataset):
        if dataset.format["type"] == "custom":
            return dataset
        dataset = dataset.select_columns(dataset.format["columns"])
    sample: dict[str, Any] = next(iter(dataset.with_format(None)), {})
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
        raise ValueError(f"the {name} data set has only the columns {', '.join(sample)}: {FORMS.format(text_field)}")
    chosen: tuple[str, ...] = readable[0]
    if left := [column for other in readable[1:] for column in other]:
        logger.warning("%s data set: %s is trained on; %s is not read", name, " and ".join(chosen), " and ".join(left))
    named = {column: column for column in chosen}
    if chosen[0] in CHATS:  # TRL reads the keys by the name of the column
        named[chosen[0]] = "conversations" if _kind(sample[chosen[0]]) == FROM_VALUE else "messages"
    if isinstance(dataset, IterableDataset):  # rows may have other columns than the first
        columns = {"prompt", "completion", *CHATS, text_field, *sample} - {*BESIDE, *OF_TOKENS}
        return dataset.map(functools.partial(_renamed, names=named), remove_columns=sorted(columns))
    rows = dataset.select_columns([*chosen, *(column for column in BESIDE if column in sample)])
    return rows.rename_columns({old: new for old, new in named.items() if old != new})


def _renamed(row: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {new: row.get(old) for old, new in names.items()}


def in_one_form(datasets: Any, text_field: str, name: str) -> Any:
    """`one_form` of a data set, or of each in a dictionary; anything else as it is."""
    if isinstance(datasets, dict):
        return {key: in_one_form(rows, text_field, key) for key, rows in datasets.items()}
    of_datasets = isinstance(datasets, (Dataset, IterableDataset))
    return one_form(datasets, text_field, name) if of_datasets else datasets


def once_of(rows: Rows, tokenizer: Any) -> tuple[int | None, int | None]:
    """The tokens with which a row of `checked_rows` begins and ends at most once: what tokenizers add to texts."""
    sample: dict[str, Any] = next(iter(rows), {})
    texts = "input_ids" not in sample and any(isinstance(sample[name], str) for name in sample if name not in BESIDE)
    return (tokenizer.bos_token_id, tokenizer.eos_token_id) if texts else (None, None)


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
    dataset = one_form(dataset, text_field, name).with_format(None)
    sample: dict[str, Any] = next(iter(dataset), {})
    if not sample:
        return dataset
    if "input_ids" in sample:
        if isinstance(dataset, Dataset):
            return label_rows(dataset, completion_only)
        if "labels" in sample:
            return dataset
        masks = [*(["completion_mask"] if completion_only else []), "assistant_masks"]
        masks = [mask for mask in masks if mask in sample]
        return dataset.map(functools.partial(_check_tokens, masks=masks, name=name), with_indices=True)
    texts = sorted((column for column in sample if column not in BESIDE), reverse=True)  # the completion last
    first = texts[0]
    kinds: tuple[str, ...] = (TEXT, ROLE_CONTENT)
    if first != "prompt":
        kinds = (ROLE_CONTENT, FROM_VALUE) if first in CHATS else (TEXT,)
    kind = _kind(sample[first])
    expected = kind if kind in kinds else " or ".join(kinds)
    check = functools.partial(_check_texts, texts=texts, expected=expected, name=name)
    strip = functools.partial(_without_blanks_at_end, text=texts[-1], eos_token=eos_token or "")
    if isinstance(dataset, IterableDataset):
        scores_completions = completion_only and texts[-1] == "completion"
        dataset = dataset.map(functools.partial(check, kind="stream", says_empty=scores_completions), with_indices=True)
        return dataset.map(strip) if expected == TEXT and eos_token is not None else dataset
    check(sample, 0, kind="data set")  # the others have the same type, if any
    for text in texts:
        if (row := _first_unfit(dataset, text, expected)) is not None:
            check(dataset[row], row, kind="data set")
    if "chat_template_kwargs" in sample and dataset.data.column("chat_template_kwargs").null_count:
        dataset = dataset.map(_with_kwargs)
    if expected == TEXT and texts[-1] == "completion" and completion_only:
        empty = rows_of(order_of(dataset), where(pc.equal(dataset.data.column("completion"), "")))
        if len(empty):
            logger.warning("%s data set: %d of %d completions %s", name, len(empty), len(dataset), EMPTY)
    if expected == TEXT and eos_token is not None:
        blanks = pc.match_substring_regex(dataset.data.column(texts[-1]), re.escape(eos_token) + r"\s+$")
        if first_of(order_of(dataset), where(blanks)) is not None:
            logger.warning("%s data set: blanks after an eos_token at the end of a text are left out", name)
            dataset = dataset.map(strip)
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


def _check_tokens(row: dict[str, Any], index: int, masks: Sequence[str], name: str) -> dict[str, Any]:
    where = f"row {index} of the {name} stream"
    ids, _ = checked_tokens(row.get("input_ids"), row.get("input_ids"), where)
    for mask in masks:
        check_mask(row.get(mask), len(ids), where, mask)
    return row


# ---- texts and messages ----


def tokenizer_without_nulls(tokenizer: Any) -> Any:
    """A copy whose chat template sees no key that is None, in messages, tools and its own arguments.

    A data set of Arrow has all keys of all rows in each: None where a row had no such key. A template renders such a
    None, or takes it for a value. The content of a message with tool calls stays: there, None is what others write.
    """
    own = copy.copy(tokenizer)
    own.apply_chat_template = functools.partial(_apply_without_nulls, tokenizer)
    return own


def _apply_without_nulls(tokenizer: Any, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    messages = []
    for message in conversation:
        messages.append(without_nulls(message))
        if message.get("tool_calls") and message.get("content", "") is None:
            messages[-1]["content"] = None
    if tokenizer.chat_template is None and options.get("chat_template") is None:
        raise ValueError("the rows hold messages, but the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, **without_nulls(options))
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the chat template fails on {short(messages)}: {error}") from error


def warn_of_unseen_roles(rows: Dataset, tokenizer: Any, name: str) -> None:
    """Says so if the chat template leaves out the messages of a role: tried on the first row that has it.

    Not of assistants, whose earlier thoughts a template may leave out, nor of tools. `rows` are of `checked_rows`.
    """
    sample = rows[0]
    for column in set(sample) & {"prompt", *CHATS}:
        keys = KEYS.get(_kind(sample[column]) or "")
        if keys is None or not _is_list_of_structs(rows.data.column(column).type):
            continue
        for row in _first_rows_of_roles(rows, column, keys[0]):
            messages = [{"role": m[keys[0]], "content": m.get(keys[1])} | m for m in rows[row][column]]
            tools = rows[row].get("tools")
            tools = json.loads(tools) if isinstance(tools, str) else tools
            options = {"tools": tools, "tokenize": False, "add_generation_prompt": column == "prompt"}
            text = _apply_without_nulls(tokenizer, messages, **options)
            for message in messages:
                said, role = message["content"], message["role"]
                if role not in ("assistant", "tool") and isinstance(said, str) and said.strip() not in text:
                    logger.warning(
                        "%s data set: the chat template leaves out what the role %r says, as in row %d: %s",
                        name, role, row, short(said),
                    )  # fmt: skip
                    return


def _first_rows_of_roles(rows: Dataset, column: str, key: str) -> list[int]:
    table_rows: dict[str, list[np.ndarray]] = {}
    first = 0
    for chunk in rows.data.column(column).chunks:
        roles, of_row = pc.struct_field(chunk.flatten(), key), pc.list_parent_indices(chunk).to_numpy()
        for role in pc.unique(roles):
            table_rows.setdefault(role.as_py(), []).append(first + np.unique(of_row[where(pc.equal(roles, role))]))
        first += len(chunk)
    found = {first_of(order_of(rows), np.concatenate(of_role)) for of_role in table_rows.values()}
    return sorted(row for row in found if row is not None)


def _is_list_of_structs(kind: pa.DataType) -> bool:
    return is_list(kind) and pa.types.is_struct(kind.value_type)


def without_nulls(value: Any) -> Any:
    """The same value without the keys, at any depth, that are None."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _kind(value: Any) -> str | None:
    """What the value of a column is; None for what TRL cannot read there."""
    if isinstance(value, str):
        return TEXT if _is_unicode(value) else None
    for kind, keys in KEYS.items():
        if isinstance(value, list) and value and all(_is_message(message, *keys) for message in value):
            return kind
    return None


def _is_message(message: Any, role: str, content: str) -> bool:
    """Whether it has a role, and a content or something else to say, such as tool calls."""
    if not isinstance(message, dict) or not isinstance(message.get(role), str):
        return False
    said = message.get(content)
    if said is None:
        others = (value for key, value in message.items() if key not in (role, content, "name"))
        return any(value not in (None, []) for value in others)
    return _is_unicode(said) if isinstance(said, str) else isinstance(said, (list, dict))


def _is_unicode(text: str) -> bool:
    """Whether it can be encoded: half of a surrogate pair cannot, and a stream may hold one."""
    return text.isascii() or bool(text.encode(errors="ignore").decode() == text)


def _check_texts(
    row: dict[str, Any],
    index: int,
    texts: Sequence[str],
    expected: str,
    name: str,
    kind: str,
    says_empty: bool = False,
) -> dict[str, Any]:
    for of_tokens in OF_TOKENS:
        if of_tokens in row:
            raise ValueError(f"row {index} of the {name} {kind} has {of_tokens}, which the first row has not")
    for text in texts:
        if _kind(row.get(text)) != expected:
            raise ValueError(f"row {index} of the {name} {kind}: {text} is {short(row.get(text))}, expected {expected}")
    if says_empty and not row[texts[-1]]:
        _say_empty(name)
    if expected == FROM_VALUE:  # TRL renames the keys in place
        row = row | {text: [dict(message) for message in row[text]] for text in texts}
    return _with_kwargs(row) if "chat_template_kwargs" in row else row


@functools.cache
def _say_empty(name: str) -> None:
    """Once in a process: how many there are, a stream knows only at its end."""
    logger.warning("%s stream: some completions %s", name, EMPTY)


def _without_blanks_at_end(row: dict[str, Any], text: str, eos_token: str) -> dict[str, Any]:
    """TRL would add a second `eos_token` behind them."""
    stripped = row[text].rstrip()
    return row | {text: stripped} if stripped.endswith(eos_token) else row


def _with_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"chat_template_kwargs": row["chat_template_kwargs"] or {}}


def _first_unfit(dataset: Dataset, name: str, expected: str) -> int | None:
    """The first row without a text, or whose list of messages is empty or has one that is none."""
    column = dataset.data.column(name)
    if expected != TEXT and not _is_list_of_structs(column.type):
        values = (row[name] for row in dataset.select_columns([name]))  # of a type that Arrow does not know
        return next((row for row, value in enumerate(values) if _kind(value) != expected), None)
    first, unfit = 0, [np.zeros(0, np.int64)]
    for chunk in column.chunks:
        unfit.append(first + where(chunk.is_null()))
        if expected != TEXT:
            unfit.append(first + where(pc.equal(pc.list_value_length(chunk), 0)))
            of_row = pc.list_parent_indices(chunk).to_numpy()
            unfit.append(first + of_row[where(_no_message(chunk.flatten(), *KEYS[expected]))])
        first += len(chunk)
    return first_of(order_of(dataset), np.unique(np.concatenate(unfit)))


def _no_message(messages: pa.StructArray, role: str, content: str) -> pa.BooleanArray:
    """Which messages have no role, or nothing to say, as in `_is_message`."""
    fields = {field.name: pc.struct_field(messages, field.name) for field in messages.type}
    silent = [
        pc.equal(pc.fill_null(pc.list_value_length(values), 0), 0) if is_list(values.type) else values.is_null()
        for name, values in fields.items()
        if name not in (role, content, "name")
    ]
    said = fields[content] if content in fields else pa.nulls(len(messages))
    if pa.types.is_primitive(said.type):  # numbers, dates
        nothing_said = pc.invert(said.is_null())
    else:
        nothing_said = functools.reduce(pc.and_, silent, said.is_null())
    return functools.reduce(pc.or_, [messages.is_null(), fields[role].is_null(), nothing_said])
