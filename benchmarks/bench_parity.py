"""The same training: each kernel against float64, then packed training against the same documents alone.

The truth is plain PyTorch in float64: each document by itself through the model's own forward, full logits. In
float64 packing must change nothing; in float32 and bfloat16 the error against that truth may be at most twice that
of plain PyTorch (one padded batch) in the same dtype, and half a unit in the last place ("allowed").

transformers' RMSNorm rounds to float32 inside. The last bit of one value in millions then falls otherwise when
documents share a matrix multiplication, and thirty layers of backward spread it to 5e-7 of every gradient, in plain
PyTorch as well. So that float64 means float64, `exact_rms_norm` leaves out that rounding, for the truth and for us;
the untouched model stands beside it with plain PyTorch's own difference.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from contest import Verdict, allowed_errors, relative_errors
from measure import Figure, Settings, device, figure, training_dtype
from peers import PLAIN_ATTENTION, PLAIN_HEAD, PLAIN_LOSS, attentions, heads, losses
from shapes import instruction_data, packed_row, smollm2, split_row, tiny_gpt2, tiny_llama, tiny_tokenizer
from torch import Tensor
from trainers import OURS, TRL_PACKED, build_trainer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

Row = dict[str, Any]
Gradients = dict[str, Tensor]

# One-token and two-token documents take other code paths than long ones; no length divides another.
TINY_LENGTHS = (1, 2, 7, 23, 31)
KERNEL_LIMIT = 1e-13  # in float64
GPT2_LIMIT = 1e-12
LLAMA_LIMIT = 1e-9  # rotary embeddings stay in float32
LOGITS_LIMIT = 1e-5


def bench_parity(settings: Settings) -> Iterator[Figure]:
    """The whole table; --quick and a dry run leave SmolLM2 out, which takes minutes."""
    tiny = [packed_row(TINY_LENGTHS, 64, seed=seed) for seed in range(4)]
    # Eight documents for every step, so that they can be split into 1, 2 and 8 micro-batches
    steps = [packed_row((3, 9, 5, 14, 2, 8, 11, 6), 64, seed=100 + step) for step in range(10)]
    yield from components()
    for name, build, limit in (("tiny GPT-2", tiny_gpt2, GPT2_LIMIT), ("tiny Llama", tiny_llama, LLAMA_LIMIT)):
        model, tokenizer = build(torch.float32), tiny_tokenizer()
        yield from one_step(name, model, tokenizer, tiny, limit)
        yield from ten_steps(name, model, tokenizer, steps, limit, learning_rate=1e-3)

    if settings.quick or settings.dry_run:
        yield figure("SmolLM2", note="not run with --quick: takes minutes")
        return
    try:
        model, tokenizer = smollm2(training_dtype())
    except ValueError as error:  # offline, and not in the cache: the tiny models' figures stand alone
        yield figure("SmolLM2", note=f"cannot run: {error}")
        return
    yield from one_step("SmolLM2", model, tokenizer, text_rows(tokenizer, (3, 24, 51, 84, 103), 6), LLAMA_LIMIT)
    steps = text_rows(tokenizer, (3, 9, 5, 14, 2, 8, 11, 6), 10)
    yield from ten_steps("SmolLM2", model, tokenizer, steps, LLAMA_LIMIT, learning_rate=5e-5)


def components() -> list[Figure]:
    """The largest error of every output of every kernel in every dtype, beside plain PyTorch's in the same dtype."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, *TINY_LENGTHS], device=device()).cumsum(0).to(torch.int32)
    T = int(bounds[-1])
    labels = torch.randint(1000, (T,), device=device()).masked_fill(torch.arange(T, device=device()) % 3 == 0, -100)
    scored = (labels != -100).nonzero().flatten()
    hidden, weight = torch.randn(T, 64, device=device()), torch.randn(1000, 64, device=device()) / 8
    logits = 3 * torch.randn(T, 1000, device=device())
    qkv = [torch.randn(T, heads, 64, device=device()) for heads in (4, 2, 2)]
    table = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for kernel, peers, plain, given, targets in (
            ("cross_entropy", losses(), PLAIN_LOSS, [logits], [labels]),
            ("linear_cross_entropy", heads(scored), PLAIN_HEAD, [hidden, weight], [labels]),
            ("varlen_attention", attentions(bounds, dtype, 64), PLAIN_ATTENTION, qkv, []),
        ):
            runs = {peer.name: peer.run for peer in peers}

            def outputs(
                name: str, wanted: torch.dtype, runs: Any = runs, given: Any = given, targets: Any = targets
            ) -> Any:
                leaves = [tensor.to(dtype).to(wanted, copy=True).requires_grad_() for tensor in given]  # noqa: B023
                result = runs[name](*(leaf.view_as(leaf) for leaf in leaves), *targets)
                weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype, device=device()).view_as(result)
                grads = torch.autograd.grad((result * weights).sum() if result.dim() else result, leaves)
                return {"output": result.detach(), **{f"gradient {i}": grad for i, grad in enumerate(grads, 1)}}

            truth = outputs(plain, torch.float64)
            ours, theirs = (relative_errors(outputs(name, dtype), truth) for name in (OURS, plain))
            allowed = allowed_errors(theirs, dict.fromkeys(theirs, dtype))
            if dtype == torch.float64:
                allowed = dict.fromkeys(allowed, KERNEL_LIMIT)
            table.append(
                figure(
                    f"{kernel}, {str(dtype).removeprefix('torch.')}", max(ours.values()), "relative",
                    ratio=Verdict(ours, allowed).share, ratio_of="error / allowed", at_most=1.0, parity=True,
                    note="; ".join(f"{name} {ours[name]:.1e}, plain PyTorch {theirs[name]:.1e}" for name in ours),
                )
            )  # fmt: skip
    return table


def one_step(name: str, model: Any, tokenizer: Any, rows: Sequence[Row], limit: float) -> list[Figure]:
    """Loss of every row and the gradients of the first, packed, against the documents alone, in three dtypes."""
    exact_model = copy.deepcopy(model).to(device(), torch.float64)
    with exact_rms_norm():
        exact = [documents_alone(exact_model, row, backward=row is rows[0]) for row in rows]
    truth = gradients(exact_model)
    table = []
    for peer in (OURS, TRL_PACKED):
        with exact_rms_norm(), trainer_of(peer, exact_model, tokenizer, rows) as trainer:
            losses = [packed(trainer, [row], backward=row is rows[0]) for row in rows]
            errors = {"loss": loss_error(losses, exact), "gradients": gradient_error(gradients(trainer.model), truth)}
        for what, error in errors.items():
            table.append(
                figure(
                    f"{name}, {what}, float64{'' if peer == OURS else ', ' + peer}",
                    error,
                    "relative",
                    at_most=limit if peer == OURS else None,
                    parity=peer == OURS,
                    note="largest over parameters of max|error| / max|gradient|" if what == "gradients" else "",
                    headline=f"{name}, packed against each document alone, float64: {what}"
                    * (peer == OURS and name == "SmolLM2"),
                )
            )
    if has_rms_norm(exact_model):
        table.append(untouched_figure(name, exact_model, tokenizer, rows[0]))
    del exact_model
    for dtype in (torch.float32, torch.bfloat16):
        plain_model = copy.deepcopy(model).to(device(), dtype)
        losses = [padded_batch(plain_model, row, tokenizer.pad_token_id, backward=row is rows[0]) for row in rows]
        plain = {"loss": loss_error(losses, exact), "gradients": gradient_error(gradients(plain_model), truth)}
        with trainer_of(OURS, plain_model, tokenizer, rows) as trainer:
            if dtype == torch.float32:
                table.append(logits_figure(name, trainer, plain_model, rows[0]))
            losses = [packed(trainer, [row], backward=row is rows[0]) for row in rows]
            ours = {"loss": loss_error(losses, exact), "gradients": gradient_error(gradients(trainer.model), truth)}
        for what in ours:
            # half a unit in the last place of the result (losses are float32), beside twice plain PyTorch's own error
            last_place = torch.finfo(torch.float32 if what == "loss" else dtype).eps
            allowed = 2 * plain[what] + last_place / 4
            table.append(
                figure(
                    f"{name}, {what}, {str(dtype).removeprefix('torch.')}",
                    ours[what],
                    "relative",
                    ratio=ours[what] / allowed,
                    ratio_of="error / allowed",
                    at_most=1.0,
                    parity=True,
                    note=f"plain PyTorch {plain[what]:.1e}",
                )
            )
    return table


def untouched_figure(name: str, exact_model: Any, tokenizer: Any, row: Row) -> dict[str, Any]:
    """Float64 gradients with the RMSNorm as it is, beside what plain PyTorch differs by from itself: each document
    alone as before, with the same loss written as `logsumexp - z[target]`.

    Without a target: whether a bit falls otherwise is luck, and what it does afterwards is the model's doing.
    """
    exact_model.zero_grad(set_to_none=True)
    documents_alone(exact_model, row)
    truth = gradients(exact_model)
    exact_model.zero_grad(set_to_none=True)
    documents_alone(exact_model, row, summed_loss=loss_written_otherwise)
    plain = gradient_error(gradients(exact_model), truth)
    with trainer_of(OURS, exact_model, tokenizer, [row]) as trainer:
        packed(trainer, [row])
        ours = gradient_error(gradients(trainer.model), truth)
    note = f"plain PyTorch, documents alone, its loss written another way: {plain:.1e}"
    return figure(f"{name}, gradients, float64, RMSNorm rounding to float32", ours, "relative", note=note)


@contextmanager
def exact_rms_norm() -> Iterator[None]:
    """Let the Llama family's RMSNorm compute in the dtype of its input: w x / sqrt(mean(x^2) + eps)."""

    def forward(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
        return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    with mock.patch.object(LlamaRMSNorm, "forward", forward):
        yield


def has_rms_norm(model: Any) -> bool:
    return any(isinstance(module, LlamaRMSNorm) for module in model.modules())


def ten_steps(
    name: str, model: Any, tokenizer: Any, rows: Sequence[Row], limit: float, *, learning_rate: float
) -> list[Figure]:
    """Float64 weights after one AdamW step per row, for several splits of its documents into packs and micro-batches.

    A split is a list of micro-batches, each a list of packs.
    """
    splits = {
        "one pack": lambda row: [[row]],
        "two packs, two micro-batches": lambda row: [[pack] for pack in halves(row)],
        "two packs, one micro-batch": lambda row: [halves(row)],
        "a micro-batch per document": lambda row: [[document] for document in split_row(row)],
    }
    exact_model = copy.deepcopy(model).to(device(), torch.float64)
    optimizer = adamw(exact_model, learning_rate)
    for row in rows:
        with exact_rms_norm():
            documents_alone(exact_model, row)
        optimizer_step(exact_model, optimizer)
    truth = {key: value.detach() for key, value in exact_model.named_parameters()}
    moved = max(float((truth[key] - value.to(truth[key])).abs().max()) for key, value in model.named_parameters())
    del optimizer
    table = []
    for split, micro_batches in splits.items():
        ours = copy.deepcopy(model).to(device(), torch.float64)
        with exact_rms_norm(), trainer_of(OURS, ours, tokenizer, rows) as trainer:
            optimizer = adamw(trainer.model, learning_rate)
            for row in rows:
                for batch in micro_batches(row):
                    packed(trainer, batch, num_items=count_scored(row))
                optimizer_step(trainer.model, optimizer)
            error = gradient_error(dict(trainer.model.named_parameters()), truth)
            del optimizer
        table.append(
            figure(
                f"{name}, weights after {len(rows)} optimizer steps, {split}",
                error,
                "relative",
                at_most=limit,
                parity=True,
                note=f"the weights moved by up to {moved:.1e}",
            )
        )
    return table


@contextmanager
def trainer_of(peer: str, model: Any, tokenizer: Any, rows: Sequence[Row], **arguments: Any) -> Iterator[Any]:
    """A trainer over packs that are already made, in the dtype of the model; `arguments` are of its configuration."""
    from datasets import Dataset

    model.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory() as folder:
        yield build_trainer(
            peer,
            copy.deepcopy(model),
            tokenizer,
            Dataset.from_list(list(rows)),
            folder,
            bf16=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            **arguments,
        )
    gc.collect()


def packed(trainer: Any, rows: Sequence[Row], *, num_items: int | None = None, backward: bool = True) -> float:
    """Loss of one micro-batch through the trainer's own collator and `compute_loss`; gradients accumulate."""
    num_items = sum(map(count_scored, rows)) if num_items is None else num_items
    inputs = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in rows]))
    trainer.model.train()
    with torch.set_grad_enabled(backward), trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(num_items))
    if backward:
        loss.backward()
    return float(loss.detach())


def torchs_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return F.cross_entropy(logits_TV, labels_T, reduction="sum")


def loss_written_otherwise(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """The same sum over the scored tokens, rounded in other places."""
    scored = labels_T != -100
    logits_NV, targets_N1 = logits_TV[scored], labels_T[scored][:, None]
    return (logits_NV.logsumexp(-1) - logits_NV.gather(-1, targets_N1).squeeze(-1)).sum()


def documents_alone(
    model: Any,
    row: Row,
    *,
    backward: bool = True,
    summed_loss: Callable[[Tensor, Tensor], Tensor] = torchs_loss,
) -> float:
    """Mean loss over the scored tokens, every document through the model by itself; gradients accumulate."""
    total = 0.0
    for document in split_row(row):
        ids, labels = (torch.tensor(document[key], device=device()) for key in ("input_ids", "labels"))
        if len(ids) < 2 or not (labels[1:] != -100).any():
            continue  # nothing is predicted
        with torch.set_grad_enabled(backward):
            logits_TV = model(input_ids=ids[None], use_cache=False).logits[0]
            loss = summed_loss(logits_TV[:-1], labels[1:]) / count_scored(row)
        if backward:
            loss.backward()
        total += float(loss.detach())
    return total


def padded_batch(model: Any, row: Row, pad: int, *, backward: bool = True) -> float:
    """The same loss as plain PyTorch users compute it: one right-padded batch, the logits in float32 (or wider)."""
    documents = split_row(row)
    longest = max(row["seq_lengths"])
    ids = torch.full((len(documents), longest), pad, device=device())
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, document in enumerate(documents):
        length = len(document["input_ids"])
        ids[i, :length] = torch.tensor(document["input_ids"])
        labels[i, :length] = torch.tensor(document["labels"])
        mask[i, :length] = 1
    with torch.set_grad_enabled(backward):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / count_scored(row)
    if backward:
        loss.backward()
    return float(loss.detach())


def logits_figure(name: str, trainer: Any, model: Any, row: Row) -> Figure:
    """Float32 logits of a whole pack against every document alone."""
    inputs = trainer._prepare_inputs(trainer.data_collator([dict(row)]))
    with torch.no_grad():
        logits = trainer.model(
            **{key: value for key, value in inputs.items() if key != "labels" and not key.startswith("loss_")},
            use_cache=False,
        ).logits[0]
        documents = [torch.tensor(document["input_ids"], device=device())[None] for document in split_row(row)]
        alone = torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in documents])
    error = float((logits - alone).abs().max() / alone.abs().max())
    return figure(
        f"{name}, logits, float32", error, "of the largest logit", at_most=LOGITS_LIMIT, parity=True, note="whole model"
    )


def text_rows(tokenizer: Any, lengths: Sequence[int], count: int) -> list[Row]:
    """`count` packs of real text, each with documents of these lengths (longer examples are cut)."""
    wanted = [length for _ in range(count) for length in lengths]
    texts = [example["prompt"] + example["completion"] for example in instruction_data(None, 16 * len(wanted))]
    documents = iter(sorted(tokenizer(texts)["input_ids"], key=len, reverse=True))
    cut = {}
    for place in sorted(range(len(wanted)), key=lambda place: -wanted[place]):
        cut[place] = next(documents)[: wanted[place]]
        assert len(cut[place]) == wanted[place], "16 examples per document hold one that is long enough"
    rows = []
    for i in range(count):
        parts = [cut[i * len(lengths) + j] for j in range(len(lengths))]
        labels = [[-100] * (len(part) // 3) + part[len(part) // 3 :] for part in parts]
        rows.append({"input_ids": [*chain(*parts)], "labels": [*chain(*labels)], "seq_lengths": list(lengths)})
    return rows


def halves(row: Row) -> list[Row]:
    """A pack as two packs: every other document."""
    documents = split_row(row)
    return [
        {key: [*chain(*(document[key] for document in half))] for key in row}
        for half in (documents[::2], documents[1::2])
    ]


def count_scored(row: Row) -> int:
    """Labels that some position predicts: all but -100 and each document's first."""
    return sum(label != -100 for document in split_row(row) for label in document["labels"][1:])


def adamw(model: Any, learning_rate: float) -> torch.optim.Optimizer:
    # The gradient of GPT-2's key bias is zero but for rounding (softmax ignores what all scores share). AdamW divides
    # that rounding by eps: 1e-8 would make 1e-17 a hundred thousand times what it is in the other weights.
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, eps=1e-6)


def optimizer_step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def gradients(model: Any) -> Gradients:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def gradient_error(found: Gradients, truth: Gradients) -> float:
    """Largest over the tensors of max|found - truth| / max|truth|; infinite if a tensor is missing."""
    if found.keys() != truth.keys():
        return float("inf")
    errors = [(found[name].double() - exact).abs().max() / exact.abs().max() for name, exact in truth.items()]
    return float(torch.stack(errors).max())


def loss_error(found: Sequence[float], truth: Sequence[float]) -> float:
    """Largest relative error; over several packs, so that no lucky rounding decides."""
    return float(np.max([abs(ours - exact) / abs(exact) for ours, exact in zip(found, truth, strict=True)]))
