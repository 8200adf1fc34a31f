"""A rank that is killed ends all of them within seconds, and the run goes on from its last whole checkpoint, on as many
processes or others, to the weights of a run that nobody killed."""

import json
import time
from pathlib import Path

import pytest
from launch import launch, results_of
from numerics import error

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_tiny.py")
RUN = {
    "family": "llama", "packing": True, "tokens_per_pass": 24, "gradient_accumulation_steps": 2, "max_steps": 6,
    "optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip
FSDP2 = {"layer": "LlamaDecoderLayer", "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
PARTS = {"sequence_parallel_size": 2}
ENGINES = {  # how it is spread, and over how many processes before and after
    "DDP, 2 to 4": ({}, 2, 4),
    "FSDP2, 2 to 4": (FSDP2, 2, 4),
    "FSDP2, 4 to 2": (FSDP2, 4, 2),
    "sequence parallelism, 2 to 4": (PARTS, 2, 4),
    "sequence parallelism and FSDP2, 4 to 2": (PARTS | FSDP2, 4, 2),
}


def spread(engine, processes):
    return RUN | engine | {"per_device_train_batch_size": 4 * engine.get("sequence_parallel_size", 1) // processes}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    alone = {"run": RUN | {"per_device_train_batch_size": 4, "save_strategy": "no", "save_steps": 6}}
    return results_of(SCRIPT, 1, tmp_path_factory.mktemp("one") / "run.pt", json.dumps(alone))["run"]


@pytest.mark.parametrize("name", ENGINES)
def test_a_killed_run_ends_at_once_and_resumes(name, whole, tmp_path):
    engine, before, after = ENGINES[name]
    folder = {"output_dir": str(tmp_path / "run")}
    killed = spread(engine, before) | folder | {"rank_1_killed_at": 5}
    launch(SCRIPT, before, tmp_path / "killed.pt", json.dumps({"run": killed}))
    assert time.time() - float((tmp_path / "run" / "killed").read_text()) < 60
    assert not (tmp_path / "killed.pt").exists()
    runs = {"run": spread(engine, after) | folder | {"resume_from": True}}
    resumed = results_of(SCRIPT, after, tmp_path / "resumed.pt", json.dumps(runs))["run"]
    assert resumed["steps"] == 6
    assert error(resumed["step_losses"], whole["step_losses"][4:]) < 1e-12
    for weight in whole["weights"]:
        assert error(resumed["weights"][weight], whole["weights"][weight]) < 1e-10, weight
