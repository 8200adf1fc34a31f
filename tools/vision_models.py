"""Measures whether packed training with pictures gives what every vision-language family of transformers gives alone.

    python tools/vision_models.py [FAMILY ...] [--save] [--json FILE]

As `models.py`, with real processors; needs torchvision, num2words and scipy. `docs/vision-models.md` is made from what
`--save` keeps.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import any_torchvision  # noqa: F401
import models
import torch
import torch.nn.functional as F
import vision_models_page
from models import (
    EXACT,
    TRL_PADDED,
    Result,
    attention_calls,
    build_trainer,
    gradient_error,
    gradients,
    message,
    one_step,
    outcome,
)
from tiny_models import Float64Throughout
from tiny_vision_models import LEFT_OUT, families, tiny_vision_model
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from vision_models_page import ALLOWED_OF_TRL, TOKENS_PER_PASS

from packsft.data.pictures import RowProcessor


def measure(family: str) -> Result:
    """What the table says of a family; `error` for one that is not measured."""
    if family in LEFT_OUT:
        return {"error": LEFT_OUT[family]}
    with Float64Throughout(), float64_pictures():
        try:
            model, processor, rows = tiny_vision_model(family)
        except Exception as error:
            return {"error": f"not built: {message(error)}"}
        try:
            batches = collated(processor, rows)
        except Exception as error:
            return {"error": f"TRL's collator raises, {message(error)}"}
        try:
            loss, truth = alone(model, batches)
        except Exception as error:
            return {"error": f"the model raises on a row alone, {message(error)}"}
        return {
            "class": type(model).__name__,
            "tokens": [batch["input_ids"].shape[1] for batch in batches],
            "packsft": ours(model, processor, rows, loss, truth),
            "trl": theirs(model, processor, rows, loss, truth),
        }


@contextlib.contextmanager
def float64_pictures() -> Iterator[None]:
    """Processors make float32, which float64 towers do not take."""
    collate = DataCollatorForVisionLanguageModeling.torch_call

    def in_float64(self: Any, examples: Any) -> Any:
        batch = collate(self, examples)
        tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        floating = {key: value.double() for key, value in tensors.items() if value.is_floating_point()}
        return batch | floating

    with mock.patch.object(DataCollatorForVisionLanguageModeling, "torch_call", in_float64):
        yield


def collated(processor: Any, rows: Any) -> list[Result]:
    """TRL's batch of each row alone."""
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss="completion" in rows.column_names)
    return [collator.torch_call([copy.deepcopy(row)]) for row in rows]


def alone(model: Any, batches: list[Result]) -> tuple[float, Any]:
    """Loss and gradients of each row by itself, through the model as transformers gives it."""
    model, loss = copy.deepcopy(model), 0.0
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits_TV = model(**inputs, use_cache=False).logits[0]
        part = F.cross_entropy(logits_TV[:-1], batch["labels"][0, 1:], reduction="sum") / count
        part.backward()
        loss += float(part.detach())
    return loss, gradients(model)


def ours(model: Any, processor: Any, rows: Any, loss: float, truth: Any) -> Result:
    """One optimizer step of all rows through `PackedSFTTrainer`."""
    planners, plan = [], RowProcessor.planner

    def noted(self: Any, *arguments: Any) -> Any:
        planners.append(plan(self, *arguments))
        return planners[-1]

    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(RowProcessor, "planner", noted),
        ):
            trainer = build_trainer(
                EXACT, copy.deepcopy(model), processor, rows, folder, bf16=False, max_length=TOKENS_PER_PASS,
                per_device_train_batch_size=len(rows), logging_nan_inf_filter=False, router_aux_loss_coef=0.0,
                remove_unused_columns=False,
            )  # fmt: skip
            with attention_calls() as calls:
                found = one_step(trainer)
        planned = "headers" if planners[0]._planned else "processed"
        return {"planned": planned} | outcome(trainer, len(calls), found, loss, truth)
    except Exception as error:
        return {"error": message(error)}


def theirs(model: Any, processor: Any, rows: Any, loss: float, truth: Any) -> Result:
    """The same rows as one padded batch through TRL's trainer, which packs none with pictures."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(
                TRL_PADDED, copy.deepcopy(model), processor, rows, folder, bf16=False, max_length=None,
                per_device_train_batch_size=len(rows), logging_nan_inf_filter=False, router_aux_loss_coef=0.0,
                remove_unused_columns=False,
            )  # fmt: skip
            trainer.current_gradient_accumulation_steps = 1  # which `train()` sets
            found = one_step(trainer)
            errors = {
                "loss_error": abs(found - loss) / loss,
                "gradient_error": gradient_error(gradients(trainer.model), truth),
            }
    except Exception as error:
        return {"verdict": "raises", "error": message(error)}
    return {"verdict": "right" if max(errors.values()) <= ALLOWED_OF_TRL else "differs"} | errors


if __name__ == "__main__":
    models.main(families(), measure, vision_models_page)
