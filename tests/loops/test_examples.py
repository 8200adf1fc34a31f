"""Each loop, run as it stands, trains the weights of `PackedSFTTrainer` on the same rows; each recipe trains."""

import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from docstrings import tokenised_docstrings
from launch import launch
from numerics import error
from peft import PeftModel
from run_example import OPTIONS, run
from run_example import __file__ as SCRIPT
from tiny import CHAT_TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import packsft
from packsft import PackedSFTConfig, PackedSFTTrainer

EXAMPLES = Path(packsft.__file__).parents[1] / "examples"

ONE_DEVICE = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).double().save_pretrained(folder)
    return folder


def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def expected(tiny, tmp_path_factory):
    """The weights of the trainer: of exact steps, and of packs."""

    def trained(**options):
        args = PackedSFTConfig(
            str(folder := tmp_path_factory.mktemp("trained")), max_length=1024, learning_rate=OPTIONS["learning_rate"],
            num_train_epochs=OPTIONS["epochs"], lr_scheduler_type="constant", max_grad_norm=0.0, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", use_cpu=True, **options,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
        rows = tokenised_docstrings(tokenizer, OPTIONS["num_rows"])
        trainer = PackedSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainer.save_model(str(folder / "model"))
        return weights(folder / "model")

    packs = {"packing_strategy": "bfd", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    return {
        "steps": trained(per_device_train_batch_size=8, tokens_per_pass=4096),
        "packs": trained(**packs, train_sampling_strategy="sequential"),
    }


@pytest.mark.parametrize(
    ("example", "takes", "options"),
    [("plain_torch", "steps", {}), ("accelerate_loop", "steps", {}), ("lightning_loop", "steps", {}),
     ("transformers_trainer", "packs", {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant",
                                        "max_grad_norm": 0.0, "use_cpu": True})],
)  # fmt: skip
def test_an_example_trains_the_weights_of_the_trainer(example, takes, options, tiny, expected, tmp_path):
    run(tmp_path / "model", example, tiny, **options)
    start = weights(tiny)
    assert error(weights(tmp_path / "model") - start, expected[takes] - start) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("example", ["plain_torch", "accelerate_loop"])
def test_so_do_two_processes(example, tiny, expected, tmp_path):
    said = launch(SCRIPT, 2, tmp_path / "model", example, tiny)
    assert (tmp_path / "model" / "config.json").exists(), said
    start = weights(tiny)
    assert error(weights(tmp_path / "model") - start, expected["steps"] - start) < 1e-10


@pytest.mark.parametrize("example", ["lora", "chat"])
def test_a_recipe_trains(example, tiny, tmp_path):
    module = importlib.import_module(example)
    trainer = module.main(str(tiny), str(tmp_path), num_rows=40, **ONE_DEVICE)
    assert trainer.state.global_step == math.ceil(len(trainer.train_dataset) / 16)
    assert trainer.isolation.isolated
    assert trainer.why_compact is None
    if example == "lora":
        assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    else:
        assert any("eval_loss" in entry for entry in trainer.state.log_history)
        (pack, *_) = trainer.train_dataset.packs()
        assert 0 < pack[0].num_scored < len(pack[0])


def test_the_yaml_trains(tiny, tmp_path):
    packsft.stdlib_docstrings().select(range(20)).to_json(tmp_path / "rows.jsonl")
    own = ["--model_name_or_path", tiny, "--dataset_name", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out"]
    options = [text for name, value in ONE_DEVICE.items() for text in (f"--{name}", value)]
    command = [sys.executable, "-m", "packsft", "trl", "sft", "--config", EXAMPLES / "sft.yaml", *own, *options]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "optimizer steps: 2" in ran.stderr
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_lora_trains_under_fsdp2(tiny, tmp_path):
    config = yaml.safe_load((EXAMPLES / "fsdp2.yaml").read_text()) | {"use_cpu": True, "mixed_precision": "no"}
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(config))
    call = f"lora.main({str(tiny)!r}, {str(tmp_path / 'out')!r}, num_rows=40, **{ONE_DEVICE!r})"
    script = tmp_path / "train.py"
    script.write_text(f"import sys\n\nsys.path.insert(0, {str(EXAMPLES)!r})\nimport lora\n\n{call}\n")
    said = launch(script, 2, config=tmp_path / "cpu.yaml")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists(), said[-3000:]
