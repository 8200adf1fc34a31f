"""A loop of one's own, with `pack` and `prepare`, takes the steps of the trainer."""

import copy
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from launch import results_of
from numerics import error
from peft import LoraConfig, get_peft_model
from plain_loop import PACK, STEP, bloom, loop, weights
from runs import trainer
from tiny import tiny_model, token_rows

import packsft


def of_trainer(folder, model, rows, **options):
    trained = trainer(folder, model, rows, optim="sgd", num_train_epochs=2, max_grad_norm=0.0, **options)
    trained.train()
    return trained


def logged(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "bloom"])
@pytest.mark.parametrize(
    ("packing", "training"),
    [({}, {}), ({"loss_normalization": "example"}, {"loss_normalization": "example"}),
     ({"shuffle": False}, {"train_sampling_strategy": "sequential"})], ids=str,
)  # fmt: skip
def test_a_plain_loop_takes_the_steps_of_the_trainer(family, packing, training, tmp_path):
    model = tiny_model(family, torch.float64) if family != "bloom" else bloom()
    rows, own = token_rows(26), copy.deepcopy(model)
    theirs = of_trainer(tmp_path, model, rows, **STEP, **training)
    packsft.prepare(own)
    assert own.packing.padded == (family == "bloom")
    found = loop(own, packsft.pack(rows, 32, **PACK, **packing))
    assert found == pytest.approx(logged(theirs), rel=1e-6)  # logged as float32
    assert error(weights(own), weights(model)) < 1e-10


def test_so_does_one_with_packs(tmp_path):
    model = tiny_model("llama", torch.float64)
    rows, own = token_rows(26), copy.deepcopy(model)
    theirs = of_trainer(tmp_path, model, rows, packing_strategy="bfd", per_device_train_batch_size=2)
    found = loop(packsft.prepare(own), packsft.pack(rows, 32, batch_size=2, strategy="bfd"))
    assert found == pytest.approx(logged(theirs), rel=1e-6)
    assert error(weights(own), weights(model)) < 1e-10


def test_so_does_one_with_a_stream():
    rows = token_rows(26)
    own, other = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    streamed = loop(packsft.prepare(own), packsft.pack(rows.to_iterable_dataset(), 32, **PACK))
    planned = loop(packsft.prepare(other), packsft.pack(rows, 32, **PACK, shuffle=False))
    assert streamed == pytest.approx(planned, rel=1e-12)
    assert error(weights(own), weights(other)) < 1e-12


@pytest.mark.parametrize("prepared_first", [False, True])
def test_so_does_one_with_an_adapter(prepared_first, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = tiny_model("llama", torch.float64, tie_word_embeddings=False)
    rows, own = token_rows(26), copy.deepcopy(model)
    torch.manual_seed(0)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    torch.manual_seed(0)
    own = packsft.prepare(own) if prepared_first else own
    own = get_peft_model(own, lora, autocast_adapter_dtype=False)
    own = own if prepared_first else packsft.prepare(own)
    of_trainer(tmp_path, model, rows, **STEP)
    loop(own, packsft.pack(rows, 32, **PACK))
    assert error(weights(own), weights(model)) < 1e-10


@pytest.mark.parametrize("strategy", ["step", "bfd"])
def test_the_losses_of_ranks_average_to_those_of_one(strategy):
    rows = token_rows(26)
    data = packsft.pack(rows, 32, batch_size=6, strategy=strategy)
    model = packsft.prepare(tiny_model("llama", torch.float64))
    whole = [[model(**batch).loss.item() for batch in step] for step in data.loader()]
    ranks = [[[model(**batch).loss.item() for batch in step] for step in data.loader(rank, 4)] for rank in range(4)]
    for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert len({len(part) for part in parts}) == 1
        assert sum(map(sum, parts)) / 4 == pytest.approx(sum(step), rel=1e-12)


@pytest.mark.parametrize("strategy", ["step", "bfd", "wrapped"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_document_comes_once_in_an_epoch_and_in_another_order_in_the_next(strategy, num_workers):
    data = packsft.pack(token_rows(26), 32, batch_size=4, strategy=strategy)
    loader = data.loader(num_workers=num_workers)
    epochs = [[(len(step), row) for step in loader for batch in step for row in batch.rows.tolist()] for _ in range(2)]
    assert len(loader) == -(-len(data.packs) // 4)
    rows = [sorted(row for _, row in epoch) for epoch in epochs]
    assert rows[0] == rows[1]
    assert set(rows[0]) == set(range(26))
    assert epochs[0] != epochs[1]
    again = data.loader()
    assert [(len(step), row) for step in again for batch in step for row in batch.rows.tolist()] == epochs[0]


def rows_of(steps):
    return [sorted(row for batch in step for row in batch.rows.tolist()) for step in steps]


@pytest.mark.parametrize("strategy", ["step", "bfd"])
def test_a_loop_goes_on_where_it_was(strategy):
    data = packsft.pack(token_rows(26), 32, batch_size=4, strategy=strategy)
    loader = data.loader()
    whole = [rows_of(loader), rows_of(loader)]
    for stop in range(1, len(loader)):
        first = data.loader()
        list(first)  # the first epoch
        steps = iter(first)
        before = rows_of([next(steps) for _ in range(stop)])
        then = data.loader(num_workers=1)
        then.load_state_dict(first.state_dict())
        assert before + rows_of(then) == whole[1]
        assert then.epoch == 2


@pytest.mark.parametrize("strategy", ["step", "bfd"])
def test_a_state_fits_another_batch_size(strategy):
    rows = token_rows(60)
    data, larger = (packsft.pack(rows, 16, batch_size=size, strategy=strategy) for size in (4, 3))
    first = data.loader()
    steps = iter(first)
    before = rows_of([next(steps), next(steps)])
    then = larger.loader()
    then.load_state_dict(first.state_dict())
    assert sorted(itertools.chain(*before, *rows_of(then))) == list(range(60))


def test_a_state_fits_other_ranks_and_passes():
    rows = token_rows(60)
    whole = rows_of(packsft.pack(rows, 16, batch_size=4).loader())
    first = packsft.pack(rows, 16, batch_size=4).loader()
    steps = iter(first)
    before = rows_of([next(steps), next(steps)])
    smaller = packsft.pack(rows, 16, batch_size=4, tokens_per_pass=12)
    shares = [smaller.loader(rank, 2) for rank in range(2)]
    for share in shares:
        share.load_state_dict(first.state_dict())
    after = [sorted(one + other) for one, other in zip(*map(rows_of, shares), strict=True)]
    assert before + after == whole


def test_a_stream_is_left_early_and_goes_on_in_its_second_epoch():
    data = packsft.pack(token_rows(26).to_iterable_dataset(), 32, batch_size=4)
    counts = [[batch.num_tokens for batch in step] for step in data.loader()]
    loader = data.loader()
    next(iter(loader))
    steps = iter(loader)
    assert loader.epoch == 0
    before = [[batch.num_tokens for batch in next(steps)] for _ in range(2)]
    assert loader.epoch == 1
    then = data.loader()
    then.load_state_dict(loader.state_dict())
    assert before + [[batch.num_tokens for batch in step] for step in then] == counts
    assert then.epoch == 2
    assert str(data) == "a stream, packed as its rows arrive (step, max_length 32)"


def test_a_state_can_be_saved_again_before_the_next_step():
    data = packsft.pack(token_rows(26), 32, batch_size=4)
    first = data.loader()
    steps = iter(first)
    before = rows_of([next(steps), next(steps)])
    second, third = data.loader(), data.loader()
    second.load_state_dict(first.state_dict())
    third.load_state_dict(second.state_dict())
    assert before + rows_of(third) == rows_of(data.loader())


def test_an_epoch_that_was_left_early_is_not_begun_again():
    data = packsft.pack(token_rows(26), 32, batch_size=4)
    whole = data.loader()
    epochs = [rows_of(whole) for _ in range(3)]
    loader = data.loader()
    assert [rows_of([next(iter(loader))]) for _ in range(3)] == [epoch[:1] for epoch in epochs]


def test_a_last_step_can_be_left_out():
    for rows in (token_rows(26), token_rows(26).to_iterable_dataset()):
        loader = packsft.pack(rows, 32, batch_size=4, drop_last=True).loader()
        for _ in range(2):
            assert [len(step) for step in rows_of(loader)] == [4] * 6
        assert loader.epoch == 2
    loader.load_state_dict(loader.state_dict())
    assert len(rows_of(loader)) == 6


def test_a_stream_goes_on_where_it_was():
    data = packsft.pack(token_rows(26).to_iterable_dataset(), 32, batch_size=4)
    lengths = [[batch.num_tokens for batch in step] for step in data.loader()]
    first = data.loader()
    steps = iter(first)
    before = [[batch.num_tokens for batch in next(steps)] for _ in range(2)]
    then = data.loader()
    then.load_state_dict(first.state_dict())
    assert before + [[batch.num_tokens for batch in step] for step in then] == lengths
    with pytest.raises(ValueError, match="num_workers=2: workers have read the stream ahead"):
        data.loader(num_workers=2).state_dict()


def test_a_state_of_other_rows_is_refused():
    state = packsft.pack(token_rows(26), 32, batch_size=4).loader().state_dict()
    rows, refused = token_rows(26), pytest.raises(ValueError, match="they are other rows, or packed in another way")
    for other, options in ((token_rows(25), {}), (rows, {"seed": 1}), (rows, {"shuffle": False}),
                           (rows, {"loss_normalization": "example"})):  # fmt: skip
        with refused:
            packsft.pack(other, 32, batch_size=4, **options).loader().load_state_dict(state)
    streams = packsft.pack(rows.to_iterable_dataset(), 32, batch_size=4).loader()
    with pytest.raises(ValueError, match="expected epoch, fingerprint, stream, taken"):
        streams.load_state_dict(state)
    for other, options in ((token_rows(26, seed=5), {}), (rows, {"strategy": "bfd"})):
        with refused:
            packsft.pack(other.to_iterable_dataset(), 32, batch_size=4, **options).loader().load_state_dict(
                streams.state_dict()
            )
    with pytest.raises(ValueError, match="the state has nothing, expected epoch, fingerprint, group_size, taken"):
        packsft.pack(rows, 32, batch_size=4).loader().load_state_dict({})


@pytest.mark.parametrize("strategy", ["step", "bfd"])
def test_what_was_saved_is_what_is_loaded(strategy, tmp_path):
    data = packsft.pack(token_rows(26), 32, batch_size=4, strategy=strategy, seed=3)
    data.save(tmp_path / "packed")
    loaded = packsft.load(tmp_path / "packed")
    assert loaded.fingerprint == data.fingerprint
    ours, theirs = data.loader(), loaded.loader()
    for _ in range(2):
        for step, other in zip(ours, theirs, strict=True):
            for batch, same in zip(step, other, strict=True):
                assert batch.keys() == same.keys()
                assert all(torch.equal(value, same[key]) for key, value in batch.items() if torch.is_tensor(value))
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        data.save(tmp_path / "packed")


@pytest.mark.parametrize(("name", "value"), [("batch_size", 5), ("seed", 1), ("drop_last", True)])
def test_changed_settings_are_refused(name, value, tmp_path):
    packsft.pack(token_rows(26), 32, batch_size=4).save(tmp_path / "packed")
    file = tmp_path / "packed" / "packsft.json"
    saved = json.loads(file.read_text())
    saved["settings"][name] = value
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="holds other rows, another plan or other settings"):
        packsft.load(tmp_path / "packed")
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match="is damaged"):
        packsft.load(tmp_path / "packed")


def test_saving_leaves_nothing_half_written(tmp_path, monkeypatch):
    data = packsft.pack(token_rows(26), 32, batch_size=np.int64(4), seed=np.int64(3), strategy="bfd")
    data.packs.set_epoch(2)  # as a trainer does
    monkeypatch.setattr("packsft.packing.PackPlan.save", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.save(tmp_path / "packed")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    data.save(tmp_path / "packed")
    assert packsft.load(tmp_path / "packed").fingerprint == data.fingerprint
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        data.save(tmp_path / "file")


def test_a_row_that_changed_between_the_sampled_ones_is_found(tmp_path):
    rows = token_rows(400)
    packsft.pack(rows, 32, batch_size=4).save(tmp_path / "packed")
    changed = rows.map(lambda row, i: {"input_ids": row["input_ids"][::-1]} if i == 5 else row, with_indices=True)
    shutil.rmtree(tmp_path / "packed" / "rows")
    changed.save_to_disk(str(tmp_path / "packed" / "rows"))
    with pytest.raises(ValueError, match="holds other rows"):
        packsft.load(tmp_path / "packed")


def test_a_folder_that_was_changed_is_refused(tmp_path):
    data = packsft.pack(token_rows(26), 32, batch_size=4)
    data.save(tmp_path / "packed")
    packsft.pack(token_rows(25), 32, batch_size=4).save(tmp_path / "other")
    (tmp_path / "packed" / "plan.npz").write_bytes((tmp_path / "other" / "plan.npz").read_bytes())
    with pytest.raises(ValueError, match="holds other rows, another plan or other settings than were saved"):
        packsft.load(tmp_path / "packed")
    (tmp_path / "other" / "packsft.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"packsft\.json is missing"):
        packsft.load(tmp_path / "other")


def test_masks_in_mappings_are_read():
    row = {"input_ids": [0, 0, 5, 6, 7], "labels": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]}
    ((batch,),) = packsft.pack([row], 16, batch_size=1).loader()
    assert batch["input_ids"].tolist() == [[5, 6, 7]]
    assert batch.num_scored == 2


def test_rows_that_are_no_tokens_are_refused():
    with pytest.raises(ValueError, match="the data set has prompt, completion, but no input_ids: tokenise it"):
        packsft.pack(Dataset.from_list([{"prompt": "a", "completion": "b"}]), 8, batch_size=1)


def test_its_settings_are_its_name():
    data = packsft.pack([[1, 2]], 8, batch_size=1)
    assert repr(data) == "PackedData(max_length=8, batch_size=1, strategy='step', tokens_per_pass=8)"


def test_what_is_lost_is_said(caplog):
    packsft.pack([[1] * 50, [2] * 5], 16, batch_size=1)
    assert "packed rows: 1 of 2 examples are cut at max_length=16, 34 of 55 tokens are lost" in caplog.text


def test_token_lists_are_rows():
    rows = [[1, 2, 3], [4, 5], (6, 7, 8, 9)]
    labelled = [{"input_ids": row, "labels": list(row)} for row in rows]
    plain, mapped = (packsft.pack(given, 8, batch_size=2, shuffle=False) for given in (rows, labelled))
    ids = [[batch["input_ids"].tolist() for batch in step] for step in plain.loader()]
    assert ids == [[[[1, 2, 3, 4, 5]]], [[[6, 7, 8, 9]]]]
    assert ids == [[batch["input_ids"].tolist() for batch in step] for step in mapped.loader()]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([[1, 2], ["a"]], {}, r"row 1 of the data set: input_ids must be a list of integers, got \['a'\]"),
        ([{"input_ids": [1, 2]}], {}, "row 0 of the data set has no labels"),
        ([[1, 2]], {"batch_size": 0}, "batch_size=0: must be an integer of at least 1"),
        ([[1, 2]], {"strategy": "best"}, "best"),
        ([[1, 2]], {"strategy": "bfd", "tokens_per_pass": 8}, "the packs of strategy='bfd' are the passes"),
        ([[1, 2]], {"loss_normalization": "row"}, "loss_normalization='row' is unknown, expected one of"),
        ([], {}, "the packed data set is empty"),
        ([[1]], {}, "no example of the packed data set has a token to score"),
        ([[1, 99]], {"vocab_size": 9}, "99"),
        ([[1, 2], [[1], [2, 3]]], {}, "row 1 of the data set: input_ids must be a list of integers"),
        ([[1, 2], np.array([1, 2**63 + 5], np.uint64)], {}, "row 1 of the data set: input_ids must be a list of int"),
        ([[1, 2], [3, -5]], {}, "row 1 of the data set: input_ids holds -5"),
        ([[1, 2]], {"max_length": None}, "max_length=None: must be an integer of at least 1"),
        ([[1, 2]], {"batch_size": True}, "batch_size=True: must be an integer"),
        ([[1, 2]], {"seed": "a"}, "seed='a': must be an integer of at least 0"),
        ([[1, 2]], {"tokens_per_pass": 0}, "tokens_per_pass=0: must be an integer of at least 1"),
        ([[1, 2]], {"vocab_size": 0}, "vocab_size=0: must be an integer of at least 1"),
        ([[1, 2]], {"vocab_size": "x"}, "vocab_size='x': must be an integer"),
        ([[1, 2]], {"shuffle": "no"}, "shuffle='no': must be True or False"),
        ([[1, 2]], {"drop_last": True}, "drop_last=True leaves nothing: an epoch has 1 items, and batch_size=2"),
        ([{"input_ids": [1, 2], "labels": [1, 2], "seq_lengths": [1, 1]}], {}, "row 0 of the data set has seq_lengths"),
        (
            Dataset.from_dict({"input_ids": [[1]], "labels": [[1]], "seq_lengths": [[1]]}),
            {},
            "data set has seq_lengths",
        ),
    ],
)
def test_bad_input_is_one_error(rows, options, said):
    with pytest.raises(ValueError, match=said):
        packsft.pack(rows, **{"max_length": 32, "batch_size": 2} | options)


@pytest.mark.parametrize("rows", [np.ones((2, 2), np.int64), torch.ones(2, 2), {1, 2}, "text", iter([[1, 2]]), 3])
def test_rows_of_another_kind_are_refused(rows):
    with pytest.raises(TypeError, match=f"the data set is of the type {type(rows).__name__}, expected a datasets"):
        packsft.pack(rows, 32, batch_size=2)


def test_ranks_that_do_not_exist_are_refused():
    data = packsft.pack([[1, 2]], 32, batch_size=2)
    with pytest.raises(ValueError, match="rank=2 must be at least 0 and below ranks=2"):
        data.loader(2, 2)
    with pytest.raises(ValueError, match="give both, or none"):
        data.loader(1)
    with pytest.raises(ValueError, match=r"ranks=2\.0: must be an integer"):
        data.loader(0, 2.0)


def test_a_batch_says_what_it_holds():
    data = packsft.pack(
        Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "labels": [[-100, 2, 3], [4, 5]]}), 8, batch_size=2
    )
    ((batch,),) = data.loader()
    assert (batch.num_tokens, batch.num_scored, batch.num_documents, sorted(batch.rows)) == (5, 3, 2, [0, 1])
    assert batch["num_items"] == 3
    assert "labels" not in batch  # of which a model that was not prepared would make a loss of its own
    assert data.report.rows()


@pytest.mark.slow
def test_a_loop_under_fsdp2_takes_the_steps_of_one_device(tmp_path):
    model = packsft.prepare(tiny_model("llama", torch.float64, tie_word_embeddings=False))
    loop(model, packsft.pack(token_rows(26), 32, **PACK))
    found = results_of(Path(__file__).parent / "fsdp_tiny.py", 2, tmp_path / "weights")
    for name, value in model.state_dict().items():
        assert error(found[name], value) < 1e-10, name


def test_the_page_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda name: tiny_model("llama"))
    page = (Path(packsft.__file__).parents[1] / "docs" / "own-loops.md").read_text(encoding="utf-8")
    names = {"code": token_rows(12), "chat": token_rows(12, seed=1)}
    exec("".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    assert names["loader"].state_dict() == names["state"]
