"""A document is checked where it enters; afterwards its parts are made without a check."""

import numpy as np
import pytest

from packsft.data.document import documents_of, make_document

PACK = {"input_ids": [7, 1, 8, 9, 1], "labels": [7, 1, -100, 9, 1], "seq_lengths": [2, 0, 3]}


def test_the_documents_of_a_users_pack_score_no_first_token_and_empty_ones_are_gone():
    first, second = documents_of(PACK, "row 0")
    assert (first.input_ids.tolist(), first.labels.tolist(), first.num_scored) == ([7, 1], [-100, 1], 1)
    assert (second.input_ids.tolist(), second.labels.tolist(), second.num_scored) == ([8, 9, 1], [-100, 9, 1], 2)
    assert (first.weight, second.weight) == (1.0, 0.5)  # each an example of its own
    assert [document.weight for document in documents_of(PACK | {"loss_weights": [0.25, 1, 0.75]}, "row 0")] == [
        0.25,
        0.75,
    ]


def test_a_part_is_a_document_of_its_own_and_keeps_the_weight_of_its_example():
    whole = make_document(np.arange(6), np.arange(6))
    part = whole.part(2, 5)
    assert (part.input_ids.tolist(), part.labels.tolist()) == ([2, 3, 4], [-100, 3, 4])
    assert (part.num_scored, part.weight, whole.weight) == (2, 1 / 5, 1 / 5)
    assert whole.part(0, 6) is whole
    assert whole.labels.tolist() == [-100, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "row 3 has no input_ids"),
        ({"input_ids": ["a"]}, r"row 3: input_ids is \['a'\], expected a list of integers"),
        ({"input_ids": [[3], [4]]}, r"row 3: input_ids is \[\[3\], \[4\]\], expected a list of integers"),
        ({"input_ids": [3, 4], "labels": [3]}, "row 3: 1 labels for 2 input_ids"),
        ({"input_ids": [3, 9]}, r"row 3: input_ids holds 9, but the vocabulary has 9 entries, 0 to 8$"),
        ({"input_ids": [3, 4], "labels": [-100, -7]}, r"row 3: labels holds -7, .* 0 to 8 \(or -100, not scored\)"),
        ({"input_ids": [2**63]}, r"row 3: input_ids is \[9223372036854775808\], expected a list of integers \(int64\)"),
        ({"input_ids": [3, 4], "seq_lengths": [3, -1]}, "row 3: seq_lengths holds -1, expected 0 or more"),
        ([3, 4], "row 3 is a list, expected a dict"),
        ({"input_ids": [3, 4], "seq_lengths": [1, 2]}, "row 3: seq_lengths sum to 3, but there are 2 input_ids"),
    ],
)
def test_a_row_that_is_not_well_formed_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        documents_of(row, "row 3", vocab_size=9)
