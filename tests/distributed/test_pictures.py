"""Two gloo processes give the weights and the losses of one, of vision-language models on rows with pictures.

A pass of one rank may have pictures and that of the other none."""

import json
from pathlib import Path

import pytest
from launch import results_of
from numerics import error

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("pictures_tiny.py")
BFD = {"packing_strategy": "bfd", "max_length": 128}
RUNS = {
    f"{family}, {name}": {"family": family} | options
    for family in ("Qwen2VL", "Idefics3", "Gemma3")
    for name, options in {"step": {}, "bfd": BFD, "workers": {"dataloader_num_workers": 1}}.items()
}


def results(folder, ranks):
    sized = {name: {"per_device_train_batch_size": (4 if "bfd" in name else 6) // ranks} | RUNS[name] for name in RUNS}
    return results_of(SCRIPT, ranks, folder / f"{ranks}.pt", json.dumps(sized))


def test_two_ranks_train_as_one(tmp_path):
    one, two = results(tmp_path, 1), results(tmp_path, 2)
    for name in RUNS:
        assert error(two[name]["moved"], one[name]["moved"]) < 1e-8, name  # Gemma 3's norms round to float32
        assert two[name]["losses"] == pytest.approx(one[name]["losses"], rel=1e-6)
        assert two[name]["evaluation"] == pytest.approx(one[name]["evaluation"], rel=1e-8)
