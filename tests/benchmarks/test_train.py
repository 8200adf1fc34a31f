"""The suite that trains: its FLOP count, its reasons, its dry run, and whether its parity would notice a wrong step."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import trainers
from harness.floors import datasheet_peak, training_flops
from harness.measure import Settings
from harness.shapes import MODELS, random_documents, random_model, tiny_llama, tiny_tokenizer
from harness.trainers import COMPETITORS, EXACT, OURS, OURS_LIGER, TRL_OUR_ATTENTION, TRL_PACKED, TRL_PADDED
from suites import train
from suites.train import Result, Workload, train_all, train_once

CPU = torch.device("cpu")
SHAPE = MODELS["Llama-3.2-1B"].shrunk()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32, whose truth is float64."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (trainers, train):
        monkeypatch.setattr(module, "training_dtype", lambda: torch.float32)


def tiny_work(examples: int = 24) -> Workload:
    rows = random_documents(examples, SHAPE.vocab_size, 64)
    return Workload(
        "tiny", lambda dtype: random_model(SHAPE, torch.float32, CPU).to(dtype), tiny_tokenizer(), rows, 128
    )


def test_flops_are_those_of_a_count_by_hand() -> None:
    """`tiny_llama`: two layers of q and o 32 x 32, k and v 32 x 16, three 32 x 64; four heads of 8; a head 32 x 64."""
    model = tiny_llama(torch.float32)
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    attention = 2 * 6 * 4 * 8 * (3**2 + 5**2)
    assert training_flops(model, [3, 5], 4) == 6 * weights * 8 + 6 * 32 * 64 * 4 + attention
    model.model.requires_grad_(False)  # a frozen weight has no gradient
    model.lm_head.weight.requires_grad_(True)
    assert training_flops(model, [3, 5], 4) == 4 * weights * 8 + 6 * 32 * 64 * 4 + attention


def test_peaks_are_those_of_the_form_that_was_measured() -> None:
    assert datasheet_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert datasheet_peak("NVIDIA H100 PCIe") is None
    assert datasheet_peak("AMD EPYC") is None


@pytest.mark.slow
def test_one_that_raises_is_listed_with_its_error_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, *arguments: Any, **named: Any) -> Any:
        if name == broken:
            raise RuntimeError("out of memory\nand more")
        return trainers.build_trainer(name, *arguments, **named)

    monkeypatch.setattr(train, "build_trainer", build)
    work = tiny_work(2)
    broken = TRL_PACKED
    found = train_all(work, [OURS, OURS_LIGER, TRL_PACKED, TRL_PADDED], {}, None)
    rows = {row["name"]: row for row in train.speeds(work, found, 1e9)}
    assert rows["tiny: TRL, packing=True"]["note"] == "cannot run: RuntimeError: out of memory"
    assert rows["tiny: packsft + Liger layer kernels"]["note"].startswith("cannot run: ")
    assert rows["tiny: packsft"]["value"] > 0
    assert rows["tiny: TRL, padded, batch 8"]["ratio"] > 0
    broken = OURS
    with pytest.raises(RuntimeError, match="out of memory"):
        train_all(work, [OURS], {}, None)


@pytest.mark.slow
def test_the_dry_run_measures_every_competitor_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "checkpointed", lambda *arguments: [])  # the main competitors once more
    rows = list(train.bench(Settings(dry_run=True)))
    named = {row["name"]: row for row in rows}
    for name in COMPETITORS:
        row = named[f"Llama-3.2-1B: {name}"]
        assert row["value"] or row["note"].lower().startswith("cannot run: liger"), row
        assert "WRONG" not in row["note"]
    assert named["Qwen2.5-7B with LoRA: packsft"]["value"] or "peft" in named["Qwen2.5-7B with LoRA: packsft"]["note"]
    assert [row["passed"] for row in rows if row["parity"]] == [True] * 3  # tokens, losses and gradient norms
    assert [row for row in rows if row["target"] and not row["parity"]] == []  # tiny models say nothing about speed


STEPS = {"per_device_train_batch_size": 2, "learning_rate": 0.0, "optim": "sgd"}
STEPS |= {"train_sampling_strategy": "sequential"}


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    """What was logged of 16 steps, by both trainers that take the same ones, and the truth of them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (trainers, train):
            monkeypatch.setattr(module, "training_dtype", lambda: torch.float32)
        found = {}
        for name in (EXACT, TRL_PADDED):
            train_once(tiny_work(32), name, result := Result(), {"use_cpu": True} | STEPS)
            found[name] = train.outputs(result.steps)
        return found | {"truth": train.outputs(list(train.plain_steps(tiny_work(32), torch.float64, STEPS)))}


def verdicts(steps: dict[str, Any], **wrong: Any) -> list[bool]:
    """Whether tokens, losses and gradient norms hold, with some of ours replaced."""
    rows = train.compared("tiny", steps[EXACT] | wrong, steps[TRL_PADDED], steps["truth"], "float64")
    return [row["passed"] for row in rows if row["parity"]]


def test_exact_steps_are_those_of_padded_batches(steps: dict[str, Any]) -> None:
    assert len(steps[EXACT]["loss"]) == 16
    assert verdicts(steps) == [True, True, True]


def test_a_step_that_is_off_by_a_percent_fails_and_so_do_other_tokens(steps: dict[str, Any]) -> None:
    wrong = copy.deepcopy(steps[EXACT])
    wrong["num_tokens"][1] += 1
    wrong["loss"][1] *= 1.01
    wrong["grad_norm"][1] *= 1.01
    assert verdicts(steps, loss=wrong["loss"]) == [True, False, True]
    assert verdicts(steps, grad_norm=wrong["grad_norm"]) == [True, True, False]
    assert verdicts(steps, num_tokens=wrong["num_tokens"]) == [False]


@pytest.mark.slow
def test_another_example_in_a_step_fails(steps: dict[str, Any]) -> None:
    """One example is exchanged for another of its length, so that the numbers of tokens cannot tell."""
    rows = tiny_work(32).rows.to_list()
    rows[0] = {key: value[::-1] if key == "input_ids" else value for key, value in rows[0].items()}
    rows[0]["labels"] = [a if b != -100 else b for a, b in zip(rows[0]["input_ids"], rows[0]["labels"], strict=True)]
    other = replace(tiny_work(32), rows=random_documents(8, 64, 64).from_list(rows))
    train_once(other, EXACT, result := Result(), STEPS)
    assert verdicts(steps, **train.outputs(result.steps)) == [True, False, False]


@pytest.mark.slow
def test_trl_with_packsft_s_attention_keeps_documents_apart() -> None:
    """The stand-in for flash attention has the losses of TRL's own packing, which masks; the first is before a step."""
    work = tiny_work()
    found = {}
    for name in (TRL_PACKED, TRL_OUR_ATTENTION):
        train_once(work, name, result := Result(), {})
        found[name] = result
    assert "attention packsft" in found[TRL_OUR_ATTENTION].note
    assert "attention sdpa" in found[TRL_PACKED].note
    ours, theirs = (train.outputs(found[name].steps)["loss"] for name in (TRL_OUR_ATTENTION, TRL_PACKED))
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=4 * torch.finfo(torch.float32).eps)


def test_liger_leaves_the_next_model_alone() -> None:
    """What it puts into the module of the model is taken out again."""
    pytest.importorskip("liger_kernel")
    from transformers.integrations.liger import apply_liger_kernel

    model = tiny_llama(torch.float32)
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    with COMPETITORS[OURS_LIGER].contained(model):
        apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
        patched = {name for name, value in before.items() if vars(module)[name] is not value}
    assert patched == {"apply_rotary_pos_emb", "LlamaMLP", "LlamaRMSNorm"}
    assert all(vars(module)[name] is value for name, value in before.items())
