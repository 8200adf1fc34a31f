"""Calls of the GPU back ends, against strict stand-ins of them: what a card would refuse is refused here.

Sizes: documents of 5, 1, 0 and 7 tokens, and a pad tail of 3 as one more document; the head sizes are those of models.
"""

import inspect
import sys
from dataclasses import replace
from types import SimpleNamespace

import attention_stand_ins
import pytest
import torch
from attention_stand_ins import STAND_INS, VARLEN, StandIn
from numerics import assert_accurate
from packsft_kernels import varlen_attention
from packsft_kernels.reference import varlen_attention as reference
from packsft_kernels.varlen_attention import BACKENDS, AttentionSpec, choose_backend, why_not
from torch._subclasses.fake_tensor import FakeTensorMode

MODULE = sys.modules["packsft_kernels.varlen_attention"]  # the function has its name
LENGTHS = (5, 1, 0, 7, 3, 0, 0)  # the last two as where boundaries are padded for torch.compile
ALL = pytest.mark.parametrize("stand_in", STAND_INS, ids=lambda s: s.function.__name__)
FLASH_2, FLASH_3, FLASH_4, TORCH_10, TORCH_11, TORCH_12 = STAND_INS


@pytest.fixture
def install(monkeypatch):
    """Put stand-ins in the place of all GPU back ends, on a card of the given capability that holds every tensor."""

    def install(*stand_ins: StandIn, capability=(9, 0)):
        packages = {stand_in.package for stand_in in stand_ins}
        monkeypatch.setattr(MODULE, "_installed", lambda module: module in packages)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(MODULE, "AttentionSpec", lambda _, *rest: AttentionSpec("cuda", *rest))
        for stand_in in stand_ins:
            module = SimpleNamespace(**{stand_in.name: stand_in.function})
            monkeypatch.setitem(sys.modules, stand_in.module, module)
        forget()

    def forget():
        why_not.cache_clear()
        MODULE._varlen_attn_parameters.cache_clear()

    yield install
    monkeypatch.undo()
    forget()


def inputs(heads=4, key_heads=2, head_dim=32, dtype=torch.bfloat16, lengths=LENGTHS):
    q, k, v = (torch.randn(sum(lengths), n, head_dim, dtype=torch.float64).to(dtype) for n in (heads, *[key_heads] * 2))
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0).int()


def assert_matches_the_definition(qkv, cu, backend, **options):
    """Output and gradients of q, k and v, for tensors of any dtype and strides."""
    upstream = torch.randn(qkv[0].shape, dtype=torch.float64)

    def run(function, dtype=None, **extra):
        leaves = [x.detach().requires_grad_() if dtype is None else x.detach().to(dtype).requires_grad_() for x in qkv]
        out = function(*leaves, cu, max(LENGTHS), **options, **extra)
        return [out, *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), leaves)]

    ours, plain = run(varlen_attention, backend=backend), run(reference, qkv[2].dtype)
    for mine, theirs, exact in zip(ours, plain, run(reference, torch.float64), strict=True):
        assert_accurate(mine, theirs, exact, f"{backend}, {options}")


@ALL
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
def test_calls_that_the_table_allows_are_taken_and_right(install, stand_in, head_dim):
    install(stand_in)
    taken = head_dim <= (128 if stand_in is FLASH_4 else 256)
    for options in (
        {},
        {"causal": False},
        {"scale": 0.3},
        {"window": 2},
        {"window": 3, "scale": 0.2},
        {"window": 3, "causal": False},
        {"softcap": 2.0},
        {"softcap": 2.0, "window": 3},
    ):
        spec = AttentionSpec("cuda", torch.bfloat16, head_dim, **{k: v for k, v in options.items() if k != "scale"})
        able = taken and options.keys() & {"window", "softcap"} <= stand_in.features
        assert choose_backend(spec) == (stand_in.backend if able else "sdpa"), options
        qkv = inputs(head_dim=head_dim)
        assert_matches_the_definition(qkv[:3], qkv[3], stand_in.backend if able else "sdpa", **options)


@ALL
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_grouping_of_heads_is_taken(install, stand_in, heads, dtype):
    install(stand_in)
    *qkv, cu = inputs(*heads, dtype=dtype)
    assert_matches_the_definition(qkv, cu, stand_in.backend)


@ALL
def test_mixed_inputs_as_autocast_makes_them_are_taken(install, stand_in):
    install(stand_in)
    q, k, v, cu = inputs()
    with torch.autocast("cpu", torch.bfloat16):  # bfloat16 values, so that the casts change none
        assert_matches_the_definition((q.float(), k.float(), v), cu, stand_in.backend)


def as_transformers(x):
    """`[T, heads, K]` as a view of the `[1, heads, T, K]` that the rotation of q and k returns."""
    return x.transpose(0, 1).contiguous()[None][0].transpose(0, 1)


STRIDES = {
    "as transformers": as_transformers,
    "slice of a fused projection": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),  # flash-attn 3 passes such a v on
    "odd rows": lambda x: torch.cat([x, x[..., :1]], dim=-1)[..., : x.shape[-1]],  # unaligned
    "one key head for all": lambda x: x[:, :1].expand_as(x),
}


@ALL
@pytest.mark.parametrize("layout", STRIDES)
def test_any_strides_are_taken(install, stand_in, layout):
    install(stand_in)
    *qkv, cu = inputs()
    views = [STRIDES[layout](x) for x in qkv]
    assert_matches_the_definition(views, cu.repeat_interleave(2)[::2], stand_in.backend)


@ALL
def test_documents_of_one_token_among_empty_ones_are_taken(install, stand_in):
    install(stand_in)
    q, k, v, cu = inputs(lengths=(1, 0, 1))
    out = varlen_attention(q, k, v, cu, 1, backend=stand_in.backend)
    assert torch.equal(out, v.repeat_interleave(2, dim=1))


@ALL
def test_nothing_is_read_from_the_device(install, stand_in):
    install(stand_in)
    with FakeTensorMode():  # has no values: reading one raises
        q, k, v = (torch.empty(9, 4, 32, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
        cu = torch.empty(4, dtype=torch.int32)
        out = varlen_attention(q, k, v, cu, 5, backend=stand_in.backend)
        assert [x.shape for x in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape] * 3
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            varlen_attention(
                q, k, v, cu, 5, backend="sdpa", dropout=0.1
            )  # which has no operator, and cuts the row on the host


def test_dropout_reaches_flash_attention_2(install):
    install(FLASH_2)
    q, k, v, cu = inputs()
    out, plain = (varlen_attention(q, k, v, cu, 7, dropout=p, backend="flash_attn_2") for p in (0.5, 0.0))
    assert not torch.equal(out, plain)
    for head in range(4):  # of the token that is alone in its document: its one weight is dropped or doubled
        assert not out[5, head].any() or torch.equal(out[5, head], 2 * plain[5, head])


def test_the_back_ends_are_tried_in_the_order_of_the_table(install):
    install(FLASH_2, FLASH_3, FLASH_4, TORCH_12)
    spec = AttentionSpec("cuda", torch.bfloat16, 128)
    wanted = {
        "flash_attn_4": spec,
        "flash_attn_3": replace(spec, window=3),
        "flash_attn_2": replace(spec, dropout=0.1),
        "sdpa": replace(spec, sinks=True),
    }
    assert {name: choose_backend(asked) for name, asked in wanted.items()} == {name: name for name in wanted}
    install(FLASH_2, FLASH_3, FLASH_4, TORCH_12, capability=(8, 0))
    assert choose_backend(spec) == "flash_attn_2"


@ALL
@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"head_dim": 20},
        {"head_dim": 264},
        {"v_head_dim": 64},
        {"capability": (8, 9), "head_dim": 208},
        {"capability": (12, 0), "head_dim": 256, "dropout": 0.1},
        {"softcap": 2.0, "dropout": 0.1},
    ],
    ids=str,
)
def test_what_the_table_refuses_a_card_would_refuse(install, stand_in, change):
    install(stand_in, capability=change.get("capability", (9, 0)))
    head_dim = change.get("head_dim", 32)
    q, k, v, cu = inputs(head_dim=head_dim, dtype=change.get("dtype", torch.bfloat16))
    v = v.new_zeros(*v.shape[:2], change.get("v_head_dim", head_dim))
    options = {name: change[name] for name in ("softcap", "dropout") if name in change}
    spec = AttentionSpec(
        "cuda",
        q.dtype,
        max(head_dim, v.shape[-1]),
        head_dim == v.shape[-1],
        **{"softcap": None, "dropout": 0.0} | options,
    )
    assert why_not(stand_in.backend, spec) is not None
    with pytest.raises(ValueError, match="cannot run this attention"):
        varlen_attention(q, k, v, cu, 7, backend=stand_in.backend, **options)
    # Softer than the table: flash-attn 2 pads head sizes, 3 and 4 know some larger v. The table waits for a card.
    soft = {FLASH_2: ["head_dim 20"], FLASH_3: ["v_head_dim 64"], FLASH_4: ["v_head_dim 64"]}.get(stand_in, [])
    if set(options) <= stand_in.features and not any(f"{name} {value}" in soft for name, value in change.items()):
        with pytest.raises((RuntimeError, AssertionError)):
            BACKENDS[stand_in.backend].run(q, k, v, cu, 7, 0.2, None, spec)


@ALL
def test_a_feature_that_the_table_lacks_is_no_parameter_of_the_function(stand_in):
    names = {"dropout": "dropout_p", "softcap": "softcap", "window": "window_size", "sinks": "learnable_sink"}
    if stand_in is not FLASH_4:  # its source has all but dropout; see the table
        has = inspect.signature(stand_in.function).parameters
        assert {feature for feature, name in names.items() if name in has} == stand_in.features


@pytest.mark.parametrize(
    ("stand_in", "change", "message"),
    [
        (TORCH_12, {"cu_seq_q": torch.tensor([0, 5, 6, 6, 13, 16])}, "int32"),
        (TORCH_12, {"cu_seq_q": torch.tensor([0, 5, 6, 6, 13, 15], dtype=torch.int32)}, "never written"),
        (TORCH_12, {"cu_seq_q": torch.tensor([0, 5, 4, 6, 13, 16], dtype=torch.int32)}, "fall"),
        (TORCH_12, {"max_q": 6}, "max_seqlen is 6"),
        (TORCH_12, {"max_q": torch.tensor(7)}, "no int"),
        (TORCH_12, {"key": torch.zeros(16, 4, 32)}, "dtypes differ"),
        (TORCH_12, {"key": torch.zeros(16, 2, 32, dtype=torch.bfloat16)}, "enable_gqa"),
        (TORCH_12, {"query": torch.zeros(16, 32, 4, dtype=torch.bfloat16).transpose(1, 2)}, "last stride"),
        (TORCH_12, {"query": torch.zeros(16, 4, 33, dtype=torch.bfloat16)[..., :32]}, "misaligned"),
        (TORCH_12, {"is_causal": True}, "unexpected keyword"),
        (TORCH_12, {"window_size": (3, 1)}, "no window"),
        (TORCH_11, {"enable_gqa": True}, "unexpected keyword"),
        (TORCH_10, {"scale": 0.1}, "unexpected keyword"),
    ],
)
def test_the_stand_ins_are_strict(install, stand_in, change, message):
    install(stand_in)
    q, k, v, cu = inputs(key_heads=4)
    call = {"query": q, "key": k, "value": v, "cu_seq_q": cu, "cu_seq_k": cu, "max_q": 7, "max_k": 7}
    stand_in.function(**call)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        stand_in.function(**call | change)


def test_the_stand_in_of_the_installed_torch_has_its_signature():
    from torch.nn.attention.varlen import varlen_attn

    release = min(int(torch.__version__.split(".")[1]), 12)
    twin = getattr(attention_stand_ins, f"varlen_attn_2_{release}")

    def shape(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert varlen_attn.__module__ == VARLEN
    assert shape(twin) == shape(varlen_attn)
