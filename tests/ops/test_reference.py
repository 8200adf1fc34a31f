"""The definitions of the losses say what `torch.nn.functional.cross_entropy` says; the rest is worked out by hand."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from packsft_kernels import LossOptions, reference


def random_logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_torchs(label_smoothing: float, reduction: str) -> None:
    logits = random_logits(6, 11)
    targets = torch.tensor([0, 10, -100, 3, -100, 5])
    options = LossOptions(label_smoothing=label_smoothing)
    ours = reference.cross_entropy(logits, targets=targets, options=options, reduction=reduction).loss
    torchs = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=label_smoothing)
    torch.testing.assert_close(ours, torchs, rtol=1e-14, atol=1e-15)
    (mine,), (theirs,) = (torch.autograd.grad(loss.sum(), logits) for loss in (ours, torchs))
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-16)


def test_a_position_predicts_the_next_label() -> None:
    """Two sequences of four; the last position of each predicts nothing, its label is never the other's."""
    logits = random_logits(2, 4, 7)
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, 5]])
    ours = reference.cross_entropy(logits, labels).loss
    by_hand = F.cross_entropy(logits[[0, 0, 0, 1, 1], [0, 1, 2, 1, 2]], torch.tensor([1, 2, 3, 4, 5]))
    torch.testing.assert_close(ours, by_hand, rtol=1e-14, atol=0)
    unshifted = reference.cross_entropy(logits, labels, shift=False).loss
    by_hand = F.cross_entropy(logits[[0, 0, 0, 1, 1], [1, 2, 3, 2, 3]], torch.tensor([1, 2, 3, 4, 5]))
    torch.testing.assert_close(unshifted, by_hand, rtol=1e-14, atol=0)


def test_options_by_hand() -> None:
    """Two tokens with logits 0 and log 3: probabilities 1/4 and 3/4, logsumexp log 4."""
    logits, target = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64), torch.tensor([0])

    def loss(**fields: float) -> float:
        return float(reference.cross_entropy(logits, targets=target, options=LossOptions(**fields)).loss)  # type: ignore[arg-type]

    assert loss() == pytest.approx(math.log(4), rel=1e-14)
    assert loss(z_loss=0.5) == pytest.approx(math.log(4) + 0.5 * math.log(4) ** 2, rel=1e-14)
    assert loss(dft=True) == pytest.approx(math.log(4) / 4, rel=1e-14)
    assert loss(logit_scale=2.0) == pytest.approx(math.log(10), rel=1e-14)
    assert loss(softcap=1.0) == pytest.approx(math.log(1 + math.exp(math.tanh(math.log(3)))), rel=1e-14)
    assert loss(label_smoothing=1.0) == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, rel=1e-14)
    out = reference.cross_entropy(logits, targets=target, options=LossOptions(entropy=True, correct=True))
    assert float(out.entropy[0]) == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3), rel=1e-14)  # type: ignore[index]
    assert not out.correct[0]  # type: ignore[index]
    assert float(out.lse[0]) == pytest.approx(math.log(4), rel=1e-14)


def test_linear_cross_entropy_is_torchs_on_the_rows() -> None:
    hidden, weight, bias = random_logits(9, 4), random_logits(11, 4), random_logits(11)
    rows, targets = torch.tensor([7, 0, 3], dtype=torch.int32), torch.tensor([2, 10, -100])
    ours = reference.linear_cross_entropy(hidden, weight, targets, rows=rows, bias=bias).loss
    torchs = F.cross_entropy(F.linear(hidden, weight, bias)[[7, 0]], targets[:2])
    torch.testing.assert_close(ours, torchs, rtol=1e-14, atol=0)


def test_options_out_of_range_name_the_field() -> None:
    for field, value in [("softcap", 0.0), ("logit_scale", -1.0), ("label_smoothing", 1.5), ("z_loss", -1e-4)]:
        with pytest.raises(ValueError, match=field):
            LossOptions(**{field: value})  # type: ignore[arg-type]


def test_an_operator_takes_every_option_and_the_backward_leaves_out_the_metrics_alone() -> None:
    names = [field.name for field in dataclasses.fields(LossOptions)]
    for operator in (torch.ops.packsft.cross_entropy, torch.ops.packsft.linear_cross_entropy):
        arguments = [argument.name for argument in operator.default._schema.arguments]
        assert [name for name in arguments if name in names] == names
    options = LossOptions(7, 2.0, 3.0, 0.1, 0.2, dft=True, entropy=True, correct=True)
    assert options.fields() == dataclasses.astuple(options)
    assert options.loss_alone() == dataclasses.replace(options, entropy=False, correct=False)
