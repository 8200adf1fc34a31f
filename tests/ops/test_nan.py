"""A NaN or an infinity in q, k or v comes out of attention on the CPU where its definition gives no number.

PyTorch's own kernels for the CPU give 0 to a query whose scores are all NaN, or have no finite largest one.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from packsft_kernels.varlen_attention import varlen_attention
from torch import Tensor

LENGTHS = ([1, 3, 2], [5, 20, 20], [40])
OPTIONS = {
    "causal": {},
    "not causal": {"causal": False},
    "window": {"window": 3},
    "dropout": {"dropout": 0.2},
    "sinks": {"sinks": torch.zeros(4, device="cpu")},
}


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with torch.device("cpu"):
        yield


def truth(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool = True, window: int = 10**6) -> Tensor:
    """Each query by itself, on the keys that it sees, in float64. Dropout and sinks of 0 leave what is finite so."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    outs = []
    for start, stop in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        for t in range(start, stop):
            seen = slice(max(start, t - window + 1), t + 1 if causal else stop)
            scores = torch.einsum("hk,shk->hs", q[t], k[seen]) * q.shape[-1] ** -0.5
            outs.append(torch.einsum("hs,shk->hk", scores.softmax(-1), v[seen]))
    return torch.stack(outs)


def spoilt(which: int, value: float, at: int, tokens: int, dtype: torch.dtype, whole: bool) -> list[Tensor]:
    given = [torch.randn(tokens, heads, 8, dtype=dtype) for heads in (4, 2, 2)]
    given[which][at, 0, slice(None) if whole else 3] = value
    return given


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_no_number_by_definition_is_none(name: str, dtype: torch.dtype) -> None:
    options, counted = dict(OPTIONS[name]), 0
    values = (torch.nan, torch.inf, -torch.inf) if name != "sinks" else (torch.nan,)  # a sink of 0 is a finite score
    for lengths, which, value, whole in itertools.product(LENGTHS, range(3), values, (False, True)):
        boundaries = [0, *itertools.accumulate(lengths)]
        for at in {0, boundaries[1] // 2, boundaries[1] - 1, boundaries[-1] - 2, boundaries[-1] - 1}:
            given = spoilt(which, value, at, boundaries[-1], dtype, whole)
            out = varlen_attention(*given, torch.tensor(boundaries, dtype=torch.int32), max(lengths), **options)
            seen = {key: options[key] for key in ("causal", "window") if key in options}
            exact = ~truth(*(x.double() for x in given), lengths, **seen).isfinite()
            found = ~out.isfinite()
            if name == "dropout" and which == 2:  # it may drop the only value that is none
                continue
            assert not (exact & ~found).any(), (lengths, "qkv"[which], value, at)
            counted += int(exact.sum())
            document = next(i for i, stop in enumerate(boundaries[1:]) if at < stop)
            found[boundaries[document] : boundaries[document + 1]] = False
            assert not found.any()  # the others do not see it
    assert counted > 1000


@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_gradients_are_none_where_those_of_the_definition_are_none(which: int) -> None:
    for lengths in LENGTHS:
        boundaries = [0, *itertools.accumulate(lengths)]
        given = [
            x.requires_grad_()
            for x in spoilt(which, torch.nan, boundaries[-1] // 2, boundaries[-1], torch.float64, False)
        ]
        out = varlen_attention(*given, torch.tensor(boundaries, dtype=torch.int32), max(lengths))
        gradient = torch.randn_like(out)
        ours = torch.autograd.grad(out, given, gradient)
        theirs = torch.autograd.grad(truth(*given, lengths), given, gradient)
        for mine, exact in zip(ours, theirs, strict=True):
            assert not (~exact.isfinite() & mine.isfinite()).any()


@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_the_operator_of_compiled_graphs_gives_the_same(which: int) -> None:
    cu_seqlens = torch.tensor([0, 1, 4, 6], dtype=torch.int32)
    given = [x.requires_grad_() for x in spoilt(which, torch.nan, 1, 6, torch.float32, False)]
    eager = varlen_attention(*given, cu_seqlens, 3)
    out, _ = torch.ops.packsft.varlen_sdpa(*given, cu_seqlens, None, 3, 8**-0.5, True, None, None)
    torch.testing.assert_close(out, eager, equal_nan=True)
    gradients = (torch.autograd.grad(x, given, torch.ones_like(x)) for x in (out, eager))
    for compiled, plain in zip(*gradients, strict=True):
        assert torch.equal(compiled.isfinite(), plain.isfinite())


def test_a_key_of_minus_infinity_that_gets_no_weight_changes_nothing() -> None:
    q, k, v = (torch.ones(3, 1, 8) for _ in range(3))
    k[0] = -torch.inf
    out = varlen_attention(q, k, v, torch.tensor([0, 3], dtype=torch.int32), 3)
    assert out[0].isnan().all()  # it sees nothing else
    assert torch.equal(out[1:], v[1:])
