"""A loop of one's own, with `pack` and `prepare`, takes the steps of the trainer."""

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from launch import results_of
from numerics import error
from peft import LoraConfig, get_peft_model
from runs import trainer
from tiny import tiny_model, token_rows

import packsft

STEP = {"per_device_train_batch_size": 6, "tokens_per_pass": 40}
PACK = {"batch_size": 6, "tokens_per_pass": 40}


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def loop(model, data, epochs=2, **options):
    """The losses of a plain loop."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    loader = data.loader(padded=model.packing.padded, **options)
    for _ in range(epochs):
        for step in loader:
            loss = 0.0
            for batch in step:
                part = model(**batch).loss
                part.backward()
                loss += float(part.detach())
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss)
    return found


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


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=24, hidden_size=32, n_layer=2, n_head=4)).double()


def test_so_does_one_with_packs(tmp_path):
    model = tiny_model("llama", torch.float64)
    rows, own = token_rows(26), copy.deepcopy(model)
    theirs = of_trainer(tmp_path, model, rows, packing_strategy="bfd", per_device_train_batch_size=2)
    found = loop(packsft.prepare(own), packsft.pack(rows, 32, batch_size=2, strategy="bfd"))
    assert found == pytest.approx(logged(theirs), rel=1e-6)
    assert error(weights(own), weights(model)) < 1e-10


def test_so_does_one_with_a_stream(tmp_path):
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
        next(iter([list(first)]))  # the first epoch
        steps = iter(first)
        before = rows_of([next(steps) for _ in range(stop)])
        then = data.loader(num_workers=1)
        then.load_state_dict(first.state_dict())
        assert before + rows_of(then) == whole[1]
        assert then.epoch == 2


def test_a_state_fits_another_batch_size():
    data, larger = (packsft.pack(token_rows(26), 32, batch_size=size) for size in (4, 8))
    first = data.loader()
    steps = iter(first)
    before = rows_of([next(steps), next(steps)])
    then = larger.loader()
    then.load_state_dict(first.state_dict())
    assert sorted(itertools.chain(*before, *rows_of(then))) == list(range(26))


def test_a_stream_goes_on_where_it_was():
    data = packsft.pack(token_rows(26).to_iterable_dataset(), 32, batch_size=4)
    lengths = [[batch.num_tokens for batch in step] for step in data.loader()]
    first = data.loader()
    steps = iter(first)
    before = [[batch.num_tokens for batch in next(steps)] for _ in range(2)]
    then = data.loader()
    then.load_state_dict(first.state_dict())
    assert before + [[batch.num_tokens for batch in step] for step in then] == lengths
    with pytest.raises(ValueError, match="num_workers=2: workers have read a stream ahead"):
        data.loader(num_workers=2).state_dict()


def test_a_state_of_other_rows_is_refused():
    state = packsft.pack(token_rows(26), 32, batch_size=4).loader().state_dict()
    with pytest.raises(ValueError, match="they are other rows, or packed in another way"):
        packsft.pack(token_rows(25), 32, batch_size=4).loader().load_state_dict(state)


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
    with pytest.raises(FileExistsError, match="is not empty"):
        data.save(tmp_path / "packed")


def test_a_folder_that_was_changed_is_refused(tmp_path):
    data = packsft.pack(token_rows(26), 32, batch_size=4)
    data.save(tmp_path / "packed")
    packsft.pack(token_rows(25), 32, batch_size=4).save(tmp_path / "other")
    (tmp_path / "packed" / "plan.npz").write_bytes((tmp_path / "other" / "plan.npz").read_bytes())
    with pytest.raises(ValueError, match="holds other rows, or another plan, than were saved"):
        packsft.load(tmp_path / "packed")
    (tmp_path / "other" / "packsft.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"packsft\.json is missing"):
        packsft.load(tmp_path / "other")


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
        ([{"input_ids": [1, 2]}], {}, "row 0 of the data set: labels must be a list of integers"),
        ([[1, 2]], {"batch_size": 0}, "batch_size=0: must be an integer of at least 1"),
        ([[1, 2]], {"strategy": "best"}, "best"),
        ([[1, 2]], {"strategy": "bfd", "tokens_per_pass": 8}, "the packs of strategy='bfd' are the passes"),
        ([[1, 2]], {"loss_normalization": "row"}, "loss_normalization='row': must be one of token, example"),
        ([], {}, "the train data set is empty"),
        ([[1]], {}, "no example of the train data set has a token to score"),
        ([[1, 99]], {"vocab_size": 9}, "99"),
    ],
)
def test_bad_input_is_one_error(rows, options, said):
    with pytest.raises(ValueError, match=said):
        packsft.pack(rows, 32, **{"batch_size": 2} | options)


def test_ranks_that_do_not_exist_are_refused():
    data = packsft.pack([[1, 2]], 32, batch_size=2)
    with pytest.raises(ValueError, match="rank=2 must be at least 0 and below ranks=2"):
        data.loader(2, 2)
    with pytest.raises(ValueError, match="give both, or none"):
        data.loader(1)
    with pytest.raises(TypeError, match="got int"):
        packsft.pack(3, 32, batch_size=2)


def test_a_batch_says_what_it_holds():
    data = packsft.pack(
        Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "labels": [[-100, 2, 3], [4, 5]]}), 8, batch_size=2
    )
    ((batch,),) = data.loader()
    assert (batch.num_tokens, batch.num_scored, batch.num_documents, sorted(batch.rows)) == (5, 3, 2, [0, 1])
    assert batch["num_items"] == 3
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
