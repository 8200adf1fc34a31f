"""Columns of any Arrow type: the documents are those of plain Python lists of the same rows, or one error names a row.

Rows of 0 to 4 values in up to 5 rows: missing, empty and single-token rows, and chunks without a row, come up often.
"""

import datetime
import itertools
import warnings
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from datasets import Array2D, ClassLabel, Dataset, Features, List, Value, concatenate_datasets
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from runs import trainer

from packsft.data.document import documents_of
from packsft.data.packs import pack_dataset
from packsft.data.raw import checked_rows, label_rows
from packsft.data.streams import PackedStream

property_test = settings(max_examples=150, deadline=None)

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
OTHERS = {
    "halffloat": (pa.float16(), np.float16),
    "float": (pa.float32(), float),
    "double": (pa.float64(), lambda i: [float(i), float("nan"), float("inf")][i % 3]),
    "decimal": (pa.decimal128(5, 0), Decimal),
    "bool": (pa.bool_(), bool),
    "null": (pa.null(), lambda i: None),
    "string": (pa.string(), str),
    "binary": (pa.binary(), lambda i: str(i).encode()),
    "date": (pa.date32(), lambda i: datetime.date(2000, 1, 1 + i % 28)),
    "struct": (pa.struct([("a", pa.int64())]), lambda i: {"a": i}),
    "list": (pa.list_(pa.int64()), lambda i: [i]),
}
TYPES = {name: (getattr(pa, name)(), int) for name in INTEGERS} | OTHERS
LISTS = {"list": pa.list_, "large_list": pa.large_list, "fixed_size_list": pa.list_}
TOKENS = st.integers(0, 100)


@st.composite
def columns(draw, lengths, types, holes):
    """(Arrow array, Python list) of rows of these lengths; with `holes`, rows and values may be null."""
    name, kind = draw(st.sampled_from(types)), draw(st.sampled_from(list(LISTS)))
    value_type, value_of = TYPES[name]
    drawn = TOKENS | st.just(-100) if name.startswith("int") else TOKENS
    if name == "uint64" and holes:
        drawn = drawn | st.just(2**64 - 100)
    values = drawn.map(value_of)
    if holes:
        values = st.one_of([values] * 9 + [st.none()])
    rows = [draw(st.lists(values, min_size=n, max_size=n)) for n in lengths]
    if holes:
        rows = [None if draw(st.integers(0, 9)) == 0 else row for row in rows]
    size = {"fixed_size_list": lengths[0]} if kind == "fixed_size_list" and len(set(lengths)) == 1 else {}
    return pa.array(rows, LISTS[kind](value_type, *size.values())), rows


@st.composite
def layouts(draw, arrays):
    """A data set of these columns in which rows are cut out of longer arrays, in chunks and behind an index."""
    count = len(next(iter(arrays.values())))
    begin = draw(st.integers(0, count // 2))
    table = {}
    for name, array in arrays.items():
        cuts = sorted([begin, count, *draw(st.lists(st.integers(begin, count), max_size=3))])
        chunks = [array.slice(i, j - i) for i, j in itertools.pairwise(cuts)]
        table[name] = pa.chunked_array(chunks, array.type)
    dataset = Dataset(pa.table(table))
    rows = list(range(begin, count))
    if draw(st.booleans()) and rows:
        order = draw(st.permutations(range(len(rows))))[draw(st.integers(0, 1)) :]
        dataset, rows = dataset.select(order), [rows[i] for i in order]
    if draw(st.booleans()):
        dataset, rows = concatenate_datasets([dataset, dataset]), rows * 2
    return dataset, rows


@st.composite
def token_rows(draw):
    """(data set, input ids, labels), the last two as Python lists."""
    holes = draw(st.booleans())
    lengths = draw(st.lists(st.sampled_from([3, 2, 4, 0, 1]), min_size=1, max_size=5))
    if draw(st.booleans()):
        lengths = [lengths[0]] * len(lengths)
    types = draw(st.sampled_from([INTEGERS, INTEGERS, list(TYPES)]))
    others = [max(n - (holes and draw(st.integers(0, 9)) == 0), 0) for n in lengths]
    (ids, id_rows), (labels, label_rows) = (draw(columns(n, types, holes)) for n in (lengths, others))
    dataset, rows = draw(layouts({"input_ids": ids, "labels": labels}))
    return dataset, [id_rows[i] for i in rows], [label_rows[i] for i in rows]


def is_tokens(row):
    return row is not None and all(type(value) is int and value < 2**63 for value in row)


def expected(ids, labels):
    """What plain lists give: the documents with a scored token, or the numbers of the bad rows."""
    pairs = list(zip(ids, labels, strict=True))
    bad = [i for i, (a, b) in enumerate(pairs) if not (is_tokens(a) and is_tokens(b) and len(a) == len(b))]
    whole = [(a, [-100, *b[1:]]) for a, b in pairs if a and b]
    return bad, [document for document in whole if any(label != -100 for label in document[1])]


def outcome(read):
    """The documents, or the message of the ValueError; no other error passes, and no cast that numpy warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return None, [(d.input_ids.tolist(), d.labels.tolist()) for item in read() for d in item]
        except ValueError as error:
            return str(error), []


def agrees(got, bad, documents, where):
    error, found = got
    if bad:
        assert error is not None
        assert any(error.startswith(f"row {row} of the {where}") for row in bad), error
    elif not documents:
        assert error is None or "has a token to score" in error or "is empty" in error, error
    else:
        assert (error, found) == (None, documents)


@property_test
@given(token_rows())
def test_a_data_set_gives_what_plain_lists_give_or_names_a_row(drawn):
    dataset, ids, labels = drawn
    got = outcome(lambda: pack_dataset(dataset, None, strategy="none", name="train").packs())
    agrees(got, *expected(ids, labels), "data set")


@property_test
@given(token_rows(), st.sampled_from([None, "numpy", "torch"]))
def test_a_stream_answers_as_the_data_set_does(drawn, form):
    dataset, ids, labels = drawn
    assume(ids)  # `datasets` makes no stream of no rows
    bad, documents = expected(ids, labels)
    integers = all(pa.types.is_integer(column.type.value_type) for column in dataset.data.columns)
    rows = dataset.with_format(form if integers and not bad else None).to_iterable_dataset()  # torch has no dates
    agrees(outcome(lambda: PackedStream(rows, None, strategy="none")), bad, documents, "train stream")


@pytest.mark.parametrize("form", ["pandas", "arrow"])
def test_a_stream_of_tables_is_refused_and_a_data_set_is_read_without_its_format(form):
    dataset = Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, 4]]}).with_format(form)
    (((document,)),) = pack_dataset(dataset, None, strategy="none", name="train").packs()
    assert document.input_ids.tolist() == [3, 4]
    with pytest.raises(ValueError, match=r"row 0 of the train stream is a \w+, expected a dict"):
        list(PackedStream(dataset.to_iterable_dataset(), None, strategy="none"))


def test_minus_100_in_an_unsigned_type_is_refused_though_int64_would_read_it_as_not_scored():
    labels = pa.array([[3], [4, 2**64 - 100]], pa.list_(pa.uint64()))
    dataset = Dataset(pa.table({"input_ids": pa.array([[3], [4, 5]]), "labels": labels}))
    with pytest.raises(ValueError, match="row 1 of the data set: labels holds 18446744073709551516, expected integers"):
        pack_dataset(dataset, None, strategy="none", name="train")


def test_a_transform_is_refused_because_columns_are_read_without_it():
    dataset = Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, 4]]}).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match=r"has a transform .* apply it with map"):
        pack_dataset(dataset, None, strategy="none", name="train")


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([3, 4]), "int64"),
        (pa.array(["34", "5"]), "string"),
        (pa.array([{"a": 3}, {"a": 4}]), "struct<a: int64>"),
        (pa.nulls(2), "null"),
    ],
)
def test_a_column_that_holds_no_lists_is_named_with_its_type(column, kind):
    with pytest.raises(ValueError, match=f"column 'input_ids' holds {kind}, expected lists of integers"):
        pack_dataset(Dataset(pa.table({"input_ids": column, "labels": column})), None, strategy="none", name="train")


def test_an_array_of_two_dimensions_is_refused_and_class_labels_are_integers():
    features = Features({name: Array2D((1, 2), "int64") for name in ("input_ids", "labels")})
    dataset = Dataset.from_dict({"input_ids": [[[3, 4]]], "labels": [[[3, 4]]]}, features=features)
    with pytest.raises(ValueError, match="column 'input_ids' holds extension"):
        pack_dataset(dataset, None, strategy="none", name="train")
    classes = Features({"input_ids": List(Value("int64")), "labels": List(ClassLabel(names=["a", "b"]))})
    dataset = Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[1, 0]]}, features=classes)
    ((document,),) = pack_dataset(dataset, None, strategy="none", name="train").packs()
    assert document.labels.tolist() == [-100, 0]


def test_tokens_are_views_of_the_columns():
    ids, labels = pa.array([[3], [4, 5]]), pa.array([[3], [4, 5]], pa.large_list(pa.int32()))
    rows = pack_dataset(Dataset(pa.table({"input_ids": ids, "labels": labels})), 4, strategy="none", name="train").rows
    for found, column in zip(rows.tokens(1, 0, 2), (ids, labels), strict=True):
        assert found.ctypes.data == column.values.buffers()[1].address + found.itemsize


# ---- masks ----


@st.composite
def masked(draw):
    """(data set, input ids, mask): the mask of any type, with nulls, other numbers and other lengths now and then."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    ids, id_rows = draw(columns(lengths, INTEGERS, False))
    name = draw(st.sampled_from(["int8", "uint64", "int64", "bool", "halffloat", "double", "string", "null"]))
    value_type, odd = (pa.float64(), [0.5, float("nan")]) if name == "double" else (TYPES[name][0], [2])
    bits = st.sampled_from([0, 1] * 8 + odd).map(TYPES[name][1] if name != "double" else float)
    bits = st.one_of([bits] * 9 + [st.none()]) if draw(st.booleans()) else bits
    sizes = [max(n + draw(st.sampled_from([0] * 8 + [-1, 1])), 0) for n in lengths]
    rows = [draw(st.lists(bits, min_size=n, max_size=n)) for n in sizes]
    kind = draw(st.sampled_from([pa.list_, pa.large_list]))
    dataset, order = draw(layouts({"input_ids": ids, "assistant_masks": pa.array(rows, kind(value_type))}))
    return dataset, [id_rows[i] for i in order], [rows[i] for i in order]


@property_test
@given(masked())
def test_labels_follow_a_mask_of_0_and_1_or_its_row_is_named(drawn):
    dataset, ids, masks = drawn
    assume(ids)
    pairs = list(zip(ids, masks, strict=True))
    bad = [
        i
        for i, (row, mask) in enumerate(pairs)
        if len(row) != len(mask) or any(isinstance(bit, str | None) or bit not in (0, 1) for bit in mask)
    ]
    labels = [[token if bit else -100 for token, bit in zip(row, mask, strict=False)] for row, mask in pairs]
    raw = {"text_field": "text", "completion_only": False, "eos_token": "", "name": "train"}
    of_stream = lambda: list(checked_rows(dataset.to_iterable_dataset(), **raw))  # noqa: E731
    ways = [lambda: label_rows(dataset), lambda: checked_rows(dataset, **raw), of_stream]
    for read, where in zip(ways, ["data set", "data set", "train stream"], strict=True):
        if bad:
            with pytest.raises(
                ValueError, match=rf"^row ({'|'.join(map(str, bad))}) of the {where}: .*assistant_masks"
            ):
                read()
        else:
            found = list(read())
            assert [row["input_ids"] for row in found] == ids
    if not bad:
        assert label_rows(dataset)["labels"][:] == labels


def test_labels_of_unsigned_ids_hold_minus_100():
    ids = pa.array([[3, 200], [4]], pa.list_(pa.uint8()))
    rows = label_rows(Dataset(pa.table({"input_ids": ids, "assistant_masks": pa.array([[0, 1], [0]])})))
    assert rows["labels"][:] == [[-100, 200], [-100]]


# ---- packs that the user made ----

ODD = {
    "seq_lengths": [None, -1, 1.0, 0.5, float("nan"), "1", [[1]], 2**63, 2**63 - 1],
    "loss_weights": [None, -1, -0.5, float("nan"), float("inf"), "1", [[1]]],
}


@st.composite
def users_packs(draw):
    """(row, the field that is spoilt or None)."""
    lengths = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    weights = draw(st.lists(st.sampled_from([0, 1, 0.25, 2**63]), min_size=len(lengths), max_size=len(lengths)))
    row = {"input_ids": list(range(sum(lengths))), "seq_lengths": lengths, "loss_weights": weights}
    spoilt = draw(st.sampled_from([None, *ODD]))
    if spoilt:
        at, odd = draw(st.integers(0, len(lengths) - 1)), draw(st.sampled_from(ODD[spoilt]))
        row[spoilt] = draw(st.sampled_from([odd, [*row[spoilt], 1], [*row[spoilt][:at], odd, *row[spoilt][at + 1 :]]]))
    return row, spoilt


@property_test
@given(users_packs())
def test_a_users_pack_is_divided_as_it_says_or_its_row_and_field_are_named(drawn):
    row, spoilt = drawn
    error, found = outcome(lambda: [documents_of(row, "row 3")])
    if spoilt:
        assert error.startswith(f"row 3: {spoilt} ")
        return
    stops = np.cumsum(row["seq_lengths"])
    parts = [row["input_ids"][stop - n : stop] for stop, n in zip(stops, row["seq_lengths"], strict=True) if n]
    assert (error, found) == (None, [(part, [-100, *part[1:]]) for part in parts])
    weights = [weight for weight, n in zip(row["loss_weights"], row["seq_lengths"], strict=True) if n]
    assert [document.weight for document in documents_of(row, "row 3")] == weights


def test_a_pack_whose_labels_are_null_is_refused_and_not_scored_as_a_whole():
    packs = Dataset.from_list([{"input_ids": [3, 4], "labels": [-100, 4]}, {"input_ids": [3, 4]}])
    with pytest.raises(ValueError, match="row 1 has no labels"):
        documents_of(packs[1], "row 1")


# ---- through the trainer ----


def chat(content):
    return [{"role": "user", "content": "why"}, {"role": "assistant", "content": content}]


BAD_ROWS = {
    "no text": ({"text": ["why", None]}, "row 1 of the train {}: text is"),
    "bytes": ({"text": [b"why", b"no"]}, "row 0 of the train {}: text is b'why', expected a text"),
    "no completion": ({"prompt": ["why"] * 2, "completion": ["no", None]}, "row 1 of the train {}: completion is"),
    "no messages": ({"messages": [chat("no"), None]}, "row 1 of the train {}: messages is"),
    "an empty chat": ({"messages": [chat("no"), []]}, "row 1 of the train {}: messages is"),
    "a null message": ({"messages": [chat("no"), [None]]}, "row 1 of the train {}: messages is"),
    "no column": ({"question": ["why"]}, "the train data set has only the columns question: expected"),
    "no ids": ({"input_ids": [[3, 4], None]}, "row 1 of the"),
    "a long mask": ({"input_ids": [[3, 4]], "assistant_masks": [[1, 1, 0]]}, "3 assistant_masks for 2 input_ids"),
}


@pytest.mark.parametrize("case", list(BAD_ROWS))
def test_the_trainer_names_a_row_that_trl_cannot_read_or_would_cut(case, tmp_path):
    rows, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=message.format("data set")):
        trainer(tmp_path, train_dataset=Dataset.from_dict(rows))
    with pytest.raises(ValueError, match=message.format("stream")):
        list(trainer(tmp_path, train_dataset=Dataset.from_dict(rows).to_iterable_dataset(), max_steps=1).train_dataset)


def test_a_row_that_was_not_selected_may_be_bad(tmp_path):
    rows = Dataset.from_dict({"messages": [[], chat("no"), None, chat("yes")]}).select([3, 1])
    assert sum(map(len, trainer(tmp_path, train_dataset=rows).train_dataset.packs())) == 2
    with pytest.raises(ValueError, match="row 1 of the train data set: messages is None"):
        trainer(
            tmp_path, train_dataset=rows.flatten_indices().select([0, 1]).add_item({"messages": None}).select([0, 2])
        )


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_messages_in_another_format_are_the_same_messages(form, tmp_path):
    rows = Dataset.from_dict({"messages": [chat("no"), chat("yes")]})
    of = lambda dataset: [  # noqa: E731
        d.input_ids.tolist() for pack in trainer(tmp_path, train_dataset=dataset).train_dataset.packs() for d in pack
    ]
    assert of(rows.with_format(form)) == of(rows)


def test_a_data_set_that_gives_tables_is_named(tmp_path):
    rows = Dataset.from_dict({"text": ["why"]}).with_format("pandas")
    with pytest.raises(ValueError, match="row 0 of train_dataset is a DataFrame, expected a dict"):
        trainer(tmp_path, train_dataset=rows)


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ({}, "completion_mask and loss_mask and loss_weights"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "completion_mask and loss_mask and loss_weights"),
        (
            {"dataset_kwargs": {"skip_prepare_dataset": True}, "loss_normalization": "example"},
            "completion_mask and loss_mask",
        ),
    ],
)
def test_columns_of_tokens_that_are_not_read_are_announced(options, unread, tmp_path, caplog):
    ids = [3, 4, 5, 6]
    row = {"input_ids": ids, "labels": ids, "loss_weights": [1.0], "loss_mask": ids, "completion_mask": ids, "id": "a"}
    trainer(tmp_path, train_dataset=Dataset.from_list([row]), **options)
    found = [record.message for record in caplog.records if "not read" in record.message]
    assert found == [f"train_dataset: {unread} beside input_ids: not read"]
