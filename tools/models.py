"""Measures whether packed training gives what every family of transformers gives alone, small, in float64 on the CPU.

    python tools/models.py [FAMILY ...] [--save] [--json FILE]

A family is measured in a process of its own, so that a crash costs one family. `docs/models.md` is made from what
`--save` keeps. Knows trainers and models; how a model is shrunk is in `tiny_models.py`, and the page is written by
`models_page.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import itertools
import logging
import math
import multiprocessing
import multiprocessing.connection
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import datasets
import models_page
import torch
import torch.nn.functional as F
import transformers
import trl
from datasets import Dataset
from models_page import LIMIT, results_file
from packsft_kernels.version import __version__
from tiny_models import LEFT_OUT, Float64Throughout, families, is_adapted, tiny_model

from packsft.model import attention, isolation
from packsft.model.claims import rounds_to_float32

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from harness.report import read, write
from harness.shapes import packed_row, tiny_tokenizer
from harness.trainers import EXACT, TRL_PACKED, TRL_PADDED, build_trainer  # noqa: F401, for the pictures

# One and two tokens take other code paths; 7 to 14 are longer than a window of 4; passes of 32 hold some of them each.
LENGTHS = (7, 1, 14, 2, 12, 5, 3, 11, 9)
TOKENS_PER_PASS = 32
SECONDS = 240  # for a family
AT_ONCE = 2

Result = dict[str, Any]
Measure = Callable[[str], Result]


def measure(family: str) -> Result:
    """What the table says of a family; `error` for one that is not measured."""
    if family in LEFT_OUT:
        return {"error": LEFT_OUT[family]}
    row = packed_row(LENGTHS, 64, seed=0)
    with Float64Throughout():
        try:
            model = tiny_model(family)
            loss, truth = alone(model, row)
        except Exception as error:
            return {"error": f"not built: {message(error)}"}
        result = {
            "class": type(model).__name__,
            "adapted": is_adapted(family),
            "causal": is_causal(model),
            "own_attention": model.config._attn_implementation,
            "packsft": ours(model, row, loss, truth),
            "trl": theirs(model, row, loss, truth),
        }
        text = model.config.get_text_config()
        if hasattr(text, "output_router_logits") and getattr(text, "router_aux_loss_coef", 0.0):
            # too small to count: of this loss, which is one of all tokens of a pass, only that it disturbs nothing
            result["router_loss_on"] = ours(model, row, loss, truth, router_loss=1e-30)
    return result | {"rounding": rounding(model, row, loss, truth)}


def alone(model: Any, row: Result) -> tuple[float, Any]:
    """Loss and gradients of each document by itself, through the model as transformers gives it."""
    model = copy.deepcopy(model)  # Recurrent Gemma keeps a state
    documents, loss = split(row), 0.0
    count = sum(label != -100 for document in documents for label in document["labels"][1:])
    for document in documents:
        ids, labels = (torch.tensor(document[key]) for key in ("input_ids", "labels"))
        if (labels[1:] != -100).any():
            logits_TV = model(input_ids=ids[None], use_cache=False).logits[0]
            part = F.cross_entropy(logits_TV[:-1], labels[1:], reduction="sum") / count
            part.backward()
            loss += float(part.detach())
    return loss, gradients(model)


def split(row: Result) -> list[Result]:
    """The documents of a pack."""
    stops = list(itertools.accumulate(row["seq_lengths"]))
    parts = [slice(stop - length, stop) for stop, length in zip(stops, row["seq_lengths"], strict=True)]
    return [{key: row[key][part] for key in ("input_ids", "labels")} for part in parts]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def is_causal(model: Any) -> bool:
    """Whether what follows leaves unchanged what earlier positions say."""
    model = copy.deepcopy(model)
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        first, whole = (model(input_ids=part, use_cache=False).logits[0, :7] for part in (ids[:, :7], ids))
    return bool((first - whole).abs().max() <= LIMIT * whole.abs().max())


def rounding(model: Any, row: Result, loss: float, truth: Any) -> Result | None:
    """The errors where the model's casts to float32 stay in, beside the model's own: alone with them and without.

    None for a model that has no such casts.
    """
    watched = copy.deepcopy(model)
    watched.config.use_cache = False  # BLT's cache wants a number of layers that its configuration does not have
    try:
        if not rounds_to_float32(watched):
            return None
        own_loss, own = alone(model, row)
    except (RuntimeError, ValueError) as error:  # a float32 meets a weight in float64
        return {"error": message(error)}
    found = ours(model, row, own_loss, own)
    errors = ("error", "loss_error", "gradient_error")
    own_errors = {"own_loss_error": abs(own_loss - loss) / loss, "own_gradient_error": gradient_error(own, truth)}
    return {name: found[name] for name in errors if name in found} | own_errors


def ours(model: Any, row: Result, loss: float, truth: Any, *, router_loss: float = 0.0) -> Result:
    """One optimizer step of all documents through `PackedSFTTrainer`, in passes of 32 tokens."""
    try:
        with exact_trainer(model, row, router_loss) as trainer, attention_calls() as calls:
            found = one_step(trainer)
            return outcome(trainer, len(calls), found, loss, truth)
    except Exception as error:
        return {"error": message(error)}


@contextlib.contextmanager
def attention_calls() -> Iterator[list[None]]:
    """One item for each call of packsft's attention."""
    calls: list[None] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return varlen_attention(*args, **kwargs)

    varlen_attention = attention.varlen_attention
    with mock.patch.object(attention, "varlen_attention", counted):
        yield calls


def outcome(trainer: Any, num_calls: int, found: float, loss: float, truth: Any) -> Result:
    """How packsft's trainer ran its step, and how far from the truth."""
    return {
        "way": "padded" if trainer.data_collator.padded else "varlen",
        "why_padded": trainer.isolation.reason,
        "attention": attention.attention_of(trainer.model),
        "attention_calls": num_calls,
        "head": "fused" if trainer.why_compact is None else "compact",
        "why_compact": trainer.why_compact,
        "loss_error": abs(found - loss) / loss,
        "gradient_error": gradient_error(gradients(trainer.model), truth),
    }


@contextlib.contextmanager
def exact_trainer(model: Any, row: Result, router_loss: float) -> Iterator[Any]:
    """packsft as it is by default, the documents of the row being one step."""
    documents = split(row)
    with tempfile.TemporaryDirectory() as folder:
        yield build_trainer(
            EXACT, copy.deepcopy(model), tiny_tokenizer(), Dataset.from_list(documents), folder, bf16=False,
            max_length=TOKENS_PER_PASS, per_device_train_batch_size=len(documents), logging_nan_inf_filter=False,
            router_aux_loss_coef=router_loss,
        )  # fmt: skip


def one_step(trainer: Any) -> float:
    """The loss of a step; gradients are left in the model."""
    trainer.model.train()
    batches = list(trainer.get_train_dataloader())
    batches, num_items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    return sum(float(trainer.training_step(trainer.model, batch, num_items)) for batch in batches)


def theirs(model: Any, row: Result, loss: float, truth: Any) -> Result:
    """The same documents as one pack through TRL's trainer: does the last one's gradient reach the others' input?"""
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(
                TRL_PACKED, copy.deepcopy(model), tiny_tokenizer(), Dataset.from_list([row]), folder, bf16=False,
                dataset_kwargs={"skip_prepare_dataset": True}, router_aux_loss_coef=0.0,
            )  # fmt: skip
            inputs = trainer._prepare_inputs(trainer.data_collator([dict(row)]))
            inputs.pop("labels")
            begin = sum(LENGTHS[:-1])
            with isolation._embedding_leaf(trainer.model) as leaf:
                logits = trainer.model(**inputs, use_cache=False).logits
            reached = isolation._gradient(logits[0, begin:], leaf[0])[:begin]
            trainer.model.zero_grad(set_to_none=True)
            found = packed_loss(trainer, row)
            errors = {
                "loss_error": abs(found - loss) / loss,
                "gradient_error": gradient_error(gradients(trainer.model), truth),
            }
    except Exception as error:
        return {"verdict": "raises", "error": message(error)}
    if reached.any() or reached.isnan().any():
        return {"verdict": "leaks"} | errors
    right = max(errors.values()) <= LIMIT  # False for what is no number
    return {"verdict": "clean" if right else "differs"} | errors


def packed_loss(trainer: Any, row: Result) -> float:
    """The loss of the row as one micro-step of the trainer; gradients are left in the model."""
    inputs = trainer._prepare_inputs(trainer.data_collator([dict(row)]))
    num_items = sum(label != -100 for document in split(row) for label in document["labels"][1:])
    trainer.model.train()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(num_items))
    loss.backward()
    return float(loss.detach())


def gradient_error(found: Any, truth: Any) -> float:
    """Largest over the tensors of max|found - truth| / max|truth|.

    A gradient that is zero in exact arithmetic (a key's bias changes no softmax) is measured against a millionth of the
    largest, and one that is missing is taken for zero.
    """
    floor = 1e-6 * max(float(grad.abs().max()) for grad in truth.values())
    whole = {name: found.get(name, torch.zeros_like(grad)) for name, grad in truth.items()}
    added = {name: grad for name, grad in found.items() if name not in truth and grad.abs().max() > 0}
    if added:
        return math.inf
    return max(
        float((whole[name] - grad).abs().max() / grad.abs().max().clamp(min=floor)) for name, grad in truth.items()
    )


def message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def sweep(names: Sequence[str], measure: Measure) -> Iterator[tuple[str, Result]]:
    """(family, what was measured) as they finish, each in a fork of this process, which has imported what it takes."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(measure, waiting[0], send))
            process.start()
            send.close()  # here, so that the end of the process is the end of the pipe
            running[receive] = waiting.pop(0), process, time.monotonic()
        ready = multiprocessing.connection.wait(list(running), timeout=1)
        for receive, (name, process, started) in list(running.items()):
            if receive in ready:
                try:
                    result = receive.recv()
                except EOFError:
                    process.join()
                    result = {"error": f"crashed: the process ended with {process.exitcode}"}
            elif time.monotonic() - started > SECONDS:
                process.kill()
                result = {"error": f"took more than {SECONDS} seconds"}
            else:
                continue
            process.join()
            del running[receive]
            yield name, result


def _child(measure: Measure, family: str, send: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    send.send(measure(family))


def main(registry: Sequence[str], measure: Measure, page: ModuleType) -> None:
    """Measures families of the registry; the page is a module with DOCUMENT, RESULTS, `page` and `status`."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; default: every one that transformers knows")
    parser.add_argument("--save", action="store_true", help=f"keep the results, and write {page.DOCUMENT.name} anew")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    names = options.families or registry
    if unknown := set(names) - set(registry):
        parser.error(f"transformers {transformers.__version__} has no {', '.join(unknown)} in its registry")
    started, results = time.monotonic(), {}
    for name, result in sweep(names, measure):
        results[name] = result
        print(f"{len(results):3}/{len(names)} {name}: {page.status(result)}", flush=True)
    file = results_file(page.RESULTS, transformers.__version__)
    seconds = round(time.monotonic() - started)
    if options.save and options.families and file.exists():  # some families anew
        seconds, results = read(file)["seconds"], read(file)["families"] | results
    report = {
        "date": f"{datetime.date.today()}",
        "versions": {
            "packsft": __version__, "transformers": transformers.__version__, "trl": trl.__version__,
            "torch": torch.__version__,
        },
        "seconds": seconds,
        "families": {name: results[name] for name in registry if name in results},
    }  # fmt: skip
    if options.json:
        write(report, options.json)
    if options.save:
        write(report, file)
        page.DOCUMENT.write_text(page.page(report), encoding="utf-8")


if __name__ == "__main__":
    main(families(), measure, models_page)
