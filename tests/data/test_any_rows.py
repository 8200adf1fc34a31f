"""Rows of arbitrary columns and types: trained on, or one error that names the row or the column."""

import tempfile
import traceback
from pathlib import Path

import pyarrow as pa
import pytest
import trl
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from runs import trainer
from tiny import tiny_model, tiny_tokenizer

import packsft
from packsft.app.inspect import inspect_data

OWN = (Path(packsft.__file__).parent, Path(trl.trainer.__file__).parent)
OF_TOKENS = ("labels", "attention_mask", "position_ids", "completion_mask", "assistant_masks", "seq_lengths")
BESIDE = ("tools", "chat_template_kwargs", "text", "messages", *OF_TOKENS)
WORDS = st.sampled_from(["why", "no <eos>", "", " ", "tell me a joke", "\ud83d"])
IDS = st.lists(st.integers(0, 23) | st.sampled_from(range(24)) | st.just(24), max_size=4)


def chats(role, content):
    said = st.one_of([WORDS] * 9 + [st.none()])
    message = st.fixed_dictionaries(
        {role: st.sampled_from(["user", "assistant", "user", "assistant", "other", None]), content: said},
        optional={"name": st.just("me"), "tool_calls": st.sampled_from([[], [{"function": {"name": "f"}}]])},
    )
    return st.lists(message, min_size=1, max_size=3)


CELLS = {
    "text": WORDS, "number": st.integers() | st.floats(), "class": st.integers(0, 2), "bool": st.booleans(),
    "ids": IDS, "mask": st.lists(st.sampled_from([0, 1, 1, 1]), max_size=4), "null": st.none(),
    "floats": st.lists(st.floats(), max_size=4), "texts": st.lists(WORDS, max_size=2),
    "nested": st.lists(IDS, max_size=2), "bytes": st.binary(max_size=3),
    "holes": st.lists(st.integers(0, 1) | st.none()),
    "chat": chats("role", "content"), "from and value": chats("from", "value"), "other chat": chats("who", "what"),
    "dict": st.dictionaries(st.sampled_from("ab"), st.integers(0, 3) | WORDS, max_size=2),
}  # fmt: skip
LIKELY = {
    "text": ["text"],
    "prompt": ["text", "chat"],
    "completion": ["text", "chat"],
    "messages": ["chat", "from and value"],
    "conversations": ["from and value", "chat"],
    "tools": ["dict", "null"],
    "chat_template_kwargs": ["dict"],
}
FORMS = st.sampled_from([["text"], ["prompt", "completion"], ["messages"], ["conversations"], ["input_ids"], []])


@st.composite
def rows(draw):
    """One to four rows of the same columns; each column mostly holds what its name says, and now and then a null."""
    names = [*draw(FORMS), *draw(st.sampled_from([[]] * 9 + [[name] for name in BESIDE]))] or ["text"]
    columns = {}
    count = draw(st.integers(1, 4))
    odd = draw(st.sampled_from([0, 0, 1]))
    for name in dict.fromkeys(names):
        likely = LIKELY.get(name, ["ids"] if "ids" in name or name == "labels" else ["mask"])
        kind = draw(st.sampled_from(likely * (1 + 8 * (1 - odd)) + list(CELLS) * odd))
        cell = st.one_of([CELLS[kind]] * 9 + [st.none()] * odd)
        columns[name] = draw(st.lists(cell, min_size=count, max_size=count))
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def is_own(error):
    """Whether it is raised by a line of packsft or TRL's trainer, and names a row, a column or the data set."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    named = any(word in str(error) for word in ("row", "column", "data set", "stream", "chat template"))
    return named and not set(OWN).isdisjoint(Path(last.filename).parents)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    tiny_tokenizer().save_pretrained(folder)
    return folder


property_test = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


@property_test
@given(rows(), st.sampled_from(["map", "stream", "stream of Arrow"]), st.booleans(), st.booleans())
def test_rows_are_trained_on_or_refused_by_name(model, drawn, source, packing, own_packs):
    try:
        dataset = Dataset.from_list(drawn)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        assume(source == "stream")
    if source == "stream":
        dataset = IterableDataset.from_generator(lambda: iter(drawn))
    elif source == "stream of Arrow":
        dataset = dataset.to_iterable_dataset()
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}} if own_packs else {}
    try:
        ours = trainer(tempfile.mkdtemp(), model=model, train_dataset=dataset, packing=packing, max_steps=1, **options)
        batches = list(ours.get_train_dataloader())
    except ValueError as refused:
        batches, error = [], refused
    event("trained on" if batches else "refused")
    assert batches or is_own(error), error


@property_test
@given(rows())
def test_inspect_counts_rows_or_refuses_them_by_name(tokenizer_folder, drawn):
    try:
        dataset = Dataset.from_list(drawn)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        assume(False)
    file = f"{tempfile.mkdtemp()}/rows.parquet"
    try:
        dataset.to_parquet(file)
    except pa.ArrowException:  # a struct without a field
        assume(False)
    try:
        found = inspect_data(file, model=tokenizer_folder).report.account
    except ValueError as refused:
        error, found = refused, None
    event("refused" if found is None else "counted")
    assert is_own(error) if found is None else found.examples_in == len(drawn)
