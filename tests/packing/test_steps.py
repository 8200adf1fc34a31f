"""The passes of an optimizer step, planned from the lengths of its documents."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_normal import LIKE, lengths_like

from packsft.packing import plan_packs, plan_step

step_lengths = st.lists(st.integers(1, 40), max_size=40)


def loads(lengths, ranks):
    """Tokens and attention cost of each rank."""
    squares = np.asarray(lengths, dtype=np.int64) ** 2
    return [
        np.array([sum(values[documents].sum() for documents in rank) for rank in ranks])
        for values in (np.asarray(lengths), squares)
    ]


def test_a_step_to_check_by_hand():
    # 20 tokens in passes of 10: two passes; the longest two part ways, and the shorter ones even them out
    ((first, second),) = plan_step([6, 5, 4, 3, 2], 10)
    assert sorted([sorted(first.tolist()), sorted(second.tolist())]) == [[0, 2], [1, 3, 4]]


def test_two_ranks_share_the_same_step():
    one, two = plan_step([6, 5, 4, 3, 2], 10, num_ranks=2)
    assert sorted([sorted(one[0].tolist()), sorted(two[0].tolist())]) == [[0, 2], [1, 3, 4]]
    assert len(one) == len(two) == 1


def test_a_rank_with_nothing_left_has_an_empty_pass():
    ranks = plan_step([5], 10, num_ranks=3)
    assert sorted(len(documents) for (documents,) in ranks) == [0, 0, 1]


def test_a_document_longer_than_a_pass_is_a_pass_of_its_own():
    ((first, second),) = plan_step([25, 4, 3], 10)
    assert sorted([first.tolist(), sorted(second.tolist())]) == [[0], [1, 2]]


def test_rows_of_similar_length_meet_where_passes_are_padded():
    # 3 rows of 10 are 30 positions; mixed with the short ones, they would be padded to 10
    ((first, second),) = plan_step([10, 2, 9, 2, 10, 1], 30, padded=True)
    assert sorted([sorted(first.tolist()), sorted(second.tolist())]) == [[0, 2, 4], [1, 3, 5]]


@settings(max_examples=300, deadline=None)
@given(step_lengths, st.integers(1, 60), st.integers(1, 5), st.booleans())
def test_every_document_is_in_one_pass_that_has_room_for_it(lengths, tokens_per_pass, num_ranks, padded):
    ranks = plan_step(lengths, tokens_per_pass, num_ranks, padded=padded)
    assert len(ranks) == num_ranks
    assert len({len(passes) for passes in ranks}) == 1
    assert len(ranks[0]) >= 1
    laid = [documents.tolist() for passes in ranks for documents in passes]
    assert sorted(itertools.chain(*laid)) == list(range(len(lengths)))
    for documents in laid:
        sizes = [lengths[i] for i in documents]
        tokens = len(sizes) * max(sizes, default=0) if padded else sum(sizes)
        assert tokens <= tokens_per_pass or len(documents) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 60), st.integers(1, 4))
def test_there_are_no_more_passes_than_best_fit_needs(lengths, tokens_per_pass, num_ranks):
    ranks = plan_step(lengths, tokens_per_pass, num_ranks)
    fewest = math.ceil(sum(lengths) / tokens_per_pass)
    assert math.ceil(fewest / num_ranks) <= len(ranks[0])
    assert len(ranks[0]) <= math.ceil(len(plan_packs(lengths, tokens_per_pass)) / num_ranks)


@pytest.mark.parametrize("num_ranks", [64, 512])
@pytest.mark.parametrize("name", list(LIKE))
def test_many_ranks_carry_the_same(name, num_ranks):
    lengths = lengths_like(name, 2048)
    step = np.resize(lengths, 128 * num_ranks)
    tokens, attention = loads(step, plan_step(step, 16_384, num_ranks))
    bound = max(1.0, (step**2).max() / attention.mean())
    assert tokens.max() < 1.1 * tokens.mean()
    assert attention.max() < 1.15 * bound * attention.mean()


@pytest.mark.parametrize("name", list(LIKE))
@pytest.mark.parametrize(("batch_size", "tokens_per_pass"), [(512, 4096), (512, 1024), (64, 8192)])
def test_eight_ranks_carry_the_same(name, batch_size, tokens_per_pass):
    # 30 steps. No plan is more even than its longest document allows, which on 8 documents a rank is not even at all.
    lengths = lengths_like(name, 1024)
    steps = np.random.default_rng(0).permutation(len(lengths))[: 30 * batch_size // 2].reshape(-1, batch_size)
    excess = []
    for step in steps:
        tokens, attention = loads(lengths[step], plan_step(lengths[step], tokens_per_pass, 8))
        bound = max(1.0, (lengths[step] ** 2).max() / attention.mean())
        excess.append((tokens.max() / tokens.mean(), attention.max() / attention.mean() / bound))
    tokens, attention = np.mean(excess, axis=0)
    assert tokens < 1.15
    assert attention < 1.15


@pytest.mark.parametrize(("arguments", "named"), [(([3], 0), "tokens_per_pass=0"), (([3], 8, 0), "num_ranks=0")])
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        plan_step(*arguments)
