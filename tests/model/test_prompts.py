"""Prompt learning of PEFT: padded rows, with the gradients of each document alone (float64) and of TRL."""

import copy

import numpy as np
import pytest
import torch
from alone import TRL_TOLERANCE, assert_gradients_equal, documents_alone, moved, packed_step, trl_step
from numerics import EXACT, error
from peft import CartridgeConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from runs import losses, trainer
from tiny import tiny_model, tiny_tokenizer, token_rows
from trl import SFTConfig, SFTTrainer

from packsft import PackedSFTTrainer

pytestmark = pytest.mark.usefixtures("rms_norm_keeps_float64")

PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PROMPTS = {
    "prompt tuning": PromptTuningConfig(**PROMPT),
    "P-tuning": PromptEncoderConfig(**PROMPT, encoder_hidden_size=8),
    "prefix tuning": PrefixTuningConfig(**PROMPT),
    "projected prefix": PrefixTuningConfig(**PROMPT, prefix_projection=True, encoder_hidden_size=8),
    "cartridge": CartridgeConfig(**PROMPT),
}


def prompted(kind, family="llama", dtype=torch.float64):
    torch.manual_seed(0)  # PEFT draws it
    return moved(get_peft_model(tiny_model(family, dtype), copy.deepcopy(PROMPTS[kind])))


def rows_with_prompts(count):
    """TRL adds the loss of a row's first token, which the last virtual one predicts, but does not count it."""
    return token_rows(count).filter(lambda row: row["labels"][0] == -100)


@pytest.mark.parametrize(
    "options", [{}, {"tokens_per_pass": 40}, {"packing": False}, {"packing_strategy": "bfd"}], ids=str
)
@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_is_trained_on_padded_rows_as_on_each_document_alone(kind, options, tmp_path, caplog):
    model, rows = prompted(kind), token_rows(12)
    ours, loss, grads = packed_step(model, rows, tmp_path, torch.float64, check_packing="off", **options)
    notice = (
        f"on padded rows instead of packed ones, with the same examples in each step: {type(PROMPTS[kind]).__name__}"
    )
    assert notice in caplog.text
    assert ("the first token of an example is not scored" in caplog.text) == (ours._prepared.virtual_tokens > 0)
    exact_loss, exact = documents_alone(model, rows, torch.float64)
    assert error(loss, exact_loss) < EXACT
    assert_gradients_equal(grads, exact, EXACT)


@pytest.mark.parametrize("kind", PROMPTS)
def test_gradients_of_a_prompt_equal_trls(kind, tmp_path):
    model, rows = prompted(kind), rows_with_prompts(16)
    loss, grads = trl_step(model, rows, tmp_path)
    exact_loss, exact = documents_alone(model, rows, torch.float64)
    assert error(loss, exact_loss) < TRL_TOLERANCE
    assert_gradients_equal(grads, exact, TRL_TOLERANCE)


@pytest.mark.parametrize("family", ["mixtral", "stablelm", "gemma2"])
def test_prompts_on_other_models_are_trained_as_by_trl(family, tmp_path):
    options = {
        "packing": False,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "max_steps": 3,
        "save_strategy": "no",
    }
    args = {"max_length": 32, "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none"}
    logs = []
    for cls in (SFTTrainer, PackedSFTTrainer):
        run = cls(
            prompted("prompt tuning", family, torch.float32),
            SFTConfig(str(tmp_path), **args, **options, logging_steps=1),
            train_dataset=rows_with_prompts(16), processing_class=tiny_tokenizer(),
        )  # fmt: skip
        run.train()
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in run.state.log_history if "loss" in entry])
    assert np.allclose(*logs, rtol=2e-5)


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_logits_of_a_prompted_model_are_those_of_the_tokens(kind, tmp_path):
    shapes = []
    ours = trainer(
        tmp_path, model=prompted(kind), eval_dataset=token_rows(6), train_dataset=token_rows(6), eval_packing=False,
        compute_metrics=lambda it: shapes.append((it.predictions.shape[:2], it.label_ids.shape)) or {},
    )  # fmt: skip
    ours.evaluate()
    assert shapes[0][0] == shapes[0][1]


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_run_resumes_and_the_best_prompt_comes_back(kind, tmp_path):
    options = {
        "train_dataset": token_rows(12), "eval_dataset": token_rows(6, seed=1), "per_device_train_batch_size": 4,
        "save_strategy": "steps", "save_steps": 1, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 1.0,
    }  # fmt: skip
    whole = trainer(tmp_path, model=prompted(kind), **options)
    whole.train()
    evaluated = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert min(evaluated) < max(evaluated)
    assert whole.evaluate()["eval_loss"] == min(evaluated)
    resumed = trainer(tmp_path, model=prompted(kind), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert losses(resumed) == losses(whole)


def test_a_prompt_that_peft_would_leave_out_and_a_model_that_must_pack_are_refused(tmp_path):
    with pytest.raises(ValueError, match="PromptTuningConfig has task_type=None, expected 'CAUSAL_LM'"):
        trainer(tmp_path, peft_config=PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ValueError, match="cannot be trained on packed documents: PromptTuningConfig puts"):
        trainer(tmp_path, model=prompted("prompt tuning"), on_unpackable="error")
    with pytest.raises(ValueError, match="PromptTuningConfig trains padded rows: there is nothing to prove"):
        trainer(tmp_path, model=prompted("prompt tuning")).check_packing()
    routed = prompted("prefix tuning", "mixtral", torch.float32)
    with pytest.raises(ValueError, match=r"PrefixTuningConfig .* the router's loss .* set router_aux_loss_coef=0\.0"):
        trainer(tmp_path, model=routed)
    without = trainer(tmp_path, model=routed, router_aux_loss_coef=0.0, max_steps=1)
    without.train()
    assert losses(without)
