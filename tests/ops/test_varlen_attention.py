"""Per-document attention: equal to each document alone, exactly isolated, and honest about what cannot run."""

import itertools
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_accurate
from packsft_kernels import varlen_attention
from packsft_kernels.reference import varlen_attention as reference
from packsft_kernels.varlen_attention import BACKENDS, AttentionSpec, choose_backend, why_not
from torch.utils.checkpoint import checkpoint

MODULE = sys.modules["packsft_kernels.varlen_attention"]  # the function has its name
SINKS = torch.linspace(-1, 1, 4, dtype=torch.float64)
# equal neighbours, a single token, an empty document, a longer one, and two empty ones that pad the boundaries
LENGTHS = (25, 1, 25, 25, 0, 70, 0, 0)


def inputs(lengths, heads=4, key_heads=2, head_dim=16, dtype=torch.float32, v_head_dim=None):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((heads, head_dim), (key_heads, head_dim), (key_heads, v_head_dim or head_dim))
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


def test_no_tokens_give_no_tokens_of_the_size_of_values():
    q, k, v, cu = inputs((0, 0), v_head_dim=24)
    out = varlen_attention(q, k, v, cu, 1)
    assert out.shape == (0, 4, 24)
    out.sum().backward()


def sdpa_with_block_mask(q, k, v, cu, longest, *, causal=True, window=None):
    """PyTorch's own attention of the row, as transformers asks for it."""
    position = torch.arange(len(q), device=q.device)
    document = torch.bucketize(position.int(), cu[1:], right=True)
    seen = (document[:, None] == document) & (position[:, None] >= position)
    seen = seen if window is None else seen & (position[:, None] - position < window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)


def assert_matches_the_definition(arguments, lengths, backend="auto", plain=reference, **options):
    *qkv, cu = arguments
    upstream = torch.randn(*qkv[0].shape[:2], qkv[2].shape[2], dtype=torch.float64, device=cu.device)
    sinks = [x.to(qkv[0].device, qkv[0].dtype) for x in [options.pop("sinks", None)] if x is not None]

    def run(function, dtype, **extra):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*qkv, *sinks)]
        extra |= options | ({"sinks": leaves[3]} if sinks else {})
        out = function(*leaves[:3], cu, max(lengths), **extra)
        return [out, *torch.autograd.grad((out * upstream.to(dtype)).sum(), leaves)]

    ours, own = run(varlen_attention, qkv[0].dtype, backend=backend), run(plain, qkv[0].dtype)
    for mine, theirs, exact in zip(ours, own, run(reference, torch.float64), strict=True):
        assert_accurate(mine, theirs, exact, f"{backend}, {options}")


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
    options = {n: (SINKS if n == "sinks" else x) for n, x in options.items()}
    assert_matches_the_definition(inputs(LENGTHS, dtype=dtype), LENGTHS, **options)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
def test_every_head_size_matches_the_definition(head_dim):
    lengths = (9, 1, 0, 13)
    for options in ({}, {"window": 4}, {"softcap": 5.0}, {"softcap": 5.0, "window": 4}, {"sinks": SINKS}):
        for dtype in (torch.float64, torch.bfloat16):
            arguments = inputs(lengths, head_dim=head_dim, dtype=dtype)
            assert_matches_the_definition(arguments, lengths, **options)
    for options in ({}, {"window": 4}):
        # SDPA's backward subtracts the sum of dO * O, as flash-attention's does: against the definition in float32, up
        # to 2.2 times what is allowed.
        arguments = inputs(lengths, head_dim=head_dim, dtype=torch.float32)
        assert_matches_the_definition(arguments, lengths, plain=sdpa_with_block_mask, **options)


def test_a_window_of_one_token_shows_each_token_its_own_value():
    q, k, v, cu = inputs(LENGTHS)
    for causal in (True, False):
        out = varlen_attention(q, k, v, cu, max(LENGTHS), window=1, causal=causal)
        assert torch.equal(out, v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("options", [{}, {"window": 1}], ids=str)
def test_dropout_drops_weights_and_follows_the_seed(options):
    lengths = (2,) * 4000  # the first token sees itself alone: its weight of 1 is dropped, or divided by 1 - 0.25
    q, k, v, cu = inputs(lengths, heads=2)
    v = torch.ones_like(v)

    def run(seed):
        torch.manual_seed(seed)
        return varlen_attention(q, k, v, cu, 2, dropout=0.25, **options)

    out = run(0)
    assert torch.equal(out, run(0))
    assert not torch.equal(out, run(1))
    first = out[::2]
    kept = (first - 4 / 3).abs() < 1e-6
    assert bool((kept | (first == 0)).all())
    assert abs(kept[..., 0].double().mean() - 0.75) < 5 * (0.25 * 0.75 / kept[..., 0].numel()) ** 0.5  # 5 sigma


PACKS = {
    "lengths": st.lists(st.integers(0, 6), min_size=2, max_size=6).filter(lambda lengths: max(lengths) > 1),
    "key_heads": st.sampled_from([1, 2, 4]),
    "options": st.fixed_dictionaries(
        {
            "causal": st.booleans(),
            "window": st.sampled_from([None, 2, 3]),
            "softcap": st.sampled_from([None, 2.0]),
            "sinks": st.sampled_from([None, SINKS]),
        }
    ),
}


@settings(max_examples=50, deadline=None)
@given(**PACKS, data=st.data())
def test_a_document_reaches_no_other_document(lengths, key_heads, options, data):
    chosen = data.draw(st.sampled_from([i for i, length in enumerate(lengths) if length]))
    q, k, v, cu = inputs(lengths, key_heads=key_heads)
    start, stop = int(cu[chosen]), int(cu[chosen + 1])
    out = varlen_attention(q, k, v, cu, max(lengths), **options)
    gradients = torch.autograd.grad(out[start:stop].square().sum(), (q, k, v))
    for gradient in gradients:
        assert not gradient[:start].any()
        assert not gradient[stop:].any()
    assert gradients[2][start:stop].any()  # of v: one token's softmax has no gradient in q and k


@settings(max_examples=50, deadline=None)
@given(**PACKS)
def test_packed_documents_equal_each_alone(lengths, key_heads, options):
    leaves = *qkv, cu = inputs(lengths, key_heads=key_heads, dtype=torch.float64)
    packed = varlen_attention(*leaves, max(lengths), **options)
    alone = torch.cat(
        [
            varlen_attention(*(x[a:b] for x in qkv), torch.tensor([0, b - a], dtype=torch.int32), b - a, **options)
            for a, b in itertools.pairwise(cu.tolist())
            if a < b
        ]
    )
    upstream = torch.randn_like(packed)
    ours, theirs = ([out, *torch.autograd.grad(out, qkv, upstream)] for out in (packed, alone))
    for mine, exact in zip(ours, theirs, strict=True):
        assert_accurate(mine, exact, exact, str(options))


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
        (replace(ON_CUDA, head_dim=512), False),
        (replace(ON_CUDA, sinks=True), True),
        (replace(ON_CUDA, dropout=0.1), True),
        (replace(ON_CUDA, window=3), True),
        (replace(ON_CUDA, head_dim=20), True),
        (replace(ON_CUDA, equal_head_dims=False), True),
    ],
)
def test_what_torch_varlen_can_do(monkeypatch, spec, able):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(MODULE, "_installed", lambda _: False)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    why_not.cache_clear()
    try:
        assert (why_not("torch_varlen", spec) is None) == able
        assert choose_backend(spec) == ("torch_varlen" if able else "sdpa")
    finally:
        why_not.cache_clear()


def test_true_float32_on_cuda_takes_sdpa(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert choose_backend(replace(ON_CUDA, dtype=torch.float32)) == "sdpa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4, 7])}, "cu_seqlens must be"),
        ({"cu_seqlens": torch.tensor([0, 4, 6], dtype=torch.int32)}, "expected from 0 to T = 7"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 7], dtype=torch.int32)}, "falls from 4 to 3 at document 1"),
        ({"q": torch.zeros(7, 3, 16)}, "do not fit"),
        ({"k": torch.zeros(7, 32)}, "must be"),
        ({"max_seqlen": torch.tensor(4)}, "int on the host"),
        ({"max_seqlen": 3}, "max_seqlen is 3, too small for 7 tokens in 2 documents"),
        (
            {"max_seqlen": 3, "cu_seqlens": torch.tensor([0, 4, 7, 7], dtype=torch.int32)},
            "max_seqlen is 3, but document 0 has 4 tokens",
        ),
        ({"q": torch.zeros(7, 4, 16, dtype=torch.int32)}, "q must be one of .*got torch.int32"),
        ({"v": torch.zeros(7, 2, 16, dtype=torch.complex64)}, "v must be one of .*got torch.complex64"),
        ({"k": torch.zeros(7, 2, 16, device="meta")}, "k is on meta, q on cpu"),
        ({"v": torch.zeros(7, 2, 16, device="meta")}, "v is on meta, q on cpu"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")}, "cu_seqlens is on meta, q on cpu"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks is on meta, q on cpu"),
        ({"sinks": torch.zeros(3)}, "sinks must be"),
        ({"sinks": torch.zeros(4), "dropout": 0.1}, "no backend can run this attention"),
        ({"softcap": 5.0, "dropout": 0.1}, "no backend can run this attention"),
        ({"window": 0}, "window must be 1"),
        ({"softcap": 0.0}, "softcap must be None or finite and above 0, got 0.0"),
        ({"softcap": float("inf")}, "softcap must be .*got inf"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be .*got -0.1"),
        ({"scale": float("nan")}, "scale must be finite and above 0, got nan"),
        ({"scale": 0.0}, "scale must be finite and above 0, got 0.0"),
        ({"backend": "flash"}, "expected 'auto' or one of"),
        ({"backend": "torch_varlen"}, "CUDA device"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    q, k, v, cu = inputs((4, 3))
    call = {"q": q, "k": k, "v": v, "cu_seqlens": cu, "max_seqlen": 4} | change
    with pytest.raises(ValueError, match=message):
        varlen_attention(**call)


GPU_BACK_ENDS = [name for name in BACKENDS if name != "sdpa"]


def cuda_inputs(lengths, dtype, **shape):
    return [x.detach().cuda() for x in inputs(lengths, dtype=dtype, **shape)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_BACK_ENDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": 16}, {"window": 16, "causal": False}, {"softcap": 5.0}], ids=str
)
def test_gpu_back_ends_match_the_definition(name, head_dim, key_heads, options):
    if (reason := why_not(name, AttentionSpec("cuda", torch.bfloat16, head_dim, **options))) is not None:
        pytest.skip(reason)
    lengths = (100, 1, 64, 0, 64, 333)
    arguments = cuda_inputs(lengths, torch.bfloat16, head_dim=head_dim, key_heads=key_heads)
    assert_matches_the_definition(arguments, lengths, backend=name, **options)
    assert_matches_the_definition(arguments, lengths, backend=name, scale=0.1, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_BACK_ENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(20, 20), (192, 128), (96, 64), (24, 40)], ids=str)
def test_gpu_back_ends_take_other_head_sizes_and_dtypes(name, dtype, sizes):
    if (reason := why_not(name, AttentionSpec("cuda", dtype, max(sizes), sizes[0] == sizes[1]))) is not None:
        pytest.skip(reason)
    lengths = (100, 1, 64, 0, 64, 333)
    arguments = cuda_inputs(lengths, dtype, head_dim=sizes[0], v_head_dim=sizes[1])
    assert_matches_the_definition(arguments, lengths, backend=name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_BACK_ENDS)
@pytest.mark.parametrize("options", [{}, {"window": 16}, {"scale": 0.1}], ids=str)
def test_gpu_back_ends_with_sinks_match_the_definition(name, options):
    spec = AttentionSpec("cuda", torch.bfloat16, 64, window=options.get("window"), sinks=True)
    if (reason := why_not(name, spec)) is not None:
        pytest.skip(reason)
    lengths = (100, 1, 64, 0, 64, 333)
    arguments = cuda_inputs(lengths, torch.bfloat16, heads=32, head_dim=64)
    assert_matches_the_definition(arguments, lengths, backend=name, sinks=torch.linspace(-1, 2, 32), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_BACK_ENDS)
def test_dropout_on_a_gpu_drops_the_same_weights_in_the_backward(name):
    """The first token of a document has one weight: dropped, or 1 / 0.75. Values of 1 make each output that factor."""
    if (reason := why_not(name, AttentionSpec("cuda", torch.bfloat16, 64, dropout=0.25))) is not None:
        pytest.skip(reason)
    q, k, v, cu = cuda_inputs([1] * 400, torch.bfloat16, head_dim=64)
    v = torch.ones_like(v).requires_grad_()

    def attend(v):
        return varlen_attention(q, k, v, cu, 1, dropout=0.25, backend=name)

    torch.manual_seed(0)
    out = attend(v)
    kept = out[..., 0] > 0
    torch.testing.assert_close(out.float(), kept[..., None].expand_as(out) / 0.75, rtol=1e-2, atol=0)
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.05)
    (grad,) = torch.autograd.grad(out, v, torch.ones_like(out))
    groups = q.shape[1] // v.shape[1]
    expected = kept.view(len(v), v.shape[1], groups).sum(-1) / 0.75
    torch.testing.assert_close(grad[..., 0].float(), expected.float(), rtol=1e-2, atol=0)
    torch.manual_seed(0)
    again = checkpoint(attend, v, use_reentrant=False)
    torch.manual_seed(1)  # the recomputation draws what the forward drew
    assert torch.equal(again, out)
    assert torch.equal(torch.autograd.grad(again, v, torch.ones_like(again))[0], grad)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window": 16}], ids=str)
def test_float32_on_a_gpu_is_as_exact_as_sdpa_in_float32(options):
    """As SDPA of each document alone with repeated heads: for a mask over the row, and for grouped heads, PyTorch takes
    another kernel, which rounds otherwise."""

    def alone(q, k, v, cu, longest, window=None):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        documents = [[x[a:b].transpose(0, 1)[None] for x in (q, k, v)] for a, b in pairwise(cu.tolist()) if a < b]
        masks = [
            None
            if window is None
            else torch.ones(2 * x.shape[2:3], dtype=bool, device=cu.device).tril().triu(1 - window)
            for x, *_ in documents
        ]
        outputs = [
            F.scaled_dot_product_attention(*document, attn_mask=mask, is_causal=mask is None)
            for document, mask in zip(documents, masks, strict=True)
        ]
        return torch.cat([output[0].transpose(0, 1) for output in outputs])

    lengths = (100, 1, 64, 0, 64, 133)
    arguments = cuda_inputs(lengths, torch.float32, head_dim=64)
    assert_matches_the_definition(arguments, lengths, plain=alone, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_BACK_ENDS)
def test_gpu_back_ends_wait_for_nothing(name):
    if (reason := why_not(name, AttentionSpec("cuda", torch.bfloat16, 64))) is not None:
        pytest.skip(reason)
    *qkv, cu = cuda_inputs((100, 1, 64), torch.bfloat16, head_dim=64)
    qkv = [x.requires_grad_() for x in qkv]
    for mode in ("default", "error"):  # the first call compiles and loads
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = varlen_attention(*qkv, cu, 100, backend=name)
            torch.autograd.grad(out, qkv, torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode("default")
