"""Ranks that share each row train as one process does, to the last bits; and what cannot be cut is refused by name."""

import json
import math
from pathlib import Path

import pytest
from launch import results_of
from numerics import error

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_tiny.py")
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 6}
STEP = {"family": "llama", "packing": True, "tokens_per_pass": 24} | SGD
BFD = STEP | {"packing_strategy": "bfd", "max_length": 24}
LORA = {"target_modules": ["q_proj", "v_proj"]}
UNTIED = {"model": {"tie_word_embeddings": False}}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}  # above 6 tokens, by a document's length
ROUTED = "a router's loss"
RUNS = {
    "step": STEP,
    "bfd": BFD,
    "examples laid end to end": STEP | {"packing": False},
    "examples that weigh the same": STEP | {"loss_normalization": "example"},
    "checkpointing": STEP | {"gradient_checkpointing": True},
    "one key head": STEP | {"model": {"num_key_value_heads": 1}},
    "positions from a table": STEP | {"family": "gpt2"},
    "softcap and windows": STEP | {"family": "gemma2"},
    "LoRA": STEP | {"lora": LORA},
    "LoRA on the head": STEP | UNTIED | {"lora": {"target_modules": ["q_proj", "lm_head"]}},
    ROUTED: STEP | {"family": "qwen2_moe", "router_aux_loss_coef": 0.5},
    "sinks": STEP | {"family": "gpt_oss", "router_aux_loss_coef": 0.0},
    "a stream": STEP | {"stream": True},
    "rotary embeddings by length": STEP | {"model": {"max_position_embeddings": 6, "rope_parameters": DYNAMIC}},
}
SHARDED = {"FSDP2": STEP, "FSDP2, LoRA on the head": RUNS["LoRA on the head"], "FSDP2, bfd": BFD}


def runs(processes: int, parts: int) -> str:
    """The same 8 examples (or packs) of a step on as many ranks: batches of 4 on one, of 4 on each group of `parts`."""
    groups = processes // parts
    shared = {"per_device_train_batch_size": 4 // groups, "gradient_accumulation_steps": 2}
    shared |= {"sequence_parallel_size": parts} if parts > 1 else {}
    found = {name: options | shared for name, options in (RUNS | SHARDED).items()}
    if processes > 1:
        for name in SHARDED:
            found[name]["layer"] = "LlamaDecoderLayer"
    return json.dumps(found)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return results_of(SCRIPT, 1, tmp_path_factory.mktemp("one") / "runs.pt", runs(1, 1))


@pytest.fixture(scope="module", params=[(2, 2), (4, 4), (4, 2)], ids=lambda ranks: "{1}-of-{0}".format(*ranks))
def many(request, tmp_path_factory):
    """Of so many processes, and so many of them in a group. A router's loss depends on the tokens of a pass, and two
    groups take other passes than one."""
    processes, parts = request.param
    found = results_of(SCRIPT, processes, tmp_path_factory.mktemp("many") / "runs.pt", runs(processes, parts))
    return {name: run for name, run in found.items() if name != ROUTED or processes == parts}


@pytest.mark.parametrize("name", [*RUNS, *SHARDED])
def test_ranks_that_share_a_row_train_as_one(name, one, many):
    if name not in many:
        pytest.skip("two groups take other passes")
    ours, theirs = many[name], one[name]
    assert ours["fused"] > 0
    assert theirs["fused"] > 0
    assert ours["weights"].keys() == theirs["weights"].keys()
    largest = max(weight.abs().max() for weight in theirs["weights"].values())
    for weight in theirs["weights"]:
        assert (ours["weights"][weight] - theirs["weights"][weight]).abs().max() < 1e-12 * largest, weight
    assert error(ours["step_losses"], theirs["step_losses"]) < 1e-12
    assert ours["history"] == pytest.approx(theirs["history"], rel=1e-9)
    assert ours["evaluated"] == pytest.approx(theirs["evaluated"], rel=1e-9)


def test_a_run_resumes_on_another_number_of_parts(one, tmp_path):
    saves = {"output_dir": str(tmp_path / "saved"), "save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    adam = STEP | {"optim": "adamw_torch", "learning_rate": 1e-3, "gradient_accumulation_steps": 2, "max_steps": 6}

    def found(processes, parts, options):
        groups = processes // parts
        of_run = adam | {"per_device_train_batch_size": 4 // groups, "sequence_parallel_size": parts} | options
        return results_of(SCRIPT, processes, tmp_path / f"{processes}{parts}.pt", json.dumps({"run": of_run}))["run"]

    found(2, 2, saves)
    again = {"resume_from": str(tmp_path / "saved" / "checkpoint-3"), "output_dir": str(tmp_path / "again")}
    whole, *others = found(1, 1, {}), found(1, 1, again), found(4, 4, again), found(4, 2, again)
    for other in others:
        assert other["steps"] == 6
        assert error(other["step_losses"], whole["step_losses"][3:]) < 1e-12
        for name, weight in other["weights"].items():
            assert error(weight, whole["weights"][name]) < 1e-10, name


REFUSED = {
    "heads": ({"model": {"num_attention_heads": 3, "hidden_size": 24, "num_key_value_heads": 3}},
              "sequence_parallel_size=2 must divide the 3 attention heads"),
    "a convolution": ({"added": "convolution"}, "model.layers.1.conv is a convolution over tokens"),
    "a state": ({"added": "previous token"}, "in model.layers.0 a token depends on earlier ones other than by"),
    "a state, bfloat16": ({"added": "previous token", "dtype": "bfloat16"}, "in model.layers.0 a token depends on"),
    "another attention": ({"attention": "flex_attention"}, "sees only the tokens of one rank"),
    "half a group": ({"sequence_parallel_size": 4}, "needs a number of processes that it divides, and there are 2"),
    "a measurement": ({"tokens_per_pass": "auto"}, "would measure on each rank for itself"),
    "logits": ({"compile_layers": True}, "compile_layers=True does not compile the exchange"),
}  # fmt: skip


def test_what_cannot_be_cut_is_refused_by_name_on_every_rank(tmp_path):
    runs = {name: STEP | {"sequence_parallel_size": 2, "refused": True} | REFUSED[name][0] for name in REFUSED}
    found = results_of(SCRIPT, 2, tmp_path / "runs.pt", json.dumps(runs))
    for name, (_, words) in REFUSED.items():
        assert len(found[name]) == 2
        for said in found[name]:
            assert said.startswith("sequence_parallel_size=")
            assert words in said


def test_the_check_of_the_model_also_proves_that_a_row_can_be_cut(tmp_path):
    """On every rank, and a fault in the exchange is seen."""
    runs = {how: STEP | {"sequence_parallel_size": 2, "proves": how} for how in ("as it is", "heads in another order")}
    found = results_of(SCRIPT, 2, tmp_path / "runs.pt", json.dumps(runs))
    claim = "a row cut over the ranks gives the loss and gradients of the whole row"
    assert found["as it is"][claim] == (True, True)
    assert found["heads in another order"] == "refused"


def test_a_group_without_documents_has_a_loss_that_is_a_number_and_a_second_trainer_takes_the_model(tmp_path):
    """9 evaluated rows in batches of 8 leave the second group of ranks without any; with a router's loss."""
    routed = RUNS[ROUTED] | {"sequence_parallel_size": 2, "per_device_train_batch_size": 2, "max_steps": 2}
    half = STEP | {"sequence_parallel_size": 2, "max_steps": 1, "per_device_train_batch_size": 2}
    runs = {ROUTED: routed | {"per_device_eval_batch_size": 4}}
    runs |= {family: half | {"family": family, "dtype": "bfloat16"} for family in ("llama", "qwen2_moe")}
    runs["again"] = half | {"attention": "packsft"}
    found = results_of(SCRIPT, 4, tmp_path / "runs.pt", json.dumps(runs))
    assert all(math.isfinite(value) for run in found.values() for value in run["evaluated"].values())
