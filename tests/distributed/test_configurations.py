"""Each configuration of docs/several-devices.md trains, on few processes on the CPU, to the weights of one process."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from launch import results_of
from numerics import error

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_tiny.py")
PAGE = (Path(__file__).parents[2] / "docs" / "several-devices.md").read_text()
TEXTS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
KINDS = [yaml.safe_load(text) for text in TEXTS]
RUN = {
    "family": "llama", "packing": True, "tokens_per_pass": 24, "gradient_accumulation_steps": 2, "optim": "sgd",
    "learning_rate": 0.1, "max_steps": 6, "train_sampling_strategy": "sequential",
}  # fmt: skip
ENGINES = {"FSDP": "fsdp2", "DEEPSPEED": "zero2"}


def test_the_page_has_them_all():
    kinds = [(kind["distributed_type"], kind["num_machines"]) for kind in KINDS]
    assert kinds == [("MULTI_GPU", 1), ("FSDP", 1), ("DEEPSPEED", 1), ("MULTI_GPU", 2)]


@pytest.mark.parametrize("text", TEXTS, ids=[f"{kind['distributed_type']}-{kind['num_machines']}" for kind in KINDS])
def test_a_configuration_trains_as_one_process(text, tmp_path):
    kind = yaml.safe_load(text)
    engine, nodes = ENGINES.get(kind["distributed_type"], ""), kind["num_machines"]
    single = engine.startswith("zero")
    if single and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    (tmp_path / "config.yaml").write_text(text)
    run = RUN | {"folder": str(tmp_path / "model"), "dtype": "float32" if single else "float64"}
    alone = {"run": run | {"per_device_train_batch_size": 4}}
    one = results_of(SCRIPT, 1, tmp_path / "one.pt", json.dumps(alone))["run"]
    spread = {"run": run | {"per_device_train_batch_size": 4 // (2 * nodes), "configured": engine or "ddp"}}
    environment = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"} if single else {}
    many = results_of(
        SCRIPT, 2 * nodes, tmp_path / "many.pt", json.dumps(spread), nodes=nodes, config=tmp_path / "config.yaml",
        **environment,
    )["run"]  # fmt: skip
    assert one["fused"] > 0
    assert many["fused"] > 0
    assert error(many["step_losses"], one["step_losses"]) < (1e-6 if single else 1e-12)
    for weight in one["weights"]:
        assert error(many["weights"][weight], one["weights"][weight]) < (2e-6 if single else 1e-12), weight
