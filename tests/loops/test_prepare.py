"""A prepared model takes batches of `pack`, is itself with everything else, and can be had back."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from plain_loop import bloom
from tiny import tiny_model, token_rows

import packsft
from packsft.model.attention import attention_of


@pytest.fixture
def batch():
    ((batch, *_), *_) = packsft.pack(token_rows(12), 64, batch_size=6, shuffle=False).loader()
    return batch


IDS = torch.tensor([[5, 6, 7, 8]])


def footprint(model):
    """What `prepare` may leave behind: attributes, hooks and classes of all modules, and the attention."""
    ignored = ("training", "_is_hf_initialized")
    return attention_of(model), [
        (name, type(module), sorted(key for key in vars(module) if key not in ignored),
         len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"compile_layers": True}, {"attention_backend": "sdpa"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom"])
def test_the_model_can_be_had_back(family, options):
    model = bloom() if family == "bloom" else tiny_model(family)
    before, logits = footprint(model), model(IDS).logits
    prepared = packsft.prepare(model, **options)
    assert prepared is model
    ((step, *_), *_) = packsft.pack(token_rows(12), 64, batch_size=6).loader(padded=model.packing.padded)
    model(**step).loss.backward()
    model.zero_grad()
    torch.testing.assert_close(model(IDS).logits, logits)
    packsft.unprepare(model)
    assert footprint(model) == before
    assert torch.equal(model(IDS).logits, logits)
    with pytest.raises(ValueError, match="was not prepared"):
        packsft.unprepare(model)


def test_generation_is_what_it_was():
    model = tiny_model("llama", torch.float64)
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(packsft.prepare(model).generate(IDS, max_new_tokens=8, do_sample=False), expected)


def test_a_copy_runs_on_its_own_weights(batch):
    model = packsft.prepare(tiny_model("llama"))
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.model.norm.weight)
    assert model(**batch).loss != other(**batch).loss
    assert other.packing.base_model is other
    packsft.unprepare(other)
    assert model.packing.base_model is model


def test_it_is_prepared_anew(batch):
    model = packsft.prepare(tiny_model("llama"))
    plain = model(**batch).loss
    smoothed = packsft.prepare(model, label_smoothing=0.1)(**batch).loss
    assert smoothed != plain
    assert packsft.prepare(model)(**batch).loss == plain


def test_rows_of_the_other_kind_are_refused(batch):
    with pytest.raises(ValueError, match=r"takes padded rows, .* has packed ones: .*\(padded=True\), because"):
        packsft.prepare(bloom())(**batch)
    ((padded, *_), *_) = packsft.pack(token_rows(12), 64, batch_size=6).loader(padded=True)
    with pytest.raises(ValueError, match=r"takes packed rows, .* has padded ones: data\.loader\(padded=False\)"):
        packsft.prepare(tiny_model("llama"))(**padded)


def test_what_only_the_trainer_handles_is_refused():
    prompt = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="PromptTuningConfig puts tokens before a row: only PackedSFTTrainer"):
        packsft.prepare(prompt)
    with pytest.raises(ValueError, match=r"set model\.config\.output_router_logits = False"):
        packsft.prepare(tiny_model("mixtral", output_router_logits=True))
    with pytest.raises(ValueError, match="max_length=512: OPTForCausalLM has a table of 256 positions"):
        packsft.prepare(tiny_model("opt"), max_length=512)
    with pytest.raises(ValueError, match="cannot be trained on packed documents"):
        packsft.prepare(bloom(), on_unpackable="error")


def test_what_was_done_is_said(batch):
    lora = packsft.prepare(adapted())
    said = str(lora.packing)
    assert "documents: in one row, and none sees another: checked on this model" in said
    assert "head: fused" in said
    assert lora.get_base_model().packing is lora.packing
    lora(**batch).loss.backward()


def test_the_trainer_takes_a_prepared_model(tmp_path):
    from runs import trainer

    model, plain = packsft.prepare(tiny_model("llama")), tiny_model("llama")
    of_prepared, of_plain = (trainer(tmp_path, one, max_steps=2) for one in (model, plain))
    assert of_prepared.train().training_loss == of_plain.train().training_loss


def test_a_preparation_that_fails_leaves_the_model_as_it_was(batch):
    model = bloom()
    before = footprint(model)
    with pytest.raises(ValueError, match="cannot be trained on packed documents"):
        packsft.prepare(model, on_unpackable="error")
    with pytest.raises(ValueError, match="flash_attn_2"):
        packsft.prepare(model, attention_backend="flash_attn_2")
    assert footprint(model) == before
    model = packsft.prepare(tiny_model("llama"))
    loss = model(**batch).loss
    with pytest.raises(ValueError, match="label_smoothing"):
        packsft.prepare(model, label_smoothing=5)
    assert model(**batch).loss == loss


def adapted():
    return get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


@pytest.mark.parametrize("given", [
    lambda: torch.nn.Linear(2, 2), lambda: torch.nn.DataParallel(tiny_model("llama")),
    lambda: torch.nn.DataParallel(adapted()), lambda: torch.compile(tiny_model("llama")),
], ids=["linear", "parallel", "parallel adapter", "compiled"])  # fmt: skip
def test_what_is_wrapped_or_no_model_is_refused(given):
    given = given()
    with pytest.raises(TypeError, match=f"a {type(given).__name__} cannot be prepared"):
        packsft.prepare(given)


@pytest.mark.parametrize("options", [{"on_unpackable": "x"}, {"max_length": "a"}, {"max_length": 0}], ids=str)
def test_arguments_are_checked(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}(: must be| is unknown)"):
        packsft.prepare(tiny_model("llama"), **options)


def test_a_model_that_accelerate_has_prepared_is_refused():
    model = tiny_model("llama")
    model._original_forward = model.forward  # as `Accelerator(mixed_precision=...)` does
    with pytest.raises(ValueError, match=r"call packsft\.prepare before it"):
        packsft.prepare(model)


def test_a_batch_on_a_model_that_was_not_prepared_gives_no_loss(batch):
    assert tiny_model("llama")(**batch).loss is None
    assert pickle.loads(pickle.dumps(packsft.prepare(tiny_model("llama"))))(**batch).loss is None


def test_a_prompt_that_comes_after_it_is_refused(batch):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="only PackedSFTTrainer trains it"):
        get_peft_model(packsft.prepare(tiny_model("llama")), prompt)(**batch)


def test_the_base_of_an_adapter_gives_it_back():
    model = adapted()
    packsft.unprepare(packsft.prepare(model).get_base_model())
    assert not hasattr(model, "packing")


def test_a_document_beyond_the_table_of_positions_is_refused():
    ((batch,),) = packsft.pack([[5] * 300], 512, batch_size=1).loader()
    with pytest.raises(ValueError, match="up to 300 tokens, and the model has a table of 256 positions"):
        packsft.prepare(tiny_model("opt"))(**batch)


def test_it_is_prepared_again_after_accelerate(batch):
    model = packsft.prepare(tiny_model("llama"))
    model._original_forward, model._is_accelerate_prepared = model.forward, True  # as accelerate does
    packsft.unprepare(model)
    assert packsft.prepare(model)(**batch).loss > 0


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model is a str, expected a causal language model of transformers"):
        packsft.prepare("a name")
