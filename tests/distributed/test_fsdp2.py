"""Two and four processes under FSDP2, accelerate's or transformers', give the weights and the losses of one, with the
fused head."""

import json
from pathlib import Path

import pytest
import torch
from launch import launch, results_of
from numerics import error
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_tiny.py")
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 6}
LLAMA = SGD | {"family": "llama", "packing": True, "tokens_per_pass": 24}
UNTIED = {"model": {"tie_word_embeddings": False}}
LAYERS = ["q_proj", "v_proj"]
MODELS = {
    "full": LLAMA,
    "full, untied": LLAMA | UNTIED,
    "OPT, untied": LLAMA | UNTIED | {"family": "opt"},
    "LoRA": LLAMA | {"lora": {"target_modules": LAYERS}},
    "LoRA on the head": LLAMA | UNTIED | {"lora": {"target_modules": [*LAYERS, "lm_head"]}},
    "LoRA on a tied head": LLAMA | {"lora": {"target_modules": [*LAYERS, "lm_head"]}},
    "a copy of the head": LLAMA | UNTIED | {"lora": {"target_modules": LAYERS, "modules_to_save": ["lm_head"]}},
    "trained tokens": LLAMA
    | UNTIED
    | {"lora": {"target_modules": LAYERS, "trainable_token_indices": {"lm_head": [3, 4], "embed_tokens": [3, 4]}}},
}
WAYS = {
    "step": {},
    "AdamW": {"optim": "adamw_torch", "learning_rate": 1e-3},
    "step, checkpointing": {"gradient_checkpointing": True},
    "bfd": {"packing_strategy": "bfd", "max_length": 24},
    "no reshard": {"fsdp_config": {"reshard_after_forward": False}},
    "sums of the last pass": {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": False}}},
}
# A pass has one row: a router's loss depends on what else is in a pass
ROUTED = SGD | {"family": "qwen2_moe", "packing": False, "router_aux_loss_coef": 0.5, "per_device_train_batch_size": 1}
ROUTERS = {"a router's loss": ROUTED, "a router's loss, tied": ROUTED | {"model": {"tie_word_embeddings": True}}}
HALF = LLAMA | {"dtype": "float32", "bf16": True}


def cells(processes):
    layer = {"layer": "LlamaDecoderLayer"} if processes > 1 else {}
    each = {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2}
    runs = {}
    for name, model in MODELS.items():
        runs[name] = model | each | (layer and {"layer": "OPTDecoderLayer" if "OPT" in name else "LlamaDecoderLayer"})
    for name, options in WAYS.items():
        given = dict(options) if processes > 1 else {k: v for k, v in options.items() if k != "fsdp_config"}
        runs[name] = LLAMA | each | layer | given
    experts = {"layer": "Qwen2MoeDecoderLayer"} if processes > 1 else {}
    for name, options in ROUTERS.items():
        runs[name] = options | experts | {"gradient_accumulation_steps": 8 // processes}
    runs["bfloat16"] = HALF | each | layer
    return json.dumps(runs)


STATE_DICTS = ["FULL_STATE_DICT", "SHARDED_STATE_DICT"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def resumed(folder):
    saves = {"save_strategy": "steps", "save_steps": 3}
    runs = {
        kind: json.loads(cells(2))["AdamW"]
        | saves
        | {"fsdp_config": {"state_dict_type": kind}, "output_dir": str(folder / kind)}
        for kind in STATE_DICTS
    }
    return results_of(SCRIPT, 2, folder / "runs.pt", json.dumps(runs))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return results_of(SCRIPT, 1, tmp_path_factory.mktemp("one") / "runs.pt", cells(1))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return results_of(SCRIPT, 2, tmp_path_factory.mktemp("two") / "runs.pt", cells(2))


FOUR = {  # on four processes: of what is in MODELS, by whom it is sharded, and how
    "4 ranks": ("full", {}),
    "HSDP": ("full", {"replicas": 2}),
    "HSDP, untied": ("full, untied", {"replicas": 2}),
    "RAM-efficient": ("full", {"fsdp_config": {"cpu_ram_efficient_loading": True}}),
    "at load": ("full", {"loads_as": {"fsdp_size": 4}}),
    "at load, untied": ("full, untied", {"loads_as": {"fsdp_size": 4}}),
    "at load, HSDP": ("full, untied", {"loads_as": {"fsdp_size": 2, "dp_replicate_size": 2}}),
    "tensor parallel": ("full", {"loads_as": {"fsdp_size": 2, "tp_size": 2}}),
    "tensor parallel, untied": ("full, untied", {"loads_as": {"fsdp_size": 2, "tp_size": 2}}),
}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    found = {}
    for at_load in (False, True):  # accelerate keeps the state of one engine
        runs = {}
        for name, (model, how) in FOUR.items():
            if ("loads_as" in how) == at_load:
                groups = 4 // how.get("loads_as", {}).get("tp_size", 1)
                each = {"per_device_train_batch_size": 4 // groups, "gradient_accumulation_steps": 2}
                runs[name] = MODELS[model] | each | ({} if at_load else {"layer": "LlamaDecoderLayer"}) | how
        found |= results_of(SCRIPT, 4, tmp_path_factory.mktemp("four") / "runs.pt", json.dumps(runs))
    return found


@pytest.mark.parametrize("name", [*MODELS, *WAYS, *ROUTERS, *FOUR])
def test_processes_under_fsdp2_give_the_weights_of_one_with_the_fused_head(name, one, two, four):
    model = FOUR[name][0] if name in FOUR else name
    ours, theirs = (four if name in FOUR else two)[name], one[model] | {"weights": dict(one[model]["weights"])}
    assert theirs["fused"] > 0
    assert ours["fused"] > 0
    largest = max(weight.abs().max() for weight in theirs["weights"].values())
    if (name, model) in (
        ("at load", "full"),
        ("tensor parallel", "full"),
    ):  # they list a tied weight twice, and keep it
        theirs["weights"]["lm_head.weight"] = theirs["weights"]["model.embed_tokens.weight"]
    assert ours["weights"].keys() == theirs["weights"].keys()
    for weight in theirs["weights"]:
        assert (ours["weights"][weight] - theirs["weights"][weight]).abs().max() < 1e-12 * largest, weight
    assert ((ours["step_losses"] - theirs["step_losses"]) / theirs["step_losses"]).abs().max() < 1e-12
    assert ours["evaluated"] == pytest.approx(theirs["evaluated"], rel=1e-9)
    if "tensor parallel" not in name:  # accelerate gathers what each rank of a group has
        assert ours["predicted"] == theirs["predicted"]


@pytest.mark.parametrize("kind", STATE_DICTS)
def test_a_sharded_run_resumes_and_its_model_loads(kind, folder, resumed, one):
    whole = one["AdamW"]["weights"]
    again = resumed[kind]["resumed"]
    assert resumed[kind]["steps"] == again["steps"] == 6
    assert torch.equal(resumed[kind]["step_losses"][3:], again["step_losses"])
    saved = AutoModelForCausalLM.from_pretrained(folder / kind / "model", dtype=torch.float64)
    for name, weight in saved.named_parameters():
        assert torch.equal(weight, resumed[kind]["weights"][name])
        assert torch.equal(weight, again["weights"][name])
        assert error(weight, whole[name]) < 1e-12


def test_losses_in_bfloat16_are_logged_in_float32(one, two):
    ours, theirs = (torch.tensor(runs["bfloat16"]["losses"], dtype=torch.float64) for runs in (two, one))
    assert (ours != ours.bfloat16().double()).all()
    assert ((ours - theirs) / theirs).abs().max() < 1e-3  # an eighth of a rounding of bfloat16
    assert two["bfloat16"]["fused"] > 0


def test_a_model_that_accelerate_does_not_shard_is_noticed(tmp_path):
    runs = {"on a CPU": LLAMA | {"max_steps": 1, "fsdp": True, "fsdp_config": {"version": 2}}}
    said = launch(SCRIPT, 2, tmp_path / "runs.pt", json.dumps(runs))
    assert "fsdp=True: not in force: accelerate shards a model over several accelerators" in said
