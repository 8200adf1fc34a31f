"""`PackedSFTConfig`: TRL's `SFTConfig` with packing on, and the few fields that are packsft's own."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from packsft_kernels.varlen_attention import BACKENDS
from trl import SFTConfig

from packsft.packing import OVERLONG, PACKING_STRATEGIES, check_max_lost_fraction, resolve_overlong

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
        packing_strategy (`str`, *optional*, defaults to `"step"`):
            `"step"`: each optimizer step takes the examples that it would take without packing, laid into as few
            passes as hold them: the same number of steps, and the same loss curve. Of a stream, steps are taken in
            its order, by each worker of its own examples. `"bfd"`, `"bfd_split"` and
            `"wrapped"` as in `SFTConfig`, planned over the whole data set (of a stream,
            over a buffer of 32 packs): a pack then takes the place of an example.
        tokens_per_pass (`int` or `str`, *optional*):
            With `"step"`, the most tokens that go through the model at once, on each device; by default `max_length`.
            `"auto"` for the most that fit, measured at the first step. It changes speed and memory, not the training
            (but for what draws or averages over a pass: dropout, NEFTune's noise, the router's auxiliary loss): a step
            that runs out of memory in one process is taken again with half as many.
        loss_normalization (`str`, *optional*, defaults to `"token"`):
            What the loss of an optimizer step is the mean of: `"token"`, over its scored tokens, or `"example"`, over
            its examples, each the mean of its tokens. Exact over passes, accumulation and devices.
        overlong (`str`, *optional*):
            What becomes of an example longer than `max_length`, with and without packing: `"truncate"`, `"split"` into
            several, `"drop"` or `"error"`. The default is to truncate, and to split under the packing strategies
            `"bfd_split"` and `"wrapped"`, which cannot do anything else. What is lost is counted and said.
        max_lost_fraction (`float`, *optional*, defaults to `1.0`):
            The share of a data set's tokens that may be lost, because they are truncated, dropped, or in examples (or
            segments of them) in which nothing is scored. More stops the run before training.
        attention_backend (`str`, *optional*, defaults to `"auto"`):
            What computes the attention within documents: `"auto"` for the first that can, or a name:
            `"flash_attn_4"`, `"flash_attn_3"`, `"flash_attn_2"`, `"torch_varlen"`, `"sdpa"`.
        check_packing (`str`, *optional*, defaults to `"on"`):
            Whether to check at construction, on the model itself, that packed documents cannot see each other: `"on"`
            or `"off"`. It costs a forward and two backwards of 34 tokens, and a forward of 11.
            `PackedSFTTrainer.check_packing()` and `packsft check` prove more.
        on_unpackable (`str`, *optional*, defaults to `"pad"`):
            What to do with a model on which they can: `"pad"` trains the same examples as right-padded rows,
            `"error"` stops.
    """

    packing: bool = field(default=True, metadata={"help": "Whether to pack several examples into one row."})
    packing_strategy: str = field(
        default="step",
        metadata={
            "help": "What is packed together: the examples of an optimizer step, or of the whole data set.",
            "choices": list(PACKING_STRATEGIES),
        },
    )
    tokens_per_pass: int | str | None = field(
        default=None,
        metadata={"help": "With packing_strategy='step', the most tokens in a pass, or 'auto'; by default max_length."},
    )
    loss_normalization: str = field(
        default="token",
        metadata={
            "help": "What the loss is the mean of: scored tokens, or examples, each the mean of its tokens.",
            "choices": ["token", "example"],
        },
    )
    overlong: str | None = field(
        default=None,
        metadata={"help": "What becomes of an example longer than max_length.", "choices": list(OVERLONG)},
    )
    max_lost_fraction: float = field(
        default=1.0, metadata={"help": "The share of a data set's tokens that may be lost; more stops the run."}
    )
    attention_backend: str = field(
        default="auto",
        metadata={
            "help": "What computes the attention within documents; 'auto' takes the first that can.",
            "choices": ["auto", *BACKENDS],
        },
    )
    check_packing: str = field(
        default="on",
        metadata={
            "help": "Whether to check on the model itself that packed documents cannot see each other.",
            "choices": ["on", "off"],
        },
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
        if isinstance(self.tokens_per_pass, str) and self.tokens_per_pass.isdecimal():  # from a command line
            self.tokens_per_pass = int(self.tokens_per_pass)
        given = self.tokens_per_pass
        if given not in (None, "auto") and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise ValueError(f"tokens_per_pass={given!r}: expected an integer of at least 1, 'auto' or None")
        if self.loss_normalization not in ("token", "example"):
            raise ValueError(
                f"loss_normalization={self.loss_normalization!r} is unknown, expected 'token' or 'example'"
            )
        if isinstance(self.check_packing, bool):  # what YAML makes of on and off
            self.check_packing = "on" if self.check_packing else "off"
        if self.check_packing not in ("on", "off"):
            raise ValueError(f"check_packing={self.check_packing!r} is unknown, expected 'on' or 'off'")
        if self.on_unpackable not in ("pad", "error"):
            raise ValueError(f"on_unpackable={self.on_unpackable!r} is unknown, expected 'pad' or 'error'")
        resolve_overlong(self.packing_strategy if self.packing else "none", self.overlong)  # raises
        check_max_lost_fraction(self.max_lost_fraction)
