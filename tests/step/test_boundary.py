"""What happens when a loss or a weight is not a number, and what SIGTERM leaves."""

import json
import math
import os
import signal
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from runs import config, losses
from runs import trainer as make
from tiny import tiny_model, tiny_tokenizer, token_rows
from transformers import TrainerCallback

from packsft import PackedSFTTrainer
from packsft.step import boundary

NAN = float("nan")


def trainer(tmp_path, bad=(), family="llama", gradient=False, **options):
    """Its loss (or with `gradient`, only the gradient) is not a number in the steps `bad`."""

    class Broken(PackedSFTTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step + 1 not in bad:
                return loss
            return loss + (loss - loss.detach()) * NAN if gradient else loss * NAN

    saves = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    return Broken(
        model=tiny_model(family), args=config(tmp_path, **saves | options), train_dataset=token_rows(24),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip


def saved(tmp_path):
    return sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    ours = trainer(tmp_path, bad=[4], save_total_limit=1)
    with pytest.raises(
        FloatingPointError,
        match=r"after step 4, whose loss is not finite; it took rows \d+, \d+, \d+, \d+ of .* weights model\.embed_",
    ):
        ours.train()
    assert saved(tmp_path) == [3]  # the last good one
    assert all(math.isfinite(loss) for loss in losses(ours)[:3])
    assert all(math.isnan(loss) for loss in losses(ours)[3:])


def test_two_losses_in_a_row_stop_the_run_and_name_the_rows(tmp_path):
    ours = trainer(tmp_path, bad=range(3, 99), save_steps=2, save_total_limit=1)
    seen = []
    collate = ours.data_collator.torch_call
    ours.data_collator.torch_call = lambda items: (
        seen.append(sorted(int(i) for i in items[0].examples)),
        collate(items),
    )[1]
    with pytest.raises(FloatingPointError) as stopped:
        ours.train()
    rows = ", ".join(map(str, seen[2]))
    assert str(stopped.value).startswith(
        f"the loss of steps 3 and 4 is not finite. Step 3 took rows {rows} of the training set."
    )
    assert saved(tmp_path) == [2]
    assert ours.state.global_step == 4


@pytest.mark.parametrize(
    "options",
    [
        {
            "packing_strategy": "bfd",
            "gradient_accumulation_steps": 2,
            "max_length": 12,
            "per_device_train_batch_size": 1,
        },
        {"packing": False, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["bfd", "unpacked"],
)
def test_a_step_of_several_micro_batches_counts_once(options, tmp_path):
    ours = trainer(tmp_path, bad=range(3, 99), save_strategy="no", **options)
    with pytest.raises(FloatingPointError, match="the loss of steps 3 and 4 is not finite"):
        ours.train()
    ignoring = trainer(
        tmp_path,
        bad=[2],
        on_nonfinite="ignore",
        learning_rate=0.0,
        max_grad_norm=0.0,
        **options | {"logging_steps": 2},
        max_steps=2,
    )
    ignoring.train()
    alone = trainer(tmp_path, learning_rate=0.0, **options, max_steps=1)
    alone.train()
    assert losses(ignoring) == pytest.approx(losses(alone), rel=1e-6)  # the mean of what is a number


def test_one_loss_alone_passes_if_the_weights_are_finite(tmp_path):
    class Once(PackedSFTTrainer):  # a loss that is not a number, and gradients that are
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss + NAN if self.state.global_step + 1 == 3 else loss

    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    ours = Once(
        model=tiny_model(), args=config(tmp_path, **saves), train_dataset=token_rows(24),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    ours.train()
    assert ours.state.global_step == 5
    assert [math.isnan(loss) for loss in losses(ours)] == [False, False, True, False, False]


def test_flags_that_are_read_late_stop_the_run_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(boundary, "lag_on", lambda device: 2)  # as on a GPU
    ours = trainer(tmp_path, bad=range(3, 99), save_strategy="no")
    with pytest.raises(FloatingPointError, match="the loss of steps 3 and 4 is not finite"):
        ours.train()
    assert ours.state.global_step == 6
    ours = trainer(tmp_path, bad=range(3, 99), save_steps=4)  # a save reads them before
    with pytest.raises(FloatingPointError, match="the loss of steps 3 and 4 is not finite"):
        ours.train()
    assert (ours.state.global_step, saved(tmp_path)) == (4, [])
    ours = trainer(tmp_path, bad=[5, 6], save_strategy="no", max_steps=6)  # and so does the end
    with pytest.raises(FloatingPointError, match="the loss of steps 5 and 6 is not finite"):
        ours.train()


def test_weights_on_several_devices_are_checked_where_they_are(tmp_path):
    ours = trainer(tmp_path)
    meta = torch.zeros(2, device="meta")  # another device
    assert ours._all_finite([torch.ones(2), torch.ones(3)])
    assert not ours._all_finite([torch.ones(2), torch.tensor([1.0, NAN])])
    with pytest.raises(NotImplementedError):  # it was moved: nothing can be copied out of "meta"
        ours._all_finite([torch.ones(2), meta])


def test_the_padding_of_a_shard_is_no_weight():
    weight = SimpleNamespace(ds_tensor=torch.tensor([1.0, NAN]), ds_numel=3, ds_process_group=None)
    for rank, expected in ((0, 2), (1, 1)):
        with mock.patch("torch.distributed.get_rank", return_value=rank):
            assert len(boundary.local_shard(weight)) == expected


def test_adalora_is_not_skipped(tmp_path):
    from peft import AdaLoraConfig

    with pytest.raises(ValueError, match="on_nonfinite='skip' leaves no gradients, but AdaLoRA"):
        make(tmp_path, peft_config=AdaLoraConfig(total_step=10), on_nonfinite="skip")


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_a_step_that_is_skipped_changes_nothing(gradient, tmp_path):
    """With two good steps around it, the run is the one that never saw it, but for the schedule."""

    def weights(ours):
        return [p.detach().clone() for p in ours.model.parameters()]

    ours = trainer(tmp_path, bad=[2], gradient=gradient, on_nonfinite="skip", max_steps=2, weight_decay=0.1)
    ours.train()
    alone = trainer(tmp_path / "alone", max_steps=1, weight_decay=0.1)
    alone.train()
    assert all(map(torch.equal, weights(ours), weights(alone)))
    assert ours.skipped_steps == 1
    history = [entry for entry in ours.state.log_history if "loss" in entry]
    assert [entry.get("skipped_steps") for entry in history] == [None, 1]


def test_ignored_it_trains_on_and_logs_what_it_is(tmp_path):
    ours = trainer(tmp_path, bad=[2], on_nonfinite="ignore", max_steps=4, max_grad_norm=0.0)
    output = ours.train()
    assert [math.isfinite(loss) for loss in losses(ours)] == [True, False, False, False]
    assert output.training_loss == output.metrics["train_loss"] == pytest.approx(losses(ours)[0])
    assert saved(tmp_path) == [1, 2, 3, 4]


def test_without_the_filter_the_log_says_nan(tmp_path):
    ours = trainer(tmp_path, bad=[2], on_nonfinite="ignore", max_steps=2, logging_steps=2, logging_nan_inf_filter=False)
    ours.train()
    assert math.isnan(losses(ours)[0])


def test_the_end_of_a_run_is_checked_too(tmp_path):
    ours = trainer(tmp_path, bad=[18], save_strategy="no")
    with pytest.raises(FloatingPointError, match="after step 18, whose loss is not finite"):
        ours.train()


def test_a_diverging_run_is_stopped(tmp_path):
    ours = trainer(tmp_path, learning_rate=1e30, save_steps=2, max_grad_norm=0.0)
    with pytest.raises(FloatingPointError):
        ours.train()
    for step in saved(tmp_path):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["global_step"] == step


@pytest.mark.parametrize("ends", ["error", "skip", "saving"])
def test_the_rows_of_all_ranks_are_named(ends, tmp_path, monkeypatch, caplog):
    """The loss of another rank may be the one that is not finite. Here it took rows 98 and 99."""
    monkeypatch.setattr(boundary, "gather_object", lambda rows: [*rows, 99, 98])
    if ends == "skip":
        trainer(tmp_path, bad=[3], on_nonfinite="skip").train()
        assert ", 98, 99 of the training set)" in caplog.text
        return
    with pytest.raises(FloatingPointError, match=r"took rows .*, 98, 99 of the training set"):
        trainer(tmp_path, bad=[3, 4], save_steps=1 if ends == "saving" else 9).train()


# ---- SIGTERM ----


def stopped(tmp_path, at, **options):
    """A run that receives SIGTERM in the step after `at`, and whose script goes on."""

    class Sends(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == at:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        ours = make(
            tmp_path, callbacks=[Sends()], eval_dataset=token_rows(4, seed=3), per_device_train_batch_size=4, **options
        )
        ours.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ours.state.global_step == at + 1
    return ours


def test_sigterm_saves_also_where_only_the_best_is_saved(tmp_path):
    best = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "eval_strategy": "steps", "eval_steps": 1}
    stopped(tmp_path, at=4, learning_rate=0.0, **best)
    assert saved(tmp_path) == [1, 5]


def test_sigterm_within_an_epoch_does_not_evaluate_as_at_its_end(tmp_path):
    ours = stopped(tmp_path, at=4, save_strategy="epoch", eval_strategy="epoch")
    assert saved(tmp_path) == [5]
    assert [entry for entry in ours.state.log_history if "eval_loss" in entry] == []


def test_the_checkpoint_of_sigterm_is_not_deleted_for_the_best_one(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "save_total_limit": 1}
    stopped(tmp_path, at=8, save_strategy="steps", save_steps=4, learning_rate=0.0, **best)
    assert saved(tmp_path) == [4, 9]
