"""A whole model with packsft's attention and fused head, traced: by torch.compile, and on fake tensors.

The packed row of `tiny.ROWS` is 15 tokens in five documents.
"""

from __future__ import annotations

import pytest
import torch
from harness.allocations import FakeAllocations
from numerics import error
from packsft_kernels import LossOptions, launch
from peft import LoraConfig, get_peft_model
from tiny import ROWS, tiny_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PreTrainedModel

from packsft.data.batch import loss_inputs, model_inputs
from packsft.data.collator import PackingCollator
from packsft.model.attention import packed_forward
from packsft.model.head import install_head


def model_with_head(
    family: str = "llama", dtype: torch.dtype = torch.float64, lora_on_head: bool = False, **overrides
) -> PreTrainedModel:
    model = tiny_model(family, dtype, **overrides)
    if lora_on_head:
        config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
        model = get_peft_model(model, config).get_base_model()
    model.set_attn_implementation("packsft")
    assert install_head(model, LossOptions()) is None
    return model


def packed(rows: list[dict]) -> dict:
    batch = PackingCollator(pad_token_id=0)([dict(row) for row in rows])
    return model_inputs(batch) | loss_inputs(batch)


@pytest.mark.parametrize(
    ("family", "lora_on_head"),
    [
        ("llama", False),
        ("llama", True),
        pytest.param("gpt2", False, marks=pytest.mark.slow),
        pytest.param("gemma2", False, marks=pytest.mark.slow),
    ],
)
def test_a_model_compiles_into_one_graph(family: str, lora_on_head: bool) -> None:
    """Loss and every gradient are what they are without torch.compile."""
    model = model_with_head(family, lora_on_head=lora_on_head)
    gradients = []
    for function in (model.forward, torch.compile(model.forward, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with packed_forward():
            output = function(**packed(ROWS))
        output.loss.backward()
        gradients.append([output.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for eager, compiled in zip(*gradients, strict=True):
        assert error(compiled, eager) < 1e-12


def test_a_training_step_runs_on_fake_tensors_and_never_holds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 tokens, all but each document's first scored, over a vocabulary of 4,096, in chunks of 64 rows: all that
    lives at once is smaller than the logits, whose size is 600 * 4,096 * 4 bytes = 9.8 MB."""
    monkeypatch.setattr(launch, "rows_per_chunk", lambda *_, **__: 64)
    model = model_with_head(dtype=torch.float32, vocab_size=4096)
    documents = [{"input_ids": [3] * 100}] * 6
    with FakeTensorMode() as mode:
        parameters = {name: mode.from_tensor(parameter) for name, parameter in model.named_parameters()}
        buffers = {name: mode.from_tensor(buffer) for name, buffer in model.named_buffers()}
        batch = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in packed(documents).items()}

        def step() -> None:
            with packed_forward():
                torch.func.functional_call(model, parameters | buffers, kwargs=batch).loss.backward()

        used = FakeAllocations().run(step)
    for parameter in parameters.values():
        assert isinstance(parameter.grad, FakeTensor)
        assert parameter.grad.shape == parameter.shape
    assert len(used.sizes) > 100
    assert 0 < used.peak < 600 * 4096 * 4
