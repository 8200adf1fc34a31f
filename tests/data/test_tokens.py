"""Tokens as users give them: with padding, positions, packs of their own, or too many for a table: right or named."""

import pytest
from datasets import Dataset, Features, List, Value
from documents import documents, ids_of, said, streamed
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from runs import trainer
from tiny import VOCAB, tiny_model

from packsft.data.document import documents_of
from packsft.data.packs import pack_dataset
from packsft.data.streams import PackedStream

# ---- padding and positions ----


@st.composite
def padded_rows(draw):
    """(rows with padding at both ends, the same rows without)."""
    rows, plain = [], []
    for _ in range(draw(st.integers(1, 5))):
        ids = draw(st.lists(st.integers(0, 9), min_size=0, max_size=4))
        labels = [draw(st.sampled_from([token, -100])) for token in ids]
        left, right = (draw(st.sampled_from([0, 0, 1, 3])) for _ in range(2))
        plain.append((ids, labels))
        rows.append(
            {
                "input_ids": [9] * left + ids + [9] * right,
                "labels": [9] * left + labels + [9] * right,
                "attention_mask": [0] * left + [1] * len(ids) + [0] * right,
                "position_ids": [1] * left + list(range(len(ids))) + [0] * right,
            }
        )
    return rows, plain


@settings(max_examples=100, deadline=None)
@given(padded_rows(), st.booleans())
def test_padding_is_no_part_of_a_document(drawn, streams):
    rows, plain = drawn
    expected = [(ids, [-100, *labels[1:]]) for ids, labels in plain if any(label != -100 for label in labels[1:])]
    features = Features({name: List(Value("int64")) for name in rows[0]})
    dataset = Dataset.from_list(rows, features=features)
    whole = [documents_of(row, "row 0") for row in rows]
    assert [d.input_ids.tolist() for pack in whole for d in pack] == [ids for ids, _ in plain if ids]
    if not expected:
        return
    if streams:
        packs = PackedStream(dataset.to_iterable_dataset(), None, strategy="none")
        found, account = documents(packs), packs.account
    else:
        packs = pack_dataset(dataset, None, strategy="none", name="train")
        found, account = documents(packs), packs.plan.account
    assert found == expected
    assert account.tokens_in == sum(len(ids) for ids, _ in plain)
    assert account.tokens_padding == sum(row["attention_mask"].count(0) for row in rows)


SPOILT = {
    "a hole": ({"attention_mask": [1, 0, 1]}, "attention_mask has a 0 between its 1: padding must be at the start or"),
    "a short mask": ({"attention_mask": [1, 1]}, "2 attention_mask for 3 input_ids"),
    "numbers of documents": ({"attention_mask": [1, 1, 2]}, "attention_mask (holds|is) .*expected .*0 or 1"),
    "two documents": ({"position_ids": [0, 1, 0]}, "its position_ids begin anew, so it holds 2 documents"),
    "an offset": ({"position_ids": [1, 2, 3]}, r"position_ids is \[1, 2, 3\], expected to count 0, 1, 2"),
    "few positions": ({"position_ids": [0, 1]}, "2 position_ids for 3 input_ids"),
    "null positions": ({"position_ids": None}, "position_ids (is missing|is None, expected a list of integers)"),
}


@pytest.mark.parametrize("source", [Dataset.from_list, streamed], ids=["map", "stream"])
@pytest.mark.parametrize("case", list(SPOILT))
def test_padding_and_positions_that_make_no_document_are_named(case, source, tmp_path):
    spoilt, message = SPOILT[case]
    good = {"input_ids": [3, 4, 5], "labels": [3, 4, 5]} | {
        name: [0, 1, 2] if name == "position_ids" else [1, 1, 1] for name in spoilt
    }
    with pytest.raises(ValueError, match=f"row 1 of the (data set|train stream): {message}"):
        list(trainer(tmp_path, train_dataset=source([good, good | spoilt]), max_steps=1).train_dataset)


# ---- packs of one's own ----


def test_packs_of_ones_own_are_divided_where_their_positions_begin_anew():
    row = {"input_ids": [3, 4, 5, 6, 9], "position_ids": [0, 1, 2, 0, 0]}
    assert ids_of([documents_of(row, "row 0")]) == [[3, 4, 5], [6], [9]]
    assert ids_of([documents_of(row | {"attention_mask": [1, 1, 1, 1, 0]}, "row 0")]) == [[3, 4, 5], [6]]
    with pytest.raises(ValueError, match="row 0: position_ids begin anew at other places than seq_lengths says"):
        documents_of(row | {"seq_lengths": [4, 1]}, "row 0")


@pytest.mark.parametrize("source", [Dataset.from_list, streamed], ids=["map", "stream"])
def test_padding_and_positions_of_ones_own_packs_reach_the_batch(source, tmp_path):
    ids = [3, 4, 5, 6, 9]
    row = {"input_ids": ids, "labels": ids, "position_ids": [0, 1, 2, 0, 0], "attention_mask": [1, 1, 1, 1, 0]}
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_steps": 1, "per_device_train_batch_size": 2}
    (batch,) = trainer(tmp_path, train_dataset=source([row, row]), **own).get_train_dataloader()
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 4, 7, 8]


def test_rows_with_seq_lengths_are_packs_of_ones_own_or_refused(tmp_path):
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [3, 4, 5], "seq_lengths": [2, 1]}])
    for packing in (True, False):
        with pytest.raises(ValueError, match="train_dataset has the column seq_lengths, so its rows are packs of your"):
            trainer(tmp_path, train_dataset=rows, packing=packing)


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"seq_lengths": [2, 2]}, "seq_lengths sum to 4, but there are 3 input_ids"),
        ({"input_ids": [3, 4, 24]}, "input_ids holds 24, but the vocabulary has 24 entries"),
        ({"labels": [3, 4]}, "2 labels for 3 input_ids"),
        ({"labels": [3, None, 4]}, "labels holds null, expected integers"),
        ({"loss_weights": [1.0, -1.0]}, "loss_weights holds -1.0, expected numbers of 0 or more"),
        ({"seq_lengths": None}, "seq_lengths is missing"),
    ],
    ids=str,
)
@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_packs_of_ones_own_are_checked_before_the_first_step(which, spoilt, message, tmp_path):
    good = {"input_ids": [3, 4, 5], "labels": [3, 4, 5], "seq_lengths": [2, 1], "loss_weights": [1.0, 1.0]}
    rows = Dataset.from_list([good] * 97 + [good | spoilt])
    sets = {"train_dataset": Dataset.from_list([good])} | {which: rows}
    with pytest.raises(ValueError, match=f"row 97 of the data set: {message}"):
        trainer(tmp_path, dataset_kwargs={"skip_prepare_dataset": True}, **sets)


def test_packs_of_ones_own_without_a_token_to_score_are_refused_and_their_padding_is_counted(tmp_path, caplog):
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(ValueError, match="no document of the data set has a token to score"):
        trainer(tmp_path, train_dataset=Dataset.from_list([{"input_ids": [3, 4], "labels": [3, -100]}]), **own)
    row = {"input_ids": [3, 4, 0], "labels": [3, 4, 0], "attention_mask": [1, 1, 0]}
    trainer(tmp_path, train_dataset=Dataset.from_list([row]), **own)
    assert said(caplog, "train data set: 1 tokens of padding are left out")


# ---- tables of positions ----


@pytest.mark.parametrize("which", ["train", "eval"])
def test_documents_beyond_a_table_of_positions_are_counted_and_refused(which, tmp_path):
    rows = Dataset.from_list([{"input_ids": [3] * n, "labels": [3] * n} for n in (50, 20, 33, 32)])
    for family in ("gpt2", "opt"):
        positions = {"n_positions" if family == "gpt2" else "max_position_embeddings": 32}
        model = tiny_model(family, **positions)
        message = rf"2 of 4 documents of the {which} data set have more tokens \(up to 50\) than the 32 positions of"
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, model=model, max_length=64, **{f"{which}_dataset": rows})
        ours = trainer(tmp_path, model=model, max_length=32, **{f"{which}_dataset": rows})
        assert ours.isolation.isolated
        ours.train()
        ours.evaluate(rows.select([1, 3]))
        assert ours.check_packing().holds


@pytest.mark.parametrize("positions", [8, 13])
def test_the_checks_fit_the_shortest_table_of_positions(positions, tmp_path):
    rows = Dataset.from_list([{"input_ids": [4] * positions, "labels": [4] * positions}])
    ours = trainer(tmp_path, model=tiny_model("gpt2", n_positions=positions), train_dataset=rows, max_length=positions)
    assert ours.isolation.isolated, ours.isolation.reason
    assert ours.check_packing().holds


def test_documents_beyond_the_positions_of_a_rotary_model_are_noticed(tmp_path, caplog):
    rows = Dataset.from_list([{"input_ids": [3] * n, "labels": [3] * n} for n in (50, 20)])
    trainer(tmp_path, model=tiny_model(max_position_embeddings=32), train_dataset=rows, max_length=64).train()
    assert len(said(caplog, "1 of 2 documents of the train data set have more tokens (up to 50) than the 32")) == 1


def test_an_adapter_around_the_embeddings_is_no_table_of_positions(tmp_path, caplog):
    rows = Dataset.from_list([{"input_ids": [3] * 30, "labels": [3] * 30}])
    model = tiny_model(max_position_embeddings=len(VOCAB))
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    trainer(tmp_path, model=model, train_dataset=rows, peft_config=lora)
    assert said(caplog, "1 of 1 documents of the train data set have more tokens (up to 30) than the 24 positions")


@pytest.mark.parametrize("own", [False, True], ids=["rows", "packs"])
def test_a_document_of_a_stream_beyond_a_table_of_positions_is_named(own, tmp_path, caplog):
    rows = [{"input_ids": [3] * n, "labels": [3] * n} for n in (5, 50)]
    model = tiny_model("gpt2", n_positions=32)
    own_packs = {"dataset_kwargs": {"skip_prepare_dataset": True}} if own else {}
    options = {"packing": False, "max_length": None, "max_steps": 2, "per_device_train_batch_size": 1} | own_packs
    trainer(
        tmp_path, model=model, train_dataset=streamed(rows[:1] * 4), **options | {"max_steps": 1, "max_length": 400}
    )
    assert not said(caplog, "positions")
    ours = trainer(tmp_path, model=model, train_dataset=streamed(rows), **options)
    with pytest.raises(ValueError, match=r"document of 50 tokens, but the model"):
        ours.train()
