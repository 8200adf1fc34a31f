"""A model that transformers' tensor parallelism splits over two processes trains as in one; adapters are refused."""

import json
from pathlib import Path

import pytest
from launch import launch, results_of
from numerics import error

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_tiny.py")
LLAMA = {
    "family": "llama", "optim": "sgd", "learning_rate": 0.1, "max_steps": 6, "packing": True, "tokens_per_pass": 24,
    "per_device_train_batch_size": 8,
}  # fmt: skip
UNTIED = {"model": {"tie_word_embeddings": False}}
RUNS = {
    "tied": LLAMA,
    "untied": LLAMA | UNTIED,
    # grouped GEMMs of experts have no float64
    "a router's loss": LLAMA | UNTIED | {"family": "qwen2_moe", "router_aux_loss_coef": 0.5, "dtype": "float32"},
}
SPLIT = {name: options | {"tp_size": 2} for name, options in RUNS.items()}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    one = results_of(SCRIPT, 1, folder / "one.pt", json.dumps(RUNS))
    return one, results_of(SCRIPT, 2, folder / "two.pt", json.dumps(SPLIT))


@pytest.mark.parametrize("name", list(RUNS))
def test_a_split_model_trains_as_in_one_process_with_the_fused_head(name, both):
    theirs, ours = (runs[name] for runs in both)
    assert ours["fused"] > 0
    allowed = 1e-12 if RUNS[name].get("dtype") is None else 2e-6
    for weight in theirs["weights"]:
        assert error(ours["weights"][weight], theirs["weights"][weight]) < allowed, weight
    assert error(ours["step_losses"], theirs["step_losses"]) < allowed
    assert ours["evaluated"] == pytest.approx(theirs["evaluated"], rel=1e-9 if allowed == 1e-12 else 1e-5)


def test_an_adapter_on_a_split_model_is_refused_by_name(tmp_path):
    adapted = SPLIT["tied"] | {"lora": {"target_modules": ["q_proj"]}}
    said = launch(SCRIPT, 2, tmp_path / "runs.pt", json.dumps({"LoRA": adapted}))
    assert "ValueError: tp_size=2 with a PEFT adapter: PEFT does not shard its matrices" in said
