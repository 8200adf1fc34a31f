"""The check before the first step: it finds what leaks, says where, and leaves nothing behind."""

from contextlib import nullcontext

import pytest
import torch
from runs import trainer
from tiny import VOCAB, tiny_model, token_rows
from tiny_models import tiny_model as tiny_family
from transformers import AutoModelForCausalLM, Llama4TextConfig, PhimoeConfig, Qwen2MoeConfig

from packsft.model import attention
from packsft.model.isolation import check_isolation


def with_attention(model, name):
    model.set_attn_implementation(name)
    return model


def check(model, **options):
    return check_isolation(with_attention(model, "packsft"), nullcontext, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "opt"])
def test_isolation_holds_on_models_that_hand_the_boundaries_on(family, dtype):
    assert check(tiny_model(family, dtype)).isolated


def test_an_attention_that_ignores_the_boundaries_is_found_and_named(monkeypatch):
    own = attention.varlen_attention

    def blind(q, k, v, cu_seqlens, max_seqlen, **kwargs):
        return own(q, k, v, torch.tensor([0, q.shape[0]], dtype=torch.int32), q.shape[0], **kwargs)

    monkeypatch.setattr(attention, "varlen_attention", blind)
    verdict = check(tiny_model("llama"))
    assert not verdict.isolated
    assert verdict.reason == "documents see each other (first in model.layers.0)"
    assert verdict.leak > 1e-4


def test_an_attention_that_sees_what_comes_after_is_found(monkeypatch):
    own = attention.varlen_attention
    monkeypatch.setattr(attention, "varlen_attention", lambda *args, **kwargs: own(*args, **kwargs | {"causal": False}))
    assert check(tiny_model("llama")).reason == "a position sees the ones after it"


def lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_the_check_leaves_no_trace(dtype, adapter, checkpointing):
    # Llama's head is tied to its embeddings
    model = tiny_model("llama", dtype)
    if adapter:
        model = lora(model).get_base_model()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    model.train()
    model.model.layers[0].eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    requires_grad = [p.requires_grad for p in model.parameters()]
    state, hooks = torch.get_rng_state(), dict(model.get_input_embeddings()._forward_hooks)
    assert check(model).isolated
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.get_input_embeddings()._forward_hooks == hooks


def test_the_check_can_be_switched_off(tmp_path):
    ours = trainer(tmp_path, check_packing="off", train_dataset=token_rows(4))
    assert ours.isolation.reason == "not checked"


def test_a_layer_that_carries_a_state_over_is_found_and_named(monkeypatch):
    model = tiny_model("llama")
    layer = model.model.layers[1]
    own = layer.forward

    def with_state(*args, **kwargs):  # a running mean, as of a scan that is never reset
        hidden = own(*args, **kwargs)
        steps = torch.arange(1, hidden.shape[1] + 1)[:, None]
        return hidden + hidden.cumsum(1) / steps

    monkeypatch.setattr(layer, "forward", with_state)
    assert check(model).reason == "documents see each other (first in model.layers.1)"


# What attends within 5 tokens by its mask alone: windows, and the chunks of Llama 4.
SIZES = {
    "vocab_size": len(VOCAB), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
TOLD_BY_THE_MASK = {
    "Qwen2MoeAttention": Qwen2MoeConfig(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "PhimoeAttention": PhimoeConfig(**SIZES, sliding_window=5, num_local_experts=4),
    "Llama4TextAttention": Llama4TextConfig(
        **SIZES, attention_chunk_size=5, head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("layer", list(TOLD_BY_THE_MASK))
def test_a_window_that_only_the_mask_knows_limits_the_documents(layer):
    model = AutoModelForCausalLM.from_config(TOLD_BY_THE_MASK[layer])
    assert check(model, max_length=5).isolated
    for max_length, limit in ((6, "max_length=6"), (None, "there is no max_length")):
        assert check(model, max_length=max_length).reason == (
            f"{layer} knows of its window of 5 tokens from its mask alone, and packing has none ({limit})"
        )


def test_a_window_that_the_attention_is_told_of_does_not():
    assert check(tiny_model("gemma2", sliding_window=4), max_length=64).isolated


def test_a_check_at_construction_takes_one_forward_and_two_backwards_of_at_most_64_tokens(tmp_path, monkeypatch):
    model, forwards, backwards = tiny_model("llama"), [], []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: forwards.append(args[0].numel()))
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: backwards.append(1) or grad(*args, **kwargs))
    trainer(tmp_path, model=model, train_dataset=token_rows(4))
    assert forwards == [34, 11, 8, 8]  # isolation; positions and masks; the head's probe, its own and the fused
    assert len(backwards) == 2


@pytest.mark.parametrize(
    "family", ["bart", "roberta"]
)  # counts through the row whatever `position_ids` say; begins at the id of the pad + 1
def test_positions_other_than_those_of_the_document_alone_are_found(family):
    assert check(tiny_family(family).float()).reason == "a packed document gets other positions than it has alone"


@pytest.mark.parametrize("family", ["ctrl", "roc_bert"])  # scales its embeddings in place; projects them
def test_what_is_done_to_the_embeddings_does_not_mislead_the_check(family):
    assert check(tiny_family(family).float()).isolated


def test_a_model_that_refuses_a_mode_is_trained_padded():
    verdict = check_isolation(tiny_family("reformer").float(), nullcontext)  # asserts that it is not in eval mode
    assert verdict.reason.startswith("a packed forward raised AssertionError")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["CUDA", "CPU"],
)
def test_running_out_of_memory_says_nothing_about_the_model(error, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(attention, "varlen_attention", fail)
    with pytest.raises(type(error), match="memory"):
        trainer(tmp_path)  # neither trains on padded rows, nor with compact logits
    monkeypatch.undo()
    monkeypatch.setattr("packsft.model.head.linear_cross_entropy", fail)
    with pytest.raises(type(error), match="memory"):
        trainer(tmp_path)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"])
def test_weights_that_are_no_numbers_are_named_before_training_or_after_its_first_steps(name, tmp_path):
    name = f"model.layers.1.{name}.weight"
    model = tiny_model("llama")
    model.get_parameter(name).data[3, 5] = torch.nan
    with pytest.raises(FloatingPointError, match=f"the weights {name} of LlamaForCausalLM are not finite"):
        trainer(tmp_path, model)
    with pytest.raises(FloatingPointError, match="the loss of steps 1 and 2 is not finite"):
        trainer(tmp_path, model, check_packing="off").train()
    padded = tiny_model("stablelm")
    padded.get_parameter(name).data[3, 5] = torch.nan
    with pytest.raises(FloatingPointError, match=f"the weights {name} of StableLmForCausalLM are not finite"):
        trainer(tmp_path, padded)


def test_gradients_that_overflow_are_no_leak(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight *= 1e30
    assert check(model).reason == "inconclusive: gradients are not finite"
