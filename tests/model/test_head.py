"""Where the fused head takes the place of the model's own: within its forward, which alone has the router's loss."""

import copy

import pytest
import torch
from packsft_kernels import LossOptions
from runs import losses, trainer
from tiny import tiny_model
from tiny_models import tiny_model as tiny_family
from transformers import LlamaForCausalLM, Qwen2MoeForCausalLM

from packsft.model.head import install_head
from packsft.model.parts import probing

ROUTED = {"max_steps": 2, "router_aux_loss_coef": 0.5}
FAMILIES = {"qwen2_moe": ROUTED, "roformer": {"max_steps": 2}}


def built(family):
    return tiny_model(family, torch.float64) if family == "qwen2_moe" else tiny_family(family)


def losses_of(ours):
    ours.train()
    return losses(ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_logits_are_made(family, tmp_path, monkeypatch):
    ours, ran, linear = trainer(tmp_path, built(family), **FAMILIES[family]), set(), torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: ran.add(self) or linear(self, x))
    ours.train()
    assert ours.why_compact is None
    assert ran
    assert ours.model.get_output_embeddings() not in ran


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_that_comes_later_sees_the_logits(family, tmp_path, caplog):
    expected, seen = losses_of(trainer(tmp_path, built(family), **FAMILIES[family])), []
    ours = trainer(tmp_path, built(family), **FAMILIES[family])
    ours.model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: seen.append(logits.shape))
    assert losses_of(ours) == pytest.approx(expected, rel=1e-9)
    assert {shape[-1] for shape in seen} == {ours.model.config.vocab_size}
    assert caplog.text.count("from now on the head makes logits of the scored tokens: a hook may look at") == 1
    assert ours.why_compact == "a hook may look at what the head computes"


def test_the_head_itself_is_as_before(tmp_path):
    ours = trainer(tmp_path, built("qwen2_moe"), **ROUTED)
    head = ours.model.get_output_embeddings()
    before = dict(vars(head)), len(head._forward_hooks)
    ours.train()
    assert (dict(vars(head)).keys(), len(head._forward_hooks)) == (before[0].keys(), before[1])


class Twice(Qwen2MoeForCausalLM):
    def forward(self, *args, **kwargs):
        self.lm_head(self.lm_head.weight[None, :8])
        return super().forward(*args, **kwargs)


class Never(Qwen2MoeForCausalLM):
    def forward(self, *args, **kwargs):
        head = self.lm_head
        self._modules["lm_head"] = torch.nn.Linear(1, 1)
        self.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden, head.weight)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._modules["lm_head"] = head


class OfTheLast(Qwen2MoeForCausalLM):
    def forward(self, *args, logits_to_keep=7, **kwargs):
        return super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)


class Masking:
    """As Chameleon: it never generates some tokens."""

    mask = torch.finfo(torch.float32).min

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., [15, 16, 17]] = self.mask
        return out


class MaskingExperts(Masking, Qwen2MoeForCausalLM):
    pass


class MaskingLlama(Masking, LlamaForCausalLM):
    pass


class Squared(Qwen2MoeForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.aux_loss = out.aux_loss + out.logits.pow(2).mean()
        return out


class AgainInTraining(Qwen2MoeForCausalLM):
    def forward(self, *args, **kwargs):
        if self.training:
            self.lm_head(self.lm_head.weight[None, :8]).argmax(-1)
        return super().forward(*args, **kwargs)


REASONS = [
    (Never, "does not call its head"),
    (Twice, "calls its head 2 times"),
    (OfTheLast, "given (1, 7, 32) for 8 tokens"),
    (MaskingExperts, "out of bounds"),
    (Squared, "the router's loss depends on the logits"),
]


@pytest.mark.parametrize(("kind", "reason"), REASONS)
def test_a_forward_that_does_not_call_its_head_once_on_all_tokens_is_not_fused(kind, reason):
    model = built("qwen2_moe")
    model.__class__ = kind
    model.config.output_router_logits = True  # as TRL sets it
    assert reason in install_head(model, LossOptions(), needs_aux_loss=True)


@pytest.mark.parametrize("mask", [Masking.mask, -1e9, -1e4, -float("inf")])
def test_tokens_that_a_model_masks_are_not_overlooked(mask, monkeypatch):
    monkeypatch.setattr(Masking, "mask", mask)
    model = tiny_model("llama")
    model.__class__ = MaskingLlama
    assert "log-probabilities would be off" in install_head(model, LossOptions())


def test_a_forward_that_is_traced_keeps_its_head():
    model = built("qwen2_moe")
    assert "torch_compile" in install_head(model, LossOptions(), needs_aux_loss=True, traced=True)
    assert install_head(model, LossOptions(), traced=True) is None


def test_a_hook_of_trls_is_not_taken_for_one_that_sees_logits():
    model, hook = built("qwen2_moe"), lambda *_: None
    hook.__module__ = "trl.models.activation_offloading"
    model.lm_head.register_forward_hook(hook)
    assert install_head(model, LossOptions(), needs_aux_loss=True) is None
    model.lm_head.register_forward_hook(lambda *_: None)
    assert "a hook may look" in install_head(model, LossOptions(), needs_aux_loss=True)


def test_a_probe_leaves_no_trace():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    with probing(model):
        assert not any(module.training for module in model.modules())
        torch.rand(3)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


class Bounded(torch.nn.Sequential):
    """A head that ends in an operation whose backward needs what it returned."""

    def __init__(self, linear):
        super().__init__(linear, torch.nn.Tanh())
        self.weight = linear.weight


def test_logits_that_their_own_operation_keeps_are_not_overwritten():
    model = tiny_model("llama")
    model.set_output_embeddings(Bounded(model.lm_head))
    expected = copy.deepcopy(model)
    assert install_head(model, LossOptions()) is not None
    ids, rows = torch.tensor([[3, 4, 5, 6]]), torch.tensor([0, 1, 2])
    model(input_ids=ids, loss_rows=rows, loss_targets=ids[0, 1:], num_items=3).loss.backward()
    torch.nn.functional.cross_entropy(expected(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("kind", [Never, AgainInTraining])
def test_what_is_not_fused_makes_logits(kind, tmp_path):
    model = built("qwen2_moe")
    expected = losses_of(trainer(tmp_path, copy.deepcopy(model), **ROUTED))
    model.__class__ = kind
    assert losses_of(trainer(tmp_path, model, **ROUTED)) == pytest.approx(expected, rel=1e-9)
