"""The report: counts that add up, and the steps formula, on sets small enough to count by hand."""

import json

import numpy as np
import pytest

from packsft.packing import cut_examples, pack_segments, packing_report


def report(lengths, max_length=4, unscored=(), strategy="bfd", overlong=None, **options):
    """`unscored`: examples in which nothing is scored."""
    segments = cut_examples(lengths, max_length, strategy=strategy, overlong=overlong)
    plan, _ = pack_segments(segments.keep_scored(~np.isin(segments.examples, unscored)))
    return packing_report(plan, **{"effective_batch_size": 2, "num_train_epochs": 1} | options)


def test_counts_of_the_example_of_trl():
    # packs [0 cut to 4], [2, 3], [1]: 3 packs for 4 examples, 10 of 11 tokens, in steps of 2
    # and two left out: an empty one, and one of 6 tokens in which nothing is scored
    got = report([5, 2, 3, 1, 0, 6], unscored=[5]).as_dict()
    assert got == {
        "strategy": "bfd",
        "max_length": 4,
        "tokens_per_pass": 4,
        "examples_in": 6,
        "examples_packed": 4,
        "examples_truncated": 1,
        "examples_split": 0,
        "examples_empty": 1,
        "examples_unscored": 1,
        "examples_overlong_dropped": 0,
        "segments_unscored": 0,
        "tokens_in": 17,
        "tokens_truncated": 1,
        "tokens_unscored": 6,
        "tokens_dropped": 0,
        "tokens_padding": 0,
        "texts_with_doubles": 0,
        "tokens_kept": 10,
        "tokens_lost": 7,
        "packs": 3,
        "packs_lower_bound": 3,
        "fill": 10 / 12,
        "examples_per_pack_mean": 4 / 3,
        "examples_per_pack_min": 1,
        "examples_per_pack_max": 2,
        "effective_batch_size": 2,
        "num_train_epochs": 1,
        "steps_packed": 2,
        "steps_unpacked": 2,
        "examples_per_step_mean": 2.0,
        "ranks": 1,
        "cost_imbalance": None,
        "cost_imbalance_shuffled": None,
    }


def test_steps_are_rounded_up_before_they_are_multiplied_by_epochs():
    # 14,250 examples in batches of 64: ceil(222.7) = 223, twice; as 1,425 packs of ten: ceil(22.3) = 23, twice
    got = report([10] * 14_250, max_length=100, effective_batch_size=64, num_train_epochs=2)
    assert (got.packs, got.steps_unpacked, got.steps_packed) == (1425, 446, 46)
    assert got.examples_per_step_mean == 14_250 / 23  # in each of the 23 steps of an epoch, and not 64


def test_a_fraction_of_an_epoch_is_rounded_up():
    assert report([4] * 10, num_train_epochs=0.5).steps_packed == 3  # 5 steps an epoch


def test_split_examples_count_once_per_segment_in_a_pack():
    got = report([9], strategy="bfd_split")  # segments of 4, 4 and 1, each a pack
    assert (got.account.examples_split, got.packs, got.account.tokens_lost, got.examples_per_pack_mean) == (
        1,
        3,
        0,
        1.0,
    )


def test_no_packs_give_no_steps():
    got = report([])
    assert (got.packs, got.fill, got.steps_packed, got.steps_unpacked, got.examples_per_pack_max) == (0, 0.0, 0, 0, 0)
    assert dict(got.rows())["fill"] == "0.00%"


def test_as_dict_is_plain_json():
    got = report([5, 2, 3, 1]).as_dict()
    assert json.loads(json.dumps(got)) == got


def test_rows_show_every_loss():
    rows = dict(report([5, 2, 3, 0, 2], unscored=[4]).rows())
    assert rows["examples"] == "5"
    assert rows["examples kept"] == "3"
    assert rows["examples truncated at 4 tokens"] == "1 (20.00%)"
    assert rows["examples dropped, empty"] == "1 (20.00%)"
    assert rows["examples dropped, no scored token"] == "1 (20.00%)"
    assert rows["tokens lost"] == "3 (25.00%)"
    assert rows["packs of 4 (bfd)"] == "3 (at least 3 needed)"
    assert rows["examples per pack"] == "1.0 (1 to 1)"
    assert rows["examples per optimizer step"] == "1.5 (2 unpacked)"


def test_rows_leave_out_what_did_not_happen():
    assert [label for label, _ in report([3, 1]).rows()] == [
        "examples",
        "tokens kept",
        "tokens lost",
        "packs of 4 (bfd)",
        "fill",
        "examples per pack",
        "examples per optimizer step",
        "epochs",
        "optimizer steps, packed",
        "optimizer steps, unpacked or exact-step",
    ]


def test_cost_imbalance_is_that_of_the_busiest_rank_and_gone_in_balanced_order():
    # 100 packs of one document of 4, cost 16, and 100 of four of 1, cost 4: two ranks get the same or 16 beside 4, half
    # of the time each, so (1 + 16 / 10) / 2 = 1.3 on average; sorted by cost, always the same
    got = report([4] * 100 + [1] * 400, ranks=2, packs_at_once=2)
    assert (got.packs, got.ranks) == (200, 2)
    assert 1.2 < got.cost_imbalance_shuffled < 1.4
    assert got.cost_imbalance == 1.0
    label = "attention cost, busiest of 2 devices / mean"
    assert dict(got.rows())[label] == f"1.00 ({got.cost_imbalance_shuffled:.2f} in a random order)"


def test_exact_steps_are_the_unpacked_ones_and_their_passes_are_estimated():
    # 400 examples of 3 and 1 tokens, 8 a step over two ranks: 16 tokens on average, about 4 passes of 4, 2 on each
    got = report([3, 1] * 200, strategy="step", effective_batch_size=8, ranks=2)
    assert got.steps_packed == got.steps_unpacked == 50
    assert got.examples_per_step_mean == 8
    assert got.packs_lower_bound == 200
    assert 200 <= got.packs < 300
    assert got.fill == 800 / (4 * got.packs)
    assert 1 <= got.cost_imbalance < got.cost_imbalance_shuffled
    rows = dict(got.rows())
    assert rows["passes of an epoch (step)"] == f"about {got.packs:,} (at least 200 needed)"
    assert rows["optimizer steps, as unpacked"] == "50"
    cut = dict(report([12, 4], strategy="step", effective_batch_size=2, overlong="split").rows())
    assert cut["pieces per optimizer step"] == cut["optimizer steps"] == "2"
    # whole passes are known exactly where every step is the same: 8 x 1 token are one pass of 8
    assert report([1] * 80, strategy="step", effective_batch_size=8, tokens_per_pass=8).packs == 10


def test_the_segments_of_split_examples_are_what_a_step_takes():
    # 10 tokens are three segments of at most 4, and 3 are one: four samples, two steps
    assert report([10, 3], strategy="step", overlong="split").steps_unpacked == 2
    assert report([10, 3], strategy="bfd_split").steps_unpacked == 2
    assert report([10, 3], strategy="wrapped").steps_unpacked == 1


def test_without_a_whole_step_there_is_no_cost_imbalance():
    assert report([4], ranks=2).cost_imbalance is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"effective_batch_size": 0}, "effective_batch_size=0: must be at least 1"),
        ({"num_train_epochs": 0}, "num_train_epochs=0: must be above 0"),
        ({"ranks": 3}, "ranks=3: must be at least 1 and divide effective_batch_size=2"),
        ({"ranks": 0}, "ranks=0: must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        report([1], **arguments)


def test_a_longer_example_is_a_full_pass_and_not_more():
    got = report([8] * 1_000 + [30], max_length=64, strategy="step", effective_batch_size=1_001, tokens_per_pass=8)
    assert (got.packs, got.packs_lower_bound, got.fill, got.tokens_per_pass) == (1_001, 1_001, 1.0, 8)
    assert ("tokens per pass", "8 on average, at most 8, or one longer example") in got.rows()
