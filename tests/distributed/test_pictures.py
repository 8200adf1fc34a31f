"""Two gloo processes give the weights and the losses of one, of vision-language models on rows with pictures.

A pass of one rank may have pictures and that of the other none."""

import json
from pathlib import Path

import pytest
from launch import launch, results_of
from numerics import error

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("pictures_tiny.py")
FAMILIES = ("Qwen2VL", "Idefics3", "Gemma3")
BFD = {"packing_strategy": "bfd", "max_length": 128}
SPARSE = {"sparse": True}  # some passes of a rank have no picture
RUNS = {
    f"{family}, {name}": {"family": family} | options
    for family in FAMILIES
    for name, options in {
        "step": {}, "bfd": BFD, "workers": {"dataloader_num_workers": 1}, "sparse": SPARSE, "sparse bfd": SPARSE | BFD,
        "stream": {"streams": True}, "sparse stream": SPARSE | {"streams": True, "dataloader_num_workers": 1},
    }.items()
}  # fmt: skip
ON_TWO = {name: (name, {}) for name in RUNS} | {
    f"{engine}: {name}": (name, {"engine": engine})
    for engine in ("fsdp2", "at load")
    for name in RUNS
    if "sparse" in name and (engine, RUNS[name]["family"]) != ("at load", "Gemma3")
}
RUNS |= {
    "Qwen2VL, frozen": RUNS["Qwen2VL, sparse"] | {"frozen": "visual"},
    "Gemma3, even": RUNS["Gemma3, sparse"] | {"vocabulary": 2},
    "Gemma3, rows": RUNS["Gemma3, sparse"] | {"eval_packing": False},
}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
ON_TWO |= {
    "Gemma3, rows": ("Gemma3, rows", {}),
    "DDP expects every gradient": ("Qwen2VL, sparse", {"ddp_find_unused_parameters": False}),
    "DDP: reentrant": ("Qwen2VL, sparse", REENTRANT),
    "DDP: static graph": ("Qwen2VL, sparse", {"ddp_static_graph": True}),
    "fsdp2: layers are computed again": ("Idefics3, sparse", {"engine": "fsdp2", "gradient_checkpointing": True}),
    "fsdp2: a frozen tower": ("Qwen2VL, frozen", {"engine": "fsdp2"}),
    "fsdp2: Gemma3, rows": ("Gemma3, rows", {"engine": "fsdp2"}),
    "at load: Gemma3, even": ("Gemma3, even", {"engine": "at load"}),
}


def results(folder, ranks, runs):
    sized = {}
    for name, options in runs.items():
        batch = 4 if options.get("packing_strategy") == "bfd" else 6
        at = str(folder / f"{options['family']}{options.get('vocabulary', '')}")
        sized[name] = {"per_device_train_batch_size": batch // ranks, "folder": at} | options
    return results_of(SCRIPT, ranks, folder / f"{ranks}.pt", json.dumps(sized))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(folder):
    return results(folder, 1, RUNS)


@pytest.fixture(scope="module")
def two(folder, one):
    runs = {name: RUNS[alone] | options for name, (alone, options) in ON_TWO.items()}
    found = {}
    for engine in {options.get("engine") for options in runs.values()}:  # accelerate keeps the state of one
        found |= results(folder, 2, {name: run for name, run in runs.items() if run.get("engine") == engine})
    return found


@pytest.mark.parametrize("name", ON_TWO)
def test_two_ranks_train_as_one(name, one, two):
    ours, theirs = two[name], one[ON_TWO[name][0]]
    assert error(ours["moved"], theirs["moved"]) < 1e-8  # Gemma 3's norms round to float32
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
    assert ours["evaluation"] == pytest.approx(theirs["evaluation"], rel=1e-8)
    run = RUNS[ON_TWO[name][0]]
    if run.get("eval_packing") is False:
        assert ours["predicted"] == theirs["predicted"]
    if "sparse" in run and not {"packing_strategy", "dataloader_num_workers"} & run.keys():
        assert min(ours["without pictures"]) > 0


def test_a_tied_head_that_comes_apart_when_it_is_loaded_is_refused(folder, one):
    runs = {"run": {"family": "Gemma3", "folder": str(folder / "Gemma3"), "engine": "at load"}}
    said = launch(SCRIPT, 2, folder / "none.pt", json.dumps(runs))
    assert "shards the 29 rows of both apart, over 2 ranks that do not divide them" in said


def test_pictures_that_come_after_the_model_was_sharded_are_refused(folder, one):
    run = {"run": {"family": "Qwen2VL", "engine": "fsdp2", "text_first": True, "per_device_train_batch_size": 3}}
    said = results_of(SCRIPT, 2, folder / "text_first.pt", json.dumps(run))["run"]
    assert "the first rows with pictures come after the model was sharded" in said
