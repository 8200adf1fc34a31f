"""The suite that trains: its FLOP count, its reasons, its dry run, and whether its parity would notice a wrong step."""

from __future__ import annotations

import copy
import sys
from typing import Any

import bench_train
import pytest
import torch
import trainers
from bench_train import Result, Workload, loss_difference, train_all, train_once
from floors import datasheet_peak, training_flops
from measure import Settings
from shapes import MODELS, random_documents, random_model, tiny_llama, tiny_tokenizer
from trainers import COMPETITORS, EXACT, OURS, OURS_LIGER, TRL_OUR_ATTENTION, TRL_PACKED, TRL_PADDED

CPU = torch.device("cpu")
SHAPE = MODELS["Llama-3.2-1B"].shrunk()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32, so that the bounds of float32 hold."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (trainers, bench_train):
        monkeypatch.setattr(module, "training_dtype", lambda: torch.float32)


def tiny_work(examples: int = 24) -> Workload:
    rows = random_documents(examples, SHAPE.vocab_size, 64)
    return Workload("tiny", lambda: random_model(SHAPE, torch.float32, CPU), tiny_tokenizer(), rows, 128)


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


def test_one_that_raises_is_listed_with_its_error_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, *arguments: Any, **named: Any) -> Any:
        if name == broken:
            raise RuntimeError("out of memory\nand more")
        return trainers.build_trainer(name, *arguments, **named)

    monkeypatch.setattr(bench_train, "build_trainer", build)
    work = tiny_work(2)
    broken = TRL_PACKED
    found = train_all(work, [OURS, OURS_LIGER, TRL_PACKED, TRL_PADDED], {}, None)
    rows = {row["name"]: row for row in bench_train.speeds(work, found, 1e9)}
    assert rows["tiny: TRL, packing=True"]["note"] == "cannot run: RuntimeError: out of memory"
    assert rows["tiny: packsft + Liger layer kernels"]["note"].startswith("cannot run: ")
    assert rows["tiny: packsft"]["value"] > 0
    assert rows["tiny: TRL, padded, batch 8"]["ratio"] > 0
    broken = OURS
    with pytest.raises(RuntimeError, match="out of memory"):
        train_all(work, [OURS], {}, None)


def test_the_dry_run_measures_every_competitor_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in bench_train.COMPILED:  # half a minute each
        monkeypatch.setitem(COMPETITORS, name, COMPETITORS[trainers.TRL_LIGER])
    monkeypatch.setattr(bench_train, "checkpointed", lambda *arguments: [])  # the main competitors once more
    rows = list(bench_train.bench_train(Settings(dry_run=True)))
    named = {row["name"]: row for row in rows}
    for name in COMPETITORS:
        layers = ", 3 layers" if name in bench_train.COMPILED else ""
        row = named[f"Llama-3.2-1B{layers}: {name}"]
        assert row["value"] or row["note"].lower().startswith("cannot run: liger"), row
        assert "WRONG" not in row["note"]
    assert named["Qwen2.5-7B with LoRA: packsft"]["value"] or "peft" in named["Qwen2.5-7B with LoRA: packsft"]["note"]
    assert [row["passed"] for row in rows if row["parity"]] == [True]
    assert [row for row in rows if row["target"] and not row["parity"]] == []  # tiny models say nothing about speed


@pytest.fixture(scope="module")
def curves() -> dict[str, Any]:
    """(tokens, loss) of every step, of both trainers that take the same steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainers, "training_dtype", lambda: torch.float32)
        found = {}
        for name in (EXACT, TRL_PADDED):
            train_once(tiny_work(), name, result := Result(), {"use_cpu": True})
            found[name] = result.curve
        return found


def test_exact_steps_have_the_losses_of_padded_batches(curves: dict[str, Any]) -> None:
    assert len(curves[EXACT]) == 3
    assert loss_difference(curves[EXACT], curves[TRL_PADDED]) < bench_train.ROUNDING[torch.float32]


@pytest.mark.parametrize("dtype", bench_train.ROUNDING)
def test_a_loss_off_by_a_percent_fails_and_so_do_other_tokens(curves: dict[str, Any], dtype: torch.dtype) -> None:
    wrong, swapped = copy.deepcopy(curves[EXACT]), copy.deepcopy(curves[EXACT])
    wrong[1] = (wrong[1][0], wrong[1][1] * 1.01)
    assert loss_difference(wrong, curves[TRL_PADDED]) > bench_train.ROUNDING[dtype]
    swapped[1] = (swapped[1][0] + 1, swapped[1][1])
    assert loss_difference(swapped, curves[TRL_PADDED]) == float("inf")


def test_another_example_in_a_step_fails() -> None:
    """One example is exchanged for another of its length, so that the loss alone can tell."""
    work = tiny_work(8)
    rows = work.rows.to_list()
    rows[0] = {key: value[::-1] if key == "input_ids" else value for key, value in rows[0].items()}
    rows[0]["labels"] = [a if b != -100 else b for a, b in zip(rows[0]["input_ids"], rows[0]["labels"], strict=True)]
    other = bench_train.replace(work, rows=bench_train.random_documents(8, 64, 64).from_list(rows))
    found = []
    for name, data in ((EXACT, other), (TRL_PADDED, work)):
        train_once(data, name, result := Result(), {})
        found.append(result.curve)
    assert float("inf") > loss_difference(*found) > bench_train.ROUNDING[torch.float32]


def test_trl_with_packsft_s_attention_keeps_documents_apart() -> None:
    """The stand-in for flash attention has the losses of TRL's own packing, which masks; the first is before a step."""
    work = tiny_work()
    found = {}
    for name in (TRL_PACKED, TRL_OUR_ATTENTION):
        train_once(work, name, result := Result(), {})
        found[name] = result
    assert "attention packsft" in found[TRL_OUR_ATTENTION].note
    assert "attention sdpa" in found[TRL_PACKED].note
    assert loss_difference(found[TRL_OUR_ATTENTION].curve, found[TRL_PACKED].curve) < 1e-6


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
