"""An order of packs: a permutation, the same for a seed, and even in attention cost over the ranks of a step.

8 ranks are one machine; 1,024 to 8,192 tokens are the packs that are trained on.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_normal import LIKE, lengths_like

from packsft.packing import attention_costs, balanced_order, cost_imbalance, plan_packs


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=40), group_size=st.integers(1, 9), seed=st.integers(0, 5)
)  # up to 40 packs of at most 12: often fewer than a group, and with a rest
def test_an_order_is_a_permutation_and_the_same_for_a_seed(lengths, group_size, seed):
    plan = plan_packs(lengths, 12)
    order = balanced_order(plan, group_size, seed)
    assert sorted(order.tolist()) == list(range(len(plan)))
    assert np.array_equal(order, balanced_order(plan, group_size, seed))


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), max_size=40), group_size=st.integers(1, 9), seed=st.integers(0, 5))
def test_no_two_groups_overlap_in_cost(lengths, group_size, seed):
    plan = plan_packs(lengths, 12)
    order = balanced_order(plan, group_size, seed)
    groups = attention_costs(plan)[order[: len(plan) // group_size * group_size]].reshape(-1, group_size)
    groups = groups[np.lexsort((groups.max(axis=1), groups.min(axis=1)))]
    assert (groups[:-1].max(axis=1) <= groups[1:].min(axis=1)).all()


def test_costs_are_sums_of_squared_lengths():
    plan = plan_packs([5, 2, 3, 1], 4, strategy="wrapped")  # documents of 4; 1, 2, 1; 2, 1
    assert attention_costs(plan).tolist() == [16, 6, 5]
    assert cost_imbalance(attention_costs(plan), 2) == 16 / 11
    assert cost_imbalance(np.array([1, 2, 3, 4]), 2, accumulation=2) == 6 / 5  # 1 + 3 and 2 + 4


@pytest.mark.parametrize("max_length", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize("seed", [None, 0])
def test_eight_ranks_carry_equal_cost(name, max_length, seed):
    plan = plan_packs(lengths_like(name, max_length), max_length, seed=seed)
    costs = attention_costs(plan)
    assert cost_imbalance(costs[np.random.default_rng(0).permutation(len(plan))], 8) > 1.25  # in a random order
    assert cost_imbalance(costs[balanced_order(plan, 8)], 8) <= 1.1
    assert cost_imbalance(costs[balanced_order(plan, 8)], 8, accumulation=4) <= 1.1


def test_different_seeds_give_different_orders():
    plan = plan_packs(lengths_like("Dolly", 2048), 2048)
    assert len({balanced_order(plan, 8, seed).tobytes() for seed in range(4)}) == 4


@pytest.mark.parametrize("group_size", [0, -1])
def test_a_group_of_nothing_is_refused(group_size):
    with pytest.raises(ValueError, match=f"group_size={group_size}: must be at least 1"):
        balanced_order(plan_packs([1], 4), group_size)
