"""Streams of rows to streams of packs: each example once, over workers and ranks, and after a kill at any position."""

import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from launch import launch
from runs import losses, trainer
from streams import batch_documents, documents, numbered_rows, stream_of
from tiny import ROWS, tiny_model
from torch.utils.data import DataLoader

from packsft import PackedSFTTrainer
from packsft.data.packs import pack_dataset
from packsft.data.ranks import Ranks
from packsft.data.steps import StepStream
from packsft.data.streams import PackedStream
from packsft.packing import Account

COUNT = 41  # with 16 tokens a pack and 32 buffered: 17 packs, an uneven number over 2 and 3
EVERY = sorted(tuple(row["input_ids"]) for row in numbered_rows(COUNT))


def packed(stream, **options):
    return PackedStream(stream, 16, **{"buffer_tokens": 32} | options)


def sequence(packs):
    return [[(d.input_ids.tolist(), d.labels.tolist(), d.weight) for d in pack] for pack in packs]


class Rows:
    """A plain iterable: the same rows in every process, no state of its own."""

    def __iter__(self):
        return iter(numbered_rows(COUNT))


STREAMS = {
    "one shard": lambda: stream_of(COUNT),
    "several shards": lambda: stream_of(COUNT, 5),
    "a generator": lambda: IterableDataset.from_generator(lambda: iter(numbered_rows(COUNT))),
    "mapped and filtered": lambda: stream_of(COUNT, 3).map(lambda row: row).filter(lambda row: len(row["labels"]) > 3),
    "shuffled through a buffer": lambda: stream_of(COUNT, 3).shuffle(seed=3, buffer_size=10),
    "a plain iterable": Rows,
}


KILLED = [
    pytest.param(kind, strategy, marks=[] if kind == "one shard" or strategy == "bfd" else pytest.mark.slow)
    for kind in STREAMS
    for strategy in ("bfd", "bfd_split", "wrapped", "none")
]


@pytest.mark.parametrize(("kind", "strategy"), KILLED)
def test_killed_at_any_position_it_goes_on_with_the_same_packs(kind, strategy):
    make = STREAMS[kind]
    options = {"strategy": strategy, "buffer_tokens": 16}
    everything = sequence(PackedStream(make(), 8 if strategy != "none" else 16, **options))
    assert len(everything) > 15
    for position in range(len(everything) + 1):
        killed = PackedStream(make(), 8 if strategy != "none" else 16, **options)
        packs = iter(killed)
        begun = sequence(next(packs) for _ in range(position))
        torch.save(killed.state_dict(), file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert json.loads(json.dumps(state)) == state
        resumed = PackedStream(make(), 8 if strategy != "none" else 16, **options)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state  # not yet iterated, it stands where it was
        assert begun + sequence(resumed) == everything


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped", "none"])
def test_a_document_is_let_go_with_its_last_part(strategy):
    packs = packed(stream_of(COUNT), strategy=strategy)
    held = []
    for _ in packs:
        state = packs.state_dict()
        held.append({document[0] for document in state["held"]})
        assert held[-1] == {key for pack in state["buffer"]["complete"] for key, *_ in pack} | {
            key for key, *_ in state["buffer"]["waiting"]
        }
    assert held[-1] == set()
    assert any(held) is (strategy != "none")


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("kind", ["one shard", "a plain iterable"])
def test_a_killed_rank_goes_on_with_its_share(kind, num_ranks):
    for rank in range(num_ranks):
        everything = sequence(packed(STREAMS[kind]()).share(Ranks(rank, num_ranks)))
        for position in range(len(everything) + 1):
            killed = packed(STREAMS[kind]()).share(Ranks(rank, num_ranks))
            packs = iter(killed)
            begun = sequence(next(packs) for _ in range(position))
            resumed = packed(STREAMS[kind]()).share(Ranks(rank, num_ranks))
            resumed.load_state_dict(killed.state_dict())
            assert begun + sequence(resumed) == everything


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", ["one shard", "several shards", "a plain iterable"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_over_ranks_and_workers_every_example_comes_once_and_all_ranks_get_as_many_packs(kind, workers, num_ranks):
    shares = [
        list(DataLoader(packed(STREAMS[kind]()).share(Ranks(rank, num_ranks)), batch_size=None, num_workers=workers))
        for rank in range(num_ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sorted(document for share in shares for pack in share for document in documents(pack)) == EVERY


def test_shards_divided_over_ranks_are_read_round_after_round():
    shares = [packed(stream_of(COUNT, 5)).share(Ranks(rank, 2), endless=True) for rank in range(2)]
    epochs = []
    for share in shares:
        packs, seen = iter(share), []
        while share._epochs_done == 0:
            seen.append(next(packs))
        epochs.append([document for pack in seen[:-1] for document in documents(pack)])
        assert sequence(seen[-1:]) == sequence(seen[:1])  # no shuffling: the second epoch is the first again
    assert sorted(epochs[0] + epochs[1]) == EVERY
    assert min(map(len, epochs)) > 10  # both have read

    killed = packed(stream_of(COUNT, 5)).share(Ranks(1, 2), endless=True)
    packs = iter(killed)
    everything = sequence(next(packs) for _ in range(30))
    for position in (0, 1, 9, 10, 11, 20):  # in the first epoch, around its end, in a later one
        killed = packed(stream_of(COUNT, 5)).share(Ranks(1, 2), endless=True)
        packs = iter(killed)
        begun = sequence(next(packs) for _ in range(position))
        resumed = packed(stream_of(COUNT, 5)).share(Ranks(1, 2), endless=True)
        resumed.load_state_dict(killed.state_dict())
        packs = iter(resumed)
        assert begun + sequence(next(packs) for _ in range(30 - position)) == everything


def test_another_epoch_comes_in_another_order_and_anew():
    stream = packed(stream_of(COUNT, 3).shuffle(seed=3, buffer_size=10))
    first = sequence(stream)
    stream.set_epoch(1)
    second = sequence(stream)
    assert first != second
    for whole in (stream, packed(stream_of(COUNT))):
        assert sorted(document for pack in whole for document in documents(pack)) == EVERY
    next(iter(stream))
    stream.load_state_dict(stream.state_dict())
    stream.set_epoch(1)  # the epoch it is in: it goes on
    assert len(sequence(stream)) == len(second) - 1
    next(iter(stream))
    stream.load_state_dict(stream.state_dict())
    stream.set_epoch(0)  # another: it starts anew
    assert sequence(stream) == first


def test_a_state_of_another_share_is_refused():
    killed = packed(stream_of(COUNT, 5)).share(Ranks(0, 2), endless=True)
    next(iter(killed))
    other = packed(stream_of(COUNT, 5)).share(Ranks(1, 2), endless=True)
    other.load_state_dict(killed.state_dict())
    with pytest.raises(ValueError, match=r"saved by .* \[0, 2, 0, 1\] and cannot be loaded by \[1, 2, 0, 1\]"):
        next(iter(other))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [3, 4, 5], "labels": [3, 4]}, "row 5 of the train stream: 2 labels for 3 input_ids"),
        ({"input_ids": [3, 24], "labels": [3, 4]}, "row 5 of the train stream: input_ids holds 24, but the vocabulary"),
        ({"input_ids": [3, 4], "labels": [3, -7]}, "row 5 of the train stream: labels holds -7"),
        ({"input_ids": [3, 4]}, "row 5 of the train stream has no labels"),
        ({"input_ids": ["a"], "labels": [3]}, r"row 5 of the train stream: input_ids is \['a'\], expected a list of"),
        ({"input_ids": [[3], [4, 5]], "labels": [3]}, r"row 5 of the train stream: input_ids is \[\[3\], \[4, 5\]\]"),
        (None, "row 5 of the train stream is a NoneType, expected a dict"),
    ],
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        list(packed([*ROWS, row], vocab_size=24))


def test_what_is_left_out_or_cut_is_counted_and_said(caplog):
    rows = [
        *ROWS,
        {"input_ids": [3, 4, 5, 6, 7], "labels": [-100, -100, -100, -100, 7]},
        {"input_ids": [], "labels": []},
    ]
    stream = PackedStream(rows, 4, buffer_tokens=8)
    packs = list(stream)
    assert sum(len(document) for pack in packs for document in pack) == 4 + 2 + 3 + 4 == stream.account.tokens_kept
    assert stream.account == Account(
        examples_in=7, examples_packed=4, tokens_in=20, examples_truncated=1, tokens_truncated=1, examples_unscored=2,
        tokens_unscored=6, examples_empty=1,
    )  # fmt: skip
    assert stream.num_packs == len(packs)
    assert caplog.text.count("tokens are left out (max_length=4); this is said once") == 1
    assert "row 0 of the train stream: 1 of its 5 tokens are left out" in caplog.text
    assert "2 of 7 examples have no token to score" in caplog.text
    assert "1 of 7 examples are cut at max_length=4, 1 of 20 tokens are lost" in caplog.text
    (kept,) = next(iter(PackedStream([rows[0]], 4, keep_end=True)))
    assert kept.input_ids.tolist() == [4, 5, 6, 1]
    with pytest.raises(ValueError, match="none of the 1 examples of the train stream has a token to score"):
        list(PackedStream(rows[5:6], 4))


LONG = [{"input_ids": list(range(3, 13)), "labels": [-100] * 6 + [9, 10, 11, 12]}, *ROWS[:2]]


@pytest.mark.parametrize("strategy", ["bfd", "none", "step"])
@pytest.mark.parametrize(
    ("overlong", "kept", "lost"),
    [
        (None, [[3, 4, 5, 6, 1], [7, 1]], "1 of 3 examples have no token to score and are left out, 10 of 17"),
        ("split", [[3, 4, 5, 6, 1], [7, 1], [8, 9, 10, 11, 12]], "1 segments of other examples have no token to score"),
        ("drop", [[3, 4, 5, 6, 1], [7, 1]], "1 of 3 examples are longer than max_length=5 and left out, 10 of 17"),
    ],
)
def test_overlong_examples_go_where_they_are_sent(overlong, kept, lost, strategy, caplog):
    packs = list(PackedStream(LONG, 5, strategy=strategy, overlong=overlong))
    assert sorted(documents(pack) for pack in packs) == sorted([tuple(ids)] for ids in kept)
    assert lost in caplog.text


def test_an_overlong_example_that_must_not_be_and_too_much_lost_stop_the_stream():
    with pytest.raises(ValueError, match=r"row 0 of the train stream has 10 tokens, more than max_length=5"):
        list(PackedStream(LONG, 5, overlong="error"))
    with pytest.raises(ValueError, match=r"stream so far loses 10 of 17 tokens .* more than max_lost_fraction=0.5"):
        list(PackedStream(LONG, 5, max_lost_fraction=0.5))
    with pytest.raises(ValueError, match="overlong='drop' contradicts the strategy 'wrapped'"):
        PackedStream(LONG, 5, strategy="wrapped", overlong="drop")
    with pytest.raises(ValueError, match="max_lost_fraction=2: must be a number from 0 to 1"):
        PackedStream(LONG, 5, max_lost_fraction=2)
    assert list(PackedStream(LONG, 5, max_lost_fraction=0.6))


def test_the_segments_of_an_example_weigh_as_much_as_the_whole():
    row = {"input_ids": list(range(3, 13)), "labels": list(range(3, 13))}
    packs = list(PackedStream([row], 4, overlong="split", per_example=True))
    assert sorted(document.weight for pack in packs for document in pack) == [1 / 7] * 3


def test_the_account_of_a_stream_is_that_of_a_plan():
    rows = [*LONG, {"input_ids": [], "labels": []}, {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [-100] * 4 + [7, 8]}]
    for strategy, overlong in (("bfd", None), ("bfd", "drop"), ("bfd_split", None), ("none", "split"), ("step", None)):
        stream = PackedStream(rows, 4, strategy=strategy, overlong=overlong)
        list(stream)
        planned = pack_dataset(Dataset.from_list(rows), 4, strategy=strategy, overlong=overlong, name="train")
        assert stream.account == planned.plan.account


def test_a_rank_without_a_pack_left_runs_a_batch_that_counts_nothing(tmp_path):
    # 16 packs over 3 ranks; a mixture of experts, whose router would give even one token of padding a loss
    ours = trainer(tmp_path, model=tiny_model("mixtral"), max_length=16)
    assert [len(list(packed(stream_of(COUNT)).share(Ranks(rank, 3)))) for rank in range(3)] == [6, 6, 6]
    *_, last = packed(stream_of(COUNT)).share(Ranks(1, 3))
    assert last == []
    batch = ours.data_collator([last])
    counts = {name: batch[name] for name in ("num_items", "num_scored", "num_tokens", "num_documents")}
    assert set(counts.values()) == {0}
    assert batch["input_ids"].shape == (1, 1)  # its forward and backward take part in what all ranks wait for
    assert ours.aux_loss_enabled
    ours.current_gradient_accumulation_steps = 1
    assert ours.compute_loss(ours.model, batch, num_items_in_batch=8).item() == 0.0


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_exact_steps_of_a_stream_are_its_examples_in_order(num_ranks, workers):
    # 41 examples, 6 a step, the last one 5; passes of 16 tokens, as many on every rank
    shares = []
    for rank in range(num_ranks):
        steps = StepStream(packed(stream_of(COUNT), strategy="step"), 6, 16, Ranks(rank, num_ranks))
        shares.append([step for batch in DataLoader(steps, 1, collate_fn=list, num_workers=workers) for step in batch])
    assert {len(share) for share in shares} == {7}
    rows = numbered_rows(COUNT)
    for i, step in enumerate(zip(*shares, strict=True)):
        assert len({len(part.passes) for part in step}) == 1
        assert {part.num_items for part in step} == {sum(len(row["labels"]) - 1 for row in rows[6 * i : 6 * i + 6])}
        taken = [document for part in step for pack in part.passes for document in documents(pack)]
        assert sorted(taken) == sorted(tuple(row["input_ids"]) for row in rows[6 * i : 6 * i + 6])


def test_exact_steps_of_a_killed_stream_go_on_after_any_step():
    def steps():
        return StepStream(packed(stream_of(COUNT, 3), strategy="step"), 6, 16)

    def seen(some):
        return [sequence(step.passes) for step in some]

    everything = seen(steps())
    for position in range(len(everything) + 1):
        killed = steps()
        begun = seen(itertools.islice(iter(killed), position))
        resumed = steps()
        resumed.load_state_dict(json.loads(json.dumps(killed.state_dict())))
        assert begun + seen(resumed) == everything


# ---- through the trainer ----


def test_a_stream_takes_the_steps_of_the_unpacked_run(tmp_path):
    results = []
    for options in ({"packing": False}, {"tokens_per_pass": 16}):
        ours = trainer(
            tmp_path, model=tiny_model("gpt2", torch.float64), train_dataset=stream_of(COUNT), max_length=16,
            max_steps=9, per_device_train_batch_size=3, gradient_accumulation_steps=2, **options,
        )  # fmt: skip
        ours.train()
        results.append(losses(ours))
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_a_step_of_a_stream_out_of_memory_is_taken_again(tmp_path, monkeypatch, caplog):
    settings = {"train_dataset": stream_of(COUNT), "max_length": 16, "max_steps": 4, "tokens_per_pass": 30}
    whole = trainer(tmp_path, model=tiny_model("gpt2", torch.float64), **settings)
    whole.train()
    compute_loss, calls = PackedSFTTrainer.compute_loss, []

    def compute(self, model, inputs, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PackedSFTTrainer, "compute_loss", compute)
    ours = trainer(tmp_path, model=tiny_model("gpt2", torch.float64), **settings)
    ours.train()
    assert "the step runs again" in caplog.text
    assert losses(ours) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"packing_strategy": "bfd"}, {"packing_strategy": "wrapped"}, {"packing": False}, {"shuffle_dataset": True}],
)
def test_a_data_loader_gives_every_example_once(tmp_path, shards, workers, options):
    ours = trainer(
        tmp_path, train_dataset=stream_of(COUNT, shards), max_length=16, max_steps=1,
        per_device_train_batch_size=2, dataloader_num_workers=workers, **options,
    )  # fmt: skip
    batches = list(ours.get_train_dataloader())
    if options.get("packing_strategy") == "wrapped":
        assert sum(batch["num_tokens"] for batch in batches) == sum(map(len, EVERY))
    else:
        assert sorted(document for batch in batches for document in batch_documents(batch)) == EVERY


def test_a_bad_row_is_named_by_the_trainer(tmp_path):
    rows = [*numbered_rows(5), {"input_ids": [3, 24], "labels": [3, 4]}]
    ours = trainer(tmp_path, train_dataset=IterableDataset.from_generator(lambda: iter(rows)), max_steps=1)
    with pytest.raises(ValueError, match="row 5 of the train stream: input_ids holds 24"):
        ours.train()


@pytest.mark.parametrize(
    "options",
    [{}, {"packing_strategy": "bfd"}, {"packing_strategy": "bfd", "shuffle_dataset": True}, {"packing": False}],
)
def test_a_resumed_run_trains_on_the_batches_that_follow(tmp_path, options):
    def run(folder, resume=None):
        ours = trainer(
            folder, model=tiny_model("gpt2", torch.float64), train_dataset=stream_of(COUNT, 3), max_length=16,
            max_steps=6, save_strategy="steps", save_steps=1, per_device_train_batch_size=1,
            gradient_accumulation_steps=2, **options,
        )  # fmt: skip
        seen = []
        step = ours.training_step
        ours.training_step = lambda model, batch, *rest: (
            seen.append(batch_documents(batch)),
            step(model, batch, *rest),
        )[1]
        ours.train(resume_from_checkpoint=resume)
        return seen, losses(ours)

    seen, losses_whole = run(tmp_path)
    per_step = 2 if options else 1  # an exact step is one item of the loader
    assert len(seen) == 6 * per_step
    for position in range(1, 6):
        resumed, losses_resumed = run(tmp_path / str(position), str(tmp_path / f"checkpoint-{position}"))
        assert resumed == seen[per_step * position :]
        assert losses_resumed == losses_whole


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "shards", "workers"), [("bfd", 1, 0), ("bfd", 4, 2), ("step", 4, 2)])
def test_two_ranks_share_a_stream_and_none_waits_for_the_other(tmp_path, strategy, shards, workers):
    # 11 steps of 4 are 41 examples; 17 packs or a few more, 2 a batch and rank: one pass, or two of each rank's own
    batches = 11 if strategy == "step" else {1: 5, 4: 12}[shards]
    script = Path(__file__).with_name("stream_ranks.py")
    said = launch(script, 2, tmp_path, shards, batches, workers, strategy)
    written = [(tmp_path / f"rank{rank}.pt").exists() for rank in range(2)]
    assert all(written), said[-3000:]  # at the end
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    trained = [[document for batch in rank["train"] for document in batch] for rank in ranks]
    if shards == 1 or strategy == "step":
        assert sorted(trained[0] + trained[1]) == EVERY
    else:  # each reads its own, again and again
        assert not set(trained[0]) & set(trained[1])
        assert set(trained[0]) | set(trained[1]) == set(EVERY)
    assert sorted(d for rank in ranks for batch in rank["eval"] for d in batch) == sorted(
        tuple(row["input_ids"]) for row in numbered_rows(13)
    )
    assert len(ranks[0]["eval"]) == len(ranks[1]["eval"])
    assert len(ranks[0]["losses"]) == batches
    split = "the train data set holds other rows on rank 1 than on rank 0, but packsft deals the rows to the ranks"
    assert [[message.startswith(split) for message in rank["refused"]] for rank in ranks] == [[True] * 6] * 2
