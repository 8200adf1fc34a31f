"""Several data sets by weight: shares, reports, orders, states, and what is refused."""

import itertools

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from tiny import token_rows

import packsft

FAR = {"stopping_strategy": "all_exhausted"}
SETS = {"short": token_rows(40, max_length=4), "long": token_rows(30, max_length=24, seed=1)}


def mixed(weights=None, **options):
    return packsft.pack(SETS, 32, **{"batch_size": 4} | options, weights=weights)


def drawn(data, epochs=1):
    """The rows of each epoch, in order of steps."""
    loader = data.loader()
    return [[row for step in loader for batch in step for row in batch.rows.tolist()] for _ in range(epochs)]


def lengths():
    return np.array([len(ids) for rows in SETS.values() for ids in rows["input_ids"]])


def test_without_weights_every_document_comes_once():
    data = mixed()
    (epoch,) = drawn(data)
    assert sorted(epoch) == list(range(70))
    assert [one.documents for one in data.mixture.sets] == [40, 30]


@pytest.mark.parametrize("stopping_strategy", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("weights_of", ["token", "document"])
@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (1, 5)], ids=str)
def test_weights_are_shares(shares, weights_of, stopping_strategy):
    weights = dict(zip(SETS, shares, strict=True))
    data = mixed(weights, weights_of=weights_of, stopping_strategy=stopping_strategy)
    epochs = drawn(data, 60)  # rounds of both sets
    rows = np.array(list(itertools.chain(*epochs)))
    amount = lengths()[rows] if weights_of == "token" else np.ones(len(rows))
    expected = weights["short"] / sum(weights.values())
    one_document = 1 / min(one.documents for one in data.mixture.sets)
    assert amount[rows < 40].sum() / amount.sum() == pytest.approx(expected, abs=0.02 + 0.5 * one_document)
    counts = np.bincount(rows, minlength=70)
    for part in (counts[:40], counts[40:]):  # in a set, every document comes equally often
        assert part.max() - part.min() <= 1
    for epoch in epochs:
        times = np.bincount(epoch, minlength=70)
        assert times.max() == 1 if stopping_strategy == "first_exhausted" else times.min() >= 1


def test_what_an_epoch_takes_is_said_and_reported():
    data = mixed({"short": 1, "long": 1})
    short, long = data.mixture.sets
    assert short.documents == 40
    assert long.documents < 30
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in str(data).splitlines()[-4:]]
    assert lines[0] == ["data set", "tokens", "tokens lost", "documents used", "tokens used"]
    for one, line, count in zip((short, long), lines[1:], (40, 30), strict=False):
        used = f"{one.tokens:,.0f} ({one.share:.1%})"
        assert line == [one.name, f"{one.tokens_in:,}", "0.00%", f"{one.documents} of {count}", used]
        assert one.share == pytest.approx(0.5, abs=0.02)
    assert lines[3][0] == "all"
    assert lines[3][3] == f"{short.documents + long.documents} of 70"
    assert lines[3][4] == f"{short.tokens + long.tokens:,.0f} (100.0%)"
    steps = len(data.loader())
    assert data.report.steps_unpacked == steps == -(-(short.documents + long.documents) // 4)
    assert data.report.packs == pytest.approx(sum(map(len, data.loader())), rel=0.2)  # in another order
    tokens = lengths()[drawn(data)[0]].sum()
    assert data.report.fill == pytest.approx(tokens / (data.report.packs * data.tokens_per_pass))


def test_without_shuffling_the_sets_take_turns():
    (epoch,) = drawn(mixed({"short": 1, "long": 1}, weights_of="document", shuffle=False, batch_size=2))
    assert [sorted(epoch[i : i + 2]) for i in range(0, 60, 2)] == [[i, 40 + i] for i in range(30)]


def test_a_mixture_goes_on_where_it_was_and_can_be_saved(tmp_path):
    data = mixed({"short": 1, "long": 3})
    data.save(tmp_path / "mixed")
    loaded = packsft.load(tmp_path / "mixed")
    whole = drawn(data, 2)
    assert drawn(loaded, 2) == whole
    first = loaded.loader()
    list(first)
    steps = iter(first)
    before = [row for _ in range(3) for batch in next(steps) for row in batch.rows.tolist()]
    then = data.loader()
    then.load_state_dict(first.state_dict())
    assert before + [row for step in then for batch in step for row in batch.rows.tolist()] == whole[1]
    with pytest.raises(ValueError, match="they are other rows, or packed in another way"):
        mixed({"short": 1, "long": 2}).loader().load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (SETS, {"weights": {"short": 1}}, r"weights are of \['short'\], and the sets are \['short', 'long'\]"),
        (SETS, {"weights": {"short": 1, "long": 0}}, r"weights\['long'\]=0: must be a number above 0"),
        (SETS, {"weights": {"short": 1, "long": "x"}}, r"weights\['long'\]='x': must be a number above 0"),
        (SETS, {"weights": [1]}, r"weights are of \[1\]"),
        ({}, {}, r"rows is a mapping from \[\], expected one or more names"),
        ({1: SETS["long"]}, {}, r"rows is a mapping from \[1\], expected one or more names"),
        ([[1, 2]], {"weights_of": "row"}, "weights_of='row' is unknown, expected one of"),
        (SETS["long"].to_iterable_dataset(), {"weights": {"a": 1}}, "weights are of several data sets"),
        (SETS, {"weights": {"short": 1, "long": 1}, "weights_of": "row"}, "weights_of='row' is unknown"),
        (SETS, {"stopping_strategy": "never"}, "stopping_strategy='never' is unknown, expected one of"),
        (SETS, {"strategy": "bfd"}, "strategy='bfd' makes packs before it is known what an epoch takes"),
        (SETS | {"empty": [[1], [2]]}, {}, "the set empty has no document with a token to score"),
        (SETS | {"bare": SETS["long"].remove_columns("labels")}, {}, "the set bare: .* has no column 'labels'"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, {}, "rows is a mapping of columns"),
        ([[1, 2]], {"weights": {"a": 1}}, "weights are of several data sets"),
        (SETS, {"weights_of": "document"}, "weights_of='document' has no effect without weights"),
        (SETS, {"stopping_strategy": "all_exhausted"}, "stopping_strategy='all_exhausted' has no effect without"),
        (SETS, FAR | {"weights": {"short": 1e9, "long": 1e-9}}, "each document of short more than 1,000 times"),
        (SETS, FAR | {"weights": {"short": 5e-324, "long": 1}}, "each document of long more than 1,000 times"),
        (SETS, FAR | {"weights": {"short": 1e300, "long": 1e-300}}, "more than 1,000 times"),
        (SETS | {"uneven": Dataset.from_list([{"input_ids": [1], "labels": []}])}, {}, "the set uneven: row 0 of"),
        (SETS | {"negative": [[1, 2], [1, -2]]}, {}, "the set negative: row 1 of the data set"),
        (SETS | {"other": [[1, 2], [3] * 40]}, {"overlong": "error"}, "the set other: row 1 has 40 tokens"),
        (SETS | {"text": Dataset.from_dict({"input_ids": ["a"], "labels": ["a"]})}, {}, "the set text: .* string"),
    ],
)  # fmt: skip
def test_bad_input_is_one_error(rows, options, said):
    with pytest.raises(ValueError, match=said):
        packsft.pack(rows, 32, batch_size=2, **options)


def test_a_stream_cannot_be_mixed():
    with pytest.raises(TypeError, match=r"the set live is of the type IterableDataset, expected .*, no stream"):
        packsft.pack(SETS | {"live": SETS["long"].to_iterable_dataset()}, 32, batch_size=2)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_sets_of_other_types_are_joined_in_any_order(first):
    kinds = [Value("uint16"), Value("int64"), Value("int32")]
    sets = {}
    for number, kind in enumerate(kinds):
        ids = [[number + 1] * n for n in (3, 5)]
        labels = ids if number == 0 else [[-100, *row[1:]] for row in ids]
        length = 4 if number == 2 else -1  # lists of one length
        if number == 2:
            ids = labels = [[3] * 4] * 2
        column = List(kind, length=length)
        sets[str(number)] = Dataset.from_dict(
            {"input_ids": ids, "labels": labels}, features=Features({"input_ids": column, "labels": column})
        )
    names = [*list(sets)[first:], *list(sets)[:first]]
    data = packsft.pack({name: sets[name] for name in names}, 8, batch_size=6, shuffle=False)
    found = sorted((pack[0].input_ids.tolist(), pack[0].labels.tolist()) for pack in data.packs.packs())
    expected = [(row["input_ids"], [-100, *row["labels"][1:]]) for rows in sets.values() for row in rows]
    assert found == sorted(expected)


def test_a_set_with_a_mask_is_joined_to_one_without():
    padded = Dataset.from_list([{"input_ids": [0, 7, 8], "labels": [0, 7, 8], "attention_mask": [0, 1, 1]}])
    for sets in ({"plain": SETS["short"], "padded": padded}, {"padded": padded, "plain": SETS["short"]}):
        data = packsft.pack(sets, 8, batch_size=50, shuffle=False)
        found = sorted(pack[0].input_ids.tolist() for pack in data.packs.packs())
        scored = [row for row in SETS["short"]["input_ids"] if len(row) > 1]
        assert found == sorted([[7, 8], *scored])


def test_a_data_set_may_be_named_like_a_column():
    assert packsft.pack({"input_ids": SETS["short"], "long": SETS["long"]}, 32, batch_size=4).mixture.sets[0].rows == 40


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weights", [{"short": 5e-324, "long": 1}, {"short": 1e300, "long": 1e-300}])
def test_a_weight_that_is_next_to_nothing_takes_one_document(weights):
    least = min(weights, key=weights.get)
    assert [one.documents for one in mixed(weights).mixture.sets if one.name == least] == [1]


def test_tiny_weights_are_as_any():
    assert mixed({"short": 5e-324, "long": 5e-324}).mixture.sets[0].documents == 40
