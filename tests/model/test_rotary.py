"""Rotary embeddings whose frequencies depend on a document's length: each document gets those that it has alone."""

import copy
import sys
from contextlib import nullcontext

import pytest
import torch
from alone import assert_gradients_equal, copied, documents_alone, one_step
from numerics import error
from runs import trainer
from tiny import tiny_model, token_rows
from tiny_models import Float64Throughout, tiny_config
from tiny_models import tiny_model as tiny_family

from packsft.model.isolation import check_isolation
from packsft.model.rotary import by_document, install_rotary

LIMIT = 6
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT,
    "short_mscale": 1.0, "long_mscale": 1.3,  # of PhiMoE alone
}  # fmt: skip


def longrope(pairs):
    return LONGROPE | {"short_factor": [1.0] * pairs, "long_factor": [2.0 + i for i in range(pairs)]}


# of the two limits, transformers takes that of the configuration itself
LONG = {
    "max_position_embeddings": 4 * LIMIT, "original_max_position_embeddings": LIMIT, "rope_parameters": longrope(4),
}  # fmt: skip


@pytest.fixture
def rows():
    """Some shorter than the limit, one exactly as long, and several longer ones that fall and rise."""
    found = token_rows(16, max_length=14)
    lengths = [len(ids) for ids in found["input_ids"]]
    assert LIMIT in lengths
    assert len({length for length in lengths if length > LIMIT}) > 3
    return found


def family(name, monkeypatch, **fields):
    """A tiny model in float64, with these fields in its configuration."""
    config = tiny_config(name)
    for field, value in fields.items():
        setattr(config, field, value)
    monkeypatch.setattr("tiny_models.tiny_config", lambda name: config)
    return tiny_family(name)


def truth(model, rows):
    """Loss and gradients of the documents alone, each by a model that was just loaded."""
    scored = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    loss, gradients = 0.0, {}
    for row, count in zip(rows, scored, strict=True):
        if count:
            one, grads = documents_alone(model, [row])
            loss += one * (count / sum(scored))
            for name, grad in grads.items():
                gradients[name] = gradients.get(name, 0.0) + grad * (count / sum(scored))
    return loss, gradients


MODELS = {
    "llama, dynamic": ("llama", {"max_position_embeddings": LIMIT, "rope_parameters": DYNAMIC}),
    "phi3, longrope": ("phi3", LONG),
    "gemma3_text, a type for each kind of layer": (
        "gemma3_text",
        {
            "max_position_embeddings": LIMIT,
            "rope_parameters": {"sliding_attention": DYNAMIC, "full_attention": DYNAMIC | {"factor": 8.0}},
        },
    ),
    "deepseek_v2, complex": ("deepseek_v2", {"max_position_embeddings": LIMIT, "rope_parameters": DYNAMIC}),
    "moshi, in the layers": ("moshi", {"max_position_embeddings": LIMIT, "rope_parameters": DYNAMIC}),
    "phimoe, on padded rows, a factor of its own": (
        "phimoe",
        LONG,
    ),
    "stablelm, on padded rows": (
        "stablelm",
        {"max_position_embeddings": LIMIT, "rope_parameters": DYNAMIC | {"partial_rotary_factor": 0.5}},
    ),
}


OPTIONS = {"tokens_per_pass": 32, "router_aux_loss_coef": 0.0}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_each_document_is_turned_as_it_is_alone(name, checkpointing, rows, tmp_path, monkeypatch):
    model_type, fields = MODELS[name]
    with Float64Throughout():
        model = family(model_type, monkeypatch, **fields)
        exact_loss, exact = truth(model, rows)
        ours = trainer(tmp_path, copied(model), rows, rows, gradient_checkpointing=checkpointing, **OPTIONS)
        assert ours._prepared.padded or "padded" not in name
        for _ in range(2):  # the second step begins where the first one ends
            ours.model.zero_grad()
            loss, gradients = one_step(ours)
            assert error(loss, exact_loss) < 1e-9
            assert_gradients_equal(gradients, exact, 1e-9)
        assert ours.evaluate()["eval_loss"] == pytest.approx(float(exact_loss), rel=1e-9)


@pytest.mark.parametrize("name", ["llama, dynamic", "phi3, longrope", "phimoe, on padded rows, a factor of its own"])
def test_without_it_the_longest_of_the_row_would_be_seen(name, rows, tmp_path, monkeypatch):
    model_type, fields = MODELS[name]
    monkeypatch.setattr("packsft.model.prepared.install_rotary", lambda model: sys.maxsize)
    with Float64Throughout():
        model = family(model_type, monkeypatch, **fields)
        exact_loss, _ = truth(model, rows)
        ours = trainer(
            tmp_path,
            copied(model),
            rows,
            check_packing="off",
            packing=False,
            **OPTIONS | {"per_device_train_batch_size": 16},
        )
        assert error(one_step(ours)[0], exact_loss) > 1e-6


def grown(model):
    """After a long row of somebody else."""
    with torch.no_grad():
        model(input_ids=torch.ones(1, 40, dtype=torch.long))
    return model


def test_what_the_model_saw_before_changes_nothing(rows, tmp_path, monkeypatch):
    model = family("llama", monkeypatch, **MODELS["llama, dynamic"][1])
    limit = rows.filter(lambda row: len(row["input_ids"]) == LIMIT)
    for data in (rows, limit):
        fresh, old = (one_step(trainer(tmp_path, m, data))[0] for m in (copied(model), grown(copied(model))))
        assert torch.equal(fresh, old)


def test_a_copy_and_a_second_trainer_turn_each_document_once(rows, tmp_path, monkeypatch):
    model = family("phi3", monkeypatch, **MODELS["phi3, longrope"][1])
    first = trainer(tmp_path, model, rows)
    loss = one_step(first)[0].detach()
    for again in (first.model, copy.deepcopy(first.model)):
        again.zero_grad()
        second = trainer(tmp_path, again, rows)
        assert torch.equal(one_step(second)[0], loss)
        assert len(second.model.model.rotary_emb._forward_hooks) == 1


def test_documents_below_the_limit_cost_nothing(tmp_path, monkeypatch):
    model = family("llama", monkeypatch, max_position_embeddings=33, rope_parameters=DYNAMIC)
    ours = trainer(tmp_path, model, token_rows(16, max_length=14))
    rope, calls = ours.model.model.rotary_emb, []
    monkeypatch.setattr(rope, "forward", lambda *a, **kw: calls.append(a) or type(rope).forward(rope, *a, **kw))
    one_step(ours)
    assert len(calls) == sum(len(step["passes"]) for step in ours.get_train_dataloader())


def test_compiled_layers_and_an_adapter_get_them_too(rows, tmp_path, monkeypatch):
    from peft import LoraConfig

    model = family("phi3", monkeypatch, **MODELS["phi3, longrope"][1]).float()
    exact_loss, _ = truth(model, rows)
    peft_config = LoraConfig(target_modules=["o_proj"])
    ours = trainer(tmp_path, copied(model), rows, compile_layers=True, peft_config=peft_config)
    assert error(one_step(ours)[0], exact_loss) < 1e-6


@pytest.mark.parametrize("name", ["llama, dynamic", "phi3, longrope", "stablelm, on padded rows"])
def test_the_proof_does_not_take_the_longest_of_a_row_for_noise(name, rows, tmp_path, monkeypatch):
    model_type, fields = MODELS[name]
    ours = trainer(tmp_path, family(model_type, monkeypatch, **fields).float(), rows)
    assert all(claim.holds for claim in ours.check_packing().claims[1:])  # the first: whether rows are packed
    monkeypatch.setattr(ours._prepared, "_rotary_limit", sys.maxsize)
    found = {claim.claim: claim.holds for claim in ours.check_packing().claims}
    assert not found["loss and gradients are those of the documents alone"]


# ---- modules that nothing is known of ----


def by_the_longest(rope, x, position_ids):
    """As in code from a hub: no `rope_type`, and a base that grows with the row."""
    scale = (position_ids.max() + 1).clamp(min=16) / 16
    angles = position_ids[..., None].double() * (rope.inv_freq / scale)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


@pytest.fixture
def unknown(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(type(model.model.rotary_emb), "forward", by_the_longest)
    return model


def test_a_module_that_goes_by_the_row_is_found_and_named(unknown):
    unknown.set_attn_implementation("packsft")
    assert check_isolation(unknown, nullcontext, max_length=16).isolated
    for max_length in (17, 4096, None):
        verdict = check_isolation(unknown, nullcontext, max_length=max_length)
        assert verdict.reason == (
            "LlamaRotaryEmbedding turns each document by the longest one of its row, also on padded rows, if that has "
            "more than 16 tokens"
        )


def test_the_check_sees_it_on_a_model_that_is_padded_for_another_reason(monkeypatch):
    model = tiny_model("stablelm")
    monkeypatch.setattr(type(model.model.rotary_emb), "forward", by_the_longest)
    model.set_attn_implementation("packsft")
    reason = check_isolation(model, nullcontext, max_length=64).reason
    assert "drops keyword arguments" in reason
    assert "; StableLmRotaryEmbedding turns each document by the longest one of its row" in reason


@pytest.mark.parametrize("name", list(MODELS))
def test_the_check_agrees_with_what_is_mended_and_leaves_no_trace(name, monkeypatch):
    model_type, fields = MODELS[name]
    model = family(model_type, monkeypatch, **fields).float()
    model.set_attn_implementation("packsft")
    assert "turns each document" in check_isolation(model, nullcontext, max_length=64).reason
    install_rotary(model)
    before = copy.deepcopy(dict(model.named_buffers()))
    verdict = check_isolation(model, nullcontext, max_length=64)
    assert "turns each document" not in (verdict.reason or "")
    assert all(torch.equal(buffer, before[key]) for key, buffer in model.named_buffers())


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn", "llama3"])
def test_frequencies_that_are_the_same_for_all_documents_need_nothing(rope_type, tmp_path):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    model = tiny_model("llama", rope_parameters=rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0})
    assert trainer(tmp_path, model, max_length=4096).isolation.isolated
    assert not model.model.rotary_emb._forward_hooks


def test_positions_of_something_else_than_tokens_are_noticed(rows, tmp_path, monkeypatch, caplog):
    model = family("llama", monkeypatch, **MODELS["llama, dynamic"][1])
    ours = trainer(tmp_path, model, rows)
    rope = ours.model.model.rotary_emb
    with by_document(torch.full((1, 40), 40)):
        for _ in range(2):
            rope(torch.zeros(1), torch.arange(20)[None])
    assert caplog.text.count("turns each document by the longest one of its batch: it got positions (1, 20)") == 1
