"""Two processes under DeepSpeed's ZeRO give the weights and the losses of one, with the fused head, in float32."""

import json
from pathlib import Path

import pytest
from launch import launch, results_of
from numerics import error

from packsft.app.invariance import certify, layouts_of, random_rows, small_models

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_tiny.py")
LLAMA = {
    "family": "llama", "dtype": "float32", "optim": "sgd", "learning_rate": 0.1, "max_steps": 6, "packing": True,
    "tokens_per_pass": 24, "train_sampling_strategy": "sequential",
}  # fmt: skip
UNTIED = {"model": {"tie_word_embeddings": False}}
LAYERS = ["q_proj", "v_proj"]
BFD = {"packing_strategy": "bfd", "max_length": 24, "tokens_per_pass": None}
RUNS = {
    "step": LLAMA,
    "bfd": LLAMA | BFD,
    "checkpointing": LLAMA | {"gradient_checkpointing": True},
    "untied": LLAMA | UNTIED,
    "LoRA": LLAMA | {"lora": {"target_modules": LAYERS}},
    "LoRA on the head": LLAMA | UNTIED | {"lora": {"target_modules": [*LAYERS, "lm_head"]}},
    "a copy of the head": LLAMA | UNTIED | {"lora": {"target_modules": LAYERS, "modules_to_save": ["lm_head"]}},
}
ROUTED = {"family": "qwen2_moe", "router_aux_loss_coef": 0.5}
# A pass has one row: a router's loss depends on what else is in a pass
RUNS["a router's loss"] = LLAMA | ROUTED | {"packing": False, "tokens_per_pass": None, "per_device_train_batch_size": 1}
HEAD = {"lora": {"target_modules": [*LAYERS, "lm_head"]}}
RUNS["a router's loss, LoRA on the head"] = RUNS["a router's loss"] | HEAD
STAGES = {name: (1, 2, 3) if name in ("step", "bfd") else (3,) for name in RUNS}
SAVING = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
CPU = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def runs(folder, processes):
    each = {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2}
    one_row = {"gradient_accumulation_steps": 8 // processes}
    return {
        name: options | (one_row if "per_device_train_batch_size" in options else each) | {"folder": str(folder / name)}
        for name, options in RUNS.items()
    }


@pytest.fixture(scope="module")
def one(folder):
    return results_of(SCRIPT, 1, folder / "one.pt", json.dumps(runs(folder, 1)))


@pytest.fixture(scope="module")
def two(folder, one):
    cells = {
        f"{name}, ZeRO-{stage}": options | {"zero_stage": stage}
        for name, options in runs(folder, 2).items()
        for stage in STAGES[name]
    }
    return results_of(SCRIPT, 2, folder / "two.pt", json.dumps(cells), **CPU)


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name in RUNS for stage in STAGES[name]])
def test_two_processes_under_zero_give_the_weights_of_one_with_the_fused_head(name, stage, one, two):
    theirs, ours = one[name], two[f"{name}, ZeRO-{stage}"]
    assert ours["fused"] > 0
    assert ours["steps"] == theirs["steps"] == 6
    for weight in theirs["weights"]:
        assert error(ours["weights"][weight], theirs["weights"][weight]) < 2e-6, weight
    assert error(ours["step_losses"], theirs["step_losses"]) < 1e-6
    assert ours["evaluated"] == pytest.approx(theirs["evaluated"], rel=1e-5)


def test_a_killed_run_resumes(folder, one):
    alone = runs(folder, 1)["step"] | SAVING | {"save_strategy": "no", "save_steps": 6}
    whole = results_of(SCRIPT, 1, folder / "whole.pt", json.dumps({"run": alone}))["run"]
    each = runs(folder, 2)["step"] | SAVING | {"zero_stage": 2, "output_dir": str(folder / "killed")}
    launch(SCRIPT, 2, folder / "killed.pt", json.dumps({"run": each | {"rank_1_killed_at": 5}}), **CPU)
    assert not (folder / "killed.pt").exists()
    again = results_of(SCRIPT, 2, folder / "again.pt", json.dumps({"run": each | {"resume_from": True}}), **CPU)["run"]
    assert again["steps"] == 6
    assert error(again["step_losses"], whole["step_losses"][4:]) < 1e-6
    for weight in whole["weights"]:
        assert error(again["weights"][weight], whole["weights"][weight]) < 1e-4, weight


PICTURES = {
    f"{family}{name}": {"family": family, "dtype": "float32", "tokens_per_pass": 64} | options
    for family in ("Qwen2VL", "Idefics3", "Gemma3")
    for name, options in {"": {}, ", bfd": BFD | {"max_length": 128}, ", sparse": {"sparse": True}}.items()
}


def with_pictures(folder, processes, engine="", runs=PICTURES):
    script, path = Path(__file__).with_name("pictures_tiny.py"), folder / f"pictures{processes}{engine}.pt"
    sized = {"per_device_train_batch_size": 4 // processes, "engine": engine}
    runs = {name: run | sized | {"folder": str(folder / run["family"])} for name, run in runs.items()}
    return results_of(script, processes, path, json.dumps(runs), **CPU if engine else {})


def test_rows_with_pictures(folder):
    one = with_pictures(folder, 1)
    for engine in ("zero2", "zero3"):
        two = with_pictures(folder, 2, engine)
        for name in PICTURES:
            assert error(two[name]["moved"], one[name]["moved"]) < 5e-6, (engine, name)
            assert two[name]["losses"] == pytest.approx(one[name]["losses"], rel=1e-6)
            assert two[name]["evaluation"] == pytest.approx(one[name]["evaluation"], rel=1e-6)


def test_a_tower_with_a_part_that_runs_for_each_picture(folder):
    runs = {"run": {"family": "Llava", "dtype": "float32", "each_alone": True}}
    one, two = with_pictures(folder, 1, runs=runs)["run"], with_pictures(folder, 2, "zero2", runs)["run"]
    assert error(two["moved"], one["moved"]) < 5e-6
    with pytest.raises(AssertionError, match=r"runs model\.multi_modal_projector\.projector\.\w+ more often for more"):
        with_pictures(folder, 2, "zero3", runs)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_weights_after_ten_steps_agree(engine):
    model, tokenizer = small_models()["GPT-2"]
    layouts = layouts_of(engine)[::3]
    results = certify(model, tokenizer, random_rows(200, 512, 256), max_length=512, layouts=layouts)
    assert all(result.agrees for result in results), results
    assert max(result.difference for result in results) > 0
