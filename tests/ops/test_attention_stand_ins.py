"""Calls of the GPU back ends, against strict stand-ins of them: what a card would refuse is refused here.

Sizes: documents of 5, 1, 0 and 7 tokens, and a pad tail of 3 as one more document; the head sizes are those of models.
"""

import inspect
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention_stand_ins import STAND_INS, StandIn, torch_varlen_backward
from numerics import assert_accurate
from packsft_kernels import varlen_attention
from packsft_kernels.reference import varlen_attention as reference
from packsft_kernels.varlen_attention import BACKENDS, AttentionSpec, choose_backend, why_not
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

MODULE = sys.modules["packsft_kernels.varlen_attention"]  # the function has its name
LENGTHS = (5, 1, 0, 7, 3, 0, 0)  # the last two as where boundaries are padded for torch.compile
ALL = pytest.mark.parametrize("stand_in", STAND_INS, ids=lambda s: s.function.__name__)
FLASH_2, FLASH_3, FLASH_4, TORCH = STAND_INS


@pytest.fixture
def install(monkeypatch):
    """Put stand-ins in the place of all GPU back ends, on a card of the given capability that holds every tensor."""

    operators = []

    def install(*stand_ins: StandIn, capability=(9, 0), backward=torch_varlen_backward):
        packages = {stand_in.package for stand_in in stand_ins}
        monkeypatch.setattr(MODULE, "_installed", lambda module: module in packages)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(MODULE, "AttentionSpec", lambda _, *rest: AttentionSpec("cuda", *rest))
        monkeypatch.setattr(
            torch.backends.cuda,
            "is_flash_attention_available",
            lambda: "torch_varlen" in {s.backend for s in stand_ins},
        )
        for stand_in in stand_ins:
            if stand_in.backend != "torch_varlen":
                module = SimpleNamespace(flash_attn_varlen_func=stand_in.function)
                monkeypatch.setitem(sys.modules, stand_in.module, module)
            elif not operators:
                operators.append(library := torch.library.Library("aten", "IMPL"))
                library.impl("_flash_attention_forward", stand_in.function, "CPU")
                library.impl("_flash_attention_backward", backward, "CPU")
        why_not.cache_clear()

    yield install
    monkeypatch.undo()
    why_not.cache_clear()
    for library in operators:
        library._destroy()


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


@pytest.mark.parametrize("stand_in", [FLASH_2, TORCH], ids=lambda s: s.function.__name__)
def test_dropout_reaches_flash_attention(install, stand_in):
    install(stand_in)
    q, k, v, cu = inputs()
    v.requires_grad_()
    out, plain = (varlen_attention(q, k, v, cu, 7, dropout=p, backend=stand_in.backend) for p in (0.5, 0.0))
    assert not torch.equal(out, plain)
    (grad,) = torch.autograd.grad(out.sum(), v)
    for head in range(4):  # of the token that is alone in its document: its one weight is dropped or doubled
        assert not out[5, head].any() or torch.equal(out[5, head], 2 * plain[5, head])
    for group, heads in enumerate(out[5].view(2, 2, -1)):
        assert torch.equal(grad[5, group], 2.0 * heads.any(-1).sum().expand(32).bfloat16())


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{}, {"window": 2}], ids=str)
def test_pytorchs_flash_attention_is_one_graph_for_packs_of_any_size(install, compiler, options):
    install(TORCH)
    torch.compiler.reset()
    counter = CompileCounterWithBackend(compiler)

    def attend(q, k, v, cu, longest):  # as `compile_layers` passes it
        return varlen_attention(q, k, v, cu, longest.shape[0], backend="torch_varlen", **options)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for lengths in ((5, 1, 7), (3, 9, 0, 2), (11, 4)):
        q, k, v, cu = inputs(lengths=lengths)
        leaves, longest = [x.requires_grad_() for x in (q, k, v)], torch.empty(max(lengths), 0)
        for tensor in (*leaves, cu, longest):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        outs = [function(*leaves, cu, longest) for function in (attend, compiled)]
        expected, got = ([out, *torch.autograd.grad(out.float().square().sum(), leaves)] for out in outs)
        for one, other in zip(expected, got, strict=True):
            assert torch.equal(one, other)
    assert counter.frame_count == 1


def test_the_back_ends_are_tried_in_the_order_of_the_table(install):
    install(FLASH_2, FLASH_3, FLASH_4, TORCH)
    spec = AttentionSpec("cuda", torch.bfloat16, 128)
    wanted = {
        "flash_attn_4": spec,
        "flash_attn_3": replace(spec, window=3),
        "flash_attn_2": replace(spec, dropout=0.1),
        "sdpa": replace(spec, sinks=True),
    }
    assert {name: choose_backend(asked) for name, asked in wanted.items()} == {name: name for name in wanted}
    install(FLASH_2, FLASH_3, FLASH_4, TORCH, capability=(8, 0))
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
    names |= {"window": "window_size_left"} if stand_in is TORCH else {}
    if stand_in is not FLASH_4:  # its source has all but dropout; see the table
        has = inspect.signature(stand_in.function).parameters
        assert {feature for feature, name in names.items() if name in has} == stand_in.features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cum_seq_q": torch.tensor([0, 5, 6, 6, 13, 16])}, "int32"),
        ({"cum_seq_q": torch.tensor([0, 5, 6, 6, 13, 15], dtype=torch.int32)}, "never written"),
        ({"cum_seq_q": torch.tensor([0, 5, 4, 6, 13, 16], dtype=torch.int32)}, "fall"),
        ({"max_q": 6}, "max_seqlen is 6"),
        ({"max_q": torch.tensor(7)}, "no int"),
        ({"key": torch.zeros(16, 4, 32)}, "dtypes differ"),
        ({"key": torch.zeros(16, 3, 32, dtype=torch.bfloat16)}, "shapes of q, k and v do not fit"),
        ({"query": torch.zeros(16, 32, 4, dtype=torch.bfloat16).transpose(1, 2)}, "last stride"),
        ({"query": torch.zeros(16, 4, 33, dtype=torch.bfloat16)[..., :32]}, "misaligned"),
        ({"softcap": 2.0}, "unexpected keyword"),
        ({"window_size_left": 3, "window_size_right": 1}, "no window"),
    ],
)
def test_the_stand_ins_are_strict(install, change, message):
    install(TORCH)
    q, k, v, cu = inputs(key_heads=4)
    call = {"query": q, "key": k, "value": v, "cum_seq_q": cu, "cum_seq_k": cu, "max_q": 7, "max_k": 7}
    call |= {"dropout_p": 0.0, "is_causal": False, "return_debug_mask": False}
    call |= {"window_size_left": -1, "window_size_right": 0}
    TORCH.function(**call)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        TORCH.function(**call | change)


@pytest.mark.parametrize("function", [TORCH.function, torch_varlen_backward], ids=["forward", "backward"])
def test_the_operators_of_the_installed_torch_are_those_of_the_stand_in(function):
    name = "_flash_attention_backward" if function is torch_varlen_backward else "_flash_attention_forward"
    schema = getattr(torch.ops.aten, name).default._schema
    ours = [(p.name, p.kind is p.KEYWORD_ONLY) for p in inspect.signature(function).parameters.values()]
    theirs = [(argument.name, argument.kwarg_only) for argument in schema.arguments]
    assert theirs[: len(ours)] == ours
    assert all(argument.default_value is None for argument in schema.arguments[len(ours) :])


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 3}, {"window": 3, "causal": False}], ids=str)
def test_the_operators_are_called_as_pytorchs_own_function_calls_them(install, options):
    """`torch.nn.attention.varlen` is what PyTorch tests on its cards."""
    from torch.nn.attention.varlen import varlen_attn

    takes, recorded = inspect.signature(varlen_attn).parameters, []
    if "window_size" not in takes:
        pytest.skip("torch 2.10's varlen_attn takes no scale and no window")

    def recording(function):
        def record(*args, **kwargs):
            given = {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}
            # without dropout no kernel reads the random state, and what is not given is None
            state = {"rng_state", "unused"}
            given = {name: value for name, value in given.items() if name not in state and value is not None}
            recorded.append({name: described(value) for name, value in given.items()})
            return function(*args, **{name: value for name, value in kwargs.items() if value is not None})

        return record

    install(replace(TORCH, function=recording(TORCH.function)), backward=recording(torch_varlen_backward))
    q, k, v, cu = inputs()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    left = options.get("window", 0) - 1
    theirs = {"window_size": (left, 0 if options.get("causal", True) else left), "scale": 32**-0.5}
    theirs |= {"enable_gqa": True} if "enable_gqa" in takes else {}  # torch 2.11 needs no flag
    for function in (
        lambda: varlen_attention(q, k, v, cu, 7, backend="torch_varlen", **options),
        lambda: varlen_attn(q, k, v, cu, cu, 7, 7, **theirs),
    ):
        out = function()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert len(recorded) == 4
    assert recorded[:2] == recorded[2:]
    assert recorded[0].keys() >= {"query", "cum_seq_k", "max_k", "scale", "window_size_left", "is_causal"}


def described(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, value.shape, value.stride(), value.double().sum().item()
