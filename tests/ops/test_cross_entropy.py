"""`cross_entropy` keeps the numerical contract in every dtype, with every option, and at the edges.

Run by itself this file tests the PyTorch path; `test_cross_entropy_triton.py` runs it again with TRITON_INTERPRET=1,
and then every test here goes through the Triton kernel (but for float64, which has none).

V = 2,500 is 9.8 blocks of the PyTorch path, and two blocks that the kernel holds; `small_blocks` makes it 4.9 blocks of
which it reads three twice. 12 rows are two rows of six. Without a device named in PACKSFT_TEST_DEVICE, the CPU.
"""

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import EXACT, assert_accurate, error, seeded
from packsft_kernels import LossOptions, _triton, cross_entropy, launch, linear_cross_entropy, reference
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (not _triton.INTERPRET)
OPTIONS = {
    "plain": LossOptions(),
    "all outputs": LossOptions(entropy=True, correct=True),
    "softcap": LossOptions(softcap=5.0),
    "scale": LossOptions(logit_scale=0.3),
    "smoothing": LossOptions(label_smoothing=0.1),
    "smoothing and all outputs": LossOptions(label_smoothing=0.1, entropy=True, correct=True),
    "z-loss": LossOptions(z_loss=1e-2),
    "dft": LossOptions(dft=True),
    "everything": LossOptions(
        softcap=5.0, logit_scale=0.7, label_smoothing=0.1, z_loss=1e-2, dft=True, entropy=True, correct=True
    ),
}
V = 2500


def streamed(vocab: int, *_: Any, **__: Any) -> launch.KernelShape:
    """Small blocks, most of which are read twice."""
    blocks = max(1, -(-vocab // 512))
    held = min(blocks, 2)
    return launch.KernelShape(2, 256, 1, 255, blocks - held, held, 3)


def held(vocab: int, *_: Any, **__: Any) -> launch.KernelShape:
    """Small blocks, all of which stay in registers."""
    return launch.KernelShape(1, 256, 1, 255, 0, max(1, -(-vocab // 256)), 1)


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = seeded(0)
    logits = (3 * torch.randn(2, 6, V, generator=generator)).to(dtype)
    labels = torch.randint(0, V, (2, 6), generator=generator)
    labels[0, 3] = -100
    labels[1, 1:3] = -100
    labels[0, 1], labels[0, 2] = 0, V - 1
    labels[1, 4] = logits[1, 3].argmax()  # one that is correct
    return {"logits": logits, "labels": labels, "weights": torch.rand(2, 6, generator=generator)}


def differentiate(function, logits: Tensor, *args, upstream: Tensor | float = 1.0, **kwargs) -> list[Tensor]:
    """[loss, gradient of the logits, the other outputs]; the logits stand in the middle of a graph, as a model's do."""
    leaf = logits.detach().clone().requires_grad_()
    out = function(leaf * 1, *args, **kwargs)
    out.loss.backward(torch.as_tensor(upstream).to(out.loss.dtype))
    return [out.loss.detach(), leaf.grad, *(value for value in out[1:] if value is not None)]


def assert_contract(logits: Tensor, *args, weights: Tensor | None = None, inplace: bool = False, **kwargs) -> None:
    wide = {} if weights is None else {"weights": weights.double()}
    narrow = {} if weights is None else {"weights": weights}
    truth = differentiate(reference.cross_entropy, logits.double(), *args, **wide, **kwargs)
    plain = differentiate(reference.cross_entropy, logits, *args, **narrow, **kwargs)
    ours = differentiate(cross_entropy, logits, *args, **narrow, inplace=inplace, **kwargs)
    for index, (mine, theirs, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        if exact.dtype == torch.bool:
            assert torch.equal(mine, exact), "correct"
        else:
            assert_accurate(mine, theirs.to(mine.dtype), exact, f"output {index}", by_row=index == 1)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype: torch.dtype, name: str, inplace: bool) -> None:
    assert_contract(**inputs(dtype), options=OPTIONS[name], inplace=inplace)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cross_entropy_shape", streamed)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_over_several_blocks(dtype: torch.dtype, name: str) -> None:
    assert_contract(**inputs(dtype), options=OPTIONS[name], inplace=True)


@pytest.mark.parametrize("vocab", [2048, 16_384, 32_768, 32_769, 300_000])
def test_the_largest_row_of_every_launch(vocab: int) -> None:
    """In float32: of each entry of the launch table, and rows beyond them all."""
    logits = torch.randn(4, vocab, generator=seeded(0))
    targets = torch.tensor([0, vocab - 1, -100, vocab // 2])
    for options in (OPTIONS["all outputs"], OPTIONS["everything"]):
        assert_contract(logits, targets=targets, options=options, inplace=True)


@pytest.mark.parametrize("shape", [streamed, held, launch.cross_entropy_shape], ids=["streamed", "held", "own"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [3, 15, 513, 701, 704])
def test_rows_may_begin_and_end_anywhere(vocab: int, dtype: torch.dtype, shape: Any, monkeypatch: Any) -> None:
    """Rows at every distance from a multiple of 16 bytes, each target once in the body and at either edge. A row's
    first and last columns must not be lost, and the columns beside the row must stay what they are."""
    monkeypatch.setattr(launch, "cross_entropy_shape", shape)
    targets = torch.tensor([0, vocab - 1, vocab // 2, min(5, vocab - 1)])
    logits = (3 * torch.randn(4, vocab, generator=seeded(0))).to(dtype)
    options = OPTIONS["all outputs" if dtype == torch.bfloat16 else "smoothing and all outputs"]
    truth = differentiate(reference.cross_entropy, logits.double(), targets=targets, options=options)
    plain = differentiate(reference.cross_entropy, logits, targets=targets, options=options)
    for offset in (0, 1, 16 // dtype.itemsize - 1):
        for stride in (vocab, vocab + 1):
            storage = torch.full((offset + 4 * stride + 8,), 7.0, dtype=dtype)
            view = storage.as_strided((4, vocab), (stride, 1), offset)
            beside = torch.ones_like(storage, dtype=torch.bool)
            beside.as_strided((4, vocab), (stride, 1), offset).fill_(False)
            for inplace in (False, True):
                view.copy_(logits)
                leaf = view.detach().requires_grad_()
                alias = leaf.view_as(leaf)
                out = cross_entropy(alias, targets=targets, options=options, inplace=inplace)
                out.loss.backward()
                assert leaf.grad is not None
                ours = [out.loss, leaf.grad, *(value for value in out[1:] if value is not None)]
                for index, (mine, theirs, exact) in enumerate(zip(ours, plain, truth, strict=True)):
                    if exact.dtype == torch.bool:
                        assert torch.equal(mine, exact)
                    else:
                        assert_accurate(mine, theirs.to(mine.dtype), exact, f"output {index}", by_row=index == 1)
                assert (storage[beside] == 7.0).all()


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions_with_an_upstream_gradient(reduction: str, inplace: bool) -> None:
    upstream = torch.randn(12, generator=seeded(1)) if reduction == "none" else 0.37
    for dtype in (torch.float64, torch.float32):
        assert_contract(**inputs(dtype), reduction=reduction, upstream=upstream, inplace=inplace)


@pytest.mark.parametrize("num_items", [17, torch.tensor(17)], ids=["int", "tensor"])
def test_mean_divides_by_the_items_given(num_items: int | Tensor) -> None:
    assert_contract(**inputs(torch.float64), num_items=num_items)


def test_labels_are_shifted_and_the_compact_form_agrees() -> None:
    given = inputs(torch.float64)
    logits, labels = given["logits"], given["labels"]
    by_hand = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    assert error(cross_entropy(logits, labels).loss, by_hand) < 1e-14
    by_hand = F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1))
    assert error(cross_entropy(logits, labels, shift=False).loss, by_hand) < 1e-14

    rows = torch.tensor([9, 0, 4], dtype=torch.int32)
    targets = torch.tensor([1, V - 1, 0])
    options = OPTIONS["all outputs"]
    for reduction, upstream in (("mean", 1.0), ("none", torch.tensor([1.0, -2.0, 0.5]))):
        assert_contract(
            logits,
            rows=rows,
            targets=targets,
            weights=torch.tensor([0.5, 2.0, 1.0]),
            options=options,
            reduction=reduction,
            upstream=upstream,
        )


def test_small_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given, options = inputs(torch.float64), OPTIONS["everything"]
    whole = differentiate(cross_entropy, **given, options=options)
    monkeypatch.setattr(launch, "_CACHED_ELEMENTS", 5 * V)  # blocks of 5, 5 and 2 rows
    for one, many in zip(whole, differentiate(cross_entropy, **given, options=options), strict=True):
        # CUDA divides the sum over a row among more threads where there are fewer rows
        assert error(many, one) <= (EXACT if one.is_cuda else 0.0)


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1023, 2049])
def test_any_vocabulary(vocab: int) -> None:
    """32 rows, so that PyTorch's own error is that of its worst row and not a lucky one."""
    logits = torch.randn(32, vocab, generator=seeded(0))
    targets = torch.tensor([0, vocab - 1, vocab // 2, -100]).repeat(8)
    for dtype in (torch.float64, torch.float32):
        assert_contract(logits.to(dtype), targets=targets, options=OPTIONS["all outputs"])


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_confident_target_keeps_its_gradient(dtype: torch.dtype, gap: float) -> None:
    """Six digits at 1 - p = gap. What is left is the rounding of z - m, at most 2^-20 for |z - m| < 32, which exp turns
    into a relative error, and some units in the last place of exp and sums. Plain float32 has no digit at 1e-9."""
    logits = torch.randn(3, 1000, generator=seeded(0))
    targets = torch.tensor([0, 500, 999])
    rows = torch.arange(3)
    logits[rows, targets] = -math.inf
    logits[rows, targets] = logits.logsumexp(-1) + math.log((1 - gap) / gap)
    logits = logits.to(dtype)
    bound = 2.0**-20 + 4 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 1e-12

    def digits(function, logits: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad, *_ = differentiate(function, logits, targets=targets, reduction="none", upstream=torch.ones(3))
        return loss.detach().double(), grad[rows, targets].double()

    truth, ours = digits(reference.cross_entropy, logits.double()), digits(cross_entropy, logits)
    # The definition cancels as well, if only in float64: so the exact values are those of log(rest / e_t).
    rest = logits.double().scatter(1, targets[:, None], -math.inf).logsumexp(-1) - logits.double()[rows, targets]
    exact = torch.log1p(rest.exp()), -torch.sigmoid(rest)
    for cancelled, right in zip(truth, exact, strict=True):
        assert float(((cancelled - right) / right).abs().max()) < 64 * torch.finfo(torch.float64).eps / gap
    for mine, right in zip(ours, exact, strict=True):
        assert float(((mine - right) / right).abs().max()) < bound
    if dtype == torch.float32 and gap < 1e-7:
        _, plain = digits(reference.cross_entropy, logits)
        assert float(((plain - exact[1]) / exact[1]).abs().max()) > 0.1


def test_a_target_far_below_the_maximum_has_a_finite_loss() -> None:
    """exp(-200) is 0 in float32: the loss is then the distance itself."""
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, -150.0, 90.0], [1.0, 0.0, 0.5]])  # the last: some entropy
    assert_contract(logits, targets=torch.tensor([1, 1, 1]), options=OPTIONS["all outputs"])


@pytest.mark.parametrize("shape", [streamed, held, launch.cross_entropy_shape], ids=["streamed", "held", "own"])
def test_the_largest_and_smallest_numbers(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of finite numbers: transformers writes the least one of a dtype over what must not be said."""
    monkeypatch.setattr(launch, "cross_entropy_shape", shape)
    least = torch.finfo(torch.float32).min
    logits = torch.randn(5, 600, generator=seeded(0))
    logits[0, 1::2], logits[1, 1::2], logits[2, :], logits[3, :] = least, -1e38, least, -2e38
    logits[3, 4] = 3e38
    targets = torch.tensor([4, 4, 4, 4, 4])
    assert_contract(logits, targets=targets, options=OPTIONS["all outputs"])
    infinite = logits[4:].clone()
    infinite[0, 4] = math.inf
    assert cross_entropy(infinite, targets=targets[4:]).loss.isnan()


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_all_rows_ignored_gives_zero(inplace: bool) -> None:
    for reduction in ("mean", "sum"):
        logits = torch.full((2, 3, 7), math.nan)
        labels = torch.full((2, 3), -100)
        loss, grad, *_ = differentiate(cross_entropy, logits, labels, reduction=reduction, inplace=inplace)
        assert float(loss) == 0
        assert not grad.any()
    none_counted = cross_entropy(torch.randn(1, 3, 7), torch.full((1, 3), -100), num_items=torch.tensor(0)).loss
    assert float(none_counted) == 0


def test_a_sequence_of_one_token_predicts_nothing() -> None:
    loss, grad, *_ = differentiate(cross_entropy, torch.randn(1, 1, 7), torch.tensor([[3]]))
    assert float(loss) == 0
    assert not grad.any()


def test_no_rows_at_all() -> None:
    loss, grad, *_ = differentiate(cross_entropy, torch.randn(0, 7), targets=torch.zeros(0, dtype=torch.int64))
    assert float(loss) == 0
    assert grad.shape == (0, 7)


@pytest.mark.parametrize("name", ["all outputs", "everything"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_ignored_rows_may_hold_nan(inplace: bool, name: str) -> None:
    given = inputs(torch.float32)
    clean = differentiate(cross_entropy, **given, options=OPTIONS[name], inplace=inplace)
    given["logits"][0, 2], given["logits"][1, 0], given["logits"][1, 5] = math.nan, math.inf, -math.inf
    for dirty, value in zip(
        differentiate(cross_entropy, **given, options=OPTIONS[name], inplace=inplace), clean, strict=True
    ):
        assert torch.equal(dirty, value)


def test_an_ignore_index_inside_the_vocabulary() -> None:
    given = inputs(torch.float64)
    given["labels"][given["labels"] == -100] = 7
    assert_contract(**given, options=LossOptions(ignore_index=7, correct=True))


def test_logits_of_minus_infinity() -> None:
    """A grammar's mask: forbidden tokens have no probability, no entropy and no gradient."""
    given = inputs(torch.float32)
    given["logits"][..., 1::2] = -math.inf
    given["labels"] = (given["labels"] // 2 * 2).clamp(min=-100)
    for dtype in (torch.float64, torch.float32):
        given["logits"] = given["logits"].to(dtype)
        for logit_scale in (1.0, 1e-3):
            assert_contract(**given, options=LossOptions(logit_scale=logit_scale, entropy=True, correct=True))


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(logit_scale=2.0, label_smoothing=0.1)], ids=str)
def test_a_row_of_minus_infinity_has_no_loss(options: LossOptions) -> None:
    logits = torch.full((2, 9), -math.inf)
    logits[1] = 0.0
    call = {"targets": torch.tensor([3, 3]), "reduction": "none", "options": options, "upstream": torch.ones(2)}
    loss, grad, *_ = differentiate(cross_entropy, logits, **call)
    assert loss.isnan().tolist() == [True, False]
    assert grad[0].isnan().all()


@pytest.mark.parametrize("shape", [streamed, held, launch.cross_entropy_shape], ids=["streamed", "held", "own"])
def test_correct_is_the_first_argmax(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties in different blocks, within the one block of a target, and with the columns at either edge of a row."""
    monkeypatch.setattr(launch, "cross_entropy_shape", shape)
    logits = torch.zeros(8, 3001)
    logits[:, [700, 2900]] = 1.0
    logits[3, 2950] = 2.0  # in the columns after the last whole block of 256
    logits[4:, [0, 3000]] = 1.0
    logits[7, :2] = 3.0
    targets = torch.tensor([700, 2900, 5, 2950, 0, 3000, 700, 1])
    out = cross_entropy(logits, targets=targets, options=LossOptions(correct=True))
    assert out.correct is not None
    assert out.correct.tolist() == [True, False, False, True, True, False, False, False]


def test_rows_further_apart_than_2_to_the_31() -> None:
    """Two rows of a view whose second begins past an int32; of the 4 GB between them no page is touched."""
    stride = 2**31 + 8
    logits = torch.empty(stride + 40, dtype=torch.bfloat16).as_strided((2, 40), (stride, 1))
    logits.copy_(torch.randn(2, 40))
    targets = torch.tensor([3, 39])
    assert_contract(logits, targets=targets)
    assert error(cross_entropy(logits, targets=targets).lse, logits.double().logsumexp(-1)) < 1e-6
    # a copy would lie close together: the gradient is written where the rows are
    compact = logits.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    cross_entropy(compact, targets=targets).loss.backward()
    view = logits.requires_grad_().view_as(logits)
    cross_entropy(view, targets=targets, inplace=True).loss.backward()
    assert torch.equal(logits.grad, compact.grad)


def test_inplace_overwrites_the_logits_and_says_so() -> None:
    """`exp` saves its result for its own backward: autograd has to notice that it is gone."""
    leaf = torch.randn(3, 7, requires_grad=True)
    logits = leaf.exp()
    loss = cross_entropy(logits, targets=torch.tensor([1, 2, 3]), inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="inplace"):
        cross_entropy(leaf, targets=torch.tensor([1, 2, 3]), inplace=True)


def test_inplace_keeps_the_gradient_in_the_logits_storage() -> None:
    leaf = torch.randn(3, 7, requires_grad=True)
    logits = leaf * 1
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss = cross_entropy(logits, targets=torch.tensor([1, 2, 3]), inplace=True).loss
    loss.backward(retain_graph=True)
    assert seen == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


def test_nothing_is_overwritten_without_a_gradient() -> None:
    logits = torch.randn(3, 7, requires_grad=True) * 1
    before = logits.detach().clone()
    targets = torch.tensor([1, 2, 3])
    with torch.no_grad():
        cross_entropy(logits, targets=targets, inplace=True)
    cross_entropy(logits, targets=targets).loss.backward()
    assert torch.equal(logits, before)


def test_a_second_backward_gives_the_gradient_again() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    loss = cross_entropy(logits, targets=torch.tensor([1, 2, 3])).loss
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    first = logits.grad.clone()
    loss.backward()
    assert torch.equal(logits.grad, 2 * first)


def test_only_the_loss_is_differentiable_and_only_once() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    out = cross_entropy(logits, targets=torch.tensor([1, 2, 3]), options=OPTIONS["all outputs"])
    assert [value.requires_grad for value in out if value is not None] == [True, False, False, False, False]
    (grad,) = torch.autograd.grad(out.loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


def test_a_target_outside_of_the_vocabulary_is_not_read() -> None:
    logits = torch.randn(2, 7)
    for target in (7, -1):
        targets = torch.tensor([0, target])
        if _triton.usable(logits.device):
            out = cross_entropy(logits, targets=targets, reduction="none")
            assert out.loss.isnan().tolist() == [False, True]
        else:
            with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
                cross_entropy(logits, targets=targets)


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("labels", {"labels": torch.zeros(2, 5, dtype=torch.int64)}),
        ("labels", {}),
        ("labels", {"labels": torch.zeros(2, 4, dtype=torch.int64), "targets": torch.zeros(8, dtype=torch.int64)}),
        ("targets", {"targets": torch.zeros(8, dtype=torch.int32)}),
        ("targets", {"targets": torch.zeros(3, dtype=torch.int64), "rows": torch.arange(2)}),
        ("rows", {"targets": torch.zeros(2, dtype=torch.int64), "rows": torch.ones(2)}),
        ("weights", {"targets": torch.zeros(8, dtype=torch.int64), "weights": torch.ones(7)}),
        ("reduction", {"targets": torch.zeros(8, dtype=torch.int64), "reduction": "average"}),
        ("num_items", {"targets": torch.zeros(8, dtype=torch.int64), "num_items": -1}),
        ("num_items", {"targets": torch.zeros(8, dtype=torch.int64), "num_items": torch.ones(2)}),
    ],
)
def test_bad_arguments_are_named(argument: str, kwargs: dict) -> None:
    with pytest.raises(ValueError, match=f"^{argument}"):
        cross_entropy(torch.randn(2, 4, 9), **kwargs)


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("targets: got 9 at 1", {"targets": torch.tensor([0, 9])}),
        ("targets: got -1 at 0, allowed: 0 to 8 or -100", {"targets": torch.tensor([-1, -100])}),
        ("rows: got 2 at 0, allowed: 0 to 1", {"targets": torch.tensor([0]), "rows": torch.tensor([2])}),
    ],
)
def test_values_are_checked_where_that_is_switched_on(argument: str, kwargs: dict, monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.import_module("packsft_kernels.cross_entropy"), "CHECK_VALUES", True)
    assert float(cross_entropy(torch.randn(2, 9), targets=torch.tensor([8, -100])).loss) > 0
    with pytest.raises(ValueError, match=f"^{argument}"):
        cross_entropy(torch.randn(2, 9), **kwargs)
    with pytest.raises(ValueError, match=f"^{argument}"):
        linear_cross_entropy(torch.randn(2, 3), torch.randn(9, 3), **kwargs)


@pytest.mark.parametrize("name", ["weights", "num_items"])
def test_what_has_no_gradient_is_refused_where_one_is_asked_for(name: str) -> None:
    given = {name: (torch.rand(2) if name == "weights" else torch.tensor(3.0)).requires_grad_()}
    targets = torch.tensor([0, 8])
    for loss in (
        lambda: cross_entropy(torch.randn(2, 9), targets=targets, **given),
        lambda: linear_cross_entropy(torch.randn(2, 3), torch.randn(9, 3), targets, **given),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got a tensor that requires grad, allowed: a constant"):
            loss()
        with torch.no_grad():
            assert float(loss().loss) > 0


@pytest.mark.parametrize("weights", [None, torch.rand(3)], ids=["", "weights"])
def test_operators_are_registered_rightly(weights: Tensor | None) -> None:
    """Schemas, fakes and autograd, as `torch.library.opcheck` checks them; torch.compile relies on all three."""
    logits = torch.randn(3, 7, requires_grad=True)
    targets = torch.tensor([1, -100, 3])
    fields = (-100, 5.0, 1.0, 0.1, 0.0, False, True, True)
    torch.library.opcheck(torch.ops.packsft.cross_entropy.default, (logits, targets, weights, *fields))
    for scale in (torch.ones(()), torch.rand(3)):
        args = (logits.detach(), targets, weights, scale, *fields)
        torch.library.opcheck(torch.ops.packsft.cross_entropy_gradient.default, args)
    for factor in (None, torch.ones(()), torch.rand(3)):
        args = (logits.detach(), targets, weights, factor, *fields)
        torch.library.opcheck(torch.ops.packsft.cross_entropy_.default, args)
