"""The passes of a step: smaller ones if memory runs out, and what fits in memory. Nothing is lost."""

import logging

import pytest
import torch
from runs import trainer
from step_runs import STEPS, assert_same_losses, run
from tiny import token_rows
from transformers import TrainerCallback

from packsft import PackedSFTTrainer


def failing_in_pass(number, monkeypatch, above=0):
    """The pass of that number (from 0) runs out of memory, and so does each one with more than `above` tokens later."""
    compute_loss, seen = PackedSFTTrainer.compute_loss, []

    def compute(self, model, inputs, *args, **kwargs):
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        if self.model.training:
            seen.append(inputs["num_tokens"])
            if len(seen) == number + 1 or (len(seen) > number and inputs["num_tokens"] > above > 0):
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(PackedSFTTrainer, "compute_loss", compute)
    return seen


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (0, 0),
        (2, 0),
        (7, 0),
        (1, 1),
        *(pytest.param(*slow, marks=pytest.mark.slow) for slow in [(1, 0), (0, 1), (2, 1), (7, 1)]),
    ],
)
def test_a_step_out_of_memory_is_taken_again_with_half_losing_nothing(number, workers, tmp_path, monkeypatch, caplog):
    settings = STEPS | {"max_steps": 6, "tokens_per_pass": 24, "dataloader_num_workers": workers}
    whole = run(tmp_path, **settings)
    seen = failing_in_pass(number, monkeypatch, above=12)
    ours = run(tmp_path, **settings)
    assert_same_losses(ours, whole, 1e-10)
    assert "the step runs again" in caplog.text
    assert max(seen[number + 2 :]) <= 12
    for our, their in zip(ours.state.log_history, whole.state.log_history, strict=True):
        for key in ("num_tokens", "entropy", "mean_token_accuracy", "grad_norm"):
            assert (key in our) == (key in their)
            assert key not in our or our[key] == pytest.approx(their[key], rel=1e-9)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_an_evaluation_out_of_memory_is_taken_again_too(stream, workers, tmp_path, monkeypatch, caplog):
    rows = token_rows(20, seed=5)
    settings = {"per_device_eval_batch_size": 8, "tokens_per_pass": 24, "dataloader_num_workers": workers}
    ours = trainer(tmp_path, eval_dataset=rows.to_iterable_dataset() if stream else rows, **settings)
    expected, predicted = ours.evaluate(), None if stream else ours.predict(ours.eval_dataset)
    compute_loss, seen = PackedSFTTrainer.compute_loss, []

    def compute(self, model, inputs, *args, **kwargs):
        seen.append(inputs["num_tokens"])
        result = compute_loss(self, model, inputs, *args, **kwargs)
        if len(seen) > 2 and inputs["num_tokens"] > 12:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(PackedSFTTrainer, "compute_loss", compute)
    again = ours.evaluate()
    assert "the step runs again" in caplog.text
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert again[key] == pytest.approx(expected[key], rel=1e-6)
    assert ours._passes.tokens_per_pass == 24  # of training
    seen.clear()
    ours.evaluate()
    assert max(seen) <= 12  # the smaller limit is kept
    if predicted is not None:
        assert (ours.predict(ours.eval_dataset).label_ids != -100).sum() == (predicted.label_ids != -100).sum()


def test_out_of_memory_on_one_of_several_ranks_names_what_to_set(tmp_path, monkeypatch):
    # the rank whose pass of five short documents is too much says so, however long another rank's document
    ours = trainer(tmp_path)
    monkeypatch.setattr(type(ours.accelerator), "num_processes", 2)
    passes = [ours.data_collator([{"input_ids": [3] * 5, "labels": [3] * 5}] * count) for count in (1, 5)]
    with pytest.raises(torch.OutOfMemoryError, match=r"a pass of 25 tokens .* rank 0.* set tokens_per_pass=12"):
        ours._passes._smaller(passes, 32, torch.OutOfMemoryError("CUDA out of memory."))


def test_other_errors_of_a_pass_are_not_taken_for_memory(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(PackedSFTTrainer, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="something else"):
        run(tmp_path, max_steps=1, **STEPS)


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 8}], ids=str)
def test_a_document_too_long_for_the_memory_is_named(options, tmp_path, monkeypatch):
    failing_in_pass(0, monkeypatch, above=1)
    with pytest.raises(torch.OutOfMemoryError, match=r"a document of \d+ tokens is too much .* even alone"):
        run(tmp_path, max_steps=1, **STEPS, **options)


def test_a_step_that_others_came_before_is_not_taken_again(tmp_path, monkeypatch):
    class Accumulates(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            args.gradient_accumulation_steps = 2

    failing_in_pass(3, monkeypatch, above=12)  # in the second of two steps that are one
    with pytest.raises(torch.OutOfMemoryError, match="would lose the gradients of the one before"):
        run(tmp_path, max_steps=2, callbacks=[Accumulates()], tokens_per_pass=24, per_device_train_batch_size=6)


def test_auto_find_batch_size_leaves_the_step_as_it_is(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    settings = STEPS | {"max_steps": 3, "tokens_per_pass": 24}
    whole = run(tmp_path, **settings)
    failing_in_pass(1, monkeypatch)
    ours = run(tmp_path, auto_find_batch_size=True, **settings)
    assert not ours.args.auto_find_batch_size
    assert "auto_find_batch_size=True: no effect on packing_strategy='step'" in caplog.text
    assert_same_losses(ours, whole, 1e-10)


def test_auto_measures_and_trains_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("packsft.step.passes.MEASURED_TOKENS", 128)
    rows = token_rows(40, max_length=200)
    settings = {"max_length": 128, "per_device_train_batch_size": 8, "max_steps": 4, "rows": rows}
    unpacked = run(tmp_path, packing=False, **settings)
    ours = run(tmp_path, tokens_per_pass="auto", **settings)
    assert "tokens_per_pass='auto': the largest step fits in one pass of" in caplog.text
    assert_same_losses(ours, unpacked, 1e-10)
    logged = [entry["num_tokens"] for entry in ours.state.log_history if "num_tokens" in entry]
    assert logged == [entry["num_tokens"] for entry in unpacked.state.log_history if "num_tokens" in entry]


@pytest.mark.parametrize("room", [0, 10_000], ids=["little memory", "memory for a step"])
def test_auto_turns_checkpointing_off_where_a_step_fits_without(room, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("packsft.step.passes.MEASURED_TOKENS", 16)
    ran, forwards, layers = [], [], []

    def fit_tokens(run, small, large, device, to_come):
        run(small)
        ran.append(any(layer.gradient_checkpointing for layer in layers))
        return small + (room if len(ran) == 1 else 1)

    monkeypatch.setattr("packsft.step.passes.fit_tokens", fit_tokens)
    options = {"rows": token_rows(24), "per_device_train_batch_size": 8, "max_steps": 2, "family": "llama"}
    plain = run(tmp_path, tokens_per_pass=1000, **options)

    class Watches(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            layers.extend(model.model.layers)
            layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(len(ran)))

    options |= {"tokens_per_pass": "auto", "gradient_checkpointing": True}
    ours = run(tmp_path, callbacks=[Watches()], **options)
    assert ran == ([False] if room else [False, True])
    trained = forwards.count(len(ran))
    assert trained == 2 if room else trained > 4
    assert ("without gradient checkpointing, which is turned off" in caplog.text) == bool(room)
    assert_same_losses(ours, plain, 1e-10)
    if room:  # and on again where it does not fit after all
        ran.clear()
        seen = failing_in_pass(2, monkeypatch)
        assert_same_losses(run(tmp_path, **options), plain, 1e-10)
        assert "gradient checkpointing is turned on again, and the step runs again" in caplog.text
        assert seen[2] == seen[3]  # the same pass


def test_checkpointing_that_auto_turned_off(tmp_path, monkeypatch, caplog):
    """An evaluation leaves it as it is, the next run turns it off again, and on several ranks it is named."""
    ours = trainer(tmp_path, gradient_checkpointing=True, tokens_per_pass=24, max_steps=1, eval_dataset=token_rows(9))
    layers = list(ours.model.model.layers)
    ours._passes._unchecked = layers
    ours.train()
    assert not any(layer.gradient_checkpointing for layer in layers)
    compute_loss, seen = PackedSFTTrainer.compute_loss, []

    def compute(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(PackedSFTTrainer, "compute_loss", compute)
    ours.evaluate()
    assert "turned on again" not in caplog.text
    assert not any(layer.gradient_checkpointing for layer in layers)
    monkeypatch.setattr(type(ours.accelerator), "num_processes", 2)
    passes = [ours.data_collator([{"input_ids": [3] * 5, "labels": [3] * 5}] * 5)]
    with pytest.raises(torch.OutOfMemoryError, match=r"=12; .* has turned gradient checkpointing off"):
        ours._passes._smaller(passes, 32, torch.OutOfMemoryError("CUDA out of memory."))


def test_the_line_through_two_peaks_is_that_of_the_memory(monkeypatch):
    from packsft.step import memory

    # a pass that takes 1 MB and 2,000 bytes a token, on a device with 100 MB of which 10 are still to come
    ran = []
    monkeypatch.setattr(memory, "_peak_above_start", lambda run, tokens, device: 1_000_000 + 2_000 * tokens)
    monkeypatch.setattr(memory, "_free", lambda device: 100_000_000)
    fitting = memory.fit_tokens(ran.append, 1024, 2048, torch.device("cpu"), to_come=10_000_000)
    assert fitting == (0.9 * 100e6 - 10e6 - 1e6) // 2000
    assert ran == []

    def out_of_memory(run, tokens, device):
        if tokens > 1024:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 1

    monkeypatch.setattr(memory, "_peak_above_start", out_of_memory)
    assert memory.fit_tokens(ran.append, 1024, 2048, torch.device("cpu"), to_come=0) == 1024


def test_the_peak_of_a_process_is_measured_within_a_tenth():
    from packsft.step import memory

    megabytes = 64

    def run(tokens):
        torch.ones(megabytes << 20, dtype=torch.uint8)

    peak = memory._peak_above_start(run, 0, torch.device("cpu"))
    assert 0.9 * megabytes < peak / 2**20 < 1.1 * megabytes
