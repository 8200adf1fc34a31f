"""Every data set form that TRL takes, packed: the tokens and labels are TRL's own, and each is in a pack once."""

import pytest
from datasets import Dataset, IterableDataset
from forms import FORMS, TOKENS
from runs import DEFAULTS, losses, trainer
from tiny import ROWS, VOCAB, tiny_model, tiny_tokenizer
from trl import SFTConfig, SFTTrainer


def documents(items):
    """(input ids, labels) of all documents in packs, sorted; each document's first label is out of the loss anyway."""
    found = []
    for item in items:
        start = 0
        for length in item.get("seq_lengths", [len(item["input_ids"])]):
            ids = list(map(int, item["input_ids"][start : start + length]))
            found.append((ids, [-100, *map(int, item["labels"][start + 1 : start + length])]))
            start += length
    return sorted(found)


def trl_documents(dataset, tmp_path, **options):
    args = SFTConfig(str(tmp_path), use_cpu=True, **DEFAULTS | options)
    trl = SFTTrainer(model=tiny_model(), args=args, train_dataset=dataset, processing_class=tiny_tokenizer())
    return documents(trl.train_dataset)


@pytest.mark.parametrize("form", list(FORMS))
def test_the_packed_documents_are_those_that_trl_prepares(form, tmp_path):
    dataset, options = FORMS[form]
    packed = trainer(tmp_path, train_dataset=dataset, max_length=32, **options)
    expected = [d for d in trl_documents(dataset, tmp_path, max_length=32, **options) if any(x != -100 for x in d[1])]
    assert documents(packed.train_dataset) == expected
    assert max(sum(item["seq_lengths"]) for item in packed.train_dataset) <= 32
    assert len(packed.train_dataset) < len(expected)
    packed.train()
    assert losses(packed)


def test_a_formatting_function_is_applied(tmp_path):
    rows = Dataset.from_list([{"q": "what is two plus two", "a": "four"}] * 4)
    packed = trainer(tmp_path, train_dataset=rows, formatting_func=lambda row: f"user {row['q']} assistant {row['a']}")
    ids, _ = documents(packed.train_dataset)[0]
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


def test_a_stream_is_packed_by_the_parent_and_kept_apart_by_us(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(ROWS * 4))
    ours = trainer(tmp_path, train_dataset=stream, max_length=8, max_steps=2, per_device_train_batch_size=1)
    ours.train()
    assert len(losses(ours)) == 2
    assert ours.packing_report is None


def test_batches_of_several_packs_are_one_longer_row(tmp_path):
    ours = trainer(tmp_path, train_dataset=TOKENS, max_length=8, per_device_train_batch_size=2)
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
    assert ours.train_dataset[0]["input_ids"].tolist() == ([3, 4, 5, 6] if keep == "keep_start" else [5, 6, 7, 8])
    assert "2 examples are cut at max_length=4, 4 of 12 tokens are lost" in caplog.text


def test_examples_without_a_scored_token_are_counted_and_left_out(tmp_path, caplog):
    rows = [*ROWS[:2], {"input_ids": [3, 4, 5, 6, 7], "labels": [-100, -100, -100, -100, 7]}]  # scored past the cut
    ours = trainer(tmp_path, train_dataset=Dataset.from_list(rows), max_length=4)
    assert "1 of 3 examples have no token to score" in caplog.text
    assert ours.packing_report.unscored_dropped == 1
    assert sum(len(item["seq_lengths"]) for item in ours.train_dataset) == 2


def test_a_shuffled_selection_of_rows_is_read_in_its_own_order(tmp_path):
    rows = Dataset.from_list(ROWS).select([4, 0, 2])
    ours = trainer(tmp_path, train_dataset=rows, packing=False)
    assert [item["input_ids"].tolist() for item in ours.train_dataset] == [ROWS[i]["input_ids"] for i in (4, 0, 2)]


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_a_split_example_loses_no_token_whichever_end_truncation_would_keep(tmp_path, strategy):
    rows = Dataset.from_list([{"input_ids": [3, 4, 5, 6, 7, 8], "labels": [3, 4, 5, 6, 7, 8]}] * 2)
    ours = trainer(tmp_path, train_dataset=rows, max_length=4, packing_strategy=strategy, truncation_mode="keep_end")
    tokens = sorted(token for item in ours.train_dataset for token in item["input_ids"].tolist())
    assert tokens == sorted([3, 4, 5, 6, 7, 8] * 2)
    ours.train()
