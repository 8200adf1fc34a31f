"""`torch_compile=True`: the same training, and no code made anew as packs of other sizes come.

61 documents of 2 to 12 tokens, in passes of at most 32. A step takes four of them (the last one) and so has one or two
passes; a batch of "bfd" is two packs. Compilations are counted for each code object; a graph break would show as
further ones. Evaluation runs uncompiled, as in the parent, unless it comes before the first training.
"""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from runs import trainer
from tiny import tiny_model, token_rows
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

ROWS, EVAL_ROWS = token_rows(61), token_rows(20, seed=1)
DIFFERENT = ("per_second", "time", "flos")  # times, and the work of padding


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Dynamo")
        yield
    torch._dynamo.reset()


def compilations() -> Counter:
    """By (function, line), of the run so far."""
    return Counter((metrics.co_name, metrics.co_firstlineno) for metrics in get_compilation_metrics())


def run(tmp_path, model, *, evaluate_first=False, **options):
    """(losses of the steps, what was logged, the model, sizes of the passes)."""
    defaults = {
        "optim": "sgd", "num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "eval_strategy": "epoch",
    }  # fmt: skip
    trained = trainer(tmp_path, model, ROWS, EVAL_ROWS, **defaults | options)
    losses, sizes = [], set()
    step, loss_of = trained.training_step, trained.compute_loss

    def training_step(*args):
        losses.append(step(*args))
        return losses[-1]

    def compute_loss(model, inputs, *args, **kwargs):
        sizes.add((tuple(inputs["input_ids"].shape), *(inputs[key] for key in ("num_scored", "num_documents"))))
        return loss_of(model, inputs, *args, **kwargs)

    if evaluate_first:
        trained.evaluate()
    trained.training_step, trained.compute_loss = training_step, compute_loss
    trained.train()
    logged = [
        {key: value for key, value in entry.items() if not any(part in key for part in DIFFERENT)}
        for entry in trained.state.log_history
    ]
    return torch.stack(losses), logged, trained.model, sizes


def assert_the_same_training(compiled, plain, tolerance=1e-12) -> None:
    assert compiled[0].dtype == torch.float64
    torch.testing.assert_close(compiled[0], plain[0], rtol=tolerance, atol=tolerance)
    assert [entry.keys() for entry in compiled[1]] == [entry.keys() for entry in plain[1]]
    for ours, theirs in zip(compiled[1], plain[1], strict=True):
        for key, value in ours.items():
            assert value == pytest.approx(theirs[key], rel=1e-7), key
    for ours, theirs in zip(compiled[2].parameters(), plain[2].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


CASES = {
    "step": ({}, 1),
    "step, examples weigh the same": ({"loss_normalization": "example"}, 1),
    "bfd": ({"packing_strategy": "bfd", "max_length": 16, "gradient_accumulation_steps": 1}, 1),
    "not packed": ({"packing": False}, 1),
    "padded": ({"family": "stablelm"}, 2),  # passes of one row are code of their own
    "evaluated first": ({"evaluate_first": True}, 2),  # without gradients
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "step" else pytest.mark.slow) for case in CASES]
)
def test_an_epoch_of_uneven_packs_is_compiled_once(case, tmp_path):
    options, most = CASES[case]
    options = dict(options)
    family = options.pop("family", "llama")
    plain, compiled = (
        run(tmp_path, tiny_model(family, torch.float64, num_hidden_layers=1), torch_compile_backend=backend, **options)
        for backend in (None, "eager")
    )
    assert list(compilations().values()) == [most]
    assert not counters["graph_break"]
    assert len(compiled[0]) >= 12
    assert len(plain[3]) > 8  # sizes of passes
    assert_the_same_training(compiled, plain)


@pytest.mark.parametrize(
    ("backend", "tolerance"),
    [
        ("eager", 1e-12),
        pytest.param("aot_eager", 1e-12, marks=pytest.mark.slow),
        pytest.param("inductor", 1e-7, marks=pytest.mark.slow),
    ],
)
def test_compiled_gradients_and_recomputed_layers_are_the_same(backend, tolerance, tmp_path):
    """Layers are recomputed but under inductor, which rounds otherwise where the model computes in float32
    (RMSNorm, rotary angles): losses are 3e-9 off."""
    plain, compiled = (
        run(
            tmp_path,
            tiny_model("llama", torch.float64, num_hidden_layers=1),
            torch_compile_backend=chosen,
            gradient_checkpointing=backend != "inductor",
        )
        for chosen in (None, backend)
    )
    assert set(compilations().values()) == {1}  # the first run of inductor may compile something of its own
    assert not counters["graph_break"]
    assert_the_same_training(compiled, plain, tolerance)


@pytest.mark.slow
def test_bfloat16_and_a_head_with_logits_of_its_own_are_compiled_once(tmp_path):
    """Autocast, and an adapter on the head, where the compact-logits path is taken."""
    from peft import LoraConfig

    model = tiny_model("llama", tie_word_embeddings=False, num_hidden_layers=1)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    losses, *_ = run(tmp_path, model, bf16=True, peft_config=config, torch_compile_backend="eager")
    assert set(compilations().values()) == {1}  # torch 2.10 breaks this graph
    assert torch.isfinite(losses).all()
