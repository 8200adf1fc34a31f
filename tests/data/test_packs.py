"""Every data set form that TRL takes, packed: the tokens and labels are TRL's own, and each is in a pack once."""

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, concatenate_datasets
from forms import FORMS, TOKENS
from runs import DEFAULTS, losses, trainer
from tiny import ROWS, VOCAB, tiny_model, tiny_tokenizer
from trl import SFTConfig, SFTTrainer

from packsft.data.document import documents_of
from packsft.data.packs import TokenRows, pack_dataset


def documents(items):
    """(input ids, labels) of all documents in packs, ours or TRL's, sorted; no first label is ever scored."""
    packs = (item if isinstance(item, list) else documents_of(item, "a row") for item in items)
    return sorted((document.input_ids.tolist(), document.labels.tolist()) for pack in packs for document in pack)


def trl_documents(dataset, tmp_path, **options):
    args = SFTConfig(str(tmp_path), use_cpu=True, **DEFAULTS | options)
    trl = SFTTrainer(model=tiny_model(), args=args, train_dataset=dataset, processing_class=tiny_tokenizer())
    return documents(trl.train_dataset)


@pytest.mark.parametrize("form", list(FORMS))
def test_the_packed_documents_are_those_that_trl_prepares(form, tmp_path):
    dataset, options = FORMS[form]
    packed = trainer(tmp_path, train_dataset=dataset, max_length=32, packing_strategy="bfd", **options)
    expected = [d for d in trl_documents(dataset, tmp_path, max_length=32, **options) if any(x != -100 for x in d[1])]
    assert documents(packed.train_dataset.packs()) == expected
    assert max(sum(map(len, item)) for item in packed.train_dataset.packs()) <= 32
    assert len(packed.train_dataset) < len(expected)
    packed.train()
    assert losses(packed)


def test_a_formatting_function_is_applied(tmp_path):
    rows = Dataset.from_list([{"q": "what is two plus two", "a": "four"}] * 4)
    packed = trainer(tmp_path, train_dataset=rows, formatting_func=lambda row: f"user {row['q']} assistant {row['a']}")
    ids, _ = documents(packed.train_dataset.packs())[0]
    assert [VOCAB[i] for i in ids] == [*["user", "what", "is", "two", "plus", "two", "assistant", "four"], "<eos>"]


def test_packs_made_by_the_user_are_taken_as_they_are(tmp_path):
    packs = Dataset.from_list([{"input_ids": [7, 1, 8, 9, 1], "labels": [7, 1, -100, 9, 1], "seq_lengths": [2, 3]}] * 3)
    ours = trainer(
        tmp_path, train_dataset=packs, dataset_kwargs={"skip_prepare_dataset": True}, per_device_train_batch_size=1
    )
    batch = next(iter(ours.get_train_dataloader()))
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 5]
    assert batch["loss_rows"].tolist() == [0, 2, 3]
    ours.train()
    assert len(losses(ours)) == 9


def test_a_stream_is_packed_without_a_plan(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(ROWS * 4))
    ours = trainer(
        tmp_path, train_dataset=stream, max_length=8, max_steps=2, packing_strategy="bfd", per_device_train_batch_size=1
    )
    ours.train()
    assert len(losses(ours)) == 2
    assert ours.packing_report is None


def test_batches_of_several_packs_are_one_longer_row(tmp_path):
    ours = trainer(tmp_path, train_dataset=TOKENS, max_length=8, packing_strategy="bfd", per_device_train_batch_size=2)
    batch = next(iter(ours.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1
    assert batch["input_ids"].shape[1] > 8


def test_without_packing_no_padding_is_computed(tmp_path):
    ours = trainer(tmp_path, train_dataset=TOKENS, packing=False, per_device_train_batch_size=4)
    for batch in ours.get_train_dataloader():
        assert batch["input_ids"].shape == (1, batch["num_tokens"])


@pytest.mark.parametrize("keep", ["keep_start", "keep_end"])
def test_truncation_keeps_the_end_that_was_asked_for(tmp_path, keep, caplog):
    rows = Dataset.from_list([{"input_ids": [3, 4, 5, 6, 7, 8], "labels": [3, 4, 5, 6, 7, 8]}] * 2)
    ours = trainer(tmp_path, train_dataset=rows, max_length=4, packing=False, truncation_mode=keep)
    assert ours.train_dataset.pack(0)[0].input_ids.tolist() == ([3, 4, 5, 6] if keep == "keep_start" else [5, 6, 7, 8])
    assert "2 of 2 examples are cut at max_length=4, 4 of 12 tokens are lost" in caplog.text


def test_examples_without_a_scored_token_are_counted_and_left_out(tmp_path, caplog):
    rows = [*ROWS[:2], {"input_ids": [3, 4, 5, 6, 7], "labels": [-100, -100, -100, -100, 7]}]  # scored past the cut
    ours = trainer(tmp_path, train_dataset=Dataset.from_list(rows), max_length=4)
    assert "1 of 3 examples have no token to score" in caplog.text
    assert ours.packing_report.account.examples_unscored == 1
    assert sum(map(len, ours.train_dataset.packs())) == 2


def test_a_shuffled_selection_of_rows_is_read_in_its_own_order(tmp_path):
    rows = Dataset.from_list(ROWS).select([4, 0, 2])
    ours = trainer(tmp_path, train_dataset=rows, packing=False)
    assert [document.input_ids.tolist() for (document,) in ours.train_dataset.packs()] == [
        ROWS[i]["input_ids"] for i in (4, 0, 2)
    ]


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_a_split_example_loses_no_token_whichever_end_truncation_would_keep(tmp_path, strategy):
    rows = Dataset.from_list([{"input_ids": [3, 4, 5, 6, 7, 8], "labels": [3, 4, 5, 6, 7, 8]}] * 2)
    ours = trainer(tmp_path, train_dataset=rows, max_length=4, packing_strategy=strategy, truncation_mode="keep_end")
    tokens = sorted(token for row in ours.train_dataset for token in row["input_ids"])
    assert tokens == sorted([3, 4, 5, 6, 7, 8] * 2)
    ours.train()


LONG = Dataset.from_list(  # scored: all, the first 3 tokens, the last token
    [
        {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [3, 4, 5, 6, 7, 8]},
        {"input_ids": [9, 10, 11, 12, 13, 14, 15], "labels": [9, 10, 11, -100, -100, -100, -100]},
        {"input_ids": [16, 17, 18], "labels": [-100, -100, 18]},
    ]
)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("overlong", "kept", "message"),
    [
        ("truncate", [[3, 4, 5, 6], [9, 10, 11, 12], [16, 17, 18]], "2 of 3 examples are cut at max_length=4, 5 of 16"),
        ("split", [[3, 4, 5, 6], [7, 8], [9, 10, 11, 12], [16, 17, 18]], "1 segments of other examples have no token"),
        ("drop", [[16, 17, 18]], "2 of 3 examples are longer than max_length=4 and left out, 13 of 16 tokens are lost"),
    ],
)
def test_overlong_examples_go_where_they_are_sent(tmp_path, caplog, packing, overlong, kept, message):
    ours = trainer(
        tmp_path, train_dataset=LONG, eval_dataset=LONG, max_length=4, packing=packing, overlong=overlong
    )  # fmt: skip
    assert [ids for ids, _ in documents(ours.train_dataset.packs())] == kept
    assert documents(ours.eval_dataset.packs()) == documents(ours.train_dataset.packs())
    assert f"train data set: {message}" in caplog.text
    expected = [sum(label != -100 for label in labels) for _, labels in documents(ours.train_dataset.packs())]
    assert sorted(ours.train_dataset.scored.tolist()) == sorted(expected)


def test_scored_tokens_are_counted_by_segment_over_chunks_and_blocks(monkeypatch):
    monkeypatch.setattr("packsft.data.columns.BLOCK", 4_000)
    rng = np.random.default_rng(0)
    table = [
        Dataset.from_dict({"input_ids": rows, "labels": rows})
        for rows in ([[7] * n for n in (3, 0, 300, 1)], [[7] * 5], [[7] * 2_100, [7] * 2_100, [7] * 4])
    ]  # the second of 2,100 ends past a block of 4,000
    labels = [np.where(rng.random(n) < 0.5, -100, 7) for part in table for n in map(len, part["labels"])]
    parts = iter(labels)
    table = [part.remove_columns("labels").add_column("labels", [next(parts).tolist() for _ in part]) for part in table]
    packs = pack_dataset(concatenate_datasets(table), 200, strategy="bfd_split", name="train", seed=0)
    plan = packs.plan
    expected = [
        (labels[example][start + 1 : stop] != -100).sum()
        for example, start, stop in zip(*(a.astype(int) for a in (plan.examples, plan.starts, plan.stops)), strict=True)
    ]
    assert packs.scored.tolist() == expected
    assert packs.scored.dtype == np.uint8


@pytest.mark.parametrize("labels", [[[7, 7], []], [[], [7, 7]], [[7], [], [7, 7]], [[], []], [[7, -100, 7], [], []]])
def test_an_empty_row_has_no_scored_token_wherever_it_lies(labels):
    rows = TokenRows(Dataset.from_dict({"input_ids": [[7] * len(row) for row in labels], "labels": labels}))
    counted = rows.count_scored(np.arange(len(labels)), np.zeros(len(labels), np.int64), rows.lengths)
    assert counted.tolist() == [sum(label != -100 for label in row[1:]) for row in labels]


@pytest.mark.parametrize("strategy", ["none", "step", "bfd", "bfd_split"])
def test_packs_read_as_a_data_set_of_trl(strategy, tmp_path):
    packing = {"packing": False} if strategy == "none" else {"packing_strategy": strategy}
    packs = trainer(
        tmp_path, train_dataset=Dataset.from_list(ROWS), eval_dataset=Dataset.from_list(ROWS), max_length=8,
        train_sampling_strategy="sequential", **packing,
    ).eval_dataset  # fmt: skip
    names = ["input_ids", "labels"] + (["seq_lengths"] if strategy != "none" else [])
    assert packs.column_names == list(packs.features) == list(packs[0]) == names
    as_rows = [dict(row) for row in packs]
    assert as_rows == [packs[i] for i in range(len(packs))] == [packs[i - len(packs)] for i in range(len(packs))]
    assert packs[:] == {name: [row[name] for row in as_rows] for name in names}
    assert packs[1:][names[0]] == packs[range(1, len(packs))][names[0]] == packs["input_ids"][1:]
    assert list(Dataset.from_list(as_rows, features=packs.features)) == as_rows
    # unlike the documents, rows keep the label of their first token
    tokens = sorted(token for row in ROWS if len(row["input_ids"]) > 1 for token in row["labels"])
    assert sorted(token for labels in packs["labels"] for token in labels) == tokens
    for row, pack in zip(as_rows, packs.packs(), strict=True):
        assert row["input_ids"] == [token for document in pack for token in document.input_ids.tolist()]
        assert row.get("seq_lengths", [len(pack[0])]) == [len(document) for document in pack]
    with pytest.raises(IndexError):
        packs[len(packs)]
    with pytest.raises(KeyError, match="column 'text' does not exist, only input_ids, labels"):
        packs["text"]


def test_an_item_of_a_stream_reads_as_a_row_of_trl(tmp_path):
    rows = Dataset.from_list(ROWS).to_iterable_dataset()
    stream = trainer(tmp_path, train_dataset=rows, packing_strategy="bfd", max_length=8, max_steps=1).train_dataset
    row = next(iter(stream))
    assert dict(row) == {
        "input_ids": [3, 4, 5, 6, 1, 8, 9, 1], "labels": [-100, -100, 5, 6, 1, -100, 9, 1], "seq_lengths": [5, 3],
    }  # fmt: skip
    assert list(row.keys()) == stream.column_names
    assert "labels" in row
    assert "text" not in row
    with pytest.raises(KeyError, match="a pack of a stream has no 'text'"):
        row["text"]
