"""`check_packing()` and `packsft check`: every claim holds on models that train right, and fails on a planted fault."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from datasets import Dataset
from runs import trainer
from tiny import tiny_model, token_rows

from packsft.app.cli import main
from packsft.data.collator import PackingCollator
from packsft.model import attention, head
from packsft.model.claims import first_documents

ISOLATION, LOGITS, HEAD, TWO, EACH, ALONE = range(6)


def failing(check):
    return [i for i, claim in enumerate(check.claims) if not claim.holds]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *itertools.product(["llama", "gpt2", "gemma2"], [torch.float64, torch.float32, torch.bfloat16]),
        *itertools.product(["mixtral"], [torch.float32, torch.bfloat16]),  # torch groups no products of float64
    ],
)
def test_every_claim_holds_on_a_packed_model(family, dtype, tmp_path):
    check = trainer(tmp_path, model=tiny_model(family, dtype)).check_packing()
    assert failing(check) == []
    assert check.facts["documents"] == "in one row, and none sees another: checked on this model"


def test_a_model_whose_documents_see_each_other_is_right_on_padded_rows(tmp_path):
    check = trainer(tmp_path, model=tiny_model("stablelm")).check_packing()
    assert failing(check) == [ISOLATION]
    assert "drops keyword arguments" in check.claims[ISOLATION].where
    assert check.facts["documents"].startswith("padded: a packed forward raised")


@pytest.mark.parametrize(
    "options",
    [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"loss_normalization": "example"},
     {"pad_to_multiple_of": 16}, {"packing_strategy": "bfd"}, {"packing": False}],
    ids=str,
)  # fmt: skip
def test_the_claims_are_those_of_the_loss_that_is_trained(options, tmp_path):
    assert failing(trainer(tmp_path, model=tiny_model("gpt2", torch.float64), **options).check_packing()) == []


def test_the_claims_speak_of_what_an_adapter_trains(tmp_path):
    from peft import LoraConfig

    adapted = trainer(tmp_path, peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    check = adapted.check_packing()
    assert failing(check) == []
    assert "lora_" in check.claims[ALONE].where or check.claims[ALONE].where == "the loss"


# ---- planted faults ----


def test_an_attention_that_ignores_the_boundaries_is_caught(tmp_path, monkeypatch):
    checked = trainer(tmp_path, model=tiny_model("llama", torch.float64), check_packing="off")
    own = attention.varlen_attention

    def blind(q, k, v, cu_seqlens, max_seqlen, **kwargs):
        return own(q, k, v, torch.tensor([0, q.shape[0]], dtype=torch.int32), q.shape[0], **kwargs)

    monkeypatch.setattr(attention, "varlen_attention", blind)
    check = checked.check_packing()
    assert failing(check) == [ISOLATION, LOGITS, TWO, EACH, ALONE]
    assert check.claims[ISOLATION].where == "documents see each other (first in model.layers.0)"
    assert check.claims[LOGITS].where == "model.layers.0"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_positions_that_do_not_restart_are_caught(dtype, tmp_path, monkeypatch):
    # they reach no other document: what the first layer is given tells them
    packed = PackingCollator._packed
    monkeypatch.setattr(
        PackingCollator, "_packed",
        lambda self, documents: (batch := packed(self, documents))
        | {"position_ids": torch.arange(batch["input_ids"].numel())[None]},
    )  # fmt: skip
    check = trainer(tmp_path, model=tiny_model("gpt2", dtype), check_packing="off").check_packing()
    assert failing(check) == [ISOLATION, LOGITS, TWO, EACH, ALONE]
    assert check.claims[ISOLATION].where == "a packed document gets other positions than it has alone"
    assert check.claims[LOGITS].where == "transformer.h.0"


def test_a_layer_that_carries_a_state_over_is_caught(tmp_path, monkeypatch):
    model = tiny_model("llama", torch.float64)
    own = model.model.layers[1].forward
    monkeypatch.setattr(
        model.model.layers[1], "forward",
        lambda *args, **kwargs: (hidden := own(*args, **kwargs)) + 1e-4 * hidden.cumsum(1),
    )  # fmt: skip
    check = trainer(tmp_path, model=model, check_packing="off").check_packing()
    assert failing(check) == [ISOLATION, LOGITS, TWO, EACH, ALONE]
    assert check.claims[LOGITS].where == "model.layers.1"


def test_a_head_whose_softcap_is_missed_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(head, "_logit_transform", lambda config: {"softcap": None, "logit_scale": 1.0})
    model = tiny_model("gemma2", final_logit_softcapping=0.1)
    # the probe at construction refuses it
    assert "log-probabilities would be off" in trainer(tmp_path, model=copy.deepcopy(model)).why_compact
    monkeypatch.setattr(head, "_why_not_fused", lambda *_: None)
    check = trainer(tmp_path, model=model).check_packing()
    assert failing(check) == [HEAD, ALONE]


def test_a_tensor_that_is_no_number_holds_nothing(tmp_path):
    model = tiny_model("llama")
    checked = trainer(tmp_path, model=model)
    model.model.norm.weight.data[0] = float("nan")
    assert set(failing(checked.check_packing())) >= {LOGITS, HEAD, TWO, EACH, ALONE}


# ---- what it leaves behind, and what it reads ----


def test_the_proof_leaves_the_model_as_it_was(tmp_path):
    checked = trainer(tmp_path, gradient_checkpointing=True)
    model = checked.model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    checked.check_packing()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [module._forward_hooks for module in model.modules()] == hooks


def test_the_result_and_the_plan_are_in_every_checkpoint(tmp_path):
    checked = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    check = checked.check_packing()
    checked.train()
    record = json.loads((tmp_path / "checkpoint-1" / "packsft.json").read_text())
    assert record["check_packing"] == check.as_dict()
    assert record["plan_fingerprint"] == checked.train_dataset.plan.fingerprint


def test_the_run_begins_with_which_way_and_why(tmp_path, caplog):
    trainer(tmp_path, max_steps=1).train()
    for line in (
        "documents: in one row, and none sees another: checked on this model",
        "attention: sdpa, float32 on cpu",
        "head: fused",
    ):
        assert line in caplog.text


def test_the_documents_are_the_first_of_the_data_set_cut_as_in_training():
    rows = token_rows(12)
    found = first_documents(rows, 5, max_tokens=20)
    assert [one.input_ids.tolist() for one in found] == [row["input_ids"][:5] for row in rows.select(range(len(found)))]
    assert 12 < sum(map(len, found)) <= 20
    pack = {"input_ids": [1, 2, 3], "labels": [-100, 2, -100], "seq_lengths": [2, 1]}
    assert [(d.input_ids.tolist(), d.labels.tolist()) for d in first_documents([pack], None)] == [
        ([1, 2], [-100, 2]), ([3], [-100]),
    ]  # fmt: skip


def test_one_document_and_prompts_longer_than_what_is_read_are_checked(tmp_path):
    rows = [{"input_ids": [3] * 300 + [4] * 20, "labels": [-100] * 300 + [4] * 20}]
    for data in (rows, rows * 4):
        checked = trainer(tmp_path, model=tiny_model("llama", max_position_embeddings=512), max_length=512,
                          train_dataset=Dataset.from_list(data))  # fmt: skip
        assert failing(checked.check_packing()) == []
    assert [len(one) for one in first_documents(rows * 4, 512)] == [128, 128]


def test_a_stream_is_checked_on_its_first_documents_and_trained_from_its_start(tmp_path):
    stream = trainer(tmp_path, train_dataset=token_rows(24).to_iterable_dataset(), max_steps=2)
    assert failing(stream.check_packing()) == []
    stream.train()
    plain = trainer(tmp_path, train_dataset=token_rows(24).to_iterable_dataset(), max_steps=2)
    plain.train()
    assert stream.state.log_history[0]["loss"] == plain.state.log_history[0]["loss"]


def test_documents_in_which_nothing_is_scored_are_refused(tmp_path):
    checked = trainer(tmp_path)
    unscored = [{"input_ids": [1, 2], "labels": [-100, -100]}]
    checked.train_dataset = unscored
    with pytest.raises(ValueError, match="none of the documents has a token to score"):
        checked.check_packing()


# ---- the command ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with and without a tokenizer, one whose packed documents see each other, and an adapter."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from tiny import tiny_tokenizer

    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "stablelm", "mixtral"):
        tiny_model(family).save_pretrained(root / family)
    tiny_tokenizer().save_pretrained(root / "llama")
    (root / "text.jsonl").write_text('{"text": "tell me a joke no"}')
    adapter = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(root / "adapter")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(tiny_model("llama"), prompt).save_pretrained(root / "prompt")
    return root


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["llama"], 0),
        (["llama", "--dtype", "float64", "--attn", "sdpa", "--max-length", "16"], 0),
        (["llama", "--attn", "eager"], 0),
        (["stablelm"], 1),
    ],
    ids=str,
)
def test_the_command_proves_a_model_in_a_folder(options, code, folders, capsys):
    model, *others = options
    assert main(["check", "--model", str(folders / model), "--json", *others]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] is (code == 0)
    assert len(found["claims"]) == 6


def test_the_command_takes_data_and_an_adapter(folders, tmp_path, capsys, monkeypatch):
    if not torch.accelerator.is_available():  # as in a CUDA build without a GPU
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"text": "tell me a joke no"}) for _ in range(3)))
    llama, adapter = str(folders / "llama"), str(folders / "adapter")
    assert main(["check", "--model", llama, "--adapter", adapter, "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert "checked on: 3 documents of 18 tokens" in out  # with the end of each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "set --model or --batch-invariance"),
        (["--batch-invariance", "--dtype", "float64"], "--dtype has no meaning with --batch-invariance"),
        (["--model", "mixtral", "--dtype", "float64"], "does not run by itself in float64"),
        (["--model", "stablelm", "--data", "text.jsonl"], "could not load the tokenizer of"),
        (
            ["--model", "llama", "--adapter", "prompt"],
            "PromptTuningConfig trains padded rows: there is nothing to prove",
        ),
        (["--model", "llama", "--attn", "flash_attn_2"], "cannot run this attention"),
    ],
)
def test_bad_input_is_one_line(options, message, folders, capsys):
    options = [str(folders / option) if option and (folders / option).exists() else option for option in options]
    assert main(["check", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("packsft: error:")
    assert message in error


def test_claims_are_plain_values(tmp_path):
    check = trainer(tmp_path).check_packing()
    assert json.loads(json.dumps(check.as_dict()))["claims"][0] == dataclasses.asdict(check.claims[0])
    assert [len(row) for row in check.rows()] == [5] * 7
