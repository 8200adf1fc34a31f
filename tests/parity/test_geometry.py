"""The weights after ten steps are the same however the steps are cut: tokens at once, micro-batches, processes."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

from packsft.geometry import (
    EXACT,
    GEOMETRIES,
    ROUNDING,
    Geometry,
    _difference,
    certify,
    rounds_to_float32,
)

SOME = (Geometry(512, 1, 1), Geometry(4096, 8, 1), Geometry(1024, 1, 2))


def instructions():
    """200 rows of 8 to 512 random tokens, log-normal: 16 of them, a step, are about 3,600 tokens."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.2, 0.8, 200), 8, 512).astype(int)
    rows = [generator.integers(3, 24, length).tolist() for length in lengths]
    return Dataset.from_list(
        [{"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]} for ids in rows]
    )


@pytest.mark.parametrize(
    ("family", "positions", "tolerance", "geometries"),
    [("gpt2", "n_positions", EXACT, GEOMETRIES), ("llama", "max_position_embeddings", ROUNDING, SOME)],
    ids=["gpt2", "llama"],
)
def test_weights_after_ten_steps_agree(family, positions, tolerance, geometries):
    model = tiny_model(family, torch.float64, **{positions: 512})
    assert rounds_to_float32(model) == (tolerance == ROUNDING)
    results = certify(model, tiny_tokenizer(), instructions(), max_length=512, geometries=geometries)
    assert [result.geometry for result in results] == list(geometries)
    for result in results:
        assert result.difference < tolerance, result
        assert result.loss_difference < 1e-14, result
    # and the geometries are different ones
    assert results[0].passes > 7
    assert min(result.passes for result in results) < 2.5


def test_a_weight_that_is_off_is_seen_and_rounding_of_a_zero_gradient_is_not():
    start = {"w": torch.zeros(3, dtype=torch.float64)}
    first = {"w": torch.tensor([1e-3, 0.0, 1e-12], dtype=torch.float64)}
    assert _difference({"w": torch.tensor([1e-3, 0.0, -1e-12]).double()}, first, start)["w"] < 1e-7
    assert _difference({"w": first["w"] + torch.tensor([1e-10, 0, 0])}, first, start)["w"] == pytest.approx(1e-7)
    assert _difference({"w": first["w"] + torch.tensor([0, 1e-6, 0])}, first, start)["w"] == pytest.approx(1e-3)


def test_a_step_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"examples_per_step=6: must be a multiple .* accumulation=8"):
        certify(tiny_model(), tiny_tokenizer(), instructions(), max_length=512, examples_per_step=6)
