"""Registers `attn_implementation="packsft"` with transformers: attention within documents where boundaries arrive.

A layer that gets `cu_seq_lens_q` attends within documents, through `packsft_kernels.varlen_attention`, and needs no
mask. Without it (generation, padded evaluation) a layer runs SDPA with transformers' own mask. The keyword argument
alone decides, so recomputation of a checkpointed layer in the backward takes the same path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from packsft_kernels.attention_spec import AttentionSpec
from packsft_kernels.varlen_attention import choose_backend, varlen_attention
from packsft_kernels.varlen_sdpa import attention_with_scores
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from packsft.compat import attention_registries
from packsft.model.parts import device_of
from packsft.model.sequence_parallel import group_of

ATTENTION_NAME = "packsft"
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
ATTENTIONS, MASKS = attention_registries()


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `[B, heads, S, K]` in, `([B, S, H, K], None)` out.

    Raises:
        ValueError: in a packed forward, the boundaries did not arrive (documents would see each other), or the model
            makes a mask of its own.
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        return _unpacked(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs), None
    if attention_mask is not None and ATTENTION_NAME not in MASKS:
        raise ValueError(f"{type(module).__name__} makes a mask of its own, which per-document attention cannot take")
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q needs one row of documents, got a batch of {query.shape[0]}")
    options: dict[str, Any] = {
        "causal": getattr(module, "is_causal", True) if is_causal is None else is_causal,
        "window": kwargs.get("sliding_window"),
        "softcap": kwargs.get("softcap"),
        "dropout": dropout,
    }
    sinks, group = kwargs.get("s_aux"), group_of(module)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, K], views; `x[0]` copies grads
    if group is not None:
        q, k, v = group.to_heads(q, k, v)
        sinks = group.own_heads(sinks)
    out = varlen_attention(
        q, k, v, cu_seqlens, int(kwargs["max_length_q"]), scale=scaling, sinks=sinks, backend=_backend_of(module),
        **options,
    )  # fmt: skip
    if group is not None:
        out = group.to_tokens(out)
    return out.unsqueeze(0), None


def _unpacked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    **kwargs: Any,
) -> Tensor:
    if ATTENTION_NAME not in MASKS:
        raise ValueError(
            f"{type(module).__name__} was called on packed documents without cu_seq_lens_q: the model drops keyword "
            "arguments on the way to its attention, so that its documents would see each other"
        )
    if _open_row is not None and not torch.compiler.is_compiling() and _mixes(_open_row, query, attention_mask):
        raise ValueError(
            "a forward got a row of several documents, which would see each other: give it all inputs of the batch, "
            "model(**inputs), or the input_ids and position_ids without an attention_mask"
        )
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    if softcap is None and sinks is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return out
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attention_with_scores(query, key, value, scale, attention_mask, softcap, sinks)
    return out.transpose(1, 2).contiguous()


@dataclass
class _OpenRow:
    """The row that a user's forward may be given: its tokens, its boundaries, and the masks that were looked at."""

    num_tokens: int
    cu_seqlens: Tensor
    mixes: list[tuple[Tensor, bool]] = field(default_factory=list)


_open_row: _OpenRow | None = None


@contextmanager
def refusing_mixed(num_tokens: int, cu_seqlens: Tensor) -> Iterator[None]:
    """While open, attention without boundaries over these tokens, or all but one of them, as for a shift, is refused if
    the documents see each other. Compiled code is not looked at."""
    global _open_row
    _open_row = _OpenRow(num_tokens, cu_seqlens)
    try:
        yield
    finally:
        _open_row = None


def _mixes(row: _OpenRow, query: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether the second document sees the first. Reads the device, once for a mask."""
    if not row.num_tokens - 1 <= query.shape[2] <= row.num_tokens:
        return False
    if attention_mask is None:
        return True
    for mask, mixes in row.mixes:
        if mask is attention_mask:
            return mixes
    begin = int(row.cu_seqlens[1])
    seen = attention_mask[..., begin, begin - 1]
    mixes = bool((seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2).any())
    row.mixes.append((attention_mask, mixes))
    return mixes


def attention_of(model: PreTrainedModel) -> str | None:
    """The attention of the layers that see the text."""
    return model.config.get_text_config()._attn_implementation


def towers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The models within a model that see no text."""
    text = model.config.get_text_config()
    if text is model.config:
        return []
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model)
    return [one for one in inner if one.config.get_text_config() is one.config and one.config is not text]


def _without_boundaries(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {key: value for key, value in kwargs.items() if key not in BOUNDARIES}


def keep_boundaries_from_towers(model: PreTrainedModel) -> None:
    """Some models hand what their layers of text get to their tower, too: flash attention there would cut its pictures
    at the boundaries of documents."""
    for tower in towers_of(model):
        if not hasattr(tower, "packsft_tower"):
            hook = tower.register_forward_pre_hook(_without_boundaries, with_kwargs=True)
            tower.packsft_tower = hook  # type: ignore[assignment]


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Sets it. A tower of a vision-language model keeps its own: it sees pictures, not documents."""
    text = model.config.get_text_config()
    parts = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
    model.set_attn_implementation(dict.fromkeys(parts, name) if parts else name)


def set_backend(model: nn.Module, backend: str) -> None:
    """Choose the back end of packed attention for this model: "auto" or a name in `varlen_attention.BACKENDS`.

    Each module stores the name, because the attention function sees only its layer. A deep copy keeps it.
    """
    for module in model.modules():
        module.packsft_backend = backend  # type: ignore[assignment]


def _backend_of(module: nn.Module) -> str:
    return getattr(module, "packsft_backend", "auto")


def backend_of(model: PreTrainedModel) -> tuple[str, AttentionSpec]:
    """The back end of a training forward under the current autocast, and the spec that it must support.

    Raises:
        ValueError: the back end was chosen by name and cannot run.
    """
    config, device = model.config.get_text_config(), device_of(model).type
    # DeepSeek's `head_dim` is that of the rotated part alone
    head_dim = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    v_head_dim = getattr(config, "v_head_dim", None) or head_dim
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    dropout = getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None) or 0.0  # GPT-2's name
    spec = AttentionSpec(
        device, dtype, max(head_dim, v_head_dim), head_dim == v_head_dim, dropout=dropout,
        softcap=getattr(config, "attn_logit_softcapping", None), window=getattr(config, "sliding_window", None),
        sinks=any(name.endswith("sinks") for name, _ in model.named_parameters()),
    )  # fmt: skip
    return choose_backend(spec, _backend_of(model)), spec


@contextmanager
def packed_forward() -> Iterator[None]:
    """While open, transformers builds no mask for `attn_implementation="packsft"`.

    The registered mask function is SDPA's, which a padded call needs. In a packed call it would build a [T, T] mask,
    and transformers would read `position_ids` back from the device to decide that it must. For a name that is not in
    the mask registry it builds no mask and reads nothing (`transformers.masking_utils._preprocess_mask_arguments`).
    """
    mask_function = MASKS.pop(ATTENTION_NAME, None)
    try:
        yield
    finally:
        if mask_function is not None:
            MASKS[ATTENTION_NAME] = mask_function


@contextmanager
def watch_masks() -> Iterator[list[tuple[str, int]]]:
    """While open, ordinary forwards of `attn_implementation="packsft"` list windows expressed only in the mask.

    The list gets (layer class, n) where a mask differs from what the attention arguments say (causal,
    `sliding_window`). Packed attention, which has no mask, is then right only for documents of at most n tokens.
    """
    found: list[tuple[str, int]] = []
    made: dict[int, tuple[int, Tensor]] = {}  # storage: (window, mask); keeps the mask alive

    def watched_mask(*args: Any, **kwargs: Any) -> Tensor | None:
        mask = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
        if mask is not None:  # BART's cross attention has no mask
            made[mask.untyped_storage().data_ptr()] = kwargs.get("local_size") or sys.maxsize, mask
        return mask

    def watched_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            told = kwargs.get("sliding_window") or sys.maxsize
            distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
            expected = ((distance >= 0) & (distance < told)).to(query.device)
            seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            windows = [window for window, _ in made.values()]
            window, _ = made.get(attention_mask.untyped_storage().data_ptr(), (None, None))
            if not torch.equal(seen, expected.expand_as(seen)):
                window = min(windows, default=1)
            elif window is None:  # the layer derived this mask from ours
                window = told if told in windows else min(windows, default=told)
            if window != told:
                found.append((type(module).__name__, min(window, told)))
        return packed_attention_forward(module, query, key, value, attention_mask, **kwargs)

    with (
        mock.patch.dict(ATTENTIONS, {ATTENTION_NAME: watched_attention}),
        mock.patch.dict(MASKS, {ATTENTION_NAME: watched_mask}),
    ):
        yield found


ATTENTIONS[ATTENTION_NAME] = packed_attention_forward
MASKS[ATTENTION_NAME] = sdpa_mask
