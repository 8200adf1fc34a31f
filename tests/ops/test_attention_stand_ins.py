"""Calls of the GPU back ends, against strict stand-ins of them: what a card would refuse is refused here.

Sizes: documents of 5, 1, 0 and 7 tokens, and a pad tail of 3 as one more document; the head sizes are those of models.
"""

import copy
import inspect
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from attention_stand_ins import STAND_INS, FlashAlgorithm, StandIn
from numerics import assert_accurate
from packsft_kernels import varlen_attention
from packsft_kernels.reference import varlen_attention as reference
from packsft_kernels.varlen_attention import BACKENDS, OPERATORS, AttentionSpec, choose_backend, why_not
from tiny import ROWS
from tiny_models import tiny_model, with_random_weights
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from trl.models import enable_selective_activation_checkpointing

from packsft import compat
from packsft.data.batch import model_inputs
from packsft.data.collator import PackingCollator
from packsft.model.attention import packed_forward, set_backend

MODULE = sys.modules["packsft_kernels.varlen_attention"]  # the function has its name
LENGTHS = (5, 1, 0, 7, 3, 0, 0)  # the last two as where boundaries are padded for torch.compile
ALL = pytest.mark.parametrize("stand_in", STAND_INS, ids=lambda s: s.function.__name__)
FLASH_2, FLASH_3, FLASH_4, TORCH = STAND_INS


@pytest.fixture
def install(monkeypatch):
    """Put stand-ins in the place of all GPU back ends, on a card of the given capability that holds every tensor."""

    operators = []

    def install(*stand_ins: StandIn, capability=(9, 0)):
        packages = {stand_in.package for stand_in in stand_ins}
        monkeypatch.setattr(MODULE, "_installed", lambda module: module in packages)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(MODULE, "AttentionSpec", lambda _, *rest: AttentionSpec("cuda", *rest))
        of_torch = any(stand_in.backward is not None for stand_in in stand_ins)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: of_torch)
        for stand_in in stand_ins:
            if stand_in.backward is None:
                module = SimpleNamespace(flash_attn_varlen_func=stand_in.function)
                monkeypatch.setitem(sys.modules, stand_in.module, module)
            elif not operators:
                operators.append(library := torch.library.Library("aten", "IMPL"))
                library.impl(stand_in.module, stand_in.function, "CPU")
                library.impl(stand_in.module.replace("forward", "backward"), stand_in.backward, "CPU")
        why_not.cache_clear()

    yield install
    monkeypatch.undo()
    why_not.cache_clear()
    for library in operators:
        library._destroy()


def inputs(heads=4, key_heads=2, head_dim=32, dtype=torch.bfloat16, lengths=LENGTHS, v_head_dim=None):
    shapes = (heads, head_dim), (key_heads, head_dim), (key_heads, v_head_dim or head_dim)
    q, k, v = (torch.randn(sum(lengths), *shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0).int()


def spec_of(q, v, options):
    sizes = q.shape[-1], v.shape[-1]
    asked = {name: value for name, value in options.items() if name not in ("scale", "sinks")}
    return AttentionSpec("cuda", q.dtype, max(sizes), sizes[0] == sizes[1], sinks="sinks" in options, **asked)


def assert_matches_the_definition(qkv, cu, backend, **options):
    """Output and gradients of q, k, v and the sinks, for tensors of any dtype and strides."""
    upstream = torch.randn(*qkv[0].shape[:2], qkv[2].shape[2], dtype=torch.float64)
    sinks = [options.pop("sinks")] if "sinks" in options else []

    def flash(q, k, v, cu, longest, sinks=None, **options):
        return FlashAlgorithm.apply(q, k, v, sinks, cu, options)

    def run(function, dtype=None, **extra):
        tensors = [x.detach() if dtype is None else x.detach().to(dtype) for x in (*qkv, *sinks)]
        leaves = [x.requires_grad_() for x in tensors]
        extra |= {"sinks": leaves[3]} if sinks else {}
        out = function(*leaves[:3], cu, max(LENGTHS), **options, **extra)
        return [out, *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), leaves)]

    plain = flash if backend == "torch_varlen" else reference
    ours, plain = run(varlen_attention, backend=backend), run(plain, qkv[2].dtype)
    for mine, theirs, exact in zip(ours, plain, run(reference, torch.float64), strict=True):
        assert_accurate(mine, theirs, exact, f"{backend}, {options}")


OPTIONS = (
    {},
    {"causal": False},
    {"scale": 0.3},
    {"window": 2},
    {"window": 3, "scale": 0.2},
    {"window": 3, "causal": False},
    {"softcap": 2.0},
    {"softcap": 2.0, "window": 3},
    {"sinks": torch.linspace(-1, 2, 32)},
    {"sinks": torch.linspace(-1, 2, 32), "window": 3},
    {"sinks": torch.linspace(-1, 2, 32), "causal": False},
)


@ALL
@pytest.mark.parametrize("head_dim", [20, 32, 64, 80, 96, 128, 192, 256, 264])
def test_calls_that_the_table_allows_are_taken_and_right(install, stand_in, head_dim):
    install(stand_in)
    for options in OPTIONS:
        # so many sinks that the largest error of their gradients is not luck
        q, k, v, cu = inputs(*((32, 16) if "sinks" in options else (4, 2)), head_dim=head_dim)
        able = head_dim <= stand_in.largest_head
        able &= options.keys() & {"window", "softcap", "sinks"} <= stand_in.features
        assert choose_backend(spec_of(q, v, options)) == (stand_in.backend if able else "sdpa"), options
        if able or head_dim == 32:
            assert_matches_the_definition((q, k, v), cu, stand_in.backend if able else "sdpa", **options)


@ALL
@pytest.mark.parametrize(
    "sizes", [(192, 128), (96, 64), (20, 12), (24, 40)], ids=["DeepSeek", "MiniCPM 3", "odd", "larger v"]
)
def test_other_sizes_of_values_are_taken_and_right(install, stand_in, sizes):
    install(stand_in)
    for options in ({}, *[{name: 3} for name in ("window",) if name in stand_in.features]):
        q, k, v, cu = inputs(head_dim=sizes[0], v_head_dim=sizes[1])
        backend = stand_in.backend if max(sizes) <= stand_in.largest_head else "sdpa"
        assert choose_backend(spec_of(q, v, options)) == backend
        assert_matches_the_definition((q, k, v), cu, backend, **options)


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
        if "sinks" in stand_in.features:
            sinks = torch.empty(4, requires_grad=True)
            out = varlen_attention(q, k, v, cu, 5, sinks=sinks, backend=stand_in.backend)
            assert [x.shape for x in torch.autograd.grad(out.sum(), (q, sinks))] == [q.shape, sinks.shape]
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            # sdpa with dropout has no operator, and cuts the row on the host
            varlen_attention(q, k, v, cu, 5, backend="sdpa", dropout=0.1)


@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 2, 4)], ids=["", "sinks"])
@pytest.mark.parametrize("stand_in", [FLASH_2, TORCH], ids=lambda s: s.function.__name__)
def test_dropout_reaches_flash_attention(install, stand_in, sinks):
    if sinks is not None and "sinks" not in stand_in.features:
        pytest.skip("it knows no sinks")
    install(stand_in)
    q, k, v, cu = inputs()
    v.requires_grad_()
    options = {"sinks": sinks, "backend": stand_in.backend}
    out, plain = (varlen_attention(q, k, v, cu, 7, dropout=p, **options) for p in (0.5, 0.0))
    assert not torch.equal(out, plain)
    (grad,) = torch.autograd.grad(out.sum(), v)
    for head in range(4):  # of the token that is alone in its document: its one weight is dropped or doubled
        assert not out[5, head].any() or torch.equal(out[5, head], 2 * plain[5, head])
    weight = (plain[5].float() / v[5].repeat_interleave(2, 0).float())[:, 0]  # of its own value, with no dropout
    for group, heads in enumerate(out[5].view(2, 2, -1)):
        expected = 2.0 * (heads.any(-1) * weight.view(2, 2)[group]).sum()
        torch.testing.assert_close(grad[5, group].float(), expected.expand(32), rtol=1e-2, atol=0)


def test_a_second_derivative_with_sinks_raises(install):
    install(TORCH)
    q, k, v, cu = inputs()
    q.requires_grad_()
    out = varlen_attention(q, k, v, cu, 7, sinks=torch.zeros(4), backend="torch_varlen")
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["heads in tokens", "tokens in heads"])
@pytest.mark.parametrize(
    "options", [{}, {"window": 2}, {"sinks": torch.linspace(-1, 2, 4)}], ids=["flash", "window", "sinks"]
)
def test_pytorchs_flash_attention_is_one_graph_for_packs_of_any_size(install, compiler, options, layout):
    install(TORCH)
    torch.compiler.reset()
    counter = CompileCounterWithBackend(compiler)

    def attend(q, k, v, cu, longest):  # as `compile_layers` passes it
        return varlen_attention(q, k, v, cu, longest.shape[0], backend="torch_varlen", **options)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for lengths in ((5, 1, 7), (3, 9, 0, 2), (11, 4)):
        q, k, v, cu = inputs(lengths=lengths)
        if layout == "tokens in heads":
            q, k, v = (as_transformers(x) for x in (q, k, v))
        leaves, longest = [x.detach().requires_grad_() for x in (q, k, v)], torch.empty(max(lengths), 0)
        for tensor in (*leaves, cu, longest):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        outs = [function(*leaves, cu, longest) for function in (attend, compiled)]
        expected, got = ([out, *torch.autograd.grad(out.float().square().sum(), leaves)] for out in outs)
        for one, other in zip(expected, got, strict=True):
            assert torch.equal(one, other)
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "mimo_v2_flash", "minicpm3"])
def test_models_with_sinks_or_smaller_values_train_on_flash_attention(install, family):
    install(*STAND_INS)
    batch = model_inputs(PackingCollator(pad_token_id=0)([dict(row) for row in ROWS]))
    trained = with_random_weights(tiny_model(family)).train()
    trained.set_attn_implementation("packsft")
    names = [
        name for name, _ in trained.named_parameters() if name.endswith(("sinks", "q_proj.weight", "o_proj.weight"))
    ]
    trained.bfloat16()  # the float64 model has the same weights

    def run(dtype, backend):
        model = copy.deepcopy(trained).to(dtype)
        set_backend(model, backend)
        with packed_forward():
            out = model(**batch, use_cache=False).logits
        out.logsumexp(-1).sum().backward()
        gradients = dict(model.named_parameters())
        return [out, *(gradients[name].grad for name in names)]

    calls, choose = [], MODULE.choose_backend
    with mock.patch.object(MODULE, "choose_backend", lambda *a: calls.append(choose(*a)) or calls[-1]):
        ours = run(torch.bfloat16, "auto")
    assert "sdpa" not in calls
    assert calls
    for mine, theirs, exact in zip(ours, run(torch.bfloat16, "sdpa"), run(torch.float64, "sdpa"), strict=True):
        assert_accurate(mine, theirs, exact, family)


def test_selective_checkpoints_save_the_output_of_attention(install):
    calls = {"attention": 0, "mlp": 0}

    def attention(*args, **kwargs):
        calls["attention"] += 1
        return TORCH.function(*args, **kwargs)

    install(replace(TORCH, function=attention))
    batch = model_inputs(PackingCollator(pad_token_id=0)([dict(row) for row in ROWS]))
    model = tiny_model("llama").bfloat16().train()
    model.set_attn_implementation("packsft")
    set_backend(model, "torch_varlen")
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.__setitem__("mlp", calls["mlp"] + 1))
    with compat.saved_by_selective_checkpointing(OPERATORS):
        enable_selective_activation_checkpointing(model)
    for enable in (None, model.gradient_checkpointing_enable):
        if enable is not None:
            enable()
        calls |= {"attention": 0, "mlp": 0}
        with packed_forward():
            model(**batch, use_cache=False).logits.logsumexp(-1).sum().backward()
        assert calls == {"attention": len(model.model.layers), "mlp": 1 if enable is None else 2}


def test_the_back_ends_are_tried_in_the_order_of_the_table(install):
    install(*STAND_INS)
    spec = AttentionSpec("cuda", torch.bfloat16, 128)
    wanted = {
        "flash_attn_4": spec,
        "flash_attn_3": replace(spec, window=3),
        "flash_attn_2": replace(spec, dropout=0.1),
        "torch_varlen": replace(spec, sinks=True),
        "sdpa": replace(spec, head_dim=512),
    }
    assert {name: choose_backend(asked) for name, asked in wanted.items()} == {name: name for name in wanted}
    install(*STAND_INS, capability=(8, 0))
    assert choose_backend(spec) == "flash_attn_2"


@ALL
@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"head_dim": 264},
        {"head_dim": 32, "v_head_dim": 264},
        {"capability": (8, 9), "head_dim": 208},
        {"capability": (12, 0), "head_dim": 256, "dropout": 0.1},
        {"softcap": 2.0, "dropout": 0.1},
    ],
    ids=str,
)
def test_what_the_table_refuses_a_card_would_refuse(install, stand_in, change):
    install(stand_in, capability=change.get("capability", (9, 0)))
    sizes = {"head_dim": change.get("head_dim", 32), "v_head_dim": change.get("v_head_dim")}
    q, k, v, cu = inputs(dtype=change.get("dtype", torch.bfloat16), **sizes)
    options = {name: change[name] for name in ("softcap", "dropout") if name in change}
    spec = spec_of(q, v, options)
    assert why_not(stand_in.backend, spec) is not None
    with pytest.raises(ValueError, match="cannot run this attention"):
        varlen_attention(q, k, v, cu, 7, backend=stand_in.backend, **options)
    if set(options) <= stand_in.features:
        with pytest.raises((RuntimeError, AssertionError)):
            BACKENDS[stand_in.backend].run(q, k, v, cu, 7, 0.2, None, spec)


@ALL
def test_a_feature_that_the_table_lacks_is_no_parameter_of_the_function(stand_in):
    names = {"dropout": "dropout_p", "softcap": "softcap", "window": "window_size", "sinks": "learnable_sink"}
    names |= {"window": "window_size_left"} if stand_in is TORCH else {}
    if stand_in is not FLASH_4:  # its source has all but dropout; see the table
        has = inspect.signature(stand_in.function).parameters
        assert {feature for feature, name in names.items() if name in has} == stand_in.features - {"sinks"}


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


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_operators_of_the_installed_torch_are_those_of_the_stand_in(direction):
    function = TORCH.function if direction == "forward" else TORCH.backward
    schema = getattr(torch.ops.aten, TORCH.module.replace("forward", direction)).default._schema
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
    install(recording(TORCH, recorded))
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


def recording(stand_in, recorded):
    """A stand-in for an operator that lists what it is given."""

    def watched(function):
        def record(*args, **kwargs):
            given = {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}
            # without dropout no kernel reads the random state, and what is not given is None
            state = {"rng_state", "unused"}
            given = {name: value for name, value in given.items() if name not in state and value is not None}
            recorded.append({name: described(value) for name, value in given.items()})
            return function(*args, **{name: value for name, value in kwargs.items() if value is not None})

        return record

    return replace(stand_in, function=watched(stand_in.function), backward=watched(stand_in.backward))


def described(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, value.shape, value.stride(), value.double().sum().item()
