"""Columns of mixed types, which `datasets` keeps as JSON: a value may be anything, and is what was written.

Rows are read from a JSON Lines file, as data sets and as streams.
"""

import json

import datasets
import pytest
from datasets import Dataset, load_dataset
from documents import ids_of
from forms import character_tokenizer
from runs import trainer
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this release of datasets has no Json columns")
QUESTION, ANSWER = {"role": "user", "content": "why"}, {"role": "assistant", "content": "no"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "why two"}]}
MIXED = [{"messages": [QUESTION, ANSWER]}, {"messages": [PARTS, ANSWER]}]


def built(tmp_path, rows, streaming=False, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"), streaming=streaming
    )
    tokenizer = character_tokenizer()
    options = {"model": tiny_model(vocab_size=len(tokenizer)), "max_length": 400, "max_steps": 1} | options
    ours = trainer(tmp_path, train_dataset=loaded, processing_class=tokenizer, **options)
    return ids_of(ours.train_dataset)


def calling(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "no", "tool_calls": [call]}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_nulls_of_json_are_what_was_written(streaming, tmp_path):
    tools = [{"name": "g", "parameters": {"x": {"enum": ["a", 1, None], "default": None}}}]
    rows = [
        {"messages": [QUESTION, calling({"a": None})], "tools": tools},
        {"messages": [QUESTION, calling({"b": 1})], "tools": [{"name": "g", "parameters": {"x": {"enum": ["a"]}}}]},
    ]
    tokenizer = character_tokenizer()
    expected = [
        tokenizer.apply_chat_template(row["messages"], tools=row["tools"], return_dict=True)["input_ids"]
        for row in rows
    ]
    assert sorted(built(tmp_path, rows, streaming)) == sorted(expected)


def test_contents_of_several_types_are_trained_on(tmp_path):
    expected = [character_tokenizer().apply_chat_template(row["messages"], return_dict=True) for row in MIXED]
    assert sorted(built(tmp_path, MIXED)) == sorted(one["input_ids"] for one in expected)


CHAT = {"messages": [QUESTION, ANSWER]}
WRONG = {
    "a number for a content": ([*MIXED, {"messages": [QUESTION | {"content": 3}, ANSWER]}], "messages is "),
    "a picture in a content": (
        [*MIXED, {"messages": [PARTS | {"content": [{"type": "image", "image": "f.png"}]}, ANSWER]}],
        "messages holds .* which would not be read",
    ),
    "a text for messages": ([CHAT, CHAT, {"messages": "hello"}], "messages is 'hello'"),
    "a number for a text": ([{"text": "a"}, {"text": "b"}, {"text": 3}], "text is 3, expected a text"),
    "a number for a completion": (
        [{"prompt": "a", "completion": "b"}] * 2 + [{"prompt": "a", "completion": 3}],
        "completion is 3, expected a text",
    ),
    "a number for tools": ([CHAT, CHAT | {"tools": [{"name": "f"}]}, CHAT | {"tools": 3}], "tools is 3"),
    "a text for arguments": (
        [CHAT | {"chat_template_kwargs": {"a": 1}}] * 2 + [CHAT | {"chat_template_kwargs": "x"}],
        "chat_template_kwargs is 'x', expected a dict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_named_by_its_row(case, tmp_path):
    rows, message = WRONG[case]
    with pytest.raises(ValueError, match=f"row 2 of the train data set: {message}"):
        built(tmp_path, rows)


def test_texts_in_a_json_column_are_texts(tmp_path):
    rows = [{"text": "why no <eos>  "}, {"text": "two"}]
    mixed = Dataset.from_list([*rows, {"text": 3}], on_mixed_types="use_json").select([0, 1])
    plain = Dataset.from_list(rows)
    found, expected = (ids_of(trainer(tmp_path, train_dataset=rows).train_dataset) for rows in (mixed, plain))
    assert found == expected
