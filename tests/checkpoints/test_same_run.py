"""A run that resumes is the same run: what may change does so exactly, and what may not is named before a step."""

import logging
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from runs import losses, trainer
from tiny import tiny_model, tiny_tokenizer, token_rows
from transformers import TrainerCallback

from packsft.checkpoints import settings

SAVES = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "per_device_train_batch_size": 4}


def begun(tmp_path, **options):
    """A whole run with its checkpoints."""
    ours = trainer(tmp_path, **SAVES | options)
    ours.train()
    return ours


def resumed(tmp_path, checkpoint=None, **options):
    ours = trainer(tmp_path, **SAVES | options)
    ours.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}") if checkpoint else True)
    return ours


def assert_same(ours, theirs, rel=0.0):
    assert losses(ours) == pytest.approx(losses(theirs), rel=rel)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=rel, atol=rel)


# ---- what may not change ----

OTHER_LABELS = token_rows(24).map(lambda row: {"labels": [-100, *row["labels"][1:-1], -100]})
SAME_LENGTHS = token_rows(24).map(
    lambda row: {key: [(i + 1) % 24 for i in row[key]] for key in ("input_ids", "labels")}
)
CHANGES = {
    "tokens": ({"train_dataset": SAME_LENGTHS}, r"training set, tokens and labels: '?\w{12}\.\.\. -> \w{12}\.\.\."),
    "labels": ({"train_dataset": OTHER_LABELS}, "training set, tokens and labels"),
    "order": ({"train_dataset": token_rows(24).select([1, 0, *range(2, 24)])}, "training set, tokens and labels"),
    "more rows": ({"train_dataset": token_rows(25)}, "training set, rows: 24 -> 25"),
    "max_length": ({"max_length": 16}, "max_length: 32 -> 16"),
    "strategy": ({"packing_strategy": "bfd"}, "packing_strategy: 'step' -> 'bfd'"),
    "no packing": ({"packing": False}, "packing: True -> False"),
    "seed": ({"seed": 7}, "seed: 42 -> 7"),
    "overlong": ({"overlong": "drop"}, "overlong: 'truncate' -> 'drop'"),
    "truncation": ({"truncation_mode": "keep_end"}, "truncation_mode: 'keep_start' -> 'keep_end'"),
    "loss": ({"loss_normalization": "example"}, "loss_normalization: 'token' -> 'example'"),
    "total batch": ({"per_device_train_batch_size": 8}, "total batch: 4 -> 8"),
    "sampling": ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy: 'random' -> 'sequential'"),
    "learning rate": ({"learning_rate": 1e-3}, r"learning_rate: 0.01 -> 0.001\n.*keeps the value of the checkpoint"),
    "schedule": ({"lr_scheduler_type": "linear"}, "lr_scheduler_type: 'constant' -> 'linear'"),
    "model": ({"model": tiny_model(num_hidden_layers=1)}, "model, parameters: "),
    "dropout": ({"model": tiny_model(attention_dropout=0.1)}, "model, config, attention_dropout: 0.0 -> 0.1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, begun(folder)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_training_is_named_before_a_step(change, whole, tmp_path):
    options, message = CHANGES[change]
    ours = trainer(tmp_path, **SAVES | options)
    with pytest.raises(ValueError, match=message):
        ours.train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))
    assert ours.state.global_step == 0


def test_another_vocabulary_or_template_is_named(whole, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += " "
    tokenizer.add_tokens(["more"])
    ours = trainer(tmp_path, processing_class=tokenizer, **SAVES)
    with pytest.raises(ValueError, match=r"chat_template: \w+\.\.\. -> \w+\.\.\.") as refused:
        ours.train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))
    assert "tokenizer: " in str(refused.value)


def test_a_change_may_go_on_with_a_warning(whole, tmp_path, caplog):
    ours = trainer(tmp_path, on_changed="warn", max_length=16, **SAVES)
    with caplog.at_level(logging.WARNING, "packsft"):
        ours.train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))
    assert "max_length: 32 -> 16" in caplog.text
    assert ours.state.global_step == 12


def test_another_adapter_is_named(tmp_path):
    from peft import LoraConfig

    begun(tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj"]), max_steps=2)
    with pytest.raises(ValueError, match="peft_config, default, lora_alpha: 8 -> 16"):
        resumed(tmp_path, peft_config=LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"]), max_steps=4)


# ---- what may change ----

FREE = {
    "tokens_per_pass": {"tokens_per_pass": 8},
    "batch and accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "workers": {"dataloader_num_workers": 2},
    "logging": {"logging_steps": 3},
    "saving": {"save_steps": 5, "save_total_limit": 1},
    "evaluation": {"eval_dataset": token_rows(4, seed=3), "eval_strategy": "steps", "eval_steps": 3},
    "more epochs": {"num_train_epochs": 3},
}


@pytest.mark.parametrize("change", FREE)
def test_what_changes_no_training_changes_without_a_word(change, whole, tmp_path, caplog):
    ours = trainer(tmp_path, **SAVES | FREE[change])
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        ours.train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))
    usual = ("packsft\n", "The tokenizer has new PAD/BOS/EOS tokens")  # before every run
    assert [text for text in map(logging.LogRecord.getMessage, caplog.records) if not text.startswith(usual)] == []
    for one, other in zip(ours.model.parameters(), whole[1].model.parameters(), strict=True):
        if change != "more epochs":
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    by_step = {entry["step"]: entry["loss"] for entry in whole[1].state.log_history if "loss" in entry}
    for entry in ours.state.log_history:
        if "loss" in entry and entry["step"] > 4 and entry["step"] <= 12 and change != "logging":
            assert entry["loss"] == pytest.approx(by_step[entry["step"]], rel=1e-5)
    if change == "logging":
        assert [entry["step"] for entry in ours.state.log_history if "loss" in entry] == [1, 2, 3, 4, 6, 9, 12]


def test_every_setting_is_a_field():
    from trl import SFTConfig

    assert set(settings._FIELDS) <= {field.name for field in fields(SFTConfig)}


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped", "none"])
@pytest.mark.parametrize("sizes", [(2, 2), (4, 1), (1, 4)], ids=str)
def test_packs_are_taken_once_when_batch_and_accumulation_change(strategy, sizes, tmp_path):
    batch, accumulation = sizes

    def options():
        model = tiny_model("gpt2", torch.float64)
        return {"packing": strategy != "none", "max_length": 12, "num_train_epochs": 3, "model": model, **named}

    named = {}
    if strategy != "none":
        named["packing_strategy"] = strategy
    whole = begun(tmp_path, **options() | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    middle = whole.state.max_steps // 3 + 1  # in the second epoch, which has other packs
    checkpoint = middle + middle % 2
    changed = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    ours = resumed(tmp_path, checkpoint, **options() | changed)
    for one, other in zip(ours.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert losses(ours) == pytest.approx(losses(whole), rel=1e-6)  # logged in float32
    assert len(losses(ours)) == whole.state.max_steps


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_groups_of_a_length_are_found_again_in_the_second_epoch(family, tmp_path):
    options = {"train_sampling_strategy": "group_by_length"}
    if family == "gpt2":
        options["model"] = tiny_model("gpt2", resid_pdrop=0.1)
    whole = begun(tmp_path, **options)
    if family == "gpt2":
        options["model"] = tiny_model("gpt2", resid_pdrop=0.1)
    assert_same(resumed(tmp_path, 8, **options), whole)
    if family == "llama":  # at the end of an epoch
        assert_same(resumed(tmp_path, 6, **options), whole)


ORDERS = [{"train_sampling_strategy": "group_by_length"}, {"accelerator_config": {"use_seedable_sampler": False}}]


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_a_callback_may_look_at_a_batch(options, tmp_path):
    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                steps = self.trainer._passes.steps
                next(iter(self.trainer.get_train_dataloader()))
                assert self.trainer._passes.steps is steps

    def made():
        ours = trainer(tmp_path, **SAVES | options, callbacks=[looks := Looks()])
        looks.trainer = ours
        return ours

    whole = made()
    whole.train()
    ours = made()
    ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(ours, whole)


# ---- state ----


def logged(ours, key):
    return [entry[key] for entry in ours.state.log_history if key in entry]


def test_the_count_of_tokens_goes_on(whole, tmp_path):
    ours = trainer(tmp_path, **SAVES)
    ours.train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))
    assert logged(ours, "num_tokens") == logged(whole[1], "num_tokens")
    ours = trainer(tmp_path, **SAVES, logging_steps=5)  # counted, but not logged when the checkpoint was saved
    ours.train()
    again = trainer(tmp_path, **SAVES, logging_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert logged(again, "num_tokens") == logged(ours, "num_tokens")
    assert logged(ours, "num_tokens")[-1] == 2 * sum(map(len, token_rows(24)["input_ids"]))


def test_rotary_embeddings_of_long_documents_need_no_state(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    rows = token_rows(24, max_length=30)
    options = {"train_dataset": rows, "num_train_epochs": 1, "save_steps": 1}

    def model():
        return tiny_model(max_position_embeddings=4, rope_parameters=rope)

    whole = begun(tmp_path, model=model(), **options)
    for checkpoint in (2, 4):
        assert_same(resumed(tmp_path, checkpoint, model=model(), **options), whole)


def test_a_finished_run_trains_no_further_step(tmp_path, caplog):
    for rows in (token_rows(24), token_rows(24).to_iterable_dataset()):
        begun(tmp_path, train_dataset=rows, max_steps=8)
        with caplog.at_level(logging.WARNING, "packsft"):
            ours = resumed(tmp_path, 8, train_dataset=rows, max_steps=8)
        assert ours.state.global_step == 8
        assert "checkpoint-8 is at step 8 of 8: the run is finished" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("strategy", ["step", "bfd", "none"])
def test_a_stream_goes_on_in_its_second_pass(strategy, workers, tmp_path):
    rows = token_rows(24).to_iterable_dataset(num_shards=2)
    options = {"train_dataset": rows, "max_steps": 10, "dataloader_num_workers": workers, "max_length": 24}
    options |= {"packing": False} if strategy == "none" else {"packing_strategy": strategy}
    if strategy == "bfd":
        options["per_device_train_batch_size"] = 2
    whole = begun(tmp_path, **options)
    for checkpoint in (4, 8):
        assert_same(resumed(tmp_path, checkpoint, **options), whole)


def test_a_stream_read_by_other_workers_is_refused(tmp_path):
    options = {"train_dataset": token_rows(24).to_iterable_dataset(num_shards=2), "max_steps": 6}
    begun(tmp_path, **options)
    assert_same(resumed(tmp_path, 4, **options, dataloader_num_workers=1), resumed(tmp_path, 4, **options))
    with pytest.raises(ValueError, match="stream, workers that read: 1 -> 2"):
        resumed(tmp_path, 4, **options, dataloader_num_workers=2)


def test_a_stream_that_gave_other_rows_is_named_before_a_step(tmp_path):
    begun(tmp_path, train_dataset=token_rows(40).to_iterable_dataset(), max_steps=6)
    changed = token_rows(40).to_list()
    changed[1] = {key: [3 if i == 4 else i for i in values] for key, values in changed[2].items()}
    rows = Dataset.from_list(changed).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"rows read so far: \w+\.\.\. -> \w+\.\.\."):
        resumed(tmp_path, 4, train_dataset=rows, max_steps=6)


def test_only_the_model_is_resumed_if_asked(tmp_path):
    whole = begun(tmp_path, save_only_model=True, lr_scheduler_type="linear")
    with pytest.raises(
        ValueError, match=r"checkpoint-12 lacks the state of optimizer, scheduler, random .*resume_only_"
    ):
        resumed(tmp_path, save_only_model=True, lr_scheduler_type="linear")
    ours = resumed(tmp_path, 4, resume_only_model=True, lr_scheduler_type="linear")
    assert ours.state.global_step == 12
    assert logged(ours, "learning_rate") == logged(whole, "learning_rate")  # the schedule goes on
    assert losses(ours)[4] == pytest.approx(losses(whole)[4], rel=1e-6)  # the weights and the examples are those


def test_a_checkpoint_of_trl_is_resumed_and_said_to_be_unchecked(tmp_path, caplog):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        str(tmp_path), save_strategy="steps", save_steps=2, max_steps=4, report_to="none", use_cpu=True, bf16=False
    )
    SFTTrainer(tiny_model(), args, train_dataset=token_rows(24), processing_class=tiny_tokenizer()).train()
    with caplog.at_level(logging.WARNING, "packsft"):
        ours = resumed(tmp_path, max_steps=6)
    assert ours.state.global_step == 6
    assert "checkpoint-4 does not record its data and settings" in caplog.text


def test_dropout_draws_the_same_whatever_is_evaluated_saved_or_logged(tmp_path):
    def model():
        return tiny_model("gpt2", resid_pdrop=0.1)

    whole = begun(tmp_path, model=model())
    rows = token_rows(4, seed=3)
    for workers in (0, 1):
        changed = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "logging_steps": 1}
        assert_same(resumed(tmp_path, 4, model=model(), dataloader_num_workers=workers, **changed), whole)


def test_the_patience_of_early_stopping_is_not_renewed(tmp_path):
    from transformers import EarlyStoppingCallback

    def options():
        return {
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=4)], "eval_dataset": token_rows(4, seed=3),
            "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "eval_loss",
            "load_best_model_at_end": True, "learning_rate": 0.0,
        }  # fmt: skip

    whole = begun(tmp_path, **options())  # no evaluation is better than the first
    assert whole.state.global_step == 5
    assert resumed(tmp_path, 3, **options()).state.global_step == 5


def test_adalora_goes_on_with_the_ranks_that_it_has_measured(tmp_path):
    from peft import AdaLoraConfig
    from transformers import TrainerCallback

    class Allocates(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.base_model.update_and_allocate(state.global_step)

    def options():
        config = AdaLoraConfig(
            init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=2, total_step=12, target_modules=["q_proj"]
        )
        return {"peft_config": config, "callbacks": [Allocates()]}

    whole = begun(tmp_path, **options())
    assert whole.model.peft_config["default"].rank_pattern
    for checkpoint in (2, 6, 10):  # before the first allocation, between two, and after the last
        assert_same(resumed(tmp_path, checkpoint, **options()), whole)


def test_a_run_that_failed_goes_on_in_the_same_process(whole, tmp_path):
    """What the failed run had counted since its last log is not counted twice."""
    from transformers import TrainerCallback

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7 and not ours.failed:
                ours.failed = True
                raise KeyboardInterrupt

    options = SAVES | {"logging_steps": 2}
    ours = trainer(tmp_path, callbacks=[Fails()], **options)
    ours.failed = False
    with pytest.raises(KeyboardInterrupt):
        ours.train()
    ours.train(resume_from_checkpoint=True)
    for one, other in zip(ours.model.parameters(), whole[1].model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert logged(ours, "num_tokens") == logged(whole[1], "num_tokens")[1::2]


@pytest.mark.parametrize("column", ["input_ids", "labels", "seq_lengths", "loss_weights"])
def test_packs_that_the_user_made_are_compared_too(column, tmp_path):
    row = {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6], "seq_lengths": [2, 2], "loss_weights": [0.5, 0.5]}
    other = {"input_ids": [3, 4, 5, 7], "labels": [3, 4, 5, -100], "seq_lengths": [3, 1], "loss_weights": [0.5, 0.25]}
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "loss_normalization": "example", "max_steps": 4}
    begun(tmp_path, train_dataset=Dataset.from_list([row] * 8), **options)
    changed = Dataset.from_list([row] * 7 + [{**row, column: other[column]}])
    with pytest.raises(ValueError, match=f"training set, {column}: "):
        resumed(tmp_path, 2, train_dataset=changed, **options)
    assert resumed(tmp_path, 2, train_dataset=Dataset.from_list([row] * 8), **options).state.global_step == 4


def test_an_evaluation_of_groups_of_a_length_draws_nothing_from_training(tmp_path):
    def options():
        return {"model": tiny_model("gpt2", resid_pdrop=0.1), "train_sampling_strategy": "group_by_length"}

    whole = begun(tmp_path, **options())
    evaluates = {"eval_dataset": token_rows(6, seed=3), "eval_strategy": "steps", "eval_steps": 2}
    assert_same(begun(tmp_path, **options(), **evaluates), whole)


def test_a_run_that_failed_adds_the_noise_of_neftune_once_when_it_resumes(tmp_path):
    from transformers import TrainerCallback

    class Fails(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    noise = {"neftune_noise_alpha": 5.0}
    whole = begun(tmp_path / "whole", **noise)
    fails = Fails()
    ours = trainer(tmp_path, callbacks=[fails], **SAVES | noise)
    with pytest.raises(KeyboardInterrupt):
        ours.train()
    ours.remove_callback(fails)
    ours.train(resume_from_checkpoint=True)
    assert_same(ours, whole)


OWN_DRAWS = {
    "the order": {"accelerator_config": {"use_seedable_sampler": False}},
    "workers that stay": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
}


@pytest.mark.parametrize("draws", OWN_DRAWS)
def test_what_draws_from_the_generator_of_the_run_draws_the_same(draws, tmp_path):
    def model():
        return tiny_model("gpt2", resid_pdrop=0.1)

    whole = begun(tmp_path, model=model(), **OWN_DRAWS[draws])
    for checkpoint in (8, 4):  # of the second epoch, of the first
        assert_same(resumed(tmp_path, checkpoint, model=model(), save_steps=99, **OWN_DRAWS[draws]), whole)


def test_other_frozen_weights_are_named(tmp_path):
    def frozen(layer, shift=0.0):
        model = tiny_model()
        for parameter in model.model.layers[layer].parameters():
            parameter.requires_grad_(False)
            parameter.data += shift
        return model

    begun(tmp_path, model=frozen(0), max_steps=2)
    assert resumed(tmp_path, model=frozen(0), max_steps=4).state.global_step == 4
    for other in (frozen(1), frozen(0, 1e-3)):
        with pytest.raises(ValueError, match=r"model, frozen weights: \w+\.\.\. -> \w+\.\.\."):
            resumed(tmp_path, 2, model=other, max_steps=4)


def test_experts_that_are_saved_under_other_names_are_resumed(tmp_path):
    options = {"eval_dataset": token_rows(4, seed=3), "eval_strategy": "steps", "eval_steps": 2}
    whole = begun(tmp_path, model=tiny_model("mixtral"), load_best_model_at_end=True, **options)
    again = resumed(tmp_path, 4, model=tiny_model("mixtral"), load_best_model_at_end=True, **options)
    assert_same(again, whole)


def test_what_says_the_same_in_other_words_is_no_change(tmp_path):
    begun(tmp_path, max_steps=2, lr_scheduler_kwargs=None, completion_only_loss=None)
    card = tmp_path / "checkpoint-2" / "README.md"
    card.write_text("edited")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint-2")
    same = {"lr_scheduler_kwargs": {}, "completion_only_loss": False}
    assert resumed(tmp_path, max_steps=4, **same).state.global_step == 4


def test_only_the_model_is_resumed_where_the_optimizer_was_deleted(tmp_path):
    begun(tmp_path, max_steps=2)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 is not whole: optimizer\.pt is missing"):
        resumed(tmp_path, max_steps=4)
    assert resumed(tmp_path, max_steps=4, resume_only_model=True).state.global_step == 4


def test_a_run_in_the_folder_of_another_is_told_so(tmp_path, caplog):
    begun(tmp_path, max_steps=2)
    with caplog.at_level(logging.WARNING, "packsft"):
        begun(tmp_path, max_steps=2)
    assert "resume_from_checkpoint=True takes the one with the highest step, now checkpoint-2" in caplog.text


def test_a_setting_that_only_one_version_knows_is_no_change():
    old, new = {"model": {"config": {"a": 1}}, "b": 1}, {"model": {"config": {"a": 1, "new": 2}}, "c": 1}
    assert settings.differences(old, new) == settings.differences(new, old) == {}
    assert settings.differences({"training set": {"rows": 1, "labels": "x"}}, {"training set": {"rows": 2}}) == {
        "training set, rows": "1 -> 2", "training set, labels": "'x' -> None"
    }  # fmt: skip
