"""A run of exact steps, and how its losses compare with those of another."""

import torch
from runs import config
from tiny import tiny_model, tiny_tokenizer, token_rows

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
