"""Messages, and what goes with them: what can be read there, and what a chat template sees of it.

TRL hands rows to the template as Arrow gives them, with a null for every key that a row does not have.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from packsft.data.columns import first_of, is_list, order_of, rows_of, true_at
from packsft.data.document import short

logger = logging.getLogger("packsft")

TEXT = "a text"
MESSAGES = "a list of messages, each with a {} and {}"
ROLE_CONTENT, FROM_VALUE = MESSAGES.format("role", "content"), MESSAGES.format("from", "value")
KEYS = {ROLE_CONTENT: ("role", "content"), FROM_VALUE: ("from", "value")}
RENAMED = dict(zip(KEYS[ROLE_CONTENT], KEYS[FROM_VALUE], strict=True))
SAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # instead of a content
OF_TEMPLATE = ("tokenize", "return_dict", "conversation", "return_assistant_tokens_mask", "add_generation_prompt")
MEDIA = ("image", "image_url", "video", "audio")  # types of parts of a content
CHATS, BESIDE = ("messages", "conversations"), ("tools", "chat_template_kwargs")


def kind_of(value: Any) -> str | None:
    """What the value of a column is; None for what TRL cannot read there."""
    if isinstance(value, str):
        return TEXT if is_unicode(value) else None
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
        return any(without_nulls(message.get(key)) not in (None, "", [], {}) for key in SAID)
    return is_unicode(said) if isinstance(said, str) else isinstance(said, (list, dict))


def is_unicode(text: str) -> bool:
    """Whether it can be encoded: half of a surrogate pair cannot, and a stream may hold one."""
    return text.isascii() or bool(text.encode(errors="ignore").decode() == text)


def doubtful_rows(dataset: Dataset, name: str, expected: str) -> Iterable[int]:
    """Rows, in order, that may be without a text, or without a message where messages are expected."""
    column = dataset.data.column(name)
    if expected != TEXT and not _is_list_of_structs(column.type):
        return range(len(dataset))  # of a type that Arrow does not know
    first, doubtful = 0, [np.zeros(0, np.int64)]
    for chunk in column.chunks:
        doubtful.append(first + true_at(chunk.is_null()))
        if expected != TEXT:
            doubtful.append(first + true_at(pc.equal(pc.list_value_length(chunk), 0)))
            of_row = pc.list_parent_indices(chunk).to_numpy()
            doubtful.append(first + of_row[true_at(_may_say_nothing(chunk.flatten(), *KEYS[expected]))])
        first += len(chunk)
    return rows_of(order_of(dataset), np.unique(np.concatenate(doubtful))).tolist()


def _may_say_nothing(messages: pa.StructArray, role: str, content: str) -> pa.BooleanArray:
    """Which messages `_is_message` may refuse: without a role, or without a content and without tool calls."""
    fields = {field.name: pc.struct_field(messages, field.name) for field in messages.type}
    said = fields[content] if content in fields else pa.nulls(len(messages))
    nothing_said = pc.invert(said.is_null()) if pa.types.is_primitive(said.type) else said.is_null()  # a number, a date
    calls = fields.get("tool_calls")
    if calls is not None and is_list(calls.type):
        nothing_said = pc.and_(nothing_said, pc.equal(pc.fill_null(pc.list_value_length(calls), 0), 0))
    return functools.reduce(pc.or_, [messages.is_null(), fields[role].is_null(), nothing_said])


def _is_list_of_structs(kind: pa.DataType) -> bool:
    return is_list(kind) and pa.types.is_struct(kind.value_type)


def check_beside(row: Mapping[str, Any], where: str) -> None:
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: tools is {short(tools)}, which is no JSON: {error}") from None
    if not isinstance(tools, list | None):
        raise ValueError(f"{where}: tools is {short(tools)}, expected a list of tools")
    if not isinstance(kwargs, dict | None):
        raise ValueError(f"{where}: chat_template_kwargs is {short(kwargs)}, expected a dict")
    if fixed := [key for key in OF_TEMPLATE if (kwargs or {}).get(key) is not None]:
        raise ValueError(f"{where}: chat_template_kwargs has {fixed[0]!r}, which the trainer sets itself")


def check_media(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raises ValueError for a picture, a video or a sound within a message: TRL (1.16) trains without them."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if isinstance(part, Mapping) and part.get("type") in MEDIA:
                raise ValueError(
                    f"{where} holds {short(part)}, which would not be read: give pictures in a column images; "
                    "videos and sounds cannot be trained on"
                )


def may_hold_media(dataset: Dataset, column: str) -> bool:
    """Whether a message of any row has such a part."""
    messages = dataset.data.column(column)
    for key in ("content", "type"):
        if not _is_list_of_structs(messages.type) or messages.type.value_type.get_field_index(key) < 0:
            return False
        messages = pc.struct_field(pc.list_flatten(messages), key)
    is_text = pa.types.is_string(messages.type) or pa.types.is_large_string(messages.type)
    return is_text and pc.any(pc.is_in(messages, pa.array(MEDIA, messages.type))).as_py() is True


def rows_of_each_kind(rows: Dataset) -> list[int]:
    """Rows that show whether `tools` and `chat_template_kwargs` can be read: the first with a value, or one for each
    text of `tools`, and for each key of the arguments."""
    found = []
    for name in set(rows.column_names) & set(BESIDE):
        column, order = rows.data.column(name), order_of(rows)
        parts = [column]
        if pa.types.is_struct(column.type):
            parts += [pc.struct_field(column, field.name) for field in column.type if field.name in OF_TEMPLATE]
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            kinds = column.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()
            found += np.unique(kinds if order is None else kinds[order], return_index=True)[1].tolist()
        found += [first_of(order, true_at(part.is_valid())) for part in parts]
    return sorted({row for row in found if row is not None})


# ---- the template ----


def tokenizer_without_nulls(tokenizer: Any, rows: Dataset | IterableDataset, name: str) -> Any:
    """A copy whose chat template sees no key that is None, in messages, tools and its own arguments.

    A data set of Arrow has all keys of all rows in each: None where a row had no such key. A template renders such a
    None, or takes it for a value. The content of a message with tool calls stays: there, None is what others write.
    What comes as JSON (text, or a column of `datasets.Json`) or from a stream of Python objects stays as it is.

    Args:
        rows: of `checked_rows`.
        name: names the data set in messages.
    """
    own = copy.copy(tokenizer)
    types = types_of(rows.data.schema) if isinstance(rows, Dataset) else getattr(rows, "arrow_types", {})
    own.apply_chat_template = functools.partial(_apply_template, tokenizer, name, types, _has_json_tools(rows))
    return own


def types_of(schema: pa.Schema) -> dict[str, pa.DataType]:
    return dict(zip(schema.names, schema.types, strict=True))


def holds_json(kind: pa.DataType) -> bool:
    """Whether values of this type, or parts of them, are JSON (`datasets.Json`), which may be anything."""
    if is_list(kind):
        return holds_json(kind.value_type)
    return _is_json(kind) or (pa.types.is_struct(kind) and any(holds_json(field.type) for field in kind))


def _is_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json"


def _has_json_tools(rows: Dataset | IterableDataset) -> bool:
    sample: dict[str, Any] = next(iter(rows), {})
    return isinstance(sample.get("tools"), str)


def _apply_template(
    tokenizer: Any,
    name: str,
    types: Mapping[str, pa.DataType] | None,
    json_tools: bool,
    messages: list[dict[str, Any]],
    **options: Any,
) -> Any:
    """`types`: of the columns; None if the rows are Python objects."""
    if tokenizer.chat_template is None and options.get("chat_template") is None:
        raise ValueError(f"the rows of the {name} data set hold messages, but the tokenizer has no chat template")
    if types is not None:
        tools = options.pop("tools", None)
        options = without_nulls(options, *_types_in(types, "chat_template_kwargs"))
        if tools is not None:
            options["tools"] = tools if json_tools else without_nulls(tools, *_types_in(types, "tools"))
        of_lists = _types_in(types, "prompt", "completion", *CHATS)
        messages = [
            kept | ({"content": None} if message.get("tool_calls") and message.get("content", "") is None else {})
            for message, kept in zip(messages, without_nulls(messages, *of_lists), strict=True)
        ]
    try:
        rendered = tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template may raise anything
        raise ValueError(
            f"the chat template fails on a row of the {name} data set, {short(messages)}: {error}"
        ) from error
    if options.get("return_assistant_tokens_mask") and 1 not in rendered["assistant_masks"]:
        raise ValueError(
            f"assistant_only_loss=True: a row of the {name} data set has no token of an assistant, {short(messages)}. "
            "Leave it out, or, if all rows are so, mark the assistant in the chat template with {% generation %}"
        )
    return rendered


def _types_in(types: Mapping[str, pa.DataType], *columns: str) -> list[pa.DataType]:
    return [types[column] for column in columns if column in types]


def without_nulls(value: Any, *types: pa.DataType) -> Any:
    """The same value without the keys, at any depth, that are None; but JSON, if it is not None itself, as it is.

    Args:
        types: what Arrow may hold the value as: of each column that it may come from.
    """
    if types and all(map(_is_json, types)):
        return value
    if isinstance(value, Mapping):
        return {key: without_nulls(inner, *_inner(types, key)) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner, *_inner(types, None)) for inner in value] if isinstance(value, list) else value


def _inner(types: Sequence[pa.DataType], key: str | None) -> list[pa.DataType]:
    """The types of a key, or with None those of an item of a list."""
    if key is None:
        return [kind.value_type for kind in types if is_list(kind)]
    structs = [kind for kind in types if pa.types.is_struct(kind)]
    names = (key, RENAMED.get(key, key))  # TRL has renamed it
    return [kind.field(name).type for kind in structs for name in set(names) if kind.get_field_index(name) >= 0]


def warn_of_unseen_roles(
    rows: Dataset | IterableDataset, tokenizer: Any, name: str, chat_template: str | None = None
) -> None:
    """Says so if the chat template leaves out the messages of a role.

    Tried on the first row that has the role, and on the first row of a stream. Not of assistants, whose earlier
    thoughts a template may leave out, nor of tools. `rows` are of `raw.checked_rows`.
    """
    sample: dict[str, Any] = next(iter(rows), {})
    for column in set(sample) & {"prompt", *CHATS}:
        keys = KEYS.get(kind_of(sample[column]) or "")
        if keys is None:
            continue
        tried = [0]
        if isinstance(rows, Dataset) and _is_list_of_structs(rows.data.column(column).type):
            tried = _first_rows_of_roles(rows, column, keys[0])
        for number in tried:
            row = rows[number] if isinstance(rows, Dataset) else sample
            messages = [{"role": m[keys[0]], "content": m.get(keys[1])} | m for m in row[column]]
            tools = row.get("tools")
            options = {"chat_template": chat_template, "tools": json.loads(tools) if isinstance(tools, str) else tools}
            options |= {"tokenize": False, "add_generation_prompt": column == "prompt"}
            options |= row.get("chat_template_kwargs") or {}
            try:
                text = tokenizer_without_nulls(tokenizer, rows, name).apply_chat_template(messages, **options)
            except ValueError:  # the template fails: TRL will, where it needs it
                return
            for message in messages:
                said, role = message["content"], message["role"]
                texts = (
                    [part.get("text") for part in said if isinstance(part, Mapping)]
                    if isinstance(said, list)
                    else [said]
                )
                unseen = any(isinstance(one, str) and one.strip() not in text for one in texts)
                if role not in ("assistant", "tool") and unseen:
                    logger.warning(
                        "%s data set: the chat template leaves out what the role %r says, as in row %d: %s",
                        name, role, number, short(said),
                    )  # fmt: skip
                    return


def _first_rows_of_roles(rows: Dataset, column: str, key: str) -> list[int]:
    table_rows: dict[str, list[np.ndarray]] = {}
    first = 0
    for chunk in rows.data.column(column).chunks:
        roles, of_row = pc.struct_field(chunk.flatten(), key), pc.list_parent_indices(chunk).to_numpy()
        for role in pc.unique(roles):
            table_rows.setdefault(role.as_py(), []).append(first + np.unique(of_row[true_at(pc.equal(roles, role))]))
        first += len(chunk)
    found = {first_of(order_of(rows), np.concatenate(of_role)) for of_role in table_rows.values()}
    return sorted(row for row in found if row is not None)
