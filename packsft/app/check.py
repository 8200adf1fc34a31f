"""`packsft check`: whether packed training is the same training, on a model by name, with the trainer as it is.

Loads and builds; what is measured is `claims.py`'s, and how a step is split is `invariance.py`'s.

    python -m packsft.app.check FOLDER   # one process of the check of batch invariance
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from packsft_kernels.varlen_attention import BACKENDS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments
from transformers.utils import is_peft_available

from packsft.app.inspect import load_rows
from packsft.config import PackedSFTConfig
from packsft.model.head import count_embeddings
from packsft.proof.claims import PackingCheck, random_documents
from packsft.proof.invariance import InvarianceResult, certify_by_name, number_tokenizer, train_layouts
from packsft.trainer import PackedSFTTrainer

WORKER = "packsft.app.check"


def check_batch_invariance(model: str | None, num_steps: int) -> list[InvarianceResult]:
    """`invariance.certify_by_name` with packsft's trainer."""
    return certify_by_name(model, num_steps, WORKER)


def check_model(
    model: str,
    *,
    adapter: str | None = None,
    attn: str | None = None,
    dtype: str = "float32",
    data: str | None = None,
    max_length: int = 1024,
) -> PackingCheck:
    """`PackedSFTTrainer.check_packing` on a model by folder or hub name, or "smollm2".

    Args:
        model: a causal language model.
        adapter: folder or hub name of a PEFT adapter on it.
        attn: a name of `varlen_attention.BACKENDS`, or else of transformers' attentions; None: what the trainer takes.
        dtype: what the model computes in.
        data: a data set, see `inspection.load_rows`; None: tokens at random.
        max_length: where documents are cut.

    Raises:
        ValueError: the model does not run by itself, or `adapter` without PEFT; and what the trainer raises.
    """
    own_attention = attn if attn not in (None, *BACKENDS) else None
    network, tokenizer = _load(model, getattr(torch, dtype), own_attention, needs_tokenizer=data is not None)
    if adapter is not None:
        if not is_peft_available():
            raise ValueError(f"adapter {adapter}: needs the package peft, which is not installed")
        from peft import PeftModel

        network = PeftModel.from_pretrained(network, adapter, is_trainable=True)
    device = TrainingArguments("unused", report_to="none", use_cpu=not torch.accelerator.is_available()).device
    network = network.to(device)
    try:
        with torch.no_grad():
            network(input_ids=torch.tensor([[0, 1]], device=network.device))
    except RuntimeError as error:
        raise ValueError(f"{model} does not run by itself in {dtype}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        args = PackedSFTConfig(
            folder, bf16=False, report_to="none", max_length=max_length, gradient_checkpointing=False,
            attention_backend=attn if attn in BACKENDS else "auto",
        )  # fmt: skip
        rows = random_documents(count_embeddings(network), max_length)
        return PackedSFTTrainer(
            model=network,
            args=args,
            train_dataset=Dataset.from_list(rows) if data is None else load_rows(data),
            processing_class=tokenizer,
        ).check_packing()


def _load(model: str, dtype: torch.dtype, attn: str | None, *, needs_tokenizer: bool) -> tuple[PreTrainedModel, Any]:
    if model == "smollm2":
        from packsft.app.smollm2 import load_smollm2

        network, tokenizer = load_smollm2(dtype)
        if attn is not None:
            network.set_attn_implementation(attn)
        return network, tokenizer
    options = {} if attn is None else {"attn_implementation": attn}
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **options)
    if not needs_tokenizer:
        return network, number_tokenizer(count_embeddings(network))
    try:
        return network, AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{model}: its tokenizer, which data needs, could not be loaded: {error}") from error


if __name__ == "__main__":
    train_layouts(sys.argv[1], PackedSFTTrainer, PackedSFTConfig)
