"""Shows that packed training is the same training: kernels against float64, the tests of parity, the model's proof.

The kernels are held to the numerical contract in every dtype. `tests/parity/` compares a packed step with the documents
alone on tiny models. `PackedSFTTrainer.check_packing` (`packsft/model/claims.py`) does so on the model that is trained.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from harness.contest import Verdict, check, relative_errors
from harness.measure import Figure, Settings, asserted, device, figure
from harness.peers import OURS, PLAIN_ATTENTION, PLAIN_HEAD, PLAIN_LOSS, attentions, heads, losses
from harness.shapes import docstrings, random_documents, smollm2, tiny_llama, tiny_tokenizer, tokenised
from harness.trainers import EXACT, build_trainer
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

EXACTLY = 1e-12  # in float64, see CONTRIBUTING.md
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def bench(settings: Settings) -> Iterator[Figure]:
    """Everything on tiny models; --quick and a dry run leave SmolLM2 out."""
    yield from kernels()
    yield from asserted("tests/parity/test_packed_equals_alone.py")
    rows = random_documents(16, 64, 64)
    for dtype in DTYPES:
        yield from claims("tiny Llama", tiny_llama(dtype), tiny_tokenizer(), rows, 64)
    if settings.quick or settings.dry_run:
        yield figure("SmolLM2", note="not run with --quick: takes minutes")
        return
    for dtype in DTYPES:
        try:
            model, tokenizer = smollm2(dtype)
        except ValueError as error:  # offline, and not in the cache
            yield figure("SmolLM2", note=f"cannot run: {error}")
            return
        yield from claims("SmolLM2", model, tokenizer, tokenised(docstrings(64), tokenizer), 1024)


def kernels() -> Iterator[Figure]:
    """The largest error of every output of every kernel in every dtype, beside plain PyTorch's in the same dtype."""
    torch.manual_seed(0)
    # documents of one and two tokens take other code paths than long ones; no length divides another
    bounds = torch.tensor([0, 1, 2, 7, 23, 31], device=device()).cumsum(0).to(torch.int32)
    T = int(bounds[-1])
    labels = torch.randint(1000, (T,), device=device()).masked_fill(torch.arange(T, device=device()) % 3 == 0, -100)
    scored = (labels != -100).nonzero().flatten()
    hidden, weight = torch.randn(T, 64, device=device()), torch.randn(1000, 64, device=device()) / 8
    logits = 3 * torch.randn(T, 1000, device=device())
    qkv = [torch.randn(T, heads, 64, device=device()) for heads in (4, 2, 2)]
    for dtype in (*DTYPES, torch.float16):
        for kernel, peers, plain, given, targets in (
            ("cross_entropy", losses(), PLAIN_LOSS, [logits], [labels]),
            ("linear_cross_entropy", heads(scored), PLAIN_HEAD, [hidden, weight], [labels]),
            ("varlen_attention", attentions(bounds, dtype, 64), PLAIN_ATTENTION, qkv, []),
        ):
            inputs = [tensor.to(dtype) for tensor in given]

            def outputs(run: Any, inputs: list[Tensor] = inputs, targets: list[Tensor] = targets) -> dict[str, Tensor]:
                leaves = [tensor.clone().requires_grad_() for tensor in inputs]
                result = run(*(leaf.view_as(leaf) for leaf in leaves), *targets)
                weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype, device=device()).view_as(result)
                grads = torch.autograd.grad((result * weights).sum() if result.dim() else result, leaves)
                return {"output": result.detach(), **{f"gradient {i}": grad for i, grad in enumerate(grads, 1)}}

            peers = [peer for peer in peers if peer.name in (OURS, plain)]
            run = next(peer.run for peer in peers if peer.name == plain)
            truth = outputs(run, [tensor.double() for tensor in inputs])
            ours = check(peers, outputs, truth, relative_errors(outputs(run), truth))[0][OURS]
            if dtype == torch.float64:
                ours = Verdict(ours.errors, dict.fromkeys(ours.errors, EXACTLY))
            yield ours.as_figure(f"{kernel}, {_name(dtype)}", value=max(ours.errors.values()), unit="relative")


def claims(name: str, model: Any, tokenizer: Any, rows: Any, max_length: int) -> Iterator[Figure]:
    """What `check_packing` finds of every claim, in the dtype of the model."""
    exact = exact_rms_norm() if model.dtype == torch.float64 else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, exact:
        trainer = build_trainer(EXACT, model, tokenizer, rows, folder, bf16=False, max_length=max_length)
        found = trainer.check_packing()
    for claim in found.claims:
        compared: dict[str, Any] = {"at_most": EXACTLY * bool(claim.allowed)}
        if model.dtype != torch.float64 and claim.allowed:
            ratio = claim.difference / claim.allowed
            compared = {"at_most": 1.0, "ratio": ratio, "ratio_of": "difference / allowed"}
        what = f"{name}, {_name(model.dtype)}: {claim.claim}"
        yield figure(what, claim.difference, "relative", **compared, parity=True, note=claim.where)


@contextlib.contextmanager
def exact_rms_norm() -> Iterator[None]:
    """Let the Llama family's RMSNorm compute in the dtype of its input, w x / sqrt(mean(x^2) + eps).

    transformers' own rounds to float32. A last bit that falls otherwise there is spread over the layers, in plain
    PyTorch as well: float64 would not mean float64.
    """

    def forward(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
        return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    with mock.patch.object(LlamaRMSNorm, "forward", forward):
        yield


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
