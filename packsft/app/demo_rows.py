"""The rows of the demo: a JSONL file in one of TRL's forms, and the tokens of an example and of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from packsft.app.json_lines import check_json, parse_json

Row = dict[str, Any]


def is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_message, value))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and is_text(value.get("role")) and is_text(value.get("content"))


TYPE_NAMES = {is_text: "a text", _is_chat: "a list of messages with `role` and `content`"}
FORMS = {("prompt", "completion"): (is_text, _is_chat), ("messages",): (_is_chat,), ("text",): (is_text,)}


def read_jsonl(path: Path) -> Dataset:
    """A JSONL file in one of TRL's forms: `text`, `prompt` + `completion` (texts or messages), or `messages`.

    Skips blank lines and drops other columns.

    Raises:
        ValueError: a line is not a JSON object, has no known form or another form than the first line, or has a column
            of the wrong type. The message names the line.
        OSError: the file cannot be read.
    """
    rows: list[Row] = []
    check_json(path)
    text = path.read_text(encoding="utf-8-sig")  # without a byte order mark
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_json(line, path, number)
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON {type(row).__name__}, expected an object")
        form = next((form for form in FORMS if row.keys() >= set(form)), None)
        if form is None:
            raise ValueError(
                f"{where}: columns {sorted(row)}, expected `text`, or `prompt` and `completion`, or `messages`"
            )
        row = {column: row[column] for column in form}
        first = rows[0] if rows else row
        if first.keys() != row.keys():
            raise ValueError(f"{where}: columns {sorted(row)}, but the first example has {sorted(first)}")
        for column in form:
            if not any(is_type(row[column]) for is_type in FORMS[form]):
                allowed = " or ".join(TYPE_NAMES[is_type] for is_type in FORMS[form])
                raise ValueError(f"{where}: `{column}` is not {allowed}")
        if len({type(value) for value in [*first.values(), *row.values()]}) > 1:
            raise ValueError(f"{where}: texts and lists of messages cannot be mixed in one file")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no examples")
    return Dataset.from_list(rows)


def token_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The whole example as TRL tokenises it: with the chat template, or as text followed by EOS."""
    if "text" in row:
        return tokenizer(row["text"] + tokenizer.eos_token)["input_ids"]
    if "messages" in row:
        return _chat_ids(row["messages"], tokenizer)
    if is_text(row["prompt"]):
        return tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
    return _chat_ids(row["prompt"] + row["completion"], tokenizer)


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt for generation: the prompt, the turns before the last, or the first half of a plain text."""
    if "text" in row:
        ids = tokenizer(row["text"])["input_ids"]
        return ids[: (len(ids) + 1) // 2]
    if "messages" in row:
        return _chat_ids(row["messages"][:-1] or row["messages"], tokenizer, add_generation_prompt=True)
    if is_text(row["prompt"]):
        return tokenizer(row["prompt"])["input_ids"]
    return _chat_ids(row["prompt"], tokenizer, add_generation_prompt=True)


def _chat_ids(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return encoded["input_ids"]


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
