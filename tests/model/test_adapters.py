"""Adapters: one packed optimizer step equals plain PEFT on each document alone, in float64; saved, they come back.

Every adapter is away from its start, where LoRA's B is zero and would hide the half of an error. TRL takes its
log-probabilities in float32 inside, also in float64.
"""

import copy
import functools
import json
import re

import pytest
import torch
import torch.nn.functional as F
from alone import TRL_TOLERANCE, assert_gradients_equal, documents_alone, moved, one_step, packed_step, trl_step
from numerics import EXACT, assert_accurate, error
from packsft_kernels import LossOptions
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    CPTConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from runs import losses, trainer
from tiny import VOCAB, tiny_model, token_rows
from tiny_models import tiny_model as tiny_family
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from packsft.model.adapters import split_head
from packsft.model.head import install_head

pytestmark = pytest.mark.usefixtures("rms_norm_keeps_float64")

LAYERS = ["q_proj", "v_proj", "down_proj"]
HEAD = [*LAYERS, "lm_head"]
NO_LORA_ON_HEAD = "Applying a PEFT adapter to `lm_head` is not supported"
NO_TRAINED_ROWS = "'TrainableTokensWrapper' object has no attribute 'bias'"


def lora(targets=LAYERS, **options):
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(targets), **options)


# The adapter, whether the head is tied to the embeddings, why the head is not fused, and what TRL says if it refuses.
KINDS = {
    "LoRA": (lora(), False, None, None),
    "rsLoRA": (lora(use_rslora=True), False, None, None),
    "DoRA": (lora(use_dora=True), False, None, None),
    "IA3": (
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        False, None, None,
    ),
    "LoRA on a tied embedding": (lora([*LAYERS, "embed_tokens"]), True, None, None),
    "LoRA on the head": (lora(HEAD), False, None, NO_LORA_ON_HEAD),
    "LoRA on a tied head": (lora(HEAD), True, None, NO_LORA_ON_HEAD),
    "rsLoRA on the head": (lora(HEAD, use_rslora=True), False, None, NO_LORA_ON_HEAD),
    "LoRA with a bias on the head": (lora(HEAD, lora_bias=True), False, None, NO_LORA_ON_HEAD),
    "DoRA on the head": (lora(HEAD, use_dora=True), False, "no plain LoRA .DoraLinearVariant.", NO_LORA_ON_HEAD),
    "LoHa on the head": (
        LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=HEAD),
        False, "is a peft.tuners.loha.layer.Linear, not a plain LoRA", NO_LORA_ON_HEAD,
    ),
    "a copy of the head": (lora(modules_to_save=["lm_head"]), False, None, None),
    "a copy of a tied head": (lora(modules_to_save=["lm_head"]), True, None, None),
    "copies of head and embedding": (lora(modules_to_save=["lm_head", "embed_tokens"]), False, None, None),
    "copies that stay tied": (lora(modules_to_save=["lm_head"], ensure_weight_tying=True), True, None, None),
    "tokens of the embedding": (lora(trainable_token_indices={"embed_tokens": [3, 7]}), False, None, None),
    "tokens of a tied head": (lora(trainable_token_indices=[3, 7]), True, None, NO_TRAINED_ROWS),
    "tokens of the head": (
        lora(trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [7, 9]}), False, None, NO_TRAINED_ROWS
    ),
    "tokens alone": (TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3, 7]), True, None, NO_LORA_ON_HEAD),
}  # fmt: skip


def base_model(tied):
    return tiny_model("llama", torch.float64, tie_word_embeddings=tied)


@functools.cache
def adapted(kind):
    config, tied, _, _ = KINDS[kind]
    return moved(get_peft_model(base_model(tied), copy.deepcopy(config)))


@functools.cache
def alone(kind):
    return documents_alone(adapted(kind), token_rows(12), torch.float64)


@functools.cache
def stepped(kind, path):
    """As it leaves the trainer: adapter weights as they were, since a step is taken without an optimizer."""
    return packed_step(adapted(kind), token_rows(12), path, torch.float64)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_each_document_alone(kind, path):
    ours, loss, grads = stepped(kind, path)
    exact_loss, exact = alone(kind)
    assert ours.isolation.isolated
    assert error(loss, exact_loss) < EXACT
    assert_gradients_equal(grads, exact, EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_fused_unless_the_adapter_on_it_is_no_plain_lora(kind, path):
    expected, found = KINDS[kind][2], stepped(kind, path)[0].why_compact
    assert found is None if expected is None else re.search(expected, found)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_trls_where_it_takes_the_adapter(kind, tmp_path):
    refusal = KINDS[kind][-1]
    if refusal is not None:
        with pytest.raises((ValueError, AttributeError), match=refusal):
            trl_step(adapted(kind), token_rows(12), tmp_path)
        return
    loss, grads = trl_step(adapted(kind), token_rows(12), tmp_path)
    exact_loss, exact = alone(kind)
    assert error(loss, exact_loss) < TRL_TOLERANCE
    assert_gradients_equal(grads, exact, TRL_TOLERANCE)


# ---- saved and merged ----

# PEFT merges into the one weight that head and embedding share, and so adds to both what belongs to one.
MERGED_INTO_BOTH = "LoRA on a tied embedding", "LoRA on a tied head"
IDS = torch.tensor([[3, 4, 5, 6, 7, 9, 20]])


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_gives_the_same_logits_on_a_fresh_model(kind, path, tmp_path):
    ours = stepped(kind, path)[0]
    ours.save_model(str(tmp_path))
    reloaded = PeftModel.from_pretrained(base_model(KINDS[kind][1]), tmp_path)
    assert torch.equal(logits(reloaded), logits(copy.deepcopy(adapted(kind))))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bias" not in kind])  # PEFT merges none without a place
def test_a_merged_model_gives_the_same_logits_without_peft_and_without_us(kind, path, tmp_path):
    merged = copy.deepcopy(stepped(kind, path)[0].model).merge_and_unload()
    plain = copy.deepcopy(adapted(kind)).merge_and_unload()
    assert error(logits(merged), logits(plain)) < EXACT
    if kind not in MERGED_INTO_BOTH:
        assert error(logits(merged), logits(copy.deepcopy(adapted(kind)))) < EXACT
    for model, name in ((merged, "ours"), (plain, "plain")):
        model.save_pretrained(tmp_path / name)
    ours, peft = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "plain"))
    assert ours == peft | {"use_cache": False}  # by transformers' Trainer
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert reloaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits(reloaded), logits(merged))


# ---- other ways to the same gradients ----


def test_an_adapter_made_by_the_trainer_is_the_same(tmp_path):
    kind = "LoRA on the head"
    ours = trainer(
        tmp_path, model=base_model(tied=False), peft_config=copy.deepcopy(KINDS[kind][0]), train_dataset=token_rows(12)
    )
    ours.model.load_state_dict(adapted(kind).state_dict())
    loss, grads = one_step(ours)
    assert error(loss, alone(kind)[0]) < EXACT
    assert_gradients_equal(grads, alone(kind)[1], EXACT)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["LoRA on the head", "tokens of a tied head"])
def test_gradient_checkpointing_changes_nothing(kind, use_reentrant, tmp_path):
    _, _, grads = packed_step(
        adapted(kind), token_rows(12), tmp_path, torch.float64,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )  # fmt: skip
    assert_gradients_equal(grads, alone(kind)[1], EXACT)


@pytest.mark.parametrize("tokens_per_pass", [12, 32])
def test_passes_add_up(tokens_per_pass, tmp_path):
    kind = "LoRA on the head"
    _, _, grads = packed_step(adapted(kind), token_rows(12), tmp_path, torch.float64, tokens_per_pass=tokens_per_pass)
    assert_gradients_equal(grads, alone(kind)[1], EXACT)


def test_what_stands_in_the_place_of_dropout_is_applied(tmp_path):
    model = copy.deepcopy(adapted("LoRA on the head"))
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Tanh()  # random numbers could not be compared
    ours, _, grads = packed_step(model, token_rows(12), tmp_path)
    assert ours.why_compact is None
    assert_gradients_equal(grads, documents_alone(model, token_rows(12))[1], EXACT)


def test_dropout_is_drawn_in_training_and_not_in_evaluation(tmp_path):
    lossy = moved(get_peft_model(base_model(tied=False), lora(["lm_head"], lora_dropout=0.5)))
    install_head(lossy.get_base_model(), LossOptions())
    training = [head_loss(lossy.train()) for _ in range(2)]
    evaluated = [head_loss(lossy.eval()) for _ in range(2)]
    assert training[0] != training[1]
    assert evaluated[0] == evaluated[1] == pytest.approx(own_loss(lossy), rel=EXACT)


# ---- the head alone, as adapters come and go ----


def head_loss(model):
    rows = torch.arange(IDS.numel() - 1, dtype=torch.int32)
    return model(input_ids=IDS, loss_rows=rows, loss_targets=IDS[0, 1:], num_items=1).loss.item()


def own_loss(model):
    return F.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:], reduction="sum").item()


def two_adapters(first, second):
    model = get_peft_model(base_model(tied=False), first)
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    return moved(model).eval()


def test_several_adapters_on_the_head_add_up():
    model = two_adapters(lora(HEAD), LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"], use_rslora=True))
    assert install_head(model.get_base_model(), LossOptions()) is None
    assert head_loss(model) == pytest.approx(own_loss(model), rel=EXACT)
    model.base_model.set_adapter("second")
    assert head_loss(model) == pytest.approx(own_loss(model), rel=EXACT)


def test_an_adapter_switched_on_later_is_not_left_out():
    """The head was found to be fused with another one."""
    model = two_adapters(lora(HEAD), lora(["lm_head"], use_dora=True))
    model.base_model.set_adapter("default")
    assert install_head(model.get_base_model(), LossOptions()) is None
    for active in ("second", "default"):
        model.base_model.set_adapter(active)
        assert head_loss(model) == pytest.approx(own_loss(model), rel=EXACT)


@pytest.mark.parametrize("kind", ["LoRA on the head", "tokens of the head", "a copy of the head"])
def test_disabled_and_merged_adapters_are_not_added(kind):
    model = copy.deepcopy(adapted(kind)).eval()
    assert install_head(model.get_base_model(), LossOptions()) is None
    with_adapter = own_loss(model)
    with model.disable_adapter():
        assert head_loss(model) == pytest.approx(own_loss(model), rel=EXACT)
        assert head_loss(model) != pytest.approx(with_adapter, rel=1e-3)
    model.merge_adapter()
    assert head_loss(model) == pytest.approx(with_adapter, rel=EXACT)
    with model.disable_adapter():  # which unmerges
        assert head_loss(model) == pytest.approx(own_loss(model), rel=EXACT)
    assert head_loss(model) == pytest.approx(with_adapter, rel=EXACT)


def test_a_lora_of_other_layers_is_left_to_its_own_forward():
    model = copy.deepcopy(adapted("LoRA on the head"))
    assert install_head(model.get_base_model(), LossOptions()) is None
    head = model.get_output_embeddings()
    head.lora_B["default"] = type("Narrow", (nn.Linear,), {})(4, len(VOCAB), bias=False)
    assert "Narrow" in split_head(head)
    assert head_loss(model.double()) == pytest.approx(own_loss(model), rel=EXACT)


@pytest.mark.parametrize("kind", ["LoRA on the head", "tokens of a tied head", "tokens of the head"])
def test_the_probe_sees_an_adapter_that_adds_nothing_yet(kind, monkeypatch):
    config, tied, _, _ = KINDS[kind]
    # in bfloat16 and a larger vocabulary two tokens are lost among the others, unless they are the targets
    base = tiny_model("llama", torch.bfloat16, vocab_size=4000, tie_word_embeddings=tied)
    model = get_peft_model(base, copy.deepcopy(config)).get_base_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert install_head(model, LossOptions()) is None
    monkeypatch.setattr("packsft.model.head.low_rank_of", lambda *_: None)
    assert "log-probabilities would be off" in install_head(model, LossOptions())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- a larger vocabulary ----


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "config",
    [
        None,
        lora(modules_to_save=["lm_head", "embed_tokens"]),
        lora(trainable_token_indices=[len(VOCAB), len(VOCAB) + 1]),
    ],
    ids=["all weights", "LoRA and copies", "LoRA and the new tokens"],
)
def test_added_tokens_are_trained(config, tied, tmp_path):
    model, rows = base_model(tied), token_rows(12)
    model.resize_token_embeddings(len(VOCAB) + 2)
    rows = rows.map(lambda row: {name: [*row[name][:-1], len(VOCAB)] for name in ("input_ids", "labels")})
    if config is not None:
        model = moved(get_peft_model(model, copy.deepcopy(config)))
    ours, loss, grads = packed_step(model, rows, tmp_path / "run")
    exact_loss, exact = documents_alone(model, rows)
    assert ours.why_compact is None
    assert error(loss, exact_loss) < EXACT
    assert_gradients_equal(grads, exact, EXACT)
    if config is None or "lm_head" in (config.modules_to_save or []) or not tied:  # else TRL fails, as above
        assert_gradients_equal(trl_step(model, rows, tmp_path)[1], exact, TRL_TOLERANCE)
    ours.save_model(str(tmp_path / "saved"))
    if config is None:
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    else:
        fresh = base_model(tied)
        fresh.resize_token_embeddings(len(VOCAB) + 2)
        fresh.load_state_dict(copy.deepcopy(model).unload().state_dict())
        reloaded = PeftModel.from_pretrained(fresh, tmp_path / "saved")
    assert torch.equal(logits(reloaded), logits(copy.deepcopy(model)))


# ---- quantised ----


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A model in 4 bits with a LoRA on it, and the same in float64 with the numbers that the 4 bits stand for."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes, which is not installed")
    folder = tmp_path_factory.mktemp("plain")
    tiny_model("llama", tie_word_embeddings=False, hidden_size=64).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            exact.get_submodule(name).weight.data.copy_(weight)
    return model, exact


def with_lora(models, targets):
    """TRL trains the adapters of a quantised model in bfloat16: so does each of these, at the same place."""
    wrapped = [get_peft_model(copy.deepcopy(model), lora(targets)) for model in models]
    start = {n: p.detach().bfloat16() for n, p in moved(wrapped[1]).named_parameters() if p.requires_grad}
    for model in wrapped:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = start[name].to(torch.float64 if model is wrapped[1] else torch.bfloat16)
    return wrapped


@pytest.mark.parametrize("targets", [LAYERS, HEAD], ids=["layers", "layers and head"])
def test_qlora_is_as_close_to_float64_as_peft_alone_and_trl(targets, quantised, tmp_path):
    model, exact = with_lora(quantised, targets)
    runs = {"ours": [], "alone": [], "trl": [], "exact": []}
    for seed in range(4):  # the error of one loss is luck
        rows = token_rows(12, seed=seed)
        ours, *step = packed_step(model, rows, tmp_path)
        assert ours.why_compact is None
        runs["ours"].append(step)
        runs["alone"].append(documents_alone(model, rows))
        runs["trl"].append(trl_step(model, rows, tmp_path) if targets == LAYERS else runs["alone"][-1])
        runs["exact"].append(documents_alone(exact, rows))
    names = list(runs["exact"][0][1])
    losses = {run: torch.stack([loss for loss, _ in steps]) for run, steps in runs.items()}
    grads = {
        run: torch.cat([grads[name].flatten() for _, grads in steps for name in names]) for run, steps in runs.items()
    }
    for plain in ("alone", "trl"):
        assert_accurate(losses["ours"], losses[plain], losses["exact"], "loss")
        assert_accurate(grads["ours"], grads[plain], grads["exact"], "gradients")


def test_a_quantised_head_computes_its_own_logits(quantised, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = copy.deepcopy(quantised[0])
    head = bitsandbytes.nn.Linear4bit(64, len(VOCAB), bias=False, quant_type="nf4", compute_dtype=torch.float32)
    head.weight = bitsandbytes.nn.Params4bit(model.lm_head.weight.data, quant_type="nf4", requires_grad=False)
    model.lm_head = head.to("cpu")
    for targets, reason in (
        (LAYERS, "the head is a bitsandbytes.nn.modules.Linear4bit"),
        (HEAD, "lora.bnb.Linear4bit"),
    ):
        wrapped = moved(get_peft_model(copy.deepcopy(model), lora(targets)))
        assert reason in install_head(wrapped.get_base_model(), LossOptions())
        assert head_loss(wrapped) == pytest.approx(own_loss(wrapped), rel=1e-6)


def test_an_adapter_that_kept_the_models_forward_gets_ours(tmp_path):
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)  # LLaMA-Adapter
    model, rows = moved(get_peft_model(base_model(tied=False), config)), token_rows(12)
    ours, _, grads = packed_step(model, rows, tmp_path, torch.float64)
    assert ours.isolation.isolated
    assert_gradients_equal(grads, documents_alone(model, rows, torch.float64)[1], EXACT)


# ---- refused ----


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "PeftModel"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(alora_invocation_tokens=[3, 4]), "alora_invocation_tokens"),
        (
            CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3], cpt_mask=[1], cpt_tokens_type_mask=[1]),
            "CPTConfig is not",
        ),
        (
            MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2),
            "MultitaskPromptTuningConfig is not supported",
        ),
        (
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "gradient_checkpointing=True drops the cache that PrefixTuningConfig fills",
        ),
    ],
    ids=["activated LoRA", "CPT", "multitask", "prefix"],
)
def test_adapters_that_cannot_be_trained_rightly_are_refused_by_name(config, message, wrapped, tmp_path):
    model = base_model(tied=False)
    adapter = {"model": get_peft_model(model, config)} if wrapped else {"model": model, "peft_config": config}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **adapter, gradient_checkpointing=True)


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "PeftModel"])
def test_a_second_model_beside_the_first_is_refused_by_name(wrapped, tmp_path):
    peft = pytest.importorskip("peft", minversion="0.21")
    model, config = base_model(tied=False), peft.ShadowConfig(task_type="CAUSAL_LM")
    adapter = {"model": get_peft_model(model, config)} if wrapped else {"model": model, "peft_config": config}
    with pytest.raises(ValueError, match="ShadowConfig runs a second model over each row"):
        trainer(tmp_path, **adapter)


# ---- losses of adapters and models ----


def adalora(dtype=torch.float64):
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=10, target_modules=LAYERS, orth_reg_weight=0.3
    )
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama", dtype), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def regularization(model):
    """By its definition (Zhang et al., arXiv 2303.10512, equation 4), averaged as PEFT does, and its gradients."""
    pairs = {name: p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    terms = []
    for name, p in pairs.items():
        square = p @ p.T if "lora_A" in name else p.T @ p
        terms.append((square - torch.eye(len(square), dtype=p.dtype)).norm())
    loss = 0.3 * sum(terms) / len(terms)
    return loss.detach(), dict(zip(pairs, torch.autograd.grad(loss, list(pairs.values())), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens_per_pass": 12},
        {"packing": False, "per_device_train_batch_size": 3},
        {"packing_strategy": "bfd", "max_length": 16},
    ],
    ids=str,
)
def test_what_adalora_adds_to_the_loss_counts_once_in_a_step(options, tmp_path):
    model, rows = adalora(), token_rows(12)
    exact_loss, exact = documents_alone(model, rows)
    added, gradients = regularization(model)
    assert added > 0.1
    exact = {name: grad + gradients.get(name, 0.0) for name, grad in exact.items()}
    args = {"max_length": 32, "per_device_train_batch_size": 12, **options}
    ours = trainer(tmp_path, model, rows, rows, **args)
    loss, grads = one_step(ours)
    assert error(loss, exact_loss + added) < EXACT
    assert_gradients_equal(grads, exact, EXACT)
    assert ours.evaluate()["eval_loss"] == pytest.approx(float(exact_loss), rel=1e-12)
    assert ours.check_packing().holds


def test_what_adalora_adds_is_in_the_logged_loss_once(tmp_path):
    found = []
    for tokens_per_pass in (12, 64):
        model = adalora()
        ours = trainer(
            tmp_path, model, token_rows(12), learning_rate=0.0, max_steps=2, tokens_per_pass=tokens_per_pass,
            per_device_train_batch_size=12,
        )  # fmt: skip
        expected = float(documents_alone(model, token_rows(12))[0] + regularization(model)[0])
        ours.train()
        found.append(losses(ours))
    assert found[0] == found[1] == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize("name", ["kasa_config", "monteclora_config"])
def test_losses_that_peft_leaves_to_the_trainer_are_noticed(name, tmp_path, caplog):
    peft = pytest.importorskip("peft", minversion="0.21")
    kind = {"kasa_config": peft.KasaConfig, "monteclora_config": peft.MontecloraConfig}[name]
    trainer(tmp_path, base_model(tied=False), peft_config=lora(**{name: kind()}))
    assert caplog.text.count(f"{name}: PEFT leaves the loss of this adapter to a compute_loss of your own") == 1


def test_a_loss_that_a_model_adds_in_its_own_forward_is_noticed(tmp_path, caplog):
    trainer(tmp_path, tiny_family("bamba").float())
    assert "computes a loss other than" not in caplog.text
    model = tiny_family("bamba").float()
    model.z_loss_coefficient = 1e-2
    trainer(tmp_path, model)
    assert (
        caplog.text.count(
            "the forward of BambaForCausalLM computes a loss other than the cross-entropy of the next tokens"
        )
        == 1
    )
