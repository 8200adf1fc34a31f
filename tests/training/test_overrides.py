"""Subclasses of the trainer, written as for TRL's: the same training, or an error that names what to do.

24 rows of 2 to 12 tokens, 6 for a step; with passes of 1,000 tokens a step takes one, of 12 tokens several.
"""

import copy

import packsft_kernels
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig
from runs import config, losses
from tiny import tiny_model, tiny_tokenizer, token_rows
from torch.utils.data import SequentialSampler
from transformers import Trainer

from packsft import PackedSFTTrainer
from packsft.model import attention
from packsft.model.given_batch import for_logits

STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 1, "optim": "sgd"}


def cross_entropy(logits, labels, count):
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count


def of_packsft(trainer, model, inputs, count):
    return PackedSFTTrainer.compute_loss(trainer, model, inputs, num_items_in_batch=count)


def of_all_inputs(trainer, model, inputs, count):
    return model(**inputs, num_items_in_batch=count).loss


def of_the_parents_parent(trainer, model, inputs, count):
    return Trainer.compute_loss(trainer, model, inputs, num_items_in_batch=count)


def as_a_tuple(trainer, model, inputs, count):
    return model(**inputs, num_items_in_batch=count, return_dict=False)[0]


def of_logits(trainer, model, inputs, count):
    labels = inputs["labels"]
    return cross_entropy(model(**{k: v for k, v in inputs.items() if k != "labels"}).logits, labels, count)


def of_logits_and_denominator(trainer, model, inputs, count):
    return of_logits(trainer, model, inputs, inputs["denominator"])


def of_tokens_and_positions(trainer, model, inputs, count):
    logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).logits
    return cross_entropy(logits, inputs["labels"], count)


LOSSES = [
    of_all_inputs, of_the_parents_parent, as_a_tuple, of_logits, of_logits_and_denominator, of_tokens_and_positions,
]  # fmt: skip


def trained(tmp_path, compute, model="llama", peft_config=None, **options):
    class Own(PackedSFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            count = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"][:, 1:] != -100).sum()
            return compute(self, model, inputs, count)

    torch.manual_seed(0)
    model = tiny_model(model, torch.float64) if isinstance(model, str) else model
    own = Own(
        model=model, args=config(tmp_path, **STEP | options), train_dataset=token_rows(24),
        eval_dataset=token_rows(13), processing_class=tiny_tokenizer(), peft_config=peft_config,
    )  # fmt: skip
    own.train()
    return own


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run without a loss of one's own."""
    path = tmp_path_factory.mktemp("plain")
    return trained(path, of_packsft)


@pytest.mark.parametrize("tokens_per_pass", [1000, 12])
@pytest.mark.parametrize("compute", LOSSES)
def test_a_loss_of_ones_own_is_the_same_however_many_passes_a_step_takes(compute, tokens_per_pass, plain, tmp_path):
    own = trained(tmp_path, compute, tokens_per_pass=tokens_per_pass)
    assert losses(own) == pytest.approx(losses(plain), rel=1e-6)
    for ours, expected in zip(own.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert own.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("strategy", ["step", "bfd"])
def test_without_the_count_the_loss_of_a_pass_is_its_part_of_the_step(strategy, tmp_path):
    options = {"packing_strategy": strategy, "max_length": 16, "tokens_per_pass": 16 if strategy == "step" else None}
    expected = trained(tmp_path, of_all_inputs, **options)
    own = trained(tmp_path, lambda own, model, inputs, _: model(**inputs).loss, **options)
    assert losses(own) == losses(expected)


ADAPTERS = {
    "LoRA": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("compute", [of_all_inputs, of_logits])
@pytest.mark.parametrize("kind", [*ADAPTERS, "padded"])
def test_adapters_prompts_and_padded_rows_take_a_loss_of_ones_own(kind, compute, tmp_path):
    options = {"model": "stablelm" if kind == "padded" else "llama", "tokens_per_pass": 12}
    plain, own = (
        trained(tmp_path, one, peft_config=copy.deepcopy(ADAPTERS.get(kind)), **options)
        for one in (of_packsft, compute)
    )
    assert losses(own) == pytest.approx(losses(plain), rel=1e-6)
    assert own.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("compute", [of_all_inputs, lambda own, model, inputs, _: model(**inputs).loss])
def test_the_routers_loss_is_part_of_the_models(compute, tmp_path):
    options = {"router_aux_loss_coef": 0.5, "tokens_per_pass": 12}
    plain, own = (trained(tmp_path, one, tiny_model("mixtral"), **options) for one in (of_packsft, compute))
    assert losses(own) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_a_loss_adds_is_part_of_the_evaluation(batch_size, plain, tmp_path):
    def with_one_for_each_token(own, model, inputs, count):
        return of_packsft(own, model, inputs, count) + inputs["num_items"] / inputs["denominator"]

    own = trained(tmp_path, with_one_for_each_token, per_device_eval_batch_size=batch_size, tokens_per_pass=12)
    assert losses(own) == pytest.approx([loss + 1 for loss in losses(plain)], rel=1e-6)
    assert own.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"] + 1, rel=1e-6)


@pytest.mark.parametrize(
    ("compute", "error", "message"),
    [
        (lambda own, model, inputs, _: model(**inputs).logits.sum(), AttributeError, "no 'logits': leave `labels` out"),
        (
            lambda own, model, inputs, _: model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss,
            ValueError,
            "tokens of a row of several documents, which would see each other",
        ),
        (
            lambda own, model, inputs, _: model(inputs["input_ids"].clone(), position_ids=None).logits.sum(),
            ValueError,
            "tokens of a row of several documents, which would see each other",
        ),
    ],
    ids=["logits", "tokens alone", "positional"],
)
def test_what_a_loss_cannot_have_is_named(compute, error, message, tmp_path):
    with pytest.raises(error, match=message):
        trained(tmp_path, compute)


def two_rows(own, model, inputs, _):
    return model(inputs["input_ids"].repeat(2, 1)).logits


FORWARDS = {
    "a mask": lambda own, model, inputs, _: model(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"],
        attention_mask=torch.ones_like(inputs["input_ids"]),
    ).logits,
    "a mask with zeros": lambda own, model, inputs, _: model(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"],
        attention_mask=(torch.arange(inputs["input_ids"].shape[1]) > 0)[None].long(),
    ).logits,
    "all but the last": lambda own, model, inputs, _: model(inputs["input_ids"][:, :-1]).logits,
    "the backbone, all but the last": lambda own, model, inputs, _: model.model(inputs["input_ids"][:, :-1])[0],
    "the backbone": lambda own, model, inputs, _: model.model(inputs["input_ids"])[0],
    "twice": two_rows,
}  # fmt: skip


@pytest.mark.parametrize("forward", FORWARDS)
def test_no_forward_of_ones_own_lets_documents_see_each_other(forward, tmp_path):
    with pytest.raises(ValueError, match="a row of several documents, which would see each other"):
        trained(tmp_path, lambda *given: FORWARDS[forward](*given).sum())
    assert attention._open_row is None


def test_the_backbone_of_a_forward_of_ones_own_gets_positions(plain, tmp_path):
    def of_hidden_states(own, model, inputs, count):
        hidden = model.model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"])[0]
        return cross_entropy(model.lm_head(hidden), inputs["labels"], count)

    assert losses(trained(tmp_path, of_hidden_states)) == pytest.approx(losses(plain), rel=1e-6)


def with_loss_function(tmp_path, function, **options):
    own = PackedSFTTrainer(
        tiny_model("llama", torch.float64), config(tmp_path, **STEP | options), train_dataset=token_rows(24),
        processing_class=tiny_tokenizer(), compute_loss_func=function,
    )  # fmt: skip
    own.train()
    return losses(own)


@pytest.mark.parametrize("tokens_per_pass", [1000, 12])
def test_a_loss_function_has_to_divide_by_the_items_of_the_step(tokens_per_pass, plain, tmp_path):
    def mean(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs.logits, labels, (labels[:, 1:] != -100).sum())

    def part(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs.logits, labels, num_items_in_batch)

    with pytest.raises(ValueError, match=r"compute_loss_func gives (\S+) for num_items_in_batch=\d+ and \1 for twice"):
        with_loss_function(tmp_path, mean, tokens_per_pass=tokens_per_pass)
    assert with_loss_function(tmp_path, part, tokens_per_pass=tokens_per_pass) == pytest.approx(losses(plain), rel=1e-6)
    options = {"packing": False, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 6}
    assert with_loss_function(tmp_path, mean, **options) == pytest.approx(losses(plain), rel=1e-6)


def test_a_loss_function_that_cannot_be_tried_again_is_taken_as_it_is(plain, tmp_path):
    def in_place(outputs, labels, num_items_in_batch=None):
        return packsft_kernels.cross_entropy(outputs.logits, labels, num_items=num_items_in_batch, inplace=True).loss

    assert with_loss_function(tmp_path, in_place, tokens_per_pass=12) == pytest.approx(losses(plain), rel=1e-6)


def test_a_small_part_of_a_loss_that_is_not_divided_is_allowed(tmp_path):
    def with_penalty(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs.logits, labels, num_items_in_batch) + penalty

    penalty = 1.0  # of a loss of about 3.2: 1.0 of 4.2 is not divided
    assert with_loss_function(tmp_path, with_penalty)
    penalty = 4.0
    with pytest.raises(ValueError, match="compute_loss_func gives"):
        with_loss_function(tmp_path, with_penalty)


def test_a_loss_is_computed_outside_of_a_run(tmp_path):
    own = PackedSFTTrainer(
        tiny_model("llama"), config(tmp_path), train_dataset=token_rows(24), processing_class=tiny_tokenizer(),
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(),
    )  # fmt: skip
    batch = own.data_collator([token_rows(1)[0]])
    assert own.compute_loss(own.model.train(), batch).isfinite()


def test_logits_of_a_part_of_a_row_are_refused():
    with pytest.raises(ValueError, match="a rank has the logits of a part of a row"):
        for_logits({"input_ids": torch.zeros(1, 4), "row_tokens": 8})


def test_a_whole_step_is_no_batch(tmp_path):
    class Own(PackedSFTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)

    own = Own(tiny_model("llama"), config(tmp_path), train_dataset=token_rows(24), processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"compute_loss got a whole optimizer step of \d+ passes: call it for each"):
        own.train()
    step = next(iter(own.get_train_dataloader()))
    with pytest.raises(ValueError, match=r"the forward got an optimizer step of \d+ passes: call it for each"):
        own.model(**step)
    with pytest.raises(KeyError, match=r"labels: this is an optimizer step of \d+ passes, see batch\['passes'\]\[0\]"):
        step["labels"]


@pytest.mark.parametrize("name", ["_get_train_sampler", "_get_eval_sampler"])
def test_a_sampler_that_would_not_be_asked_is_refused(name, tmp_path):
    Own = type("Own", (PackedSFTTrainer,), {name: lambda self, rows=None: SequentialSampler(rows)})
    own = Own(
        tiny_model("llama"), config(tmp_path), train_dataset=token_rows(24), eval_dataset=token_rows(7),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"Own overrides {name}, which packs and exact steps do not ask"):
        own.train() if name == "_get_train_sampler" else own.evaluate()
