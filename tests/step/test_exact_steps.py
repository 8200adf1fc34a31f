"""Exact-step packing: the unpacked run's steps, losses and schedule, however many tokens go through at once."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from runs import config, trainer
from tiny import tiny_model, tiny_tokenizer, token_rows
from transformers import TrainerCallback

from packsft import PackedSFTTrainer


class Recording(PackedSFTTrainer):
    """Adds up what `training_step` returns, by optimizer step: the logged losses are summed in float32."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.step_losses = getattr(self, "step_losses", {})
        self.step_losses[self.state.global_step] = self.step_losses.get(self.state.global_step, 0.0) + loss.double()
        return loss


def run(
    tmp_path, family="gpt2", dtype=torch.float64, rows=None, resume=None, callbacks=None, eval_dataset=None, **more
):
    torch.manual_seed(0)
    ours = Recording(
        model=tiny_model(family, dtype), args=config(tmp_path, **more), callbacks=callbacks, eval_dataset=eval_dataset,
        train_dataset=token_rows(50) if rows is None else rows, processing_class=tiny_tokenizer(),
    )  # fmt: skip
    ours.train(resume_from_checkpoint=resume)
    return ours


def assert_same_losses(ours, unpacked, tolerance):
    assert ours.step_losses.keys() == unpacked.step_losses.keys()
    for step, loss in unpacked.step_losses.items():
        assert abs(ours.step_losses[step] - loss) <= tolerance * abs(loss), step


STEPS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "lr_scheduler_type": "linear"}


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        ("gpt2", torch.float64, 1e-10),
        ("llama", torch.float32, 1e-5),
        pytest.param("gpt2", torch.float32, 1e-5, marks=pytest.mark.slow),
        pytest.param("llama", torch.float64, 1e-10, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_thirty_losses_are_those_of_the_unpacked_run(family, dtype, tolerance, tmp_path):
    # 50 examples, 6 a step, the ninth step of each epoch 2: 30 steps are three epochs and three steps of a fourth.
    # float32: the learning rate of a real run. At 1e-2 AdamW turns the rounding of a zero gradient into whole steps.
    learning_rate = {"learning_rate": 1e-2 if dtype == torch.float64 else 1e-4}
    unpacked = run(tmp_path, family, dtype, packing=False, max_steps=30, **STEPS, **learning_rate)
    assert len(unpacked.step_losses) == 30
    for tokens_per_pass in (12, 40, None):
        ours = run(tmp_path, family, dtype, tokens_per_pass=tokens_per_pass, max_steps=30, **STEPS, **learning_rate)
        assert_same_losses(ours, unpacked, tolerance)


def test_another_order_of_examples_would_be_seen(tmp_path):
    unpacked = run(tmp_path, packing=False, max_steps=3, **STEPS)
    ours = run(tmp_path, max_steps=3, **STEPS, data_seed=1)
    with pytest.raises(AssertionError):
        assert_same_losses(ours, unpacked, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 1},
        {"num_train_epochs": 2.5},
        {"max_steps": 7},
        {"num_train_epochs": 1, "gradient_accumulation_steps": 1},
        {"num_train_epochs": 1, "per_device_train_batch_size": 64},
    ],
    ids=str,
)
def test_steps_schedule_and_every_log_are_those_of_the_unpacked_run(options, tmp_path):
    settings = STEPS | options | {"warmup_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    results = [run(tmp_path, eval_dataset=token_rows(9, seed=3), packing=p, **settings) for p in (False, True)]
    unpacked, ours = results
    assert ours.state.max_steps == unpacked.state.max_steps == ours.state.global_step
    assert ours.packing_report.steps_packed == ours.packing_report.steps_unpacked
    assert len(ours.state.log_history) == len(unpacked.state.log_history)
    for our, their in zip(ours.state.log_history, unpacked.state.log_history, strict=True):
        assert our.keys() == their.keys()
        for key in ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy",
                    "eval_loss", "eval_entropy", "eval_num_tokens", "total_flos"):  # fmt: skip
            if key in their:
                assert our[key] == pytest.approx(their[key], rel=1e-5), key


def test_callbacks_see_the_effective_batch_and_each_step_once(tmp_path):
    events = []

    class Seen(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            events.append(("begin", args.per_device_train_batch_size * args.gradient_accumulation_steps))

        def on_substep_end(self, args, state, control, **kwargs):
            events.append("substep")

        def on_step_end(self, args, state, control, **kwargs):
            events.append(("end", state.global_step))

    ours = run(tmp_path, max_steps=2, tokens_per_pass=12, callbacks=[Seen()], **STEPS)
    assert events == [("begin", 6), ("end", 1), ("begin", 6), ("end", 2)]
    assert (ours.args.per_device_train_batch_size, ours.args.gradient_accumulation_steps) == (2, 3)
    assert ours.get_total_train_batch_size(ours.args) == 6


@pytest.mark.parametrize("stop", [1, 4, 9, 13])
def test_a_run_stopped_in_the_middle_of_an_epoch_resumes_on_the_same_losses(stop, tmp_path):
    # nine steps an epoch: after the first, in the middle, at the end of an epoch, in the middle of the second
    settings = STEPS | {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": stop, "tokens_per_pass": 20}
    whole = run(tmp_path / "whole", **settings)
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / f"checkpoint-{stop}"), **settings)
    assert list(resumed.step_losses) == list(range(stop, 18))
    for step, loss in resumed.step_losses.items():
        assert loss == whole.step_losses[step]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers, tmp_path):
    here, there = (run(tmp_path, max_steps=12, dataloader_num_workers=n, **STEPS) for n in (0, workers))
    assert here.step_losses == there.step_losses


def test_each_epoch_takes_every_example_once(tmp_path):
    ours = trainer(tmp_path, train_dataset=token_rows(50), tokens_per_pass=16, **STEPS)
    epochs = []
    loader = ours.get_train_dataloader()
    for _ in range(2):
        steps = [step["examples"] for step in loader]
        assert sorted(np.concatenate(steps)) == list(range(50))
        epochs.append(np.concatenate(steps).tolist())
    assert epochs[0] != epochs[1]


def test_evaluation_is_packed_in_the_same_way(tmp_path):
    rows, results = token_rows(21, seed=1), []
    for options in ({"tokens_per_pass": 12}, {"tokens_per_pass": 1000}, {"packing": False}, {"eval_packing": False}):
        results.append(trainer(tmp_path, eval_dataset=rows, per_device_eval_batch_size=4, **options).evaluate())
    for result in results[1:]:
        for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
            assert result[key] == pytest.approx(results[0][key], rel=1e-6)


@pytest.mark.parametrize("options", [{"tokens_per_pass": 12}, {"packing": False}, {"eval_packing": False}], ids=str)
@pytest.mark.parametrize("family", ["llama", "stablelm"])
def test_predictions_are_a_row_for_each_example_in_their_order(family, options, tmp_path):
    rows = token_rows(13)
    ours = trainer(tmp_path, model=tiny_model(family), per_device_eval_batch_size=5, **options)
    output = ours.predict(rows)
    assert output.predictions.shape == (*output.label_ids.shape, 24)
    assert len(output.predictions) == len(rows)
    for row, logits, labels in zip(rows, output.predictions, output.label_ids, strict=True):
        length = len(row["input_ids"])
        with torch.no_grad():
            alone = ours.model(torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(torch.from_numpy(logits[:length]), alone, rtol=1e-4, atol=1e-5)
        assert labels[1:length].tolist() == row["labels"][1:]
        assert (labels[length:] == -100).all()


def scored(rows):
    return sum(sum(x != -100 for x in row["labels"][1:]) for row in rows)


def test_predictions_of_padded_passes_lie_below_each_other(tmp_path):
    rows = token_rows(21)
    ours = trainer(tmp_path, model=tiny_model("stablelm"), eval_dataset=rows, tokens_per_pass=24)
    output = ours.predict(ours.eval_dataset)
    assert output.predictions.shape == (21, max(len(row["input_ids"]) for row in rows), 24)
    assert (output.label_ids != -100).sum() == scored(rows)


def test_metrics_can_have_the_inputs(tmp_path):
    rows, seen = token_rows(9), []

    def compute_metrics(prediction):
        seen.append((prediction.inputs, prediction.label_ids))
        return {}

    ours = trainer(
        tmp_path, eval_dataset=rows, tokens_per_pass=12, compute_metrics=compute_metrics, include_for_metrics=["inputs"]
    )
    ours.evaluate()
    ((inputs, labels),) = seen
    assert inputs.shape == labels.shape == (9, max(len(row["input_ids"]) for row in rows))
    assert (inputs[labels != -100] == labels[labels != -100]).all()


def test_a_mixture_of_experts_averages_its_auxiliary_loss_over_the_passes(tmp_path):
    # all the same rows: whatever the passes, the router sees the same tokens in each
    rows = Dataset.from_list([{"input_ids": [3, 4, 5, 6, 7], "labels": [3, 4, 5, 6, 7]}] * 8)
    options = {"per_device_train_batch_size": 8, "max_steps": 2, "router_aux_loss_coef": 0.5}
    few, many = (
        run(tmp_path, "mixtral", torch.float32, rows=rows, tokens_per_pass=tokens_per_pass, **options)
        for tokens_per_pass in (40, 10)
    )
    assert_same_losses(many, few, 1e-5)


def test_input_tokens_are_counted_over_all_passes(tmp_path):
    counts = []
    for options in ({"packing": False}, {"tokens_per_pass": 12}):
        ours = run(tmp_path, max_steps=3, include_num_input_tokens_seen="all", **STEPS, **options)
        counts.append(ours.state.num_input_tokens_seen)
    assert counts[0] == counts[1] > 0


def test_checkpoints_and_callbacks_keep_the_arguments_of_the_user(tmp_path):
    class Clips(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.max_grad_norm = 123.0

    ours = run(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, callbacks=[Clips()], **STEPS)
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    for args in (saved, ours.args):
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 3)
        assert args.max_grad_norm == 123.0


def test_a_model_that_cannot_be_packed_takes_the_same_steps_on_rows_of_similar_length(tmp_path):
    settings = STEPS | {"max_steps": 4}
    unpacked = run(tmp_path, "stablelm", packing=False, **settings)
    ours = run(tmp_path, "stablelm", tokens_per_pass=24, **settings)
    assert not ours.isolation.isolated
    assert_same_losses(ours, unpacked, 1e-10)
    for step in ours.get_train_dataloader():
        assert all(batch["input_ids"].numel() <= 24 for batch in step["passes"])


# ---- memory ----


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


def test_weights_that_change_within_a_backward_are_refused(tmp_path):
    model = tiny_model("llama")
    model.model.norm.weight.register_post_accumulate_grad_hook(lambda weight: None)
    with pytest.raises(ValueError, match=r"^model.norm.weight has a hook that runs after each backward"):
        trainer(tmp_path, model=model).train()
    trainer(tmp_path, model=model, packing=False, max_steps=1).train()


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


# ---- what the loss is the mean of ----


def test_examples_count_the_same_where_the_loss_is_their_mean(tmp_path):
    # the truth, row by row: the mean over a row's scored tokens, then over rows
    rows, model = token_rows(12), tiny_model("gpt2", torch.float64)
    truth = 0.0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        truth += torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"])[1:]).item() / 12
    for options in (
        {"per_device_train_batch_size": 12, "tokens_per_pass": 16},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "packing": False},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 99, "packing_strategy": "bfd"},
    ):
        ours = run(
            tmp_path, rows=rows, eval_dataset=rows, loss_normalization="example", num_train_epochs=1,
            learning_rate=0.0, **options,
        )  # fmt: skip
        assert list(ours.step_losses) == [0]
        assert ours.step_losses[0].item() == pytest.approx(truth, rel=1e-12)
        assert ours.evaluate()["eval_loss"] == pytest.approx(truth, rel=1e-12)
    by_token = run(tmp_path, rows=rows, num_train_epochs=1, per_device_train_batch_size=12)
    assert abs(by_token.step_losses[0].item() - truth) > 1e-6


def test_the_parts_of_a_split_example_weigh_as_much_as_the_whole(tmp_path):
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in (list(range(3, 13)), [3, 4, 5])])
    ours = trainer(
        tmp_path, train_dataset=rows, max_length=4, packing_strategy="bfd_split", loss_normalization="example",
        eval_dataset=rows, per_device_train_batch_size=9,
    )  # fmt: skip
    (batch,) = ours.get_train_dataloader()
    # cut at 4 and 8, and nothing predicts the first token of a part: 3 + 3 + 1 of the ten are scored, 2 of the three
    assert sorted(batch["loss_weights"].tolist()) == sorted([1 / 7] * 7 + [1 / 2] * 2)
    assert batch["num_items"] == pytest.approx(2, rel=1e-15)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True drops a micro-batch"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy='batch_rebalance' deals examples"),
        ({"tokens_per_pass": 0}, "tokens_per_pass=0: expected an integer of at least 1, 'auto' or None"),
        ({"tokens_per_pass": "most"}, "tokens_per_pass='most': expected"),
        (
            {"loss_normalization": "tokens"},
            "loss_normalization='tokens' is unknown, expected one of .'token', 'example'",
        ),
    ],
    ids=str,
)
def test_bad_settings_are_named(options, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"packing_strategy": "bfd", "tokens_per_pass": 64},
            "tokens_per_pass=64: no effect on a packing_strategy",
        ),
        (
            {"dataset_kwargs": {"skip_prepare_dataset": True}, "overlong": "drop"},
            "overlong='drop': no effect on packs of your own",
        ),
    ],
    ids=["tokens_per_pass", "overlong"],
)
def test_settings_without_an_effect_are_named(options, named, tmp_path, caplog):
    trainer(tmp_path, **options)
    assert named in caplog.text


def test_passes_cannot_be_measured_under_deepspeed(tmp_path):
    args = config(tmp_path, tokens_per_pass="auto")
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="tokens_per_pass='auto' does not work under DeepSpeed"):
        trainer(tmp_path, args=args)


def test_auto_find_batch_size_leaves_the_step_as_it_is(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    settings = STEPS | {"max_steps": 3, "tokens_per_pass": 24}
    whole = run(tmp_path, **settings)
    failing_in_pass(1, monkeypatch)
    ours = run(tmp_path, auto_find_batch_size=True, **settings)
    assert not ours.args.auto_find_batch_size
    assert "auto_find_batch_size=True: no effect on packing_strategy='step'" in caplog.text
    assert_same_losses(ours, whole, 1e-10)
