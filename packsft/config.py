"""`PackedSFTConfig`: TRL's `SFTConfig` with packing on, and the few fields that are packsft's own."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from packsft_kernels.varlen_attention import BACKENDS
from trl import SFTConfig

logger = logging.getLogger("packsft")


def has_bf16() -> bool:
    """Whether bfloat16 products are computed by the hardware that training takes: emulated, float32 is far faster."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


@dataclass
class PackedSFTConfig(SFTConfig):
    r"""
    `SFTConfig` for [`PackedSFTTrainer`]. A plain `SFTConfig` works as well; this one adds the parameters below.

    Parameters:
        packing (`bool`, *optional*, defaults to `True`):
            Whether to pack several examples into one row of `max_length` tokens. With `False`, each example is an item
            of its own, and the examples of a batch are laid end to end without padding.
        packing_strategy (`str`, *optional*, defaults to `"bfd"`):
            As in `SFTConfig`: `"bfd"`, `"bfd_split"` or `"wrapped"`, each planned over the whole data set (of a stream,
            over a buffer of 32 packs).
        attention_backend (`str`, *optional*, defaults to `"auto"`):
            What computes the attention within documents: `"auto"` for the first that can, or a name:
            `"flash_attn_4"`, `"flash_attn_3"`, `"flash_attn_2"`, `"torch_varlen"`, `"sdpa"`.
        check_packing (`bool`, *optional*, defaults to `True`):
            Whether to check at construction, on the model itself, that packed documents cannot see each other. It
            costs a forward and two backwards of 34 tokens.
        on_unpackable (`str`, *optional*, defaults to `"pad"`):
            What to do with a model on which they can: `"pad"` trains the same examples as right-padded rows,
            `"error"` stops.
    """

    packing: bool = field(default=True, metadata={"help": "Whether to pack several examples into one row."})
    attention_backend: str = field(
        default="auto",
        metadata={
            "help": "What computes the attention within documents; 'auto' takes the first that can.",
            "choices": ["auto", *BACKENDS],
        },
    )
    check_packing: bool = field(
        default=True,
        metadata={"help": "Whether to check on the model itself that packed documents cannot see each other."},
    )
    on_unpackable: str = field(
        default="pad",
        metadata={
            "help": "What to do with a model that cannot keep packed documents apart: 'pad' or 'error'.",
            "choices": ["pad", "error"],
        },
    )

    def __post_init__(self) -> None:
        self.use_cpu: bool
        if not self.use_cpu and not torch.accelerator.is_available():
            # transformers refuses bf16 without an accelerator unless it is told that the CPU is meant
            logger.warning("no accelerator found: use_cpu=True")
            self.use_cpu = True
        super().__post_init__()
        if self.attention_backend != "auto" and self.attention_backend not in BACKENDS:
            raise ValueError(
                f"attention_backend={self.attention_backend!r} is unknown, expected 'auto' or one of {list(BACKENDS)}"
            )
        if self.on_unpackable not in ("pad", "error"):
            raise ValueError(f"on_unpackable={self.on_unpackable!r} is unknown, expected 'pad' or 'error'")
