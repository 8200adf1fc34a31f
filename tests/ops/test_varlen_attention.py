"""Per-document attention: equal to each document alone, exactly isolated, and honest about what cannot run."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_accurate
from packsft_kernels import varlen_attention
from packsft_kernels.reference import varlen_attention as reference
from packsft_kernels.varlen_attention import BACKENDS, AttentionSpec, choose_backend, why_not

MODULE = sys.modules["packsft_kernels.varlen_attention"]  # the function has its name
LENGTHS = (25, 1, 25, 25, 0, 70)  # equal neighbours, a single token, an empty document, a longer one


def inputs(lengths, heads=4, key_heads=2, head_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), h, head_dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for h in (heads, key_heads, key_heads)
    )
    return q, k, v, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def test_outputs_are_bitwise_those_of_each_document_alone():
    q, k, v, cu = inputs(LENGTHS)
    packed = varlen_attention(q, k, v, cu, max(LENGTHS))
    for start, stop in itertools.pairwise(cu.tolist()):
        if stop > start:
            alone_cu = torch.tensor([0, stop - start], dtype=torch.int32)
            alone = varlen_attention(q[start:stop], k[start:stop], v[start:stop], alone_cu, stop - start)
            assert torch.equal(packed[start:stop], alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"scale": 0.3},
        {"window": 30},
        {"softcap": 2.0},
        {"sinks": True},
        {"window": 5, "softcap": 5.0},
    ],
    ids=str,
)
def test_outputs_and_gradients_match_the_definition(dtype, options):
    q, k, v, cu = inputs(LENGTHS, dtype=dtype)
    options = {n: (torch.linspace(-1, 1, 4, dtype=dtype) if n == "sinks" else x) for n, x in options.items()}
    upstream = torch.randn(q.shape, dtype=torch.float64)

    def run(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        cast = {n: x.to(dtype) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        out = function(*leaves, cu, max(LENGTHS), **cast)
        return [out, *torch.autograd.grad((out * upstream.to(dtype)).sum(), leaves)]

    truth = run(reference, torch.float64)
    for ours, theirs, exact in zip(run(varlen_attention, dtype), run(reference, dtype), truth, strict=True):
        assert_accurate(ours, theirs, exact, str(options))


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=2, max_size=6).filter(any), data=st.data())
def test_a_document_reaches_no_other_document(lengths, data):
    chosen = data.draw(st.sampled_from([i for i, length in enumerate(lengths) if length]))
    q, k, v, cu = inputs(lengths)
    start, stop = int(cu[chosen]), int(cu[chosen + 1])
    out = varlen_attention(q, k, v, cu, max(lengths))
    gradients = torch.autograd.grad(out[start:stop].square().sum(), (q, k, v))
    for gradient in gradients:
        assert not gradient[:start].any()
        assert not gradient[stop:].any()
    assert gradients[2][start:stop].any()  # of v: one token's softmax has no gradient in q and k


def test_autocast_inputs_of_mixed_dtypes_are_cast_to_its_dtype():
    q, k, v, cu = inputs((4, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = varlen_attention(q, k, v.bfloat16(), cu, 4)
    assert out.dtype == torch.bfloat16


def test_float64_stays_float64_under_autocast():
    q, k, v, cu = inputs((4, 3), dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert varlen_attention(q, k, v, cu, 4).dtype == torch.float64


ON_CUDA = AttentionSpec("cuda", torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("torch_varlen", replace(ON_CUDA, device="cpu"), "CUDA device"),
        ("flash_attn_2", replace(ON_CUDA, device="cpu"), "CUDA device"),
        ("flash_attn_2", ON_CUDA, "not installed"),
        ("torch_varlen", replace(ON_CUDA, dtype=torch.float32), "bfloat16 or float16"),
    ],
)
def test_a_back_end_that_cannot_run_says_why(name, spec, reason):
    if reason == "not installed" and why_not(name, ON_CUDA) is None:
        pytest.skip("flash-attn is installed and able here")
    assert reason in why_not(name, spec)


@pytest.mark.parametrize(
    ("spec", "able"),
    [
        (ON_CUDA, True),
        (replace(ON_CUDA, softcap=30.0), False),
        (replace(ON_CUDA, sinks=True), False),
        (replace(ON_CUDA, dropout=0.1), False),
        (replace(ON_CUDA, head_dim=20), False),
        (replace(ON_CUDA, head_dim=512), False),
        (replace(ON_CUDA, equal_head_dims=False), False),
    ],
)
def test_what_torch_varlen_can_do(monkeypatch, spec, able):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(MODULE, "_installed", lambda module: module == "torch.nn.attention.varlen")
    why_not.cache_clear()
    try:
        assert (why_not("torch_varlen", spec) is None) == able
        assert choose_backend(spec) == ("torch_varlen" if able else "sdpa")
    finally:
        why_not.cache_clear()


def test_true_float32_on_cuda_takes_one_sdpa_call_per_document(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert choose_backend(replace(ON_CUDA, dtype=torch.float32)) == "sdpa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4, 7])}, "cu_seqlens must be"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "expected from 0 to T = 7"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 7], dtype=torch.int32)}, "falls from 4 to 3 at document 1"),
        ({"q": torch.zeros(7, 3, 16)}, "do not fit"),
        ({"k": torch.zeros(7, 32)}, "must be"),
        ({"max_seqlen": torch.tensor(4)}, "int on the host"),
        ({"max_seqlen": 3}, "max_seqlen is 3, but document 0 has 4 tokens"),
        ({"window": 0}, "window must be 1"),
        ({"softcap": 5.0, "dropout": 0.1}, "no back end can run this attention"),
        ({"sinks": torch.zeros(3)}, "sinks must be"),
        ({"backend": "flash"}, "expected 'auto' or one of"),
        ({"backend": "torch_varlen"}, "CUDA device"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    q, k, v, cu = inputs((4, 3))
    call = {"q": q, "k": k, "v": v, "cu_seqlens": cu, "max_seqlen": 4} | change
    with pytest.raises(ValueError, match=message):
        varlen_attention(**call)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "sdpa"])
@pytest.mark.parametrize("options", [{}, {"window": 16}], ids=str)
def test_gpu_back_ends_match_the_definition(name, options):
    lengths = (100, 1, 64, 64, 333)
    q, k, v, cu = (x.detach().cuda() for x in inputs(lengths, head_dim=64, dtype=torch.bfloat16))
    spec = AttentionSpec("cuda", torch.bfloat16, 64, window=options.get("window"))
    if (reason := why_not(name, spec)) is not None:
        pytest.skip(reason)
    upstream = torch.randn(q.shape, device="cuda", dtype=torch.float64)

    def run(function, dtype, **extra):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, cu, max(lengths), **options, **extra)
        return [out, *torch.autograd.grad((out * upstream.to(dtype)).sum(), leaves)]

    truth = run(reference, torch.float64)
    ours = run(varlen_attention, torch.bfloat16, backend=name)
    for mine, theirs, exact in zip(ours, run(reference, torch.bfloat16), truth, strict=True):
        assert_accurate(mine, theirs, exact, name)
