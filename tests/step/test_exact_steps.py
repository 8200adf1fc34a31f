"""Exact-step packing: the unpacked run's steps, losses and schedule, however many tokens go through at once."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from runs import config, trainer
from step_runs import STEPS, assert_same_losses, run
from tiny import tiny_model, token_rows
from transformers import TrainerCallback


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


def test_weights_that_change_within_a_backward_are_refused(tmp_path):
    model = tiny_model("llama")
    model.model.norm.weight.register_post_accumulate_grad_hook(lambda weight: None)
    with pytest.raises(ValueError, match=r"^model.norm.weight has a hook that runs after each backward"):
        trainer(tmp_path, model=model).train()
    trainer(tmp_path, model=model, packing=False, max_steps=1).train()


def test_passes_cannot_be_measured_under_deepspeed(tmp_path):
    args = config(tmp_path, tokens_per_pass="auto")
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="tokens_per_pass='auto' does not work under DeepSpeed"):
        trainer(tmp_path, args=args)
