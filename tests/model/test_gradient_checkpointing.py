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

from packsft.model.gradient_checkpointing import checkpoint, install_checkpoint

pytorchs = functools.partial(torch_checkpoint, use_reentrant=False)


class Layer(nn.Module):
    """Saves inputs, outputs, views and a random mask. `outside` is not among its arguments."""

    def __init__(self, outside=1.0):
        super().__init__()
        self.linear, self.norm, self.outside, self.calls = nn.Linear(8, 8), nn.LayerNorm(8), outside, 0

    def forward(self, hidden, number=1, scale=1.0):
        self.calls += 1
        gate, up = self.linear(self.norm(hidden)).chunk(2, dim=-1)
        mixed = torch.cat([nn.functional.silu(gate) * up, torch.exp(up)], dim=-1)
        return hidden + nn.functional.dropout(mixed, 0.5) * scale * self.outside * number


def gradients(run, seed=0, backwards=1):
    """The output of two layers, all gradients, and random numbers drawn before and after the backward."""
    torch.manual_seed(seed)
    outside, scale = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    layers = [Layer(outside), Layer()]
    hidden = first = torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in layers:
            hidden = run(layer, hidden, 2, scale=scale)
    drawn = torch.rand(3)
    for _ in range(backwards):
        hidden.square().sum().backward(retain_graph=True)
    leaves = [outside, scale, first, *(parameter for layer in layers for parameter in layer.parameters())]
    return [hidden.detach(), drawn, torch.rand(3), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("backwards", [1, 2])
def test_bits_of_pytorchs_checkpoint(backwards):
    """Gradients of arguments, keywords and others, under autocast and dropout; the random state after the backward."""
    ours = gradients(checkpoint, backwards=backwards)
    assert all(map(torch.equal, ours, gradients(pytorchs, backwards=backwards)))
    assert not torch.equal(ours[0], gradients(checkpoint, seed=1)[0])


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
    layer, hidden = Layer(), torch.randn(5, 8, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: seen.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        output = checkpoint(layer, hidden)
    assert seen == [hidden.data_ptr()]
    output.sum().backward()
    assert layer.calls == 2


def test_inputs_can_be_offloaded():
    def offloaded(*args, **kwargs):
        with save_on_cpu():
            return checkpoint(*args, **kwargs)

    assert all(map(torch.equal, gradients(offloaded), gradients(pytorchs)))


@pytest.mark.parametrize("inner", [checkpoint, pytorchs])
@pytest.mark.parametrize("outer", [checkpoint, pytorchs])
def test_a_checkpoint_inside_a_checkpoint(inner, outer):
    def nested(inner, outer, layer, hidden, number, scale):
        return outer(lambda states: inner(layer, states.sin(), number, scale=scale).cos(), hidden)

    ours = gradients(functools.partial(nested, inner, outer))
    assert all(
        map(torch.equal, ours, gradients(functools.partial(nested, lambda f, *args, **kw: f(*args, **kw), pytorchs)))
    )


def test_a_backward_inside_of_the_function():
    def function(hidden):
        (slope,) = torch.autograd.grad(hidden.sin().sum(), hidden, create_graph=True)
        return slope.exp()

    hidden = torch.linspace(0, 1, 5, requires_grad=True)
    (ours,) = torch.autograd.grad(checkpoint(function, hidden).sum(), hidden)
    (plain,) = torch.autograd.grad(function(hidden).sum(), hidden)
    assert torch.equal(ours, plain)


def test_without_gradients_nothing_is_kept():
    layer = Layer()
    with torch.no_grad():
        assert checkpoint(layer, torch.randn(5, 8)).grad_fn is None
    assert layer.calls == 1


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


def test_an_input_changed_in_place_is_refused():
    hidden = torch.randn(5, 8, requires_grad=True) * 1
    output = checkpoint(Layer(), hidden)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(
    ("second", "how"),
    [
        (lambda hidden: hidden[:2].exp(), r"float32 \[2, 8\] where the forward saved torch.float32 \[5, 8\]"),
        (lambda hidden: hidden.double().exp(), r"float64 \[5, 8\] where the forward saved torch.float32 \[5, 8\]"),
        (lambda hidden: hidden + 1, "0 saved tensors, 1 in the forward"),
    ],
)
def test_a_layer_that_computes_something_else_is_refused(second, how):
    functions = iter([torch.exp, second])
    output = checkpoint(lambda hidden: next(functions)(hidden), torch.randn(5, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match=how):
        output.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "replaced"),
    [
        ({"use_reentrant": False}, True),
        ({"use_reentrant": False, "preserve_rng_state": True}, True),
        ({"use_reentrant": False, "preserve_rng_state": False}, False),
        ({"use_reentrant": True}, False),
    ],
)
def test_only_the_defaults_are_replaced(arguments, replaced):
    model = tiny_model()
    model.gradient_checkpointing_enable(arguments)
    install_checkpoint(model)
    functions = {layer._gradient_checkpointing_func for layer in model.model.layers}
    assert (functions == {checkpoint}) is replaced


@pytest.mark.parametrize("options", [{}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}, {"bf16": True}])
def test_training(options, tmp_path, monkeypatch):
    """The trainer uses it; with `torch_compile`, which traces PyTorch's, the bits are the same, too."""
    calls, models = [], []
    forward = checkpoint.__globals__["_Recomputed"].pack
    monkeypatch.setattr(
        "packsft.model.gradient_checkpointing._Recomputed.pack", lambda *a: calls.append(1) or forward(*a)
    )
    for installs in (True, False):
        if not installs:
            monkeypatch.setattr("packsft.trainer.install_checkpoint", lambda model: None)
        ours = trainer(tmp_path, tiny_model(), gradient_checkpointing=True, max_steps=2, **options)
        ours.train()
        models.append(list(ours.model.parameters()))
        assert bool(calls) is (installs and "torch_compile" not in options)
        calls.clear()
    assert all(map(torch.equal, *models))
