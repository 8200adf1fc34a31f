"""The weights after ten steps are the same however the steps are cut: tokens at once, micro-batches, processes."""

import json

import pytest
import torch

from packsft.app.cli import main
from packsft.app.invariance import (
    EXACT,
    LAYOUTS,
    ROUNDING,
    InvarianceResult,
    Layout,
    _difference,
    certify,
    layouts_of,
    random_rows,
    small_models,
)
from packsft.model.claims import rounds_to_float32

SOME = (Layout(None, 8, 1), Layout(512, 1, 1), Layout(1024, 8, 1), Layout(4096, 1, 1))
FEW = (Layout(None, 8, 1), Layout(4096, 1, 1))


@pytest.mark.parametrize(
    ("name", "tolerance", "layouts"),
    [
        pytest.param("GPT-2", EXACT, FEW, id="GPT-2, one process"),
        pytest.param("GPT-2", EXACT, LAYOUTS, id="GPT-2", marks=pytest.mark.slow),
        pytest.param("Llama", ROUNDING, SOME, id="Llama", marks=pytest.mark.slow),
        *(
            pytest.param("GPT-2", EXACT, layouts_of(engine)[::3], id=f"GPT-2, {engine}", marks=pytest.mark.slow)
            for engine in ("fsdp2", "sp")
        ),
    ],
)
def test_weights_after_ten_steps_agree(name, tolerance, layouts):
    # 200 rows of 8 to 512 tokens: 16 of them, a step, are about 3,600
    model, tokenizer = small_models()[name]
    assert rounds_to_float32(model) == (tolerance == ROUNDING)
    results = certify(model, tokenizer, random_rows(200, 512, 256), max_length=512, layouts=layouts)
    assert [result.layout for result in results] == list(layouts)
    for result in results:
        assert result.difference < tolerance, result
        assert result.loss_difference < (1e-14 if tolerance == EXACT else tolerance), result
    # and the layouts are different ones
    assert results[0].passes == 8
    assert min(result.passes for result in results) < 2.5


def test_a_weight_that_is_off_is_seen_and_rounding_of_a_zero_gradient_is_not():
    start = {"w": torch.zeros(3, dtype=torch.float64)}
    first = {"w": torch.tensor([1e-3, 0.0, 1e-12], dtype=torch.float64)}
    assert _difference({"w": torch.tensor([1e-3, 0.0, -1e-12]).double()}, first, start)["w"] < 1e-7
    assert _difference({"w": first["w"] + torch.tensor([1e-10, 0, 0])}, first, start)["w"] == pytest.approx(1e-7)
    assert _difference({"w": first["w"] + torch.tensor([0, 1e-6, 0])}, first, start)["w"] == pytest.approx(1e-3)


def test_weights_that_are_no_number_do_not_agree():
    start, first = {"w": torch.zeros(2).double()}, {"w": torch.ones(2).double()}
    assert not _difference({"w": torch.tensor([1.0, float("nan")]).double()}, first, start)["w"] <= EXACT
    assert not InvarianceResult("GPT-2", SOME[0], 1.0, float("nan"), 0.0, EXACT).agrees
    assert not InvarianceResult("GPT-2", SOME[0], 1.0, 0.0, float("nan"), EXACT).agrees
    assert _difference(start, start, start)["w"] == 0.0  # a bias that never moves


def test_the_command_fails_where_weights_differ(monkeypatch, capsys):
    results = [InvarianceResult("GPT-2", Layout(None, 8, 1), 8.0, 2e-12, 0.0, EXACT)]
    monkeypatch.setattr("packsft.app.invariance.check_batch_invariance", lambda model, num_steps, engine: results)
    assert main(["check", "--batch-invariance", "--json"]) == 1
    (printed,) = json.loads(capsys.readouterr().out)
    assert (printed["agrees"], printed["layout"]["tokens_per_pass"]) == (False, None)
    results[0] = InvarianceResult("GPT-2", Layout(512, 8, 1), 8.0, 5e-13, 0.0, EXACT)
    assert main(["check", "--batch-invariance"]) == 0
    assert "5.0e-13" in capsys.readouterr().out
    assert main(["check"]) == 2


def test_a_step_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"examples_per_step=6: must be a multiple .* accumulation=8"):
        certify(*small_models()["GPT-2"], random_rows(8, 512, 256), max_length=512, examples_per_step=6)
