"""The suites of growing cost, of memory and of parity: exponents, what is timed at each point, what is held."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.measure import Settings
from harness.peers import BLOCK_MASK, OURS
from harness.shapes import random_documents, tiny_llama, tiny_tokenizer
from harness.trainers import OURS as TRAINER
from harness.trainers import build_trainer
from suites import memory, parity, scaling, step


@pytest.mark.parametrize(("power", "passed"), [(0.5, True), (1.0, True), (2.0, False)])
def test_the_exponent_is_that_of_the_cost(power: float, passed: bool) -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    row = scaling._exponent("cost", sizes, [3 * size**power for size in sizes], scaling.LINEAR)
    assert row["value"] == pytest.approx(power)
    assert row["passed"] is passed


def test_an_axis_is_a_point_for_each_size_and_an_exponent_for_all_but_the_limit() -> None:
    def candidates(size: float) -> dict[str, Any]:
        return {"limit": lambda: None, OURS: lambda: time.sleep(size), "peer": lambda: None}

    table = list(scaling._axis("Naps", "seconds", [0.02, 0.04], candidates, 1, at_most=1.1))
    assert [(row["series"], row["x"]) for row in table[:6]] == [
        (name, size) for size in (0.02, 0.04) for name in ("limit", OURS, "peer")
    ]
    assert [bool(row.get("limit")) for row in table[:3]] == [True, False, False]
    assert [row["name"] for row in table[6:]] == ["Naps: packsft, exponent", "Naps: peer, exponent"]
    assert table[6]["value"] == pytest.approx(1.0, abs=0.3)
    assert table[6]["target"] == "<= 1.1"
    assert table[7]["target"] == ""


def test_every_axis_times_its_limit_and_ours() -> None:
    for candidates in (
        scaling._cross_entropy(8, 100),
        scaling._head(32, 16, 8, 100),
        scaling._attention(256, 2),
    ):
        assert list(candidates)[1] == OURS
        for run in candidates.values():
            getattr(run, "prepare", lambda: None)()
            run()
    assert BLOCK_MASK in candidates


def test_an_axis_of_memory_has_two_lines_of_each_candidate() -> None:
    def candidates(size: int) -> dict[str, Any]:
        return {name: lambda: torch.empty(size, dtype=torch.int8).fill_(0) for name in (OURS, "peer")}

    sizes = [2**20, 2**21]
    table = list(scaling._axis("Time", "bytes", sizes, candidates, 1, at_most=1.1, memory="Memory"))
    assert [row["value"] for row in table if row.get("chart") == "Memory"] == pytest.approx([1, 1, 2, 2], abs=0.1)
    exponents = {row["name"]: row["target"] for row in table[8:]}
    assert exponents["Memory: packsft, exponent"] == "<= 1.1"
    assert exponents["Memory: peer, exponent"] == ""
    assert not [row for row in table if row.get("limit")]


def test_what_the_host_takes_is_of_a_whole_step_and_of_the_models_own(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32)
    trainer = build_trainer(TRAINER, model, tiny_tokenizer(), random_documents(8, 64, 64), str(tmp_path), bf16=False)
    rows = step.launching(trainer, repeats=1)
    assert [row["name"] for row in rows] == [
        "a step of 16 tokens, the model alone",
        "a step of 16 tokens, packsft",
        "a launch of the smallest kernel",
    ]
    assert rows[1]["ratio"] == rows[1]["value"] / rows[0]["value"]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_checkpointing_takes_is_beside_a_step_and_a_forward_and_beside_pytorchs() -> None:
    limit, pytorchs, ours = step.checkpointing(repeats=1)
    assert [row["ratio"] for row in (pytorchs, ours)] == [row["value"] / limit["value"] for row in (pytorchs, ours)]
    assert ours["passed"] is (ours["value"] <= pytorchs["value"])
    assert (limit["target"], pytorchs["target"]) == ("", "")


def test_the_memory_suite_needs_no_gpu_and_meets_its_targets() -> None:
    figures = list(memory.bench(Settings(quick=True)))
    judged = {figure["name"]: figure["passed"] for figure in figures if figure["passed"] is not None}
    # the head's budget and TRL's memory, for all tokens scored and for some; a row shared by two ranks
    assert len(judged) == 5
    assert all(judged.values())
    assert not [figure["name"] for figure in figures if figure["value"] is None and "packsft" in figure["name"]]
    assert next(figure["note"] for figure in figures if "Liger" in figure["name"]).startswith("cannot run: ")


def test_every_kernel_holds_its_parity_in_every_dtype() -> None:
    figures = list(parity.kernels())
    assert len(figures) == 12
    assert all(figure["passed"] for figure in figures)
    # a bound that holds everything would be none: the yardstick is rounding, not a broken comparison
    for row in figures:
        dtype = getattr(torch, row["name"].rpartition(" ")[2])
        assert row["value"] < 100 * torch.finfo(dtype).eps
        assert row["ratio"] > 0 or row["value"] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_claim_of_the_proof_has_a_target_and_fails_parity(dtype: torch.dtype) -> None:
    rows = random_documents(8, 64, 64)
    figures = list(parity.claims("tiny", tiny_llama(dtype), tiny_tokenizer(), rows, 64))
    assert len(figures) == 6
    assert all(figure["parity"] and figure["passed"] for figure in figures)
    targets = [figure["target"] for figure in figures]
    assert targets == ["<= 0", *["<= 1e-12" if dtype == torch.float64 else "<= 1"] * 5]
