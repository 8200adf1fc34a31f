"""`packsft::varlen_sdpa`, what per-document SDPA is to torch.compile and to fake tensors: the same in one operator.

T = 12 tokens in documents of 5, 0, 1 and 6; 4 query and 2 key heads of size 8.
"""

from __future__ import annotations

import pytest
import torch
from numerics import error
from packsft_kernels.varlen_attention import varlen_attention
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
