"""One optimizer step of the trainer or of TRL's, and its truth: plain PyTorch on one document at a time."""

import copy

import torch
import torch.nn.functional as F
from tiny import tiny_tokenizer
from trl import SFTConfig, SFTTrainer

from packsft import PackedSFTConfig, PackedSFTTrainer

TRL_TOLERANCE = 8 * torch.finfo(torch.float32).eps  # TRL takes log-probabilities in float32, also of float64


def moved(model):
    """All that is trained, a step away from where it starts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def copied(model, dtype=None):
    model = copy.deepcopy(model).cpu()
    return model if dtype is None else model.to(dtype)  # which quantised weights refuse


def documents_alone(model, rows, dtype=None):
    """Each document through the model's own forward (transformers' SDPA, no packsft code): the cross-entropies of the
    scored tokens over their number in all documents, and the gradients."""
    model = copied(model, dtype).train()
    model.set_attn_implementation("eager" if "gemma" in model.config.model_type else "sdpa")
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    loss = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, -len(row["input_ids"]) : -1]  # not virtual
        labels = torch.tensor(row["labels"][1:])
        loss = loss + F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum"
        )
    loss = loss / count
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def packed_step(model, rows, tmp_path, dtype=None, **options):
    """Loss and gradients of all rows as one optimizer step of the trainer."""
    defaults = {"max_length": 32, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    args = PackedSFTConfig(str(tmp_path), **defaults | options)
    trainer = PackedSFTTrainer(
        model=copied(model, dtype), args=args, train_dataset=rows, processing_class=tiny_tokenizer()
    )
    return trainer, *one_step(trainer)


def one_step(trainer):
    """Loss and gradients of all of the trainer's rows, ours or TRL's, outside of `train()`."""
    trainer.model.train()
    trainer._filters_log = False  # which would give the loss of a step at its last micro-batch
    batches = list(trainer.get_train_dataloader())
    batches, num_items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(trainer.training_step(trainer.model, batch, num_items) for batch in batches)
    return loss, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def trl_step(model, rows, path):
    args = SFTConfig(
        str(path), packing=False, per_device_train_batch_size=len(rows), max_length=32, bf16=False, use_cpu=True,
        gradient_checkpointing=False, report_to="none",
    )  # fmt: skip
    return one_step(SFTTrainer(copy.deepcopy(model), args, train_dataset=rows, processing_class=tiny_tokenizer()))


def assert_gradients_equal(grads, exact, tolerance):
    """Per tensor, relative to its largest gradient; one that is zero in exact arithmetic (a key's bias does not change
    a softmax) is rounding noise of 1e-20, measured against a millionth of the largest gradient instead."""
    assert grads.keys() == exact.keys()
    floor = 1e-6 * max(grad.abs().max() for grad in exact.values())
    for name, grad in grads.items():
        off = (grad.cpu() - exact[name]).abs().max() / exact[name].abs().max().clamp(min=floor)
        assert off < tolerance, f"{name}: {off:.2g}"
