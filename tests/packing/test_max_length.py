"""Which max_length to take, on five lengths counted by hand: 30 tokens in all."""

import numpy as np

from packsft.packing import MaxLength, compare_max_lengths, recommended_max_length

LENGTHS = np.array([1, 2, 3, 8, 16])


def test_what_each_max_length_cuts_and_how_full_its_packs_are():
    # at 4: 4 and 12 tokens lost of two examples, packs [4] [4] [3, 1] [2]; at 16: packs [16] [8, 3, 2, 1]
    assert compare_max_lengths(LENGTHS, [16, 4, 4]) == [
        MaxLength(4, examples_truncated=2, tokens_lost=16, share_lost=16 / 30, share_cut=16 / 30, packs=4,
                  fill=14 / 16),
        MaxLength(16, examples_truncated=0, tokens_lost=0, share_lost=0.0, share_cut=0.0, packs=2, fill=30 / 32),
    ]  # fmt: skip


def test_what_is_never_scored_is_lost_but_not_cut():
    # of the 8 tokens only the last is scored, of the 3 none
    def count_scored(examples, starts, stops):
        return np.array(
            [{0: 0, 1: 1, 2: 0, 3: int(stop == 8), 4: 1}[i] for i, stop in zip(examples, stops, strict=True)]
        )

    short, long = compare_max_lengths(LENGTHS, [4, 16], count_scored)
    assert (long.tokens_lost, long.share_lost, long.share_cut) == (4, 4 / 30, 0.0)
    assert (short.tokens_lost, short.share_cut) == (4 + 8 + 12, 20 / 30)
    assert short.packs == 2
    assert recommended_max_length([short, long]) == 16


def test_recommended_is_the_smallest_that_loses_no_more_than_allowed():
    compared = compare_max_lengths(LENGTHS, [4, 8, 16, 32])  # 16, 8, 0 and 0 tokens of 30 lost
    assert recommended_max_length(compared) == 16
    assert recommended_max_length(compared, 8 / 30) == 8
    assert recommended_max_length(compared[:2]) is None


def test_no_tokens_lose_nothing():
    (only,) = compare_max_lengths(np.zeros(2, int), [4])
    assert (only.share_lost, only.packs, only.fill) == (0.0, 0, 0.0)
