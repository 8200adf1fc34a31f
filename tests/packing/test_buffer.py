"""The bounded buffer: every token once, no more held than may be, and a state that goes on in the same way."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_normal import lengths_like

from packsft.packing import plan_packs
from packsft.packing.buffer import PackingBuffer

MAX_LENGTH = 8
LENGTHS = st.lists(st.integers(0, 20), max_size=40)


def packs_of(lengths, strategy="bfd", buffer_tokens=24, max_length=MAX_LENGTH, kill_at=None):
    """All packs; killed after pack `kill_at`, another buffer goes on with the state through JSON."""
    buffer = PackingBuffer(max_length, buffer_tokens, strategy)
    packs = []

    def pop(at_end=False):
        nonlocal buffer
        while (pack := buffer.pop(at_end=at_end)) is not None:
            packs.append(pack)
            if len(packs) == kill_at:
                state = json.loads(json.dumps(buffer.state_dict()))
                buffer = PackingBuffer(max_length, buffer_tokens, strategy)
                buffer.load_state_dict(state)

    for key, length in enumerate(lengths):
        num_segments = buffer.push(key, length)
        assert num_segments == 1 or length == 0 or strategy == "wrapped"
        pop()
        assert buffer.tokens <= buffer_tokens
    pop(at_end=True)
    assert buffer.tokens == 0
    return packs


def test_a_stream_to_check_by_hand():
    # Three packs of 8 may wait. 5 + 2 + 3 + 1 + 4 + 6 = 21 do; the next 4 are too many. 5, the oldest, goes with the
    # 3 that fills its rest. 2 + 1 + 4 + 6 + 4 = 17 wait at the end, where the longest goes first: 6 + 2, 4 + 4, 1.
    packs = packs_of([5, 2, 3, 1, 4, 6, 4])
    assert [[segment.length for segment in pack] for pack in packs] == [[5, 3], [6, 2], [4, 4], [1]]
    assert [[segment.key for segment in pack] for pack in packs] == [[0, 2], [5, 1], [4, 6], [3]]


def test_wrapped_is_the_plan_of_the_same_name():
    lengths = [5, 2, 3, 1, 20, 4, 0, 6]
    plan = plan_packs(lengths, MAX_LENGTH, strategy="wrapped")
    assert [[list(p) for p in pack] for pack in packs_of(lengths, "wrapped")] == [
        plan.segments(i).tolist() for i in range(len(plan))
    ]


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.sampled_from(["bfd", "wrapped", "none"]), st.integers(8, 40))
def test_every_token_comes_once_and_in_order_and_no_pack_is_too_long(lengths, strategy, buffer_tokens):
    lengths = lengths if strategy == "wrapped" else [min(length, MAX_LENGTH) for length in lengths]
    packs = packs_of(lengths, strategy, buffer_tokens)
    seen = {}
    for pack in packs:
        assert 0 < sum(segment.length for segment in pack) <= MAX_LENGTH
        for segment in pack:
            seen.setdefault(segment.key, []).append((segment.start, segment.stop))
    for key, length in enumerate(lengths):
        assert [token for start, stop in seen.get(key, []) for token in range(start, stop)] == list(range(length))
    if strategy in ("wrapped", "none"):
        in_order = [(segment.key, segment.start) for pack in packs for segment in pack]
        assert in_order == sorted(in_order)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.sampled_from(["bfd", "wrapped", "none"]))
def test_a_state_after_any_pack_goes_on_with_the_same_packs(lengths, strategy):
    lengths = lengths if strategy == "wrapped" else [min(length, MAX_LENGTH) for length in lengths]
    expected = packs_of(lengths, strategy)
    for kill_at in range(1, len(expected) + 1):
        assert packs_of(lengths, strategy, kill_at=kill_at) == expected


def test_nothing_waits_for_ever():
    # a length that fits nothing else goes out once it is the oldest: here 7, among pairs of 4
    packs = packs_of([7, *[4] * 50])
    assert [segment.length for segment in packs[0]] == [7]


@pytest.mark.parametrize(("name", "short_by"), [("Dolly", 0.001), ("Alpaca", 0.001), ("Tulu", 0.008)])
def test_the_buffer_fills_packs_nearly_as_well_as_the_plan_over_everything(name, short_by):
    lengths = lengths_like(name, 1024)[:4000].clip(max=1024).tolist()
    plan = plan_packs(lengths, 1024)
    packs = packs_of(lengths, max_length=1024, buffer_tokens=32 * 1024)
    assert sum(lengths) / (len(packs) * 1024) >= plan.fill - short_by


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 24, "best"), "strategy='best': choose one of step"),
        ((0, 24), "max_length=0"),
        ((None, 24), "max_length=None"),
        ((8, 7), "buffer_tokens=7 is less than a pack of max_length=8"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackingBuffer(*arguments)


def test_without_packing_and_without_a_cut_each_example_is_a_pack():
    assert [[tuple(segment) for segment in pack] for pack in packs_of([30, 2], "none", 0, None)] == [
        [(0, 0, 30)],
        [(1, 0, 2)],
    ]
