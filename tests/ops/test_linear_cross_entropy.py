"""`linear_cross_entropy` keeps the numerical contract, its GEMMs and its memory, wherever it stands in a graph.

T = 40 tokens of which N = 24 are scored, M = 32, V = 700, a low-rank addition of R = 6; small chunks are forced where
several are to be tested.
"""

import functools
import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate, error, seeded
from packsft_kernels import LossOptions, launch, linear_cross_entropy, reference
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
T, N, M, V, R = 40, 24, 32, 700, 6
PARAMETERS = "hidden", "weight", "bias", "down", "up"
OPTIONS = {
    "plain": LossOptions(),
    "all outputs": LossOptions(entropy=True, correct=True),
    "everything": LossOptions(
        softcap=5.0, logit_scale=0.7, label_smoothing=0.1, z_loss=1e-2, dft=True, entropy=True, correct=True
    ),
}


def inputs(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = seeded(seed)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[5] = -100
    return {
        "hidden": torch.randn(T, M, generator=generator).to(dtype),
        "weight": (0.3 * torch.randn(V, M, generator=generator)).to(dtype),
        "bias": torch.randn(V, generator=generator).to(dtype),
        "targets": targets,
        "rows": torch.randperm(T, generator=generator)[:N].sort().values.int(),
        "weights": torch.rand(N, generator=generator),
    }


def low_rank_inputs(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """With an addition that is about as large as the logits it is added to."""
    generator = seeded(seed + 100)
    down, up = torch.randn(T, R, generator=generator), torch.randn(V, R, generator=generator)
    return {**inputs(dtype, seed), "down": down.to(dtype), "up": up.to(dtype)}


def differentiate(
    function, given: dict, upstream: Tensor | float = 1.0, trained: tuple[str, ...] = PARAMETERS, **kwargs
) -> dict[str, Tensor]:
    """`down` and `up` are given to the function as `low_rank`."""
    given = {name: value.detach().clone() for name, value in given.items()}
    parameters = {name: given[name].requires_grad_() for name in trained if name in given}
    out = function(**with_low_rank(given), **kwargs)
    out.loss.backward(torch.as_tensor(upstream).to(out.loss.dtype))
    outputs = {name: value.detach() for name, value in out._asdict().items() if value is not None}
    return {**outputs, **{f"{name}.grad": value.grad for name, value in parameters.items()}}


def with_low_rank(given: dict) -> dict:
    others = {name: value for name, value in given.items() if name not in ("down", "up")}
    return {**others, "low_rank": (given["down"], given["up"])} if "down" in given else others


def assert_contract(*draws: dict, **kwargs) -> None:
    """Several draws count as one with more rows: the largest of a few errors is luck, ours and PyTorch's alike."""

    def run(function, wide: bool = False) -> dict[str, Tensor]:
        results = []
        for given in draws:
            if wide:
                given = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
            results.append(differentiate(function, given, **kwargs))
        return {name: torch.cat([torch.atleast_1d(r[name]) for r in results]) for name in results[0]}

    truth, plain = run(reference.linear_cross_entropy, wide=True), run(reference.linear_cross_entropy)
    ours = run(linear_cross_entropy)
    for name, exact in truth.items():
        if exact.dtype == torch.bool:
            # An argmax of rounded logits may differ where plain PyTorch's in that dtype does; in float64 never.
            assert torch.equal(ours[name], exact if ours["loss"].dtype == torch.float64 else plain[name]), name
        else:
            assert_accurate(ours[name], plain[name], exact, name, by_row=name.endswith(".grad") and exact.dim() == 2)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows and a last 8: for fewer the BLAS takes another path, whose rounding plain PyTorch's is no measure of."""
    monkeypatch.setattr(launch, "rows_per_chunk", lambda *_, **__: 16)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype: torch.dtype, name: str) -> None:
    assert_contract(*(inputs(dtype, seed) for seed in range(6)), options=OPTIONS[name])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_contract_over_several_chunks(dtype: torch.dtype, reduction: str) -> None:
    """With an upstream gradient that no power of two divides: a vector for "none"."""
    upstream = torch.randn(N, generator=seeded(1)) if reduction == "none" else 0.37
    draws = (inputs(dtype, seed) for seed in range(6))
    assert_contract(*draws, reduction=reduction, upstream=upstream, options=OPTIONS["all outputs"])


LORA = "hidden", "down", "up"  # what is trained where the weight is frozen


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_contract_of_a_low_rank_addition(dtype: torch.dtype, reduction: str) -> None:
    upstream = torch.randn(N, generator=seeded(1)) if reduction == "none" else 0.37
    draws = (low_rank_inputs(dtype, seed) for seed in range(6))
    assert_contract(*draws, reduction=reduction, upstream=upstream, options=OPTIONS["everything"], trained=LORA)


@pytest.mark.parametrize("absent", [("rows",), ("bias",), ("bias", "weights")], ids=str)
@pytest.mark.parametrize("trained", [PARAMETERS, ("up",), ("down",)], ids=str)
def test_a_low_rank_addition_in_one_chunk(trained: tuple[str, ...], absent: tuple[str, ...]) -> None:
    given = low_rank_inputs(torch.float64)
    if "rows" in absent:
        given |= {name: given[name][:N] for name in ("hidden", "down")}
    for name in absent:
        del given[name]
    assert_contract(given, trained=trained)


@pytest.mark.parametrize(
    ("dtype", "own"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.usefixtures("small_chunks")
def test_a_low_rank_addition_has_a_dtype_of_its_own(dtype: torch.dtype, own: torch.dtype) -> None:
    """Adapters in float32 on a model in bf16 and the other way round: as if all were in the model's dtype."""
    given = low_rank_inputs(own)
    given = {n: x.to(dtype) if x.is_floating_point() and n not in ("down", "up") else x for n, x in given.items()}
    same = given | {name: given[name].to(own).to(dtype) for name in ("down", "up")}
    mixed, alike = differentiate(linear_cross_entropy, given), differentiate(linear_cross_entropy, same)
    for name, value in alike.items():
        expected = value.to(own) if name in ("down.grad", "up.grad") else value
        assert mixed[name].dtype == expected.dtype
        # a float32 sum of bf16 gradients is not rounded once more, and may only be nearer; on a GPU a product neither
        wide = torch.finfo(torch.bfloat16 if torch.bfloat16 in (dtype, own) else torch.float32).eps
        unrounded = ("up.grad", "down.grad") if mixed[name].is_cuda else ("up.grad",)
        assert error(mixed[name], expected) <= (wide if name in unrounded else 0), name


def test_weight_gradients_do_not_add_up_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 chunks of 16 rows with like hidden states, each a small step on a sum that is already large in bf16."""
    monkeypatch.setattr(launch, "rows_per_chunk", lambda *_, **__: 16)
    generator = seeded(0)
    given = {
        "hidden": (1 + 0.1 * torch.randn(512, M, generator=generator)).bfloat16(),
        "weight": (0.3 * torch.randn(V, M, generator=generator)).bfloat16(),
        "targets": torch.randint(0, V, (512,), generator=generator),
        "down": (1 + 0.1 * torch.randn(512, R, generator=generator)).bfloat16(),
        "up": (0.3 * torch.randn(V, R, generator=generator)).bfloat16(),
    }
    assert_contract(given)
    del given["down"], given["up"]
    given["bias"] = torch.zeros(V, dtype=torch.bfloat16)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    runs = differentiate(linear_cross_entropy, given), differentiate(reference.linear_cross_entropy, given)
    truth = differentiate(reference.linear_cross_entropy, wide)
    assert_accurate(*(run["bias.grad"] for run in (*runs, truth)), "bias.grad")


@pytest.mark.parametrize("absent", [("rows",), ("bias",), ("weights",), ("bias", "weights")])
def test_optional_arguments(absent: tuple[str, ...]) -> None:
    given = inputs(torch.float64)
    if "rows" in absent:
        given["hidden"] = given["hidden"][:N]
    for name in absent:
        del given[name]
    assert_contract(given)


@pytest.mark.parametrize("num_items", [17, torch.tensor(17)], ids=["int", "tensor"])
def test_mean_divides_by_the_items_given(num_items: int | Tensor) -> None:
    assert_contract(inputs(torch.float64), num_items=num_items)


def test_rows_may_repeat() -> None:
    """A bucket is filled up with row 0 at weight 0; and a row that counts twice has twice the gradient."""
    given = inputs(torch.float64)
    given["rows"][3], given["rows"][9:12] = given["rows"][2], 0
    given["weights"][9:12] = 0
    assert_contract(given)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
def test_a_confident_target_keeps_its_gradient(gap: float) -> None:
    """One-hot hidden states and weights that are the logits: the GEMM is exact and the bound is `cross_entropy`'s."""
    weight = torch.randn(500, 1, generator=seeded(0))
    weight[250] = -math.inf
    weight[250] = weight.logsumexp(0) + math.log((1 - gap) / gap)
    hidden = torch.ones(1, 1)
    given = {"hidden": hidden, "weight": weight, "targets": torch.tensor([250])}
    ours = differentiate(linear_cross_entropy, given)
    rest = weight.double().index_fill(0, torch.tensor(250), -math.inf).logsumexp(0) - weight.double()[250]
    for mine, right in ((ours["loss"], rest.exp().log1p()), (ours["weight.grad"][250], -rest.sigmoid())):
        assert float(((mine.double() - right) / right).abs()) < 2.0**-20 + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_give_zero_and_stay_in_the_graph(reduction: str) -> None:
    given = low_rank_inputs(torch.float32)
    given.update({name: given[name][:0] for name in ("targets", "rows", "weights")})
    upstream = torch.zeros(0) if reduction == "none" else 1.0
    out = differentiate(linear_cross_entropy, given, upstream, reduction=reduction)
    assert float(out["loss"].sum()) == 0
    for name in PARAMETERS:
        assert not out[f"{name}.grad"].any()
        assert out[f"{name}.grad"].shape == given[name].shape


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_may_hold_nan(reduction: str) -> None:
    """Not even through 0 * NaN in the weight's gradient."""
    given = low_rank_inputs(torch.float32)
    upstream = torch.ones(N) if reduction == "none" else 1.0
    clean = differentiate(linear_cross_entropy, given, upstream, reduction=reduction, options=OPTIONS["everything"])
    given["hidden"][given["rows"][5]] = given["down"][given["rows"][5]] = math.nan
    dirty = differentiate(linear_cross_entropy, given, upstream, reduction=reduction, options=OPTIONS["everything"])
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name


def test_all_rows_ignored_gives_zero() -> None:
    given = inputs(torch.bfloat16)
    given["targets"] = torch.full_like(given["targets"], -100)
    given["hidden"].fill_(math.nan)
    out = differentiate(linear_cross_entropy, given)
    assert all(not value.any() for value in out.values())


# ---------------------------------------------------------------------------------------------------- what it costs


@pytest.fixture
def flops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """FLOPs of each run of the chunk loop, counted from within: a dispatch mode is blind to what operators do."""
    counts = []

    def counted(*args):
        with FlopCounterMode(display=False) as counter:
            result = chunk_loop(*args)
        counts.append(counter.get_total_flops())
        return result

    module = sys.modules[linear_cross_entropy.__module__]
    chunk_loop = module._chunk_loop  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "_chunk_loop", counted)
    return counts


@pytest.mark.parametrize(
    ("trained", "gemms"), [(("hidden", "weight"), 3), (("hidden",), 2), (("weight",), 2), ((), 1)], ids=str
)
@pytest.mark.usefixtures("small_chunks")
def test_number_of_gemms(trained: tuple[str, ...], gemms: int, flops: list[int]) -> None:
    given = inputs(torch.float32)
    for name in trained:
        given[name].requires_grad_()
    with FlopCounterMode(display=False) as outside:
        loss = linear_cross_entropy(given["hidden"], given["weight"], given["targets"], rows=given["rows"]).loss
        if trained:
            loss.backward()
    assert flops == [gemms * 2 * N * M * V]
    assert outside.get_total_flops() == 0  # none in the backward


@pytest.mark.parametrize(
    ("trained", "wide", "narrow"),
    [(LORA, 2, 3), (("down", "up"), 1, 3), ((*LORA, "weight"), 3, 3), ((), 1, 1)],
    ids=str,
)
@pytest.mark.usefixtures("small_chunks")
def test_a_low_rank_addition_costs_narrow_gemms(
    trained: tuple[str, ...], wide: int, narrow: int, flops: list[int]
) -> None:
    given = low_rank_inputs(torch.float32)
    for name in trained:
        given[name].requires_grad_()
    loss = linear_cross_entropy(**with_low_rank(given)).loss
    if trained:
        loss.backward()
    assert flops == [2 * N * V * (wide * M + narrow * R)]


def test_one_gemm_without_grad_mode_and_four_for_a_vector_of_losses(flops: list[int]) -> None:
    given = inputs(torch.float32)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, given["targets"], rows=given["rows"])
    linear_cross_entropy(hidden, weight, given["targets"], rows=given["rows"], reduction="none").loss.sum().backward()
    assert flops == [gemms * 2 * N * M * V for gemms in (1, 1, 3)]


def test_nothing_is_read_back() -> None:
    """As on a GPU: no value of a tensor reaches Python, forward and backward, operators' bodies included."""
    given = inputs(torch.float32)
    del given["bias"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        differentiate(linear_cross_entropy, given, num_items=torch.tensor(N), options=OPTIONS["everything"])
        differentiate(linear_cross_entropy, given, torch.ones(N), reduction="none")
    names = {event.key for event in profile.key_averages()}
    assert "packsft::linear_cross_entropy" in names
    assert not names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2"}


def test_gradients_are_no_saved_tensors() -> None:
    """Else offloading of saved tensors would carry dW to the host and back."""
    given = inputs(torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear_cross_entropy(
            given["hidden"].requires_grad_(), given["weight"].requires_grad_(), given["targets"], rows=given["rows"]
        )
    assert not any(tensor.numel() >= N * M for tensor in saved)


def test_gradients_are_freed_by_the_backward() -> None:
    """The loss is often held until the next step's; the gradient of a vocabulary must not be held with it."""
    given = inputs(torch.float32)
    loss = linear_cross_entropy(
        given["hidden"], given["weight"].requires_grad_(), given["targets"], rows=given["rows"]
    ).loss
    node = loss.grad_fn
    assert node is not None
    assert node.gradients.weight.shape == (V, M)  # type: ignore[attr-defined]
    loss.backward()
    assert node.gradients is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_rows", [1, 520, 4096, 4097, 100_000])
@pytest.mark.parametrize("vocab", [2, 49_152, 128_256, 300_000_000])
@pytest.mark.parametrize("weight_grad", [False, True])
def test_chunks_keep_to_the_budget_and_are_few(num_rows: int, vocab: int, weight_grad: bool) -> None:
    rows = launch.rows_per_chunk(num_rows, vocab, 2, weight_grad=weight_grad)
    most = 4096 if weight_grad else 1024
    assert 1 <= rows <= most
    assert rows == 1 or rows * vocab * 2 <= launch.CHUNK_BYTES
    fewest = math.ceil(num_rows / max(1, min(most, launch.CHUNK_BYTES // (2 * vocab))))
    assert math.ceil(num_rows / rows) <= fewest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_only_a_gradient_in_bfloat16_is_rounded(
    dtype: torch.dtype, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict] = []
    rows_per_chunk = launch.rows_per_chunk
    monkeypatch.setattr(launch, "rows_per_chunk", lambda *a, **k: asked.append(k) or rows_per_chunk(*a, **k))
    given = inputs(dtype)
    linear_cross_entropy(given["hidden"], given["weight"].requires_grad_(trained), given["targets"], rows=given["rows"])
    rounded = M if trained and dtype == torch.bfloat16 else 0
    assert asked == [{"weight_grad": trained, "rounded_width": rounded}]


@pytest.mark.parametrize(
    ("vocab", "width"), [(128_256, 2048), (128_256, 4096), (256_000, 3584), (32_000, 4096), (7, 64)]
)
def test_a_rounded_gradient_takes_larger_chunks_in_the_same_memory(vocab: int, width: int) -> None:
    def peak(num_rows: int, rows: int) -> int:
        """Bytes of logits and of dW in bfloat16, or of its sum in float32 and then of the sum and its rounding."""
        logits, rounded = 2 * vocab * rows, 2 * vocab * width
        return logits + rounded if rows >= num_rows else 2 * rounded + max(logits, rounded)

    chunks = {}
    # what any number of rows may take, although fewer rows in even chunks would take less
    allowed = peak(2**30, launch.rows_per_chunk(2**30, vocab, 2, weight_grad=True))
    for num_rows in (*range(1, 20_000, 13), 2**20):
        rows = launch.rows_per_chunk(num_rows, vocab, 2, weight_grad=True, rounded_width=width)
        before = launch.rows_per_chunk(num_rows, vocab, 2, weight_grad=True)
        chunks[num_rows] = math.ceil(num_rows / rows)
        assert chunks[num_rows] <= math.ceil(num_rows / before)
        assert peak(num_rows, rows) <= max(allowed, peak(num_rows, before))
    # where one chunk would do, there is one
    assert all(count == 1 for num_rows, count in chunks.items() if peak(num_rows, num_rows) <= allowed)


# ---------------------------------------------------------------------------------------------------- where it stands


def parameters_and_loss(dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    given = inputs(dtype)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    return iter((hidden, weight, linear_cross_entropy(hidden, weight, given["targets"], rows=given["rows"]).loss))


def test_a_retained_graph_gives_the_gradients_again_and_another_one_says_so() -> None:
    """2 + 3 times the gradient of an upstream of 1: neither factor may stay behind in what is kept."""
    hidden, weight, loss = parameters_and_loss()
    loss.backward(torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    loss.backward(torch.tensor(3.0, dtype=torch.float64))
    once_hidden, once_weight, again = parameters_and_loss()
    again.backward()
    assert error(hidden.grad, 5 * once_hidden.grad) < 1e-15  # type: ignore[arg-type, operator]
    assert error(weight.grad, 5 * once_weight.grad) < 1e-15  # type: ignore[arg-type, operator]
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


def test_two_calls_on_one_tied_weight_add_up() -> None:
    """The weight is the embedding, the hidden states come from it, and the head runs twice."""

    def loss(head, weight: Tensor) -> Tensor:
        tokens = torch.arange(10)
        hidden = torch.tanh(F.embedding(tokens, weight))
        return head(hidden, weight, tokens + 1).loss + 0.5 * head(hidden * 2, weight, tokens + 2, reduction="sum").loss

    grads = []
    for head in (linear_cross_entropy, reference.linear_cross_entropy):
        weight = inputs(torch.float64)["weight"].requires_grad_()
        loss(head, weight).backward()
        grads.append(weight.grad)
    assert error(*grads) < 1e-13


def test_gradients_accumulate_over_micro_steps() -> None:
    """Two backwards into one `.grad`, the first of which may have become `.grad` itself."""
    _, weight, loss = parameters_and_loss()
    loss.backward()
    given = inputs(torch.float64)
    linear_cross_entropy(given["hidden"], weight, given["targets"], rows=given["rows"]).loss.backward()
    _, once, again = parameters_and_loss()
    again.backward()
    assert once.grad is not None
    assert error(weight.grad, 2 * once.grad) < 1e-15


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_differentiating_twice_raises(reduction: str) -> None:
    given = inputs(torch.float64)
    hidden = given["hidden"].requires_grad_()
    loss = linear_cross_entropy(hidden, given["weight"], given["targets"], rows=given["rows"], reduction=reduction).loss
    (grad,) = torch.autograd.grad(loss.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        (grad.square().sum() + hidden.sum()).backward()


def test_only_the_loss_is_differentiable() -> None:
    given = inputs(torch.float32)
    given["hidden"].requires_grad_()
    for reduction in ("mean", "none"):
        out = linear_cross_entropy(**given, options=OPTIONS["all outputs"], reduction=reduction)
        assert [value.requires_grad for value in out if value is not None] == [True, False, False, False, False]


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_of_checkpointing(reentrant: bool) -> None:
    hidden, weight, loss = parameters_and_loss()
    loss.backward()
    given = inputs(torch.float64)
    again, tied = given["hidden"].requires_grad_(), given["weight"].requires_grad_()

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, given["targets"], rows=given["rows"]).loss

    checkpoint(head, again, tied, use_reentrant=reentrant).backward()
    assert torch.equal(again.grad, hidden.grad)  # type: ignore[arg-type]
    assert torch.equal(tied.grad, weight.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_gives_gradients_in_the_parameters_dtypes(hidden_dtype: torch.dtype, reduction: str) -> None:
    """Master weights in float32, GEMMs in bf16: as good as plain PyTorch under the same autocast."""
    given = inputs(torch.bfloat16)
    given = {name: value.float() if name in ("weight", "bias") else value for name, value in given.items()}
    given["hidden"] = given["hidden"].to(hidden_dtype)
    upstream = torch.ones(N) if reduction == "none" else 1.0

    @functools.wraps(linear_cross_entropy)
    def autocast(function, **kwargs):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            return function(**kwargs)

    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    truth = differentiate(reference.linear_cross_entropy, wide, upstream, reduction=reduction)
    plain = differentiate(
        functools.partial(autocast, reference.linear_cross_entropy), given, upstream, reduction=reduction
    )
    ours = differentiate(functools.partial(autocast, linear_cross_entropy), given, upstream, reduction=reduction)
    assert ours["weight.grad"].dtype == torch.float32
    assert ours["hidden.grad"].dtype == hidden_dtype
    for name, exact in truth.items():
        # The GEMMs' results are bf16, and what they are handed over in may be wider: half a unit of bf16 is what an
        # exact GEMM could still be off by.
        if name.endswith(".grad"):
            assert_accurate(ours[name].bfloat16(), plain[name], exact, name, by_row=exact.dim() == 2)
        else:
            assert_accurate(ours[name], plain[name], exact, name)


@pytest.mark.parametrize(
    "absent",
    [(), ("rows",), ("bias",), ("weights", "down", "up"), ("rows", "bias", "weights", "down", "up")],
    ids=str,
)
def test_operators_are_registered_rightly(absent: tuple[str, ...]) -> None:
    """Schemas, fakes and autograd, as `torch.library.opcheck` checks them; torch.compile relies on all three."""
    given: dict[str, Tensor | None] = {**low_rank_inputs(torch.float32), **dict.fromkeys(absent)}
    if given["rows"] is None:
        given |= {name: given[name][:N] for name in ("hidden", "down") if given[name] is not None}
    parameters = [given[name] for name in PARAMETERS]
    for parameter in parameters:
        if parameter is not None:
            parameter.requires_grad_()
    tensors = *parameters, given["targets"], given["rows"], given["weights"]
    fields = (-100, 5.0, 1.0, 0.1, 0.0, False, True, True)
    operators = torch.ops.packsft
    torch.library.opcheck(operators.linear_cross_entropy_rows.default, (*tensors, *fields, torch.float32))
    for scale in (torch.tensor(0.1), torch.rand(N)):
        for trained in (PARAMETERS, LORA, ("weight",)):
            wanted = [name in trained and given[name] is not None for name in PARAMETERS]
            for parameter, needed in zip(parameters, wanted, strict=True):
                if parameter is not None:
                    parameter.requires_grad_(needed)
            args = (*tensors, scale, *fields, torch.float32, *wanted)
            torch.library.opcheck(operators.linear_cross_entropy.default, args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(reduction: str) -> None:
    given = inputs(torch.float64)

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        out = linear_cross_entropy(
            torch.tanh(hidden),
            weight,
            given["targets"],
            rows=given["rows"],
            reduction=reduction,
            options=OPTIONS["all outputs"],
        )
        return out.loss.sum() * 2, out.entropy

    results = []
    for function in (head, torch.compile(head, fullgraph=True, backend="aot_eager")):
        hidden, weight = (given[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
        loss, entropy = function(hidden, weight)
        loss.backward()
        results.append((loss.detach(), entropy, hidden.grad, weight.grad))
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager) < 1e-14


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_serves_every_number_of_rows(reduction: str) -> None:
    """Nothing in the checks or the fakes ties the graph to a size, though a longer batch takes more chunks."""
    counter, frames = CompileCounterWithBackend("aot_eager"), []

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def head(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, up: Tensor) -> Tensor:
        low_rank = hidden[:, :R], up
        return linear_cross_entropy(
            hidden, weight, targets, rows=rows, reduction=reduction, low_rank=low_rank
        ).loss.sum()

    for count in (N, 3, 5000):
        hidden, weight = torch.randn(count + 7, M, requires_grad=True), torch.randn(V, M, requires_grad=True)
        up = torch.randn(V, R, requires_grad=True)
        head(hidden, weight, torch.zeros(count, dtype=torch.int64), torch.arange(count), up).backward()
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("hidden", {"hidden": torch.ones(2, T, M)}),
        ("hidden", {"hidden": torch.ones(T, M, dtype=torch.int64)}),
        ("weight", {"weight": torch.ones(V, M + 1)}),
        ("weight", {"weight": torch.ones(0, M)}),
        ("weight", {"weight": torch.ones(V, M, dtype=torch.bfloat16)}),
        ("bias", {"bias": torch.ones(V + 1)}),
        ("targets", {"targets": torch.zeros(N + 1, dtype=torch.int64)}),
        ("targets", {"targets": torch.zeros(N)}),
        ("rows", {"rows": torch.ones(N)}),
        ("weights", {"weights": torch.ones(N - 1)}),
        ("low_rank", {"low_rank": (torch.ones(T, R), torch.ones(V, R + 1))}),
        ("low_rank", {"low_rank": (torch.ones(N, R), torch.ones(V, R))}),
        ("low_rank", {"low_rank": (torch.ones(T, R), None)}),
        ("low_rank", {"low_rank": (torch.ones(T, R), torch.ones(R, V))}),
        ("reduction", {"reduction": "average"}),
        ("num_items", {"num_items": -1}),
        ("num_items", {"num_items": 3, "reduction": "sum"}),
    ],
)
def test_bad_arguments_are_named(argument: str, wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"^{argument}"):
        linear_cross_entropy(**{**inputs(torch.float32), **wrong})


def test_works_without_triton() -> None:
    """As on a machine for which there is none: importing it fails."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from packsft_kernels import _triton, linear_cross_entropy\n"
        "assert not _triton.HAS_TRITON\n"
        "h = torch.randn(4, 8, requires_grad=True)\n"
        "linear_cross_entropy(h, torch.randn(9, 8), torch.tensor([0, 8, 3, -100])).loss.backward()\n"
        "assert h.grad.any()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
