"""A run of the trainer: steps, metrics, evaluation, checkpoints, adapters, and no reading of the device."""

import gc
import json
import math
import multiprocessing

import pytest
import torch
from datasets import Dataset
from packsft_kernels import LossOptions
from runs import DEFAULTS, losses, trainer
from tiny import tiny_model, tiny_tokenizer, token_rows
from tiny_models import tiny_model as tiny_family
from trl import SFTConfig, SFTTrainer

from packsft import PackedSFTTrainer
from packsft.config import _say_no_accelerator
from packsft.model.head import install_head
from packsft.notices import never_fires


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"num_train_epochs": 2}], ids=str)
def test_the_steps_announced_are_the_steps_made(tmp_path, options, caplog):
    ours = trainer(tmp_path, packing_strategy="bfd", per_device_train_batch_size=1, **{"num_train_epochs": 1} | options)
    packs, accumulation = len(ours.train_dataset), options.get("gradient_accumulation_steps", 1)
    expected = math.ceil(packs / accumulation) * options.get("num_train_epochs", 1)
    ours.train()
    assert ours.state.global_step == expected == ours.packing_report.steps_packed
    assert f"optimizer steps: {expected} (unpacked it would be {ours.packing_report.steps_unpacked}" in caplog.text
    assert 'packing_strategy="step" keeps the unpacked number' in caplog.text


def test_what_never_fires_is_said(tmp_path):
    # 14,250 examples packed five to a row leave some 43 to 46 steps of 64: eval_steps=200 and save_steps=500 never come
    args = SFTConfig(
        str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=200, save_steps=500, logging_steps=10
    )
    notices = never_fires(args, 46, has_eval_dataset=True)
    assert any("eval_steps=200 is more than the 46 steps: only the last is evaluated" in notice for notice in notices)
    assert any("save_steps=500 is more than the 46 steps" in notice for notice in notices)
    assert never_fires(args, 500, has_eval_dataset=True) == []


@pytest.mark.parametrize("on", [True, False])
def test_layers_that_are_computed_again_are_said(tmp_path, caplog, on):
    trainer(tmp_path, gradient_checkpointing=on, use_cpu=True, max_steps=1).train()
    assert caplog.text.count("layers are computed again in the backward") == on


@pytest.mark.parametrize(
    ("options", "notice"),
    [
        ({"eval_strategy": "no"}, 'eval_strategy="no": it is never evaluated'),
        ({"warmup_steps": 46}, "the warm-up of 46 steps is as long as the run"),
        ({"logging_steps": 47}, "logging_steps=47 is more than the 46 steps"),
    ],
)
def test_each_setting_that_never_fires_is_named(tmp_path, options, notice):
    args = SFTConfig(str(tmp_path), use_cpu=True, **{"eval_strategy": "epoch", "save_strategy": "no"} | options)
    assert any(notice in said for said in never_fires(args, 46, has_eval_dataset=True))


def test_metrics_are_those_of_trl(tmp_path):
    rows = token_rows(8)
    options = DEFAULTS | {"per_device_train_batch_size": 2, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    runs = []
    for cls, extra in ((SFTTrainer, {"packing": False}), (PackedSFTTrainer, {"packing": False})):
        args = SFTConfig(str(tmp_path), use_cpu=True, **options | extra)
        run = cls(
            model=tiny_model(), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer()
        )
        run.train()
        runs.append(run.state.log_history)
    theirs, ours = runs
    assert [set(entry) - {"tokens_per_second"} for entry in ours] == [set(entry) for entry in theirs]
    for their, our in zip(theirs, ours, strict=True):
        for key in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate", "grad_norm"):
            if key in their:
                assert our[key] == pytest.approx(their[key], rel=2e-5), key


def test_the_evaluation_loss_is_the_same_number_packed_or_not(tmp_path):
    rows, results = token_rows(20, seed=1), []
    for options in ({"packing": True}, {"packing": False}, {"packing": False, "per_device_eval_batch_size": 3}):
        ours = trainer(tmp_path, eval_dataset=rows, **options)
        results.append(ours.evaluate())
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-5)
        assert results[0][key] == pytest.approx(results[2][key], rel=1e-5)


def test_evaluate_takes_a_raw_data_set_and_a_dictionary_of_them(tmp_path):
    texts = Dataset.from_list([{"text": "tell me a joke no"}] * 4)
    ours = trainer(tmp_path, eval_dataset={"a": token_rows(4), "b": token_rows(6)})
    assert {"eval_a_loss", "eval_b_loss"} <= ours.evaluate().keys()
    assert ours.evaluate(texts)["eval_loss"] > 0


def test_compute_metrics_gets_logits_and_labels(tmp_path):
    shapes = []

    def compute_metrics(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"seen": 1.0}

    ours = trainer(tmp_path, eval_dataset=token_rows(4), compute_metrics=compute_metrics)
    assert ours.evaluate()["eval_seen"] == 1.0
    ((logits, labels),) = shapes
    assert logits == (*labels, 24)


def test_predict_gives_logits(tmp_path):
    ours = trainer(tmp_path)
    output = ours.predict(token_rows(4))
    assert output.predictions.shape[-1] == 24
    assert output.metrics["test_loss"] > 0


def test_a_run_stopped_in_the_middle_of_an_epoch_resumes_on_the_same_losses(tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_length": 16,
               "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}  # fmt: skip
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert whole.state.global_step > 6
    assert losses(resumed) == losses(whole)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_tells_its_plan_and_what_was_checked(tmp_path):
    ours = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    ours.train()
    record = json.loads((tmp_path / "checkpoint-1" / "packsft.json").read_text())
    assert record["plan_fingerprint"] == ours.train_dataset.plan.fingerprint
    assert record["isolation"] == {"isolated": True, "reason": None, "leak": 0.0}


def test_a_saved_model_gives_the_same_logits_without_packsft(tmp_path):
    from transformers import AutoModelForCausalLM

    ours = trainer(tmp_path, max_steps=2)
    ours.train()
    ours.save_model(str(tmp_path / "saved"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert reloaded.config._attn_implementation == "sdpa"
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, ours.model.eval()(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("on_head", [False, True], ids=["on the layers", "on lm_head too"])
def test_a_lora_adapter_is_trained(tmp_path, on_head):
    from peft import LoraConfig

    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", *(["lm_head"] if on_head else [])], init_lora_weights=False
    )
    model = tiny_model("llama", tie_word_embeddings=False)
    ours = trainer(tmp_path, model=model, peft_config=lora, max_steps=3)
    before = {n: p.detach().clone() for n, p in ours.model.named_parameters()}
    ours.train()
    moved = {n for n, p in ours.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in ours.model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n for n in moved) == on_head
    assert ours.why_compact is None


@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}], ids=str)
def test_other_losses_are_those_of_trl(tmp_path, options):
    rows = token_rows(6)
    results = []
    for cls in (SFTTrainer, PackedSFTTrainer):
        args = SFTConfig(str(tmp_path), use_cpu=True, **DEFAULTS | {"packing": False, "max_steps": 2} | options)
        run = cls(model=tiny_model(), args=args, train_dataset=rows, processing_class=tiny_tokenizer())
        run.train()
        results.append(losses(run))
    assert results[1] == pytest.approx(results[0], rel=2e-5)


def test_a_batch_without_scored_tokens_gives_zero_and_not_nan(tmp_path):
    ours = trainer(tmp_path)
    batch = ours.data_collator([{"input_ids": [3, 4, 5], "labels": [-100] * 3}])
    loss = ours.compute_loss(ours.model, batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in ours.model.parameters())


def test_bf16_without_an_accelerator_trains_on_the_cpu(tmp_path, caplog):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    _say_no_accelerator.cache_clear()  # said once
    ours = trainer(tmp_path, bf16=True, max_steps=1)
    assert caplog.text.count("no accelerator found: setting use_cpu=True") == 1
    trainer(tmp_path, bf16=True, max_steps=1)
    assert caplog.text.count("no accelerator found") == 1
    ours.train()
    assert math.isfinite(losses(ours)[0])


def test_pad_tail_has_no_gradient(tmp_path):
    # the head is not tied, so a token's row of the embeddings gets a gradient only through its own positions
    ours = trainer(tmp_path, model=tiny_model("gpt2", tie_word_embeddings=False), pad_to_multiple_of=8)
    batch = ours.data_collator([{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 0, 0, 0, 0, 0]]
    ours.compute_loss(ours.model, batch).backward()
    reached = ours.model.get_input_embeddings().weight.grad.abs().sum(-1).nonzero().flatten()
    assert reached.tolist() == [3, 4]  # the last token predicts nothing, and the pad is not reached


def test_a_mixture_of_experts_gets_its_auxiliary_loss_as_in_trl(tmp_path):
    rows, results = token_rows(6), []
    for cls in (SFTTrainer, PackedSFTTrainer):
        options = DEFAULTS | {"packing": False, "max_steps": 3, "per_device_train_batch_size": 1}
        args = SFTConfig(str(tmp_path), use_cpu=True, router_aux_loss_coef=0.5, **options)
        run = cls(model=tiny_model("mixtral"), args=args, train_dataset=rows, processing_class=tiny_tokenizer())
        run.train()
        results.append([[entry[key] for key in ("loss", "aux_loss")] for entry in run.state.log_history[:-1]])
    assert run.why_compact is None
    for theirs, ours in zip(*results, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


def test_a_model_with_a_coefficient_but_no_auxiliary_loss_is_trained(tmp_path):
    ours = trainer(tmp_path, model=tiny_family("llama4_text").float(), train_dataset=token_rows(4), max_steps=1)
    ours.train()  # Llama 4 has the coefficient and never the loss
    assert len(losses(ours)) == 1


def test_a_loss_function_of_the_users_gets_the_logits(tmp_path):
    def loss_of_logits(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    own, plain = trainer(tmp_path, max_steps=2, compute_loss_func=loss_of_logits), trainer(tmp_path, max_steps=2)
    own.train()
    plain.train()
    assert losses(own) == pytest.approx(losses(plain), rel=1e-5)


def test_an_evaluation_counts_nothing_of_one_that_failed(tmp_path):
    def fails_once(prediction):
        if not calls:
            calls.append(1)
            raise ArithmeticError
        return {}

    calls = []
    ours = trainer(tmp_path, eval_dataset=token_rows(9), compute_metrics=fails_once)
    weight = ours.model.lm_head.weight
    with torch.no_grad():
        weight.mul_(30)
    with pytest.raises(ArithmeticError):
        ours.evaluate()
    with torch.no_grad():
        weight.zero_()
    ours.compute_loss(ours.model.eval(), ours.data_collator([token_rows(1)[0]]))  # nor of the user's own calls
    before = ours._sums["eval"]
    metrics = ours.evaluate()
    assert ours._sums["eval"] is before
    for name in ("eval_loss", "eval_entropy"):
        assert metrics[name] == pytest.approx(math.log(24), rel=1e-6)


def test_tokens_may_be_added_after_construction(tmp_path):
    rows = Dataset.from_list([{"input_ids": [3, 24, 5], "labels": [3, 24, 5]}] * 4)
    ours = trainer(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="holds 24, but the vocabulary has 24 entries"):
        ours.evaluate(rows)
    ours.model.resize_token_embeddings(25)
    assert ours.evaluate(rows)["eval_loss"] > 0
    assert ours.data_collator.vocab_size == 25
    again = trainer(tmp_path, max_steps=1)
    again.model.resize_token_embeddings(25)
    again.train_dataset = rows  # as a pack of one's own
    again.train()
    assert len(losses(again)) == 1


def test_workers_that_stay_are_those_of_the_trainers_own_sets(tmp_path):
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    ours = trainer(tmp_path, eval_dataset=token_rows(4), **options)
    for rows in (None, token_rows(3), None, token_rows(2)):
        ours.evaluate(rows)
    own = ours.get_eval_dataloader()
    assert own is ours.get_eval_dataloader()
    ours.callback_handler.eval_dataloader = None
    gc.collect()
    assert len(multiprocessing.active_children()) == 1
    del own, ours._eval_loaders
    gc.collect()


def test_an_adapter_on_the_embeddings_is_trained(tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    ours = trainer(tmp_path, model=tiny_model("llama", tie_word_embeddings=False), peft_config=lora, max_steps=1)
    assert ours.isolation.isolated
    ours.train()


def test_a_deep_copy_of_the_model_runs_on_its_own_weights(tmp_path):
    import copy

    ours = trainer(tmp_path)
    copied = copy.deepcopy(ours.model)
    with torch.no_grad():
        copied.get_input_embeddings().weight.zero_()
        assert not copied(torch.tensor([[3, 4]])).logits.any()


def test_a_log_of_a_callback_leaves_the_metrics_of_the_window_alone(tmp_path):
    from transformers import TrainerCallback

    class Chatty(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            ours.log({"note": 1.0})

    ours = trainer(tmp_path, callbacks=[Chatty()], gradient_accumulation_steps=2, per_device_train_batch_size=1)
    ours.train()
    quiet = trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    quiet.train()
    chatty = [entry["entropy"] for entry in ours.state.log_history if "loss" in entry]
    assert chatty == [entry["entropy"] for entry in quiet.state.log_history if "loss" in entry]


def test_an_evaluation_between_two_logs_knows_the_tokens_so_far(tmp_path):
    ours = trainer(
        tmp_path, packing=False, per_device_train_batch_size=1, eval_dataset=token_rows(4), max_steps=4,
        logging_steps=4, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    ours.train()
    evaluated = [entry["eval_num_tokens"] for entry in ours.state.log_history if "eval_num_tokens" in entry]
    logged = [entry["num_tokens"] for entry in ours.state.log_history if "num_tokens" in entry]
    assert 0 < evaluated[0] < evaluated[1] == logged[0]


@pytest.mark.parametrize("vocabulary", [64, 49_152])
def test_the_head_is_fused_whatever_the_size_of_its_log_probabilities(vocabulary):
    """Random logits are small and log-probabilities near -log V: a rounding of those is no wrong head."""
    assert install_head(tiny_model(vocab_size=vocabulary), LossOptions()) is None


def test_a_head_whose_scale_is_missed_is_not_fused(monkeypatch):
    model = tiny_model("llama", vocab_size=49_152)
    own = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: (out := own(*a, **k)) | {"logits": 1.001 * out.logits})
    assert "log-probabilities would be off by" in install_head(model, LossOptions())


@pytest.mark.parametrize(
    "family", ["llama4_text", "mllama", "inkling_text", "recurrent_gemma", "xlstm"]
)  # backbone, backbone, scale, softcap, softcap: each by a name of its own
def test_the_head_is_fused_on_families_that_name_its_parts_differently(family):
    assert install_head(tiny_family(family).float(), LossOptions()) is None


def test_a_plain_configuration_may_take_exact_steps(tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, **DEFAULTS | {"packing": True, "packing_strategy": "step"})
    ours = PackedSFTTrainer(tiny_model(), args, train_dataset=token_rows(24), processing_class=tiny_tokenizer())
    assert ours.train().global_step == 9
