"""`attn_implementation="packsft"` inside transformers: masks, dtypes and arguments that do not arrive."""

import copy

import pytest
import torch
from runs import losses, trainer
from tiny import ROWS, tiny_model, tiny_tokenizer
from transformers import AttentionMaskInterface

from packsft.data.batch import model_inputs
from packsft.data.collator import PackingCollator
from packsft.model import attention


def packed_inputs():
    """As in training: a cache would make transformers look past the positions, and cast v to the dtype of k."""
    return model_inputs(PackingCollator(pad_token_id=0)([dict(row) for row in ROWS])) | {"use_cache": False}


def with_attention(model, name):
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation(name)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_padded_logits_and_generation_are_those_of_transformers(family):
    own, ours = (with_attention(tiny_model(family), name) for name in ("eager", "packsft"))
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    batch = tokenizer(["tell me a joke", "why"], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        seen = batch["attention_mask"].bool()
        torch.testing.assert_close(ours(**batch).logits[seen], own(**batch).logits[seen], atol=1e-5, rtol=1e-5)
        generated = [m.generate(**batch, max_new_tokens=5, do_sample=False) for m in (ours, own)]
    assert torch.equal(*generated)


def test_restarting_positions_without_boundaries_still_keep_documents_apart():
    # outside of the trainer: transformers builds the block mask from the positions
    model = with_attention(tiny_model("llama"), "packsft")
    inputs = packed_inputs()
    with torch.no_grad():
        by_boundaries = model(**inputs).logits
        by_positions = model(**{key: inputs[key] for key in ("input_ids", "position_ids", "use_cache")}).logits
    torch.testing.assert_close(by_positions, by_boundaries, atol=1e-5, rtol=1e-5)


def test_no_mask_is_built_in_a_packed_forward(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a mask was built")

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "packsft", refuse)
    model = with_attention(tiny_model("llama"), "packsft")
    with pytest.raises(AssertionError, match="a mask was built"):
        model(**packed_inputs())
    with attention.packed_forward():
        model(**packed_inputs())
    assert AttentionMaskInterface._global_mapping["packsft"] is refuse


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_float32_weights_under_autocast_give_attention_one_dtype(family, monkeypatch):
    # rotary embeddings leave q and k in float32 while v is bfloat16; flash kernels refuse that, CPU SDPA hides it
    seen = []
    original = attention.varlen_attention

    def record(q, k, v, *args, **kwargs):
        out = original(q, k, v, *args, **kwargs)
        seen.append((q.dtype, v.dtype, out.dtype))
        return out

    monkeypatch.setattr(attention, "varlen_attention", record)
    model = with_attention(tiny_model(family), "packsft")
    with torch.autocast("cpu", dtype=torch.bfloat16), attention.packed_forward():
        model(**packed_inputs())
    assert {out for _, _, out in seen} == {torch.bfloat16}
    assert any(q != v for q, v, _ in seen), "the trap is gone from this model: the test shows nothing any more"


def test_a_model_that_drops_the_boundaries_raises_instead_of_leaking():
    model = with_attention(tiny_model("stablelm"), "packsft")
    with attention.packed_forward(), pytest.raises(ValueError, match="without cu_seq_lens_q"):
        model(**packed_inputs())


def test_a_model_that_drops_the_boundaries_trains_padded_and_says_why(tmp_path, caplog):
    ours = trainer(tmp_path, model=tiny_model("stablelm"), max_steps=2)
    assert "trained on padded rows instead of packed ones" in caplog.text
    assert "drops keyword arguments" in ours.isolation.reason
    assert ours.model.config._attn_implementation == "sdpa"
    ours.train()
    assert len(losses(ours)) == 2


def test_each_model_keeps_its_own_back_end(tmp_path, monkeypatch):
    # two trainers in one process: the second must not change what the first one runs
    seen, run = [], attention.varlen_attention

    def watch(*args, backend, **kwargs):
        seen.append(backend)
        return run(*args, backend=backend, **kwargs)

    monkeypatch.setattr(attention, "varlen_attention", watch)
    first, second = (trainer(tmp_path, attention_backend=name, max_steps=1) for name in ("sdpa", "auto"))
    for ours, expected in ((first, "sdpa"), (second, "auto")):
        seen.clear()
        ours.train()
        assert set(seen) == {expected}
    assert attention.backend_of(copy.deepcopy(first.model))[0] == "sdpa"
