"""The contract's helper catches the faults that losses are known for, and passes what is right."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate, error

IGNORED = -100


def losses(dtype: torch.dtype, shift: int = 1, drop_ignored: bool = True, scale: float = 1.0) -> list[torch.Tensor]:
    """(loss, gradient) of shifted cross-entropy, by autograd; the arguments plant faults."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 50, (40,), generator=generator)
    labels[::4] = IGNORED
    logits = torch.randn(40, 50, generator=generator).bfloat16().to(dtype).requires_grad_()
    targets = labels.roll(-shift)
    targets[-1] = IGNORED
    if not drop_ignored:
        targets = targets.clamp(min=0)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED) * scale
    loss.backward()
    assert logits.grad is not None
    return [loss.detach(), logits.grad]


def test_a_right_result_passes() -> None:
    for plain, truth in zip(losses(torch.bfloat16), losses(torch.float64), strict=True):
        assert_accurate(truth.bfloat16(), plain, truth, "rounded truth", by_row=truth.dim() > 0)


@pytest.mark.parametrize(
    "fault",
    [{"shift": 0}, {"shift": 2}, {"drop_ignored": False}, {"scale": 29 / 30}],
    ids=["labels not shifted", "labels shifted twice", "ignored rows scored", "divided by one item too many"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_planted_fault_is_caught(dtype: torch.dtype, fault: dict) -> None:
    _, ours = losses(dtype, **fault)
    _, plain = losses(dtype)
    _, truth = losses(torch.float64)
    with pytest.raises(AssertionError, match="allowed"):
        assert_accurate(ours, plain, truth, "gradient", by_row=True)


def test_a_dropped_last_block_of_the_vocabulary_is_caught() -> None:
    _, plain = losses(torch.bfloat16)
    _, truth = losses(torch.float64)
    ours = truth.bfloat16()
    ours[:, -1] = 0
    with pytest.raises(AssertionError, match="allowed"):
        assert_accurate(ours, plain, truth, "gradient", by_row=True)


@pytest.mark.parametrize("accumulator", [torch.bfloat16, torch.float32], ids=str)
def test_weight_gradients_summed_in_bf16_are_caught(accumulator: torch.dtype) -> None:
    """16 chunks, as a long row under another library's chunk rule: bf16 sums fail, float32 sums pass."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 32, generator=generator).bfloat16()
    grad = torch.softmax(torch.randn(512, 300, generator=generator), -1).bfloat16()
    grad[torch.arange(512), torch.randint(0, 300, (512,), generator=generator)] -= 1
    truth = grad.double().t() @ hidden.double()
    total = torch.zeros(300, 32, dtype=accumulator)
    for g, h in zip(grad.chunk(16), hidden.chunk(16), strict=True):
        total += g.t() @ h
    if accumulator == torch.float32:
        assert_accurate(total.bfloat16(), grad.t() @ hidden, truth, "dW", by_row=True)
    else:
        with pytest.raises(AssertionError, match="allowed"):
            assert_accurate(total, grad.t() @ hidden, truth, "dW", by_row=True)


def test_nan_and_infinity_count_unless_the_truth_has_them() -> None:
    truth = torch.tensor([1.0, float("inf"), float("nan")], dtype=torch.float64)
    assert error(truth.float(), truth) == 0
    assert error(torch.tensor([float("nan"), float("inf"), float("nan")]), truth) == float("inf")
    assert error(torch.tensor([1.0, 3e38, float("nan")]), truth) == float("inf")
    assert error(torch.tensor([1e-30]), torch.zeros(1, dtype=torch.float64)) == float("inf")
