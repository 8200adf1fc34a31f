"""The collator against five literal rows that can be checked by hand."""

import numpy as np
import pytest
import torch
from tiny import ROWS

from packsft.data.collator import PackingCollator, rounded_size


def collate(*rows, **options):
    return PackingCollator(pad_token_id=0, vocab_size=24, **options)([dict(row) for row in rows])


def test_two_documents_make_one_row_whose_positions_restart():
    batch = collate(ROWS[0], ROWS[2])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 1, 8, 9, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 5, 8]
    assert batch["max_length_q"] == batch["max_length_k"] == 5
    assert batch["labels"].tolist() == [[-100, -100, 5, 6, 1, -100, 9, 1]]


def test_dtypes_are_those_of_the_contract():
    batch = collate(*ROWS)
    int64, int32 = ("input_ids", "position_ids", "labels", "loss_targets"), ("cu_seq_lens_q", "seq_idx", "loss_rows")
    assert {batch[key].dtype for key in int64} == {torch.int64}
    assert {batch[key].dtype for key in int32} == {torch.int32}


def test_loss_rows_are_the_positions_before_the_scored_tokens():
    batch = collate(ROWS[0], ROWS[2])
    # tokens 5, 6, 1 stand at 2, 3, 4 and 9, 1 at 6, 7: they are predicted one position earlier
    assert batch["loss_rows"].tolist() == [1, 2, 3, 5, 6]
    assert batch["loss_targets"].tolist() == [5, 6, 1, 9, 1]


def test_no_position_predicts_the_first_token_of_the_next_document():
    # the labels of row 1 and row 3 score their first token; nothing may predict it
    batch = collate(ROWS[1], ROWS[3], ROWS[1])
    assert batch["labels"].tolist() == [[-100, 1, -100, -100, 1]]
    assert batch["loss_rows"].tolist() == [0, 3]


def test_a_pack_given_by_the_user_keeps_its_documents():
    pack = {"input_ids": [7, 1, 8, 9, 1], "labels": [7, 1, 8, 9, 1], "seq_lengths": [2, 3]}
    assert collate(pack)["cu_seq_lens_q"].tolist() == collate(ROWS[1], ROWS[2])["cu_seq_lens_q"].tolist()
    assert collate(pack)["labels"].tolist() == [[-100, 1, -100, 9, 1]]


def test_labels_default_to_the_input_ids():
    assert collate({"input_ids": [7, 8, 1]})["labels"].tolist() == [[-100, 8, 1]]


def test_the_pad_is_a_document_of_its_own_and_not_scored():
    batch = collate(ROWS[0], pad_to_multiple_of=4)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 1, 0, 0, 0]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 8]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["loss_rows"].tolist() == [1, 2, 3]


def test_a_padded_batch_scores_the_same_tokens():
    packed, padded = collate(*ROWS), collate(*ROWS, padded=True)
    assert padded["input_ids"].shape == (5, 5)
    assert padded["loss_targets"].tolist() == packed["loss_targets"].tolist()
    predicted_by = padded["input_ids"].flatten()[padded["loss_rows"] + 1]
    assert predicted_by.tolist() == padded["loss_targets"].tolist()
    assert "cu_seq_lens_q" not in padded


def test_round_sizes_pads_every_size_to_a_multiple_of_eight_and_scores_nothing_more():
    batch, plain = collate(ROWS[0], ROWS[2], ROWS[1], round_sizes=True, max_length=5), collate(*ROWS[:3])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 1, 8, 9, 1, 7, 1, 0, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 0]]  # pads are no longer
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 8, 10, 15, 16, 16, 16, 16]  # than max_length; three empty ones
    assert batch["max_length_q"] == batch["max_length_k"] == 5
    assert batch["loss_rows"].tolist() == [1, 2, 3, 5, 6, 8, 0, 0]
    assert batch["loss_targets"].tolist() == [5, 6, 1, 9, 1, 1, -100, -100]
    for key in ("num_items", "num_scored", "num_tokens", "num_documents"):
        assert batch[key] == plain[key]


def test_sixteen_sizes_are_enough_for_a_power_of_two():
    assert [rounded_size(size) for size in (0, 1, 8, 9, 255, 256, 257, 1000, 1024)] == [
        8, 8, 8, 16, 256, 256, 272, 1024, 1024,
    ]  # fmt: skip
    assert len({rounded_size(size) for size in range(1025, 2049)}) == 16
    assert max(rounded_size(size) / size for size in range(256, 5000)) < 1 + 1 / 16


def test_max_length_is_a_power_of_two_where_it_is_not_known():
    assert collate(ROWS[0], round_sizes=True)["max_length_q"] == 8
    assert collate({"input_ids": [3] * 9}, round_sizes=True, max_length=5)["max_length_q"] == 16  # the user's own pack


def test_padded_rows_are_as_wide_as_a_multiple_of_eight_too():
    batch = collate(*ROWS, padded=True, round_sizes=True, per_example=True)
    assert batch["input_ids"].shape == batch["labels"].shape == (5, 8)
    assert len(batch["loss_rows"]) == len(batch["loss_targets"]) == len(batch["loss_weights"]) == 8
    assert batch["num_items"] == batch["loss_weights"].sum() == 4  # of five documents; one has no scored token


def test_padding_is_not_counted_as_tokens():
    for options in ({}, {"padded": True}, {"pad_to_multiple_of": 8}):
        assert collate(*ROWS, **options)["num_tokens"] == 15


def test_rows_are_not_changed():
    row = {"input_ids": np.array([7, 1]), "labels": np.array([7, 1])}
    collate(row)
    assert row["labels"].tolist() == [7, 1]


def test_a_bad_row_is_named_by_its_place_in_the_batch():
    with pytest.raises(ValueError, match="row 1 of the batch: input_ids holds 24, but the vocabulary has 24 entries"):
        collate(ROWS[0], {"input_ids": [3, 24]})
