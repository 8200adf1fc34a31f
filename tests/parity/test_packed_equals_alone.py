"""Packed training is the same training: against plain transformers on one document at a time, in float64.

The truth is `documents_alone` of `tests/alone.py`.
"""

import copy
import itertools

import pytest
import torch
from alone import assert_gradients_equal, documents_alone, packed_step
from datasets import Dataset
from numerics import EXACT, assert_accurate, error
from runs import trainer
from tiny import tiny_model, token_rows

pytestmark = pytest.mark.usefixtures("rms_norm_keeps_float64")
# Gemma 2's own attention, the truth here, takes its softmax in float32 (eager: SDPA has no softcap).
TOLERANCE = dict.fromkeys(("gpt2", "opt", "llama", "qwen3", "stablelm"), EXACT) | {"gemma2": 1e-6}


@pytest.mark.parametrize("family", list(TOLERANCE))
def test_loss_and_every_gradient_equal_the_documents_alone_in_float64(family, tmp_path):
    rows, model = token_rows(12), tiny_model(family)
    trainer, loss, grads = packed_step(model, rows, tmp_path, torch.float64)
    exact_loss, exact_grads = documents_alone(model, rows, torch.float64)
    assert trainer.isolation.isolated == (family != "stablelm")  # which drops keyword arguments, and trains padded
    assert error(loss, exact_loss) < TOLERANCE[family]
    assert_gradients_equal(grads, exact_grads, TOLERANCE[family])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_close_to_float64_as_plain_pytorch(dtype, tmp_path):
    # six sets of rows: the error of one loss is luck
    model = tiny_model("llama").to(dtype)
    results = []
    for seed in range(6):
        rows = token_rows(12, seed=seed)
        runs = packed_step(model, rows, tmp_path, dtype)[1:], documents_alone(model, rows, dtype)
        results.append((*runs, documents_alone(model, rows, torch.float64)))
    assert_accurate(*(torch.stack([run[0] for run in runs]) for runs in zip(*results, strict=True)), "loss")
    flat = [torch.cat([g.flatten() for run in runs for g in run[1].values()]) for runs in zip(*results, strict=True)]
    assert_accurate(*flat, "gradients")


@pytest.mark.parametrize(
    "options",
    [
        {"tokens_per_pass": 12},
        {"packing_strategy": "bfd", "max_length": 16},
        {"packing": False},
        {"packing": False, "per_device_train_batch_size": 4},
        {"max_length": 16},
        {"max_length": 64, "per_device_train_batch_size": 3},
        {"max_length": 24, "pad_to_multiple_of": 16},
    ],
    ids=str,
)
def test_the_split_into_packs_and_micro_batches_changes_nothing(options, tmp_path):
    rows, model = token_rows(12), tiny_model("gpt2")
    exact_loss, exact_grads = documents_alone(model, rows, torch.float64)
    _, loss, grads = packed_step(model, rows, tmp_path, torch.float64, **options)
    assert error(loss, exact_loss) < EXACT
    assert_gradients_equal(grads, exact_grads, EXACT)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    # the recomputation runs in the backward, outside of any context of ours
    rows, model = token_rows(12), tiny_model("gpt2")
    _, exact_grads = documents_alone(model, rows, torch.float64)
    for use_reentrant in (False, True):
        _, _, grads = packed_step(
            model, rows, tmp_path, torch.float64,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        )  # fmt: skip
        assert_gradients_equal(grads, exact_grads, EXACT)


def test_a_document_in_the_wrong_place_would_be_seen(tmp_path, monkeypatch):
    # the tolerances above can fail: positions that do not restart are off by more than a thousand times
    from packsft.data.collator import PackingCollator

    packed = PackingCollator._packed

    def positions_run_on(self, documents):
        batch = packed(self, documents)
        return batch | {"position_ids": torch.arange(batch["input_ids"].numel())[None]}

    monkeypatch.setattr(PackingCollator, "_packed", positions_run_on)
    rows, model = token_rows(12), tiny_model("gpt2")
    # the check before the first step would see it, too
    _, loss, _ = packed_step(model, rows, tmp_path, torch.float64, check_packing=False)
    exact_loss, _ = documents_alone(model, rows, torch.float64)
    assert error(loss, exact_loss) > 1e-9


def made_pack(rows, chosen):
    documents = [rows[i] for i in chosen]
    tokens = {key: list(itertools.chain(*(d[key] for d in documents))) for key in ("input_ids", "labels")}
    return tokens | {"seq_lengths": [len(d["labels"]) for d in documents]}


def weights_after_ten_steps(model, dataset, tmp_path, **options):
    run = trainer(
        tmp_path, model=copy.deepcopy(model).to(torch.float64), train_dataset=dataset, learning_rate=1e-3,
        max_steps=10, train_sampling_strategy="sequential", max_grad_norm=1.0, weight_decay=0.01, **options,
    )  # fmt: skip
    run.train()
    assert run.state.global_step == 10
    return dict(run.model.named_parameters())


@pytest.mark.parametrize(("family", "tolerance"), [("gpt2", EXACT), ("llama", 1e-9)])
def test_weights_after_ten_steps_do_not_depend_on_packs_and_micro_batches(family, tolerance, tmp_path):
    # 80 examples, the same 8 in each step: one by one, in a batch, as one pack, as two packs of five and three
    model, rows = tiny_model(family), token_rows(80)
    parts = [part for i in range(0, 80, 8) for part in (range(i, i + 5), range(i + 5, i + 8))]
    packs = Dataset.from_list([made_pack(rows, part) for part in parts])
    one_by_one = weights_after_ten_steps(
        model, rows, tmp_path, packing=False, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    in_a_batch = weights_after_ten_steps(model, rows, tmp_path, packing=False, per_device_train_batch_size=8)
    made = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    one_pack = weights_after_ten_steps(model, packs, tmp_path, per_device_train_batch_size=2, **made)
    two_packs = weights_after_ten_steps(
        model, packs, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, **made
    )
    start = dict(model.named_parameters())
    for name, weight in one_by_one.items():
        # a weight with a gradient of rounding noise only (the key's bias) is moved by Adam in the noise's direction
        if (weight - start[name]).abs().max() == 0 or name.endswith("c_attn.bias"):
            continue
        for other in (in_a_batch, one_pack, two_packs):
            assert error(other[name], weight) < tolerance, name
