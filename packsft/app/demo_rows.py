"""The rows of the demo, and the tokens of an example and of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_convert_to_chatml

from packsft.app.rows import load_rows
from packsft.data.raw import checked_rows

Row = dict[str, Any]
SHOWN_COLUMNS = ("text", "prompt", "completion", "messages")


def demo_rows(data: str) -> Dataset:
    """Texts or messages: `text`, `prompt` and `completion`, or `messages`. Without other columns.

    Args:
        data: see `load_rows`.

    Raises:
        ValueError, OSError: as `load_rows`, or a row has neither. The message names it.
    """
    rows = checked_rows(load_rows(data), text_field="text", completion_only=False, eos_token=None, name=data)
    if "input_ids" in rows.column_names:
        raise ValueError(f"{data} holds tokens, but the demo shows texts: it needs a text or messages in each row")
    rows = rows.map(maybe_convert_to_chatml)
    return rows.select_columns([name for name in SHOWN_COLUMNS if name in rows.column_names])


def of_texts(row: Row) -> bool:
    """Whether it holds texts, and not messages."""
    return all(isinstance(value, str) for value in row.values())


def token_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The whole example as TRL tokenises it: with the chat template, or as text followed by EOS."""
    if "text" in row:
        return tokenizer(row["text"] + tokenizer.eos_token)["input_ids"]
    if "messages" in row:
        return _chat_ids(row["messages"], tokenizer)
    if of_texts(row):
        return tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
    return _chat_ids(row["prompt"] + row["completion"], tokenizer)


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt for generation: the prompt, the turns before the last, or the first half of a plain text."""
    if "text" in row:
        ids = tokenizer(row["text"])["input_ids"]
        return ids[: (len(ids) + 1) // 2]
    if "messages" in row:
        return _chat_ids(row["messages"][:-1] or row["messages"], tokenizer, add_generation_prompt=True)
    if of_texts(row):
        return tokenizer(row["prompt"])["input_ids"]
    return _chat_ids(row["prompt"], tokenizer, add_generation_prompt=True)


def _chat_ids(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return encoded["input_ids"]


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
