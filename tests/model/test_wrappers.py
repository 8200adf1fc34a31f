"""What others do with a prepared model: unwrap, copy, pickle, spread it over devices, and train it again."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import dispatch_model
from packsft_kernels import LossOutput
from peft import LoraConfig
from runs import losses, trainer
from tiny import tiny_model
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from packsft.model.adapters import split_head
from packsft.model.head import HeadOutput

IDS = torch.tensor([[3, 4, 5, 6]])
BF16 = {"bf16": True, "use_cpu": True}


def plain(model):
    """The same weights in a model that no trainer has seen."""
    fresh = tiny_model("llama")
    fresh.load_state_dict(model.state_dict())
    return fresh


def trained(tmp_path, model=None, **options):
    ours = trainer(tmp_path, model, max_steps=3, **options)
    ours.train()
    return ours


@pytest.mark.parametrize("options", [{}, BF16], ids=["float32", "bfloat16"])
def test_a_model_that_accelerate_unwraps_trains_on(options, tmp_path):
    """accelerate follows `__wrapped__` down to the forward of the class, and TRL's head is lost there."""
    whole, ours = (trained(tmp_path, **options) for _ in range(2))
    model = ours.accelerator.unwrap_model(ours.model_wrapped, keep_fp32_wrapper=False)
    assert torch.equal(model(input_ids=IDS).logits, plain(model)(input_ids=IDS).logits)
    rows = torch.arange(3, dtype=torch.int32)
    assert isinstance(model(input_ids=IDS, loss_rows=rows, loss_targets=IDS[0, 1:], num_items=3), HeadOutput)
    whole.train()
    ours.train()
    assert losses(ours)[-1] == pytest.approx(losses(whole)[-1], rel=1e-3)  # autocast is gone


def test_generation_knows_the_arguments_of_the_model(tmp_path):
    model = trained(tmp_path).model.eval()
    with pytest.raises(ValueError, match="no_such_argument"):
        model.generate(IDS, max_new_tokens=2, no_such_argument=1)


@pytest.mark.parametrize("options", [{}, BF16, {"compile_layers": True}], ids=["float32", "bfloat16", "compiled"])
@pytest.mark.parametrize("how", ["the model", "deepcopy", "pickle", "torch.save"])
def test_a_copy_is_trained_by_another_trainer_like_the_model_itself(how, options, tmp_path):
    model = trained(tmp_path, **options).model
    expected = losses(trained(tmp_path, plain(model), **options))

    def saved():
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    copies = {
        "the model": lambda: model,
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
        "torch.save": saved,
    }
    copied = copies[how]()
    before = model.lm_head.weight.clone()
    assert losses(trained(tmp_path, copied, **options)) == expected
    assert copied is model or torch.equal(model.lm_head.weight, before)  # which has weights of its own


def test_a_pickled_model_has_layers_of_the_class_that_everybody_knows(tmp_path):
    model = trained(tmp_path, compile_layers=True).model
    assert type(model.model.layers[0]) is not LlamaDecoderLayer
    assert type(pickle.loads(pickle.dumps(model)).model.layers[0]) is LlamaDecoderLayer


def test_the_precision_of_an_earlier_trainer_is_gone(tmp_path):
    model = trained(tmp_path, **BF16).model
    assert not torch.equal(model(input_ids=IDS).logits, plain(model)(input_ids=IDS).logits)
    trainer(tmp_path, model)
    assert torch.equal(model(input_ids=IDS).logits, plain(model)(input_ids=IDS).logits)


def test_a_model_that_was_trained_in_float32_is_trained_in_bfloat16_next(tmp_path):
    """accelerate prepares no model twice, and TRL goes on in float32."""
    model = trained(tmp_path, use_cpu=True).model
    expected = losses(trained(tmp_path, plain(model), **BF16))
    assert losses(trained(tmp_path, plain(model), use_cpu=True)) != expected
    assert losses(trained(tmp_path, model, **BF16)) == expected


def test_an_adapter_is_copied_and_pickled_too(tmp_path):
    ours = trained(tmp_path, peft_config=LoraConfig(target_modules=["q_proj"]))
    copies = pickle.loads(pickle.dumps(ours.model)), copy.deepcopy(ours.model), ours.model
    found = [losses(trained(tmp_path, model)) for model in copies]
    assert found[0] == found[1] == found[2]


# ---- several devices, as far as a CPU shows them ----

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def device_map(**others):
    return dict.fromkeys(PARTS, "cpu") | others


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, BF16], ids=str)
@pytest.mark.parametrize("head", ["fused", "compact"])
def test_hooks_that_move_inputs_change_nothing(head, options, tmp_path, monkeypatch):
    if head == "compact":
        monkeypatch.setattr("packsft.model.head._why_not_fused", lambda *_: "as asked")
    spread = dispatch_model(tiny_model("llama"), device_map(), main_device="cpu", force_hooks=True)
    assert losses(trained(tmp_path, spread, **options)) == losses(trained(tmp_path, **options))


@pytest.fixture
def offloaded(tmp_path):
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "saved")

    def load(**others):
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", device_map=device_map(**others), offload_folder=tmp_path / "offloaded"
        )

    return load


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.1", "lm_head"])
def test_weights_that_are_trained_are_not_offloaded(part, offloaded, tmp_path):
    with pytest.raises(ValueError, match=rf"device_map: the weights {part}[a-z_.]*weight are offloaded"):
        trainer(tmp_path, offloaded(**{part: "disk"}))


@pytest.mark.parametrize("part", ["model.embed_tokens", "lm_head"])
def test_frozen_weights_may_be_offloaded(part, offloaded, tmp_path):
    def run(model):
        torch.manual_seed(0)
        return trained(tmp_path, model, peft_config=LoraConfig(target_modules=["q_proj"]))

    ours = run(offloaded(**{part: "disk"}))
    assert ours.isolation.isolated
    assert ours.why_compact == ("the head's weight is offloaded" if part == "lm_head" else None)
    assert losses(ours) == pytest.approx(losses(run(offloaded())), rel=1e-6)


def test_a_batch_is_moved_to_the_head_and_what_comes_back_to_the_batch(monkeypatch, tmp_path):
    """The head is on "meta", whose tensors get along with no others."""
    model = trainer(tmp_path, tiny_model("llama", tie_word_embeddings=False)).model
    head, additions = split_head(model.lm_head)
    rows = torch.arange(3, dtype=torch.int32)
    with torch.device("meta"):
        elsewhere = torch.nn.Linear(32, head.out_features, bias=False)
    seen = []

    def watched(hidden, weight, targets, **options):
        given = [hidden, weight, targets, *(options[key] for key in ("rows", "weights", "num_items"))]
        seen.extend(tensor.device.type for tensor in given)
        return LossOutput(*(torch.zeros(3, device="meta") for _ in LossOutput._fields))

    monkeypatch.setattr("packsft.model.head.linear_cross_entropy", watched)
    monkeypatch.setattr("packsft.model.head.split_head", lambda _: (elsewhere, additions))
    scored = {"loss_targets": IDS[0, 1:], "loss_weights": torch.ones(3), "num_items": torch.tensor(3.0)}
    with torch.no_grad(), pytest.raises(NotImplementedError, match="meta"):  # the way back: there is no data to move
        model(input_ids=IDS, loss_rows=rows, **scored)
    assert seen == ["meta"] * 6
