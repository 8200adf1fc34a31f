"""`checkpoint` gives the bits of PyTorch's non-reentrant one, keeps only the inputs, and refuses what that refuses."""

import functools
import gc
import weakref

import pytest
import torch
from runs import trainer
from tiny import tiny_model
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from packsft.model import gradient_checkpointing
from packsft.model.gradient_checkpointing import checkpoint, install_checkpoint

pytorchs = functools.partial(torch_checkpoint, use_reentrant=False)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Layer(nn.Module):
    """Saves inputs, outputs, views and a random mask. `outside` is not among its arguments."""

    def __init__(self, outside=1.0):
        super().__init__()
        self.linear, self.norm, self.outside, self.calls = nn.Linear(8, 8), nn.LayerNorm(8), outside, 0

    def forward(self, hidden, number=1, shift=0.0, scale=1.0):
        self.calls += 1
        gate, up = self.linear(self.norm(hidden * number)).chunk(2, dim=-1)
        mixed = torch.cat([nn.functional.silu(gate + shift) * up, torch.exp(up)], dim=-1)
        return hidden + nn.functional.dropout(mixed, 0.5) * scale * self.outside


def gradients(run, seed=0, backwards=1, device="cpu", autocast=torch.bfloat16, frozen=False):
    """The output of two layers, all gradients, and random numbers drawn before and after the backward."""
    torch.manual_seed(seed)
    outside, scale, shift = (torch.randn(width).to(device).requires_grad_() for width in (8, 8, 4))
    layers = [Layer(outside).to(device), Layer().to(device)]
    hidden = first = torch.randn(5, 8).to(device).requires_grad_()
    if frozen:
        hidden, shift = first.detach(), shift.detach()
    with torch.autocast(device, autocast):
        for layer in layers:
            hidden = run(layer, hidden, 2, shift, scale=scale)
    drawn = torch.rand(3, device=device)
    for _ in range(backwards):
        hidden.square().sum().backward(retain_graph=True)
    leaves = [outside, scale, *(parameter for layer in layers for parameter in layer.parameters())]
    leaves += [] if frozen else [first, shift]
    return [hidden.detach(), drawn, torch.rand(3), torch.rand(3, device=device), *(leaf.grad for leaf in leaves)]


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [{}, {"backwards": 2}, {"autocast": torch.float16}, {"frozen": True}], ids=lambda options: str(options)
)
def test_bits_of_pytorchs_checkpoint(options, device):
    """Gradients of arguments, keywords and others, under autocast and dropout; the random state after the backward."""
    ours = gradients(checkpoint, device=device, **options)
    assert equal(ours, gradients(pytorchs, device=device, **options))
    assert not torch.equal(ours[0], gradients(checkpoint, 1, device=device, **options)[0])


def test_it_computes_again_once_and_only_to_the_last_saved_tensor():
    reached = []

    def function(hidden):
        reached.append("start")
        hidden = hidden.exp().sin()
        reached.append("end")
        return hidden

    hidden = torch.randn(4, requires_grad=True)
    checkpoint(function, hidden).sum().backward()
    assert reached == ["start", "end", "start"]  # sin() saves what exp() has returned
    assert torch.allclose(hidden.grad, hidden.exp().cos() * hidden.exp())


def test_only_the_inputs_are_kept():
    seen = []
    layer, hidden = Layer(), torch.randn(5, 8, requires_grad=True) * 1
    alive = weakref.ref(hidden)
    with saved_tensors_hooks(lambda tensor: seen.append(tensor.data_ptr()) or tensor.clone(), lambda tensor: tensor):
        output = checkpoint(layer, hidden)
    assert seen == [hidden.data_ptr()]
    del hidden
    assert alive() is None  # a hook has replaced it, and nothing else has it
    output.sum().backward()
    assert layer.calls == 2


def test_inputs_can_be_offloaded():
    def offloaded(*args, **kwargs):
        with save_on_cpu():
            return checkpoint(*args, **kwargs)

    assert equal(gradients(offloaded), gradients(pytorchs))


@pytest.mark.parametrize("inner", [checkpoint, pytorchs])
@pytest.mark.parametrize("outer", [checkpoint, pytorchs])
def test_a_checkpoint_inside_a_checkpoint(inner, outer):
    def nested(inner, outer, layer, hidden, number, shift, scale):
        return outer(lambda states: inner(layer, states.sin(), number, shift, scale=scale).cos(), hidden)

    ours, theirs = (gradients(functools.partial(nested, *pair)) for pair in [(inner, outer), (pytorchs, pytorchs)])
    assert equal(ours, theirs)


def test_a_backward_inside_of_the_function():
    def function(hidden):
        (slope,) = torch.autograd.grad(hidden.sin().sum(), hidden, create_graph=True)
        return slope.exp()

    hidden = torch.linspace(0, 1, 5, requires_grad=True)
    (ours,) = torch.autograd.grad(checkpoint(function, hidden).sum(), hidden)
    (plain,) = torch.autograd.grad(function(hidden).sum(), hidden)
    assert torch.equal(ours, plain)


def test_a_second_backward_does_not_take_what_the_first_left():
    """Of the layer as it is now, all tensors: not some of before."""
    weight = torch.tensor(2.0)

    def run(checkpoint):
        weight.fill_(2.0)
        hidden = torch.linspace(0.1, 1, 5, requires_grad=True)
        first, other = checkpoint(lambda hidden: ((hidden * weight).sin(), (hidden * weight).cos()), hidden)
        torch.autograd.grad(first.sum(), hidden)
        weight.fill_(3.0)
        return torch.autograd.grad(other.sum(), hidden)

    assert equal(run(checkpoint), run(pytorchs))


def test_without_gradients_nothing_is_kept():
    layer = Layer()
    with torch.no_grad():
        assert checkpoint(layer, torch.randn(5, 8)).grad_fn is None
        assert torch.equal(checkpoint(slope_of_sine, torch.zeros(3)), torch.ones(3))
    assert layer.calls == 1


def slope_of_sine(hidden):
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        return torch.autograd.grad(hidden.sin().sum(), hidden)[0]


def test_hooks_that_are_always_called_are_called_where_it_stops():
    """Those of PyTorch's FSDP2 and of TRL's offloading close what a hook before the forward has opened."""
    layer, is_open = nn.Sequential(nn.Tanh()), []
    layer.register_forward_pre_hook(lambda *args: is_open.append(True))
    layer.register_forward_hook(lambda *args: is_open.pop() and None, always_call=True)
    checkpoint(layer, torch.randn(4, requires_grad=True)).sum().backward()
    assert not is_open


def test_memory_is_freed_by_the_backward():
    """Not by the garbage collector: there is no cycle of references."""
    hidden = torch.randn(5, 8, requires_grad=True) * 1
    alive = weakref.ref(hidden)
    gc.disable()
    try:
        output = checkpoint(Layer(), hidden)
        del hidden
        assert alive() is not None
        output.sum().backward()
        assert alive() is None
    finally:
        gc.enable()


def tensors_alive():
    gc.collect()
    return sum(isinstance(value, torch.Tensor) for value in gc.get_objects())


@pytest.mark.parametrize("retain_graph", [False, True])
def test_tensors_are_let_go_one_by_one_and_those_that_nothing_needs_at_once(retain_graph):
    counts = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            counts.append(tensors_alive())
            return gradient

    def function(hidden):
        for _ in range(8):
            hidden.cos().exp()  # saves a tensor whose graph ends here
            hidden = Counted.apply(hidden).exp()
        return hidden

    before = tensors_alive()
    checkpoint(function, torch.zeros(4, requires_grad=True)).sum().backward(retain_graph=retain_graph)
    assert [counts[0] - count for count in counts[:7]] == [*range(7)]
    assert counts[0] - before < 16


def test_a_layer_may_keep_a_part_of_its_graph():
    """As Gemma 3n keeps keys and values in a dictionary: it keeps what it saves, and no other tensor for ever."""
    kept = {}

    def function(hidden):
        kept["states"] = hidden.exp()
        return kept["states"].sin().exp().cos()

    def step():
        checkpoint(function, torch.zeros(4, requires_grad=True)).sum().backward()
        return tensors_alive()

    assert step() == step() == step()


def test_an_input_changed_in_place_is_refused():
    hidden = torch.randn(5, 8, requires_grad=True) * 1
    output = checkpoint(Layer(), hidden)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def stubborn(hidden):
    try:
        return hidden.exp().exp()
    except BaseException:
        return hidden.sin()


FLOATS = r"where the forward saved torch.float32 \[5, 8\] on cpu"


@pytest.mark.parametrize(
    ("first", "second", "how"),
    [
        (torch.exp, lambda hidden: hidden[:2].exp(), r"float32 \[2, 8\] on cpu " + FLOATS),
        (torch.exp, lambda hidden: hidden.double().exp(), r"float64 \[5, 8\] on cpu " + FLOATS),
        (torch.exp, lambda hidden: hidden.to("meta").exp(), r"float32 \[5, 8\] on meta " + FLOATS),
        (torch.exp, lambda hidden: hidden + 1, "0 saved tensors, 1 in the forward"),
        (torch.exp, lambda hidden: stubborn(hidden[:2]), r"float32 \[2, 8\] on cpu " + FLOATS),
    ],
    ids=["shape", "dtype", "device", "number", "swallowed"],
)
def test_a_layer_that_computes_something_else_is_refused(first, second, how):
    functions = iter([first, second])
    output = checkpoint(lambda hidden: next(functions)(hidden), torch.randn(5, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match=how):
        output.sum().backward()


def test_a_layer_that_goes_on_behind_the_last_tensor_is_right():
    hidden = torch.randn(5, 8, requires_grad=True)
    (ours,) = torch.autograd.grad(checkpoint(stubborn, hidden).sum(), hidden)
    (plain,) = torch.autograd.grad(stubborn(hidden).sum(), hidden)
    assert torch.equal(ours, plain)


def test_pytorchs_is_called_where_it_knows_more(monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(gradient_checkpointing, "_Recomputed", refuse)
    layer, hidden = Layer(), torch.randn(5, 8, requires_grad=True)
    with torch.device("cpu"):
        checkpoint(layer, hidden)
    checkpoint(layer, hidden=hidden)  # of its keywords it does not know the device, and PyTorch's does not either
    checkpoint(layer.to("meta"), hidden.to("meta"))
    with pytest.raises(AssertionError):
        checkpoint(layer, hidden)


@pytest.mark.parametrize(
    ("arguments", "replaced"),
    [
        ({"use_reentrant": False}, True),
        ({"use_reentrant": False, "preserve_rng_state": True}, True),
        ({"use_reentrant": False, "preserve_rng_state": False}, False),
        ({"use_reentrant": True}, False),
    ],
    ids=str,
)
def test_only_the_defaults_are_replaced(arguments, replaced):
    model = tiny_model()
    model.gradient_checkpointing_enable(arguments)
    install_checkpoint(model)
    functions = {layer._gradient_checkpointing_func for layer in model.model.layers}
    assert (functions == {checkpoint}) is replaced


@pytest.mark.parametrize("other", [functools.partial(lambda *args: None, use_reentrant=False), lambda *args: None])
def test_another_function_is_left_alone(other):
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.layers[0]._gradient_checkpointing_func = other
    install_checkpoint(model)
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == [other, checkpoint]


@pytest.mark.parametrize(
    "options", [{}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}, {"bf16": True}], ids=str
)
def test_training(options, tmp_path, monkeypatch):
    """The trainer uses it; with `torch_compile`, which traces PyTorch's, the bits are the same, too."""
    made, models = [], []
    recomputed = gradient_checkpointing._Recomputed
    monkeypatch.setattr(gradient_checkpointing, "_Recomputed", lambda *args: made.append(1) or recomputed(*args))
    for installs in (True, False):
        if not installs:
            monkeypatch.setattr("packsft.trainer.install_checkpoint", lambda model: None)
        ours = trainer(tmp_path, tiny_model(), gradient_checkpointing=True, max_steps=2, **options)
        ours.train()
        models.append(list(ours.model.parameters()))
        assert bool(made) is (installs and "torch_compile" not in options)
        made.clear()
    assert equal(*models)
