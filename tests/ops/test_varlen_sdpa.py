"""SDPA by documents: as `packsft::varlen_sdpa`, the one operator that torch.compile and fake tensors see; and in
batches of similar length, as on a GPU.

T = 12 tokens in documents of 5, 0, 1 and 6; 4 query and 2 key heads of size 8.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import error
from packsft_kernels.attention_spec import AttentionSpec
from packsft_kernels.reference import varlen_attention as reference
from packsft_kernels.varlen_attention import varlen_attention
from packsft_kernels.varlen_sdpa import sdpa
from torch._dynamo.testing import CompileCounter

CU_SEQLENS = torch.tensor([0, 5, 5, 6, 12], dtype=torch.int32)
OPTIONS = {
    "causal": {},
    "not causal": {"causal": False},
    "window": {"window": 3},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": torch.randn(4, dtype=torch.float64)},
}


def tensors(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(12, heads, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]


@pytest.mark.parametrize("name", OPTIONS)
def test_it_compiles_into_one_graph_and_gives_what_eager_gives(name: str) -> None:
    given = tensors()
    options = dict(OPTIONS[name])
    if "sinks" in options:
        options["sinks"] = options["sinks"].clone().requires_grad_()
        given.append(options["sinks"])

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return varlen_attention(q.sin(), k, v, CU_SEQLENS, 6, **options).cos()

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        out = function(*given[:3])
        results.append((out, *torch.autograd.grad(out.sum(), given)))
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled.detach(), eager.detach()) < 1e-14


@pytest.mark.parametrize("name", ["causal", "not causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_pytorchs_flash_attention_computes_is_not_computed_again(dtype: torch.dtype, name: str) -> None:
    given, options = tensors(dtype), OPTIONS[name]
    eager = varlen_attention(*given, CU_SEQLENS, 6, **options)
    out, sums = torch.ops.packsft.varlen_sdpa(
        *given, CU_SEQLENS, None, 6, 8**-0.5, options.get("causal", True), None, None
    )
    assert torch.equal(out, eager)
    assert sums.shape == (12 * 4,)
    with torch.profiler.profile() as profiler:
        gradients = torch.autograd.grad(out.sum(), given)
    names = {event.key for event in profiler.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" not in names
    for ours, theirs in zip(gradients, torch.autograd.grad(eager.sum(), given), strict=True):
        assert error(ours, theirs) < 2 * torch.finfo(dtype).eps


def test_with_dropout_a_graph_breaks_and_no_boundary_is_compiled_into_it() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return varlen_attention(q.sin(), k, v, cu_seqlens, 12, dropout=0.1).cos()

    compiled = []
    for first in range(2, 8):
        attend(*tensors(), torch.tensor([0, first, 8, 12], dtype=torch.int32))
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[-1] > 0


@pytest.mark.parametrize("cu_seqlens", [CU_SEQLENS, CU_SEQLENS[[0, -1]]], ids=["four documents", "one document"])
@pytest.mark.parametrize("sinks", [None, torch.randn(4, requires_grad=True)], ids=["", "sinks"])
@pytest.mark.parametrize(("causal", "window", "softcap"), [(True, None, None), (False, 3, 5.0)])
def test_it_is_registered_rightly(
    cu_seqlens: torch.Tensor, sinks: torch.Tensor | None, causal: bool, window: int | None, softcap: float | None
) -> None:
    args = (*tensors(torch.float32), cu_seqlens, sinks, 12, 0.3, causal, window, softcap)
    torch.library.opcheck(torch.ops.packsft.varlen_sdpa.default, args)
    args = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
    backward = torch.ops.packsft.varlen_sdpa_backward.default
    torch.library.opcheck(backward, (torch.randn(12, 4, 8), *args, *torch.ops.packsft.varlen_sdpa(*args)))


def sdpa_as_on_a_gpu(q, k, v, cu_seqlens, longest, *, sinks=None, **masking):
    spec = AttentionSpec("cuda", q.dtype, q.shape[-1], sinks=sinks is not None, **masking)
    return sdpa(q, k, v, cu_seqlens, longest, 8**-0.5, sinks, spec)


@pytest.mark.parametrize("name", OPTIONS)
@settings(deadline=None)
@given(lengths=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 150)), min_size=1, max_size=12))
def test_documents_of_similar_length_share_a_call_and_nothing_else(name: str, lengths: list[int]) -> None:
    q, k, v = (torch.randn(sum(lengths), heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    wanted = q, k, v, *(x.requires_grad_() for x in OPTIONS[name].values() if isinstance(x, torch.Tensor))
    upstream = torch.randn_like(q)
    results = []
    for attend in (sdpa_as_on_a_gpu, reference):
        out = attend(q, k, v, cu_seqlens, max(lengths), **OPTIONS[name])
        results.append((out, *torch.autograd.grad(out, wanted, upstream)) if sum(lengths) else (out,))
    for ours, definition in zip(*results, strict=True):
        torch.testing.assert_close(ours, definition, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("lengths", "options", "batches"),
    [
        # three quarters, and up to a kernel's block
        ((100, 20, 75, 74, 0, 64, 2, 1), {}, [(2, 100), (2, 74), (3, 20)]),
        ((20, 30, 20), {}, [(3, 30)]),
        ((300, 200, 300), {"window": 16}, [(2, 300), (1, 200)]),
        ((300, 300, 300), {}, [(3, 300)]),
        ((1024, 900, 1100, 1200, 1100), {}, [(1, 1200), (2, 1100), (2, 1024)]),  # scores cost more than calls
        ((300, 290, 300), {"causal": False}, [(1, 300), (1, 290), (1, 300)]),  # what fills up would be seen
    ],
    ids=str,
)
def test_batches_of_similar_length(monkeypatch, lengths, options, batches) -> None:
    called = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: called.append(q.shape) or attend(q, *a, **k)
    )
    q, k, v = (torch.randn(sum(lengths), heads, 8) for heads in (4, 2, 2))
    sdpa_as_on_a_gpu(q, k, v, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), **options)
    assert [(B, S) for B, _, S, _ in called] == batches
