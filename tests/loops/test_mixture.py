"""Several data sets by weight: shares, reports, orders, states, and what is refused."""

import itertools

import numpy as np
import pytest
from tiny import token_rows

import packsft

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
    header, *of_sets = [line.split("  ") for line in str(data).splitlines()[-3:]]
    assert header[0].strip() == "data set"
    for one, line, count in zip((short, long), of_sets, (40, 30), strict=True):
        cells = [cell.strip() for cell in line if cell.strip()]
        assert cells == [
            one.name, str(count), f"{one.tokens_in:,}", "0.00%", f"{one.documents} of {count}", f"{one.share:.1%}"
        ]  # fmt: skip
        assert one.share == pytest.approx(0.5, abs=0.02)
    steps = len(data.loader())
    assert data.report.steps_exact == steps == -(-(short.documents + long.documents) // 4)
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
        ([[1, 2]], {"weights_of": "row"}, "weights_of='row': must be one of"),
        (SETS["long"].to_iterable_dataset(), {"weights": {"a": 1}}, "weights are of several data sets"),
        (SETS, {"weights": {"short": 1, "long": 1}, "weights_of": "row"}, "weights_of='row': must be one of token"),
        (SETS, {"stopping_strategy": "never"}, "stopping_strategy='never': must be one of first_exhausted"),
        (SETS, {"strategy": "bfd"}, "strategy='bfd' makes packs before it is known what an epoch takes"),
        (SETS | {"empty": [[1], [2]]}, {}, "the set empty has no document with a token to score"),
        (SETS | {"bare": SETS["long"].remove_columns("labels")}, {}, "the set bare has no column labels"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, {}, "rows is a mapping of columns"),
        ([[1, 2]], {"weights": {"a": 1}}, "weights are of several data sets"),
    ],
)  # fmt: skip
def test_bad_input_is_one_error(rows, options, said):
    with pytest.raises(ValueError, match=said):
        packsft.pack(rows, 32, batch_size=2, **options)


def test_a_stream_cannot_be_mixed():
    with pytest.raises(TypeError, match=r"the set live is of the type IterableDataset, expected .*, no stream"):
        packsft.pack(SETS | {"live": SETS["long"].to_iterable_dataset()}, 32, batch_size=2)
