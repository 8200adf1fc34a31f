"""`packsft check`: proves on a named model that packed training is the same training.

Loads and prepares the model. `model/claims.py` measures the claims.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import send_to_device
from packsft_kernels import LossOptions
from packsft_kernels.varlen_attention import BACKENDS
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import is_peft_available

from packsft.app.rows import loaded, prepared_rows
from packsft.compat import is_out_of_memory
from packsft.data.collator import PackingCollator
from packsft.data.joined_pictures import JoinedPictures, RotaryPositions
from packsft.data.packs import pack_dataset
from packsft.data.pictures import PictureRows
from packsft.model.claims import PackingCheck, check_packing, first_documents, random_documents
from packsft.model.parts import count_embeddings
from packsft.model.positions import most_tokens_of
from packsft.model.prepared import PreparedModel


def check_model(
    model: str,
    *,
    adapter: str | None = None,
    attn: str | None = None,
    dtype: str = "float32",
    data: str | None = None,
    max_length: int = 1024,
) -> PackingCheck:
    """`claims.check_packing` on a model by folder or hub name, or "smollm2".

    Args:
        model: a causal language model, or for rows with pictures a vision-language model.
        adapter: folder or hub name of a PEFT adapter on it.
        attn: a name in `varlen_attention.BACKENDS` or a transformers attn_implementation; None: the trainer's choice.
        dtype: dtype of the weights and the forward.
        data: a data set, see `rows.load_rows`; None: random tokens.
        max_length: documents are cut here.

    Raises:
        ValueError: the model does not run without packing, `adapter` is given without PEFT, or `PreparedModel` raises.
    """
    rows, once = (None, (None, None)) if data is None else prepared_rows(data, model, max_length=max_length)
    loads = AutoModelForImageTextToText if isinstance(rows, PictureRows) else AutoModelForCausalLM
    network: Any = _load(model, getattr(torch, dtype), attn if attn not in (None, *BACKENDS) else None, loads)
    if adapter is not None:
        if not is_peft_available():
            raise ValueError(f"adapter {adapter} needs the package peft, which is not installed")
        from peft import PeftConfig, PeftModel

        config = PeftConfig.from_pretrained(adapter)
        if config.is_prompt_learning:
            raise ValueError(f"{type(config).__name__} trains padded rows: there is nothing to prove")
        network = PeftModel.from_pretrained(network, adapter, is_trainable=True)
    device = torch.device("cpu")
    if torch.accelerator.is_available():  # a CUDA build names an accelerator even where there is none
        device = torch.accelerator.current_accelerator() or device
    network = network.to(device)
    try:
        with torch.no_grad():
            network(input_ids=torch.tensor([[0, 1]], device=device))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{model} does not run by itself in {dtype}: {error}") from error
    config = network.config.get_text_config()
    routes = hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0.0) != 0.0
    prepared = PreparedModel(
        network,
        LossOptions(),
        attention_backend=attn if attn in BACKENDS else "auto",
        max_length=max_length,
        needs_aux_loss=routes,
    )
    vocab_size = count_embeddings(prepared.base_model)
    max_length = most_tokens_of(prepared.base_model, max_length) or max_length
    pictures = None
    if rows is None:
        documents = random_documents(vocab_size, max_length)
    elif isinstance(rows, PictureRows):
        documents = rows.shortest_documents()
        pictures = JoinedPictures(rows.processor, RotaryPositions.of(prepared.base_model))
    else:
        packs = pack_dataset(rows, max_length, strategy="none", name="train", vocab_size=vocab_size, once=once)
        documents = first_documents(packs.packs(), max_length)
    collator = PackingCollator(
        pad_token_id=0, padded=prepared.padded, max_length=max_length, masked=routes, pictures=pictures
    )
    return check_packing(network, prepared, documents, collator, lambda batch: send_to_device(batch, device))


def _load(model: str, dtype: torch.dtype, attn: str | None, loads: Any) -> PreTrainedModel:
    if model == "smollm2":
        from packsft.app.smollm2 import load_smollm2

        network, _ = load_smollm2(dtype)
        if attn is not None:
            network.set_attn_implementation(attn)
        return network
    options = {} if attn is None else {"attn_implementation": attn}
    return loaded(loads, model, dtype=dtype, **options)
