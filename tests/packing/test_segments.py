"""Segments: whatever is not packed is counted with its reason, under every strategy and `overlong`.

Lengths of 0 to 20 at `max_length` 1 to 9: overlong, empty and exactly fitting examples come up in nearly every draw.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packsft.packing import PackPlan, cut_examples, pack_segments, plan_packs

WAYS = [
    *[(strategy, overlong) for strategy in ("bfd", "none") for overlong in ("truncate", "split", "drop", "error")],
    ("bfd_split", "split"),
    ("wrapped", "split"),
]
ways = pytest.mark.parametrize(("strategy", "overlong"), WAYS)
DRAWS = {
    "lengths": st.lists(st.integers(0, 20), max_size=20),
    "max_length": st.integers(1, 9),
    "seed": st.none() | st.integers(0, 3),
    "keep_end": st.booleans(),
    "unscored": st.integers(0, 2**31),  # seeds which segments have no scored token
}


def planned(strategy, overlong, lengths, max_length, seed, keep_end, unscored):
    """(segments as cut, which are scored, plan, the segment of each segment); None where "error" stops."""
    if overlong == "error" and max(lengths, default=0) > max_length:
        with pytest.raises(ValueError, match="overlong other than 'error'"):
            plan_packs(lengths, max_length, strategy=strategy, overlong=overlong)
        return None
    cut = cut_examples(lengths, max_length, strategy=strategy, overlong=overlong, keep_end=keep_end)
    scored = np.random.default_rng(unscored).random(len(cut)) < 0.7
    return cut, scored, *pack_segments(cut.keep_scored(scored), seed=seed)


@ways
@settings(max_examples=60, deadline=None)
@given(**DRAWS)
def test_every_scored_segment_lies_in_one_pack_and_everything_else_is_counted(strategy, overlong, **draws):
    if (found := planned(strategy, overlong, **draws)) is None:
        return
    cut, scored, plan, order = found
    lengths, max_length = np.array(draws["lengths"], int), draws["max_length"]
    planned_segments = [tuple(segment) for i in range(len(plan)) for segment in plan.segments(i).tolist()]
    segments = list(zip(cut.examples.tolist(), cut.starts.tolist(), cut.stops.tolist(), strict=True))
    kept = [segment for segment, keep in zip(segments, scored, strict=True) if keep]
    assert planned_segments == [kept[j] for j in order]
    assert sorted(planned_segments) == sorted(kept) == kept
    assert all(1 <= plan.seq_lengths(i).sum() <= max_length for i in range(len(plan)))

    over = lengths > max_length
    reached = np.zeros(len(lengths), int)  # tokens of each example that were cut into segments, in order
    for example, start, stop in segments:
        first = lengths[example] - max_length if draws["keep_end"] and overlong == "truncate" and over[example] else 0
        assert start == first + reached[example] < stop
        reached[example] += stop - start
    limit = {"truncate": np.minimum(lengths, max_length), "drop": np.where(over, 0, lengths)}.get(overlong, lengths)
    assert reached.tolist() == limit.tolist()

    packed = np.isin(np.arange(len(lengths)), [example for example, _, _ in kept])
    per_example = np.bincount([example for example, _, _ in kept], minlength=len(lengths))
    dropped = over if overlong == "drop" else np.zeros_like(over)
    account = plan.account
    assert account.examples_in == len(lengths)
    assert account.examples_packed == packed.sum()
    assert account.examples_empty == (lengths == 0).sum()
    assert account.examples_overlong_dropped == dropped.sum()
    assert account.examples_unscored == (~packed & ~dropped & (lengths > 0)).sum()
    assert account.examples_split == (per_example > 1).sum()
    assert account.examples_truncated == ((over & packed).sum() if overlong == "truncate" else 0)
    removed = [segment for segment, keep in zip(segments, scored, strict=True) if not keep]
    assert account.segments_unscored == sum(packed[example] for example, _, _ in removed)
    of_whole, of_others = lengths[~packed & ~dropped].sum(), sum(e - s for x, s, e in removed if packed[x])
    assert account.tokens_unscored == of_whole + of_others
    assert account.tokens_dropped == lengths[dropped].sum()
    assert account.tokens_truncated == ((lengths - limit)[packed].sum() if overlong == "truncate" else 0)
    assert account.tokens_in == lengths.sum()
    assert account.tokens_lost == account.tokens_truncated + account.tokens_unscored + account.tokens_dropped


@ways
def test_a_plan_is_its_seeds_in_any_process_and_survives_the_file(strategy, overlong, tmp_path):
    call = f"plan_packs([7, 3, 3, 5, 2, 1, 6] * 5, 9, strategy={strategy!r}, overlong={overlong!r}, seed=%d)"
    plans = [eval(call % seed) for seed in (0, 1, 2)]
    assert len({plan.fingerprint for plan in plans}) == 3
    result = subprocess.run(
        [sys.executable, "-c", f"from packsft.packing import plan_packs; print(({call % 1}).fingerprint)"],
        env={**os.environ, "PYTHONHASHSEED": "5"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.split() == [plans[1].fingerprint]
    plans[1].save(tmp_path / "plan")
    assert PackPlan.load(tmp_path / "plan").account == plans[1].account


@pytest.mark.parametrize("lengths", [[], [9], [9, 5], [1], [1, 1]])
@pytest.mark.parametrize("max_length", [1, 4])
@ways
def test_few_or_only_overlong_examples(strategy, overlong, lengths, max_length):
    if overlong == "error" and max(lengths, default=0) > max_length:
        return  # test_an_overlong_example_is_named
    plan = plan_packs(lengths, max_length, strategy=strategy, overlong=overlong, seed=0)
    assert plan.num_tokens == sum(
        min(n, max_length) if overlong == "truncate" else n * (overlong != "drop" or n <= max_length) for n in lengths
    )


def test_wrapped_keeps_its_cuts_where_a_segment_is_removed():
    cut = cut_examples([3, 5, 4], 4, strategy="wrapped")  # [0 0:3, 1 0:1], [1 1:5], [2 0:4]
    plan, _ = pack_segments(cut.keep_scored(np.array([True, False, False, True])))
    assert [plan.segments(i).tolist() for i in range(len(plan))] == [[[0, 0, 3]], [[2, 0, 4]]]


def test_an_overlong_example_is_named():
    with pytest.raises(ValueError, match=r"row 1 has 9 tokens, more than max_length=4, as have 2 of 4 rows"):
        plan_packs([4, 9, 1, 5], 4, overlong="error")


@pytest.mark.parametrize(
    ("strategy", "overlong", "message"),
    [
        ("bfd", "cut", "overlong='cut' is unknown, expected None or one of"),
        ("bfd_split", "drop", "overlong='drop' contradicts the strategy 'bfd_split'"),
        ("wrapped", "truncate", "overlong='truncate' contradicts the strategy 'wrapped'"),
    ],
)
def test_what_cannot_be_is_named(strategy, overlong, message):
    with pytest.raises(ValueError, match=message):
        plan_packs([1], 4, strategy=strategy, overlong=overlong)
