"""What only a card can confirm: a training step on it waits for nothing, and packing changes nothing there either."""

from typing import Any

import pytest
import torch
from alone import assert_gradients_equal, documents_alone, packed_step
from runs import losses, trainer
from tiny import tiny_model, token_rows
from torch._dynamo.utils import counters
from transformers import TrainerCallback

pytestmark = pytest.mark.gpu


class NoWaiting(TrainerCallback):
    """From the second step on (the first sets things up), whatever makes the host wait for the device raises."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            torch.cuda.set_sync_debug_mode("error")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += torch.cuda.get_sync_debug_mode() != 0
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_training_step_never_waits_for_the_device(family, tmp_path):
    callback = NoWaiting()
    ours = trainer(
        tmp_path, tiny_model(family, head_dim=16), bf16=True, max_steps=3, gradient_accumulation_steps=2, use_cpu=False,
        callbacks=[callback],
    )  # fmt: skip
    try:
        ours.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert callback.steps == 2


def test_packed_losses_are_those_of_examples_alone(tmp_path):
    """In float32, through per-document SDPA: the same 24 examples in a step, packed into one row or one by one."""
    runs = []
    for packing in (True, False):
        ours = trainer(
            tmp_path, packing=packing, gradient_accumulation_steps=24, per_device_train_batch_size=1, max_length=512,
            max_steps=1, use_cpu=False,
        )  # fmt: skip
        ours.train()
        runs.append(losses(ours)[0])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


@pytest.mark.usefixtures("rms_norm_keeps_float64")
@pytest.mark.parametrize("options", [{}, {"packing_strategy": "bfd"}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt"])
def test_a_step_on_the_card_is_that_of_the_documents_alone_on_the_cpu(family, options, tmp_path):
    model, rows = tiny_model(family, torch.float64), token_rows(8)
    loss, exact = documents_alone(model, list(rows))
    _, ours, grads = packed_step(model, rows, tmp_path, use_cpu=False, per_device_train_batch_size=8, **options)
    assert float(ours) == pytest.approx(float(loss), rel=1e-12)
    assert_gradients_equal(grads, exact, 1e-10)


def test_compiled_layers_are_compiled_once_for_packs_of_any_size(tmp_path):
    """As wide and long as models that are trained: Inductor then considers kernels that it does not for small ones."""
    wide = {"hidden_size": 2048, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}
    model = tiny_model("llama", torch.bfloat16, **wide)
    ours = trainer(tmp_path, model, bf16=True, compile_layers=True, use_cpu=False)
    torch._dynamo.reset()
    counters.clear()
    for lengths in ([4096], [1000, 2000, 1090], [5, 295], [8192]):
        row = {"input_ids": [5] * sum(lengths), "seq_lengths": lengths}
        batch = ours._prepare_inputs(ours.data_collator([row]))
        ours.compute_loss(model.train(), batch).backward()
    assert counters["stats"]["unique_graphs"] == 1
