"""`PackedSFTConfig`: TRL's `SFTConfig` with packing on and a few more fields."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from packsft_kernels.varlen_attention import BACKENDS
from trl import SFTConfig

from packsft.packing import OVERLONG, PACKING_STRATEGIES, check_max_lost_fraction, resolve_overlong

logger = logging.getLogger("packsft")


def integer(name: str, value: Any, least: int) -> int:
    """Raises ValueError, naming the argument, for what is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")
    return int(value)


@functools.cache
def _say_no_accelerator() -> None:
    """Once, not per configuration and process."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("no accelerator found: setting use_cpu=True")


def has_bf16() -> bool:
    """Whether the training device multiplies bfloat16 in hardware. Emulated bfloat16 is far slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


@dataclass
class PackedSFTConfig(SFTConfig):
    r"""
    `SFTConfig` for [`PackedSFTTrainer`] with the parameters below. A plain `SFTConfig` works as well.

    Parameters:
        packing (`bool`, *optional*, defaults to `True`):
            Whether to pack several examples into one row of `max_length` tokens. With `False`, the examples of a batch
            are laid end to end in one row, without padding.
        packing_strategy (`str`, *optional*, defaults to `"step"`):
            Which examples are packed together. `"step"`: each optimizer step takes the same examples as without
            packing, in as few passes as hold them; the number of steps and the loss curve do not change. For a stream,
            steps follow its order, and each worker makes steps of its own examples. `"bfd"`, `"bfd_split"` and
            `"wrapped"`: as in `SFTConfig`, but planned over the whole data set (for a stream, over a buffer of 32
            packs); batch sizes then count packs, not examples.
        tokens_per_pass (`int` or `str`, *optional*, defaults to `max_length`):
            With `"step"`, the most tokens in one pass on each device. A pass is a micro-batch: one forward and backward
            of the model. `"auto"` measures at the first step how many tokens fit, and turns gradient checkpointing off
            if the largest step fits without it. The value changes speed and memory, not the training, except for what
            draws or averages over a pass (dropout, NEFTune's noise, the router's auxiliary loss). In one process, a
            step that runs out of memory runs again with half as many tokens.
        sequence_parallel_size (`int`, *optional*, defaults to `1`):
            How many ranks share each row, for documents that one device has no memory for: each holds that part of the
            row's tokens, and in attention that part of the heads. It must divide the number of processes and of
            attention heads. `tokens_per_pass` and batch sizes then count per group of ranks.
        loss_normalization (`str`, *optional*, defaults to `"token"`):
            The loss of an optimizer step is the mean over its scored tokens (`"token"`), or over its examples, each of
            them the mean over its scored tokens (`"example"`). Exact over passes, gradient accumulation and devices.
        overlong (`str`, *optional*):
            What happens to an example longer than `max_length`, with and without packing: `"truncate"`, `"split"`,
            `"drop"` or `"error"`. By default it is truncated; `"bfd_split"` and `"wrapped"` split it and allow nothing
            else. Lost tokens are counted and reported.
        max_lost_fraction (`float`, *optional*, defaults to `1.0`):
            The share of a data set's tokens that may be lost: truncated, dropped, or in examples (or segments of them)
            without a scored token. If more are lost, the run stops before training.
        attention_backend (`str`, *optional*, defaults to `"auto"`):
            Computes the attention within documents. `"auto"` takes the first backend that can run; or `"flash_attn_4"`,
            `"flash_attn_3"`, `"flash_attn_2"`, `"torch_varlen"`, `"sdpa"`.
        check_packing (`str`, *optional*, defaults to `"on"`):
            `"on"` checks at construction, on the model itself, that packed documents cannot see each other; `"off"`
            skips this. It costs one forward and two backwards of 34 tokens, and one forward of 11.
            `PackedSFTTrainer.check_packing()` and `packsft check` prove more.
        on_unpackable (`str`, *optional*, defaults to `"pad"`):
            What happens to a model that fails this check: `"pad"` trains the same examples as right-padded rows,
            `"error"` stops.
        compile_layers (`bool`, *optional*, defaults to `False`):
            Whether to train with compiled decoder layers: `torch.compile` on the first layer of each kind serves all of
            them, and packs of any size. It takes seconds at the first step, and needs a C++ compiler on the CPU, Triton
            on a GPU. Evaluation and padded rows are not compiled.
        on_changed (`str`, *optional*, defaults to `"error"`):
            What happens if a run resumes from a checkpoint with other rows or settings than it was saved with, where
            these change the training: `"error"` stops before a step and lists them, `"warn"` lists them and goes on.
        on_nonfinite (`str`, *optional*, defaults to `"error"`):
            What happens if a loss is not a number: `"error"` stops after two such steps in a row, or before weights
            that are not finite are saved; `"skip"` leaves out every step whose loss or gradient is not finite, and
            counts it; `"ignore"` goes on.
        resume_only_model (`bool`, *optional*, defaults to `False`):
            Whether to resume only the weights and the step: the place in the data and in the learning-rate schedule go
            on, the optimizer and the random generators begin anew.
        enable_jit_checkpoint (`bool`, *optional*, defaults to `True`):
            Whether SIGTERM during training, which ends a preempted job, saves a checkpoint after the current step (on
            several GPUs, up to three steps later), unless `save_strategy="no"`. The process then ends by the signal; a
            second one ends it at once.
    """

    packing: bool = field(default=True, metadata={"help": "Whether to pack several examples into one row."})
    packing_strategy: str = field(
        default="step",
        metadata={
            "help": "Which examples to pack together: those of an optimizer step ('step'), or of the whole data set.",
            "choices": list(PACKING_STRATEGIES),
        },
    )
    tokens_per_pass: int | str | None = field(
        default=None,
        metadata={"help": "With packing_strategy='step': the most tokens in a pass, or 'auto' (default: max_length)."},
    )
    sequence_parallel_size: int = field(
        default=1, metadata={"help": "How many ranks share each row, each with a part of its tokens."}
    )
    loss_normalization: str = field(
        default="token",
        metadata={
            "help": "Average the loss over scored tokens, or over examples (each the mean over its tokens).",
            "choices": ["token", "example"],
        },
    )
    overlong: str | None = field(
        default=None,
        metadata={"help": "What to do with an example longer than max_length.", "choices": list(OVERLONG)},
    )
    max_lost_fraction: float = field(
        default=1.0, metadata={"help": "The share of a data set's tokens that may be lost. More stops the run."}
    )
    attention_backend: str = field(
        default="auto",
        metadata={
            "help": "Backend of the attention within documents; 'auto' takes the first that can run.",
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
    compile_layers: bool = field(
        default=False, metadata={"help": "Whether to train with compiled decoder layers (regional compilation)."}
    )
    on_changed: str = field(
        default="error",
        metadata={
            "help": "What to do if a run resumes with other data or settings: 'error' or 'warn'.",
            "choices": ["error", "warn"],
        },
    )
    on_nonfinite: str = field(
        default="error",
        metadata={
            "help": "What to do if a loss is not a number: 'error', 'skip' the step, or 'ignore'.",
            "choices": ["error", "skip", "ignore"],
        },
    )
    resume_only_model: bool = field(
        default=False, metadata={"help": "Whether to resume only the weights and the step, not the optimizer."}
    )
    enable_jit_checkpoint: bool = field(
        default=True, metadata={"help": "Whether SIGTERM saves a checkpoint after the current step."}
    )

    def __post_init__(self) -> None:
        self.use_cpu: bool
        if not self.use_cpu and not torch.accelerator.is_available():
            # without an accelerator, transformers accepts bf16 only with use_cpu=True
            _say_no_accelerator()
            self.use_cpu = True
        super().__post_init__()
        if isinstance(self.check_packing, bool):  # YAML reads on and off as booleans
            self.check_packing = "on" if self.check_packing else "off"
        for name in CHOICES:
            if (value := getattr(self, name)) is not None or name in NEVER_NONE:
                check_choice(name, value)
        check_packs(self)
        if isinstance(self.tokens_per_pass, str) and self.tokens_per_pass.isdecimal():  # from a command line
            self.tokens_per_pass = int(self.tokens_per_pass)
        given = self.tokens_per_pass
        if given not in (None, "auto") and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise ValueError(f"tokens_per_pass={given!r}: expected an integer of at least 1, 'auto' or None")
        resolve_overlong(self.packing_strategy if self.packing else "none", self.overlong)  # raises
        check_max_lost_fraction(self.max_lost_fraction)


def with_own_fields(args: SFTConfig) -> PackedSFTConfig:
    """A copy. A plain `SFTConfig` gets the fields that it lacks, with their defaults."""
    args = copy.copy(args)
    for own in fields(PackedSFTConfig):
        if not hasattr(args, own.name):
            setattr(args, own.name, own.default)
    return cast(PackedSFTConfig, args)


CHOICES: dict[str, Sequence[Any]] = {
    name: field.metadata["choices"]
    for name, field in PackedSFTConfig.__dataclass_fields__.items()
    if "choices" in field.metadata
}


NEVER_NONE = {
    own.name for own in fields(PackedSFTConfig) if own.default is not None and not hasattr(SFTConfig, own.name)
}


def check_choice(name: str, value: Any) -> None:
    """Raises ValueError for what is none of the `CHOICES` of this name, if it has any."""
    choices = CHOICES.get(name)
    if choices and getattr(value, "value", value) not in [getattr(choice, "value", choice) for choice in choices]:
        raise ValueError(f"{name}={value!r} is unknown, expected one of {list(choices)}")


def check_packs(args: SFTConfig) -> None:
    """Raises ValueError for a strategy that is unknown, or a `max_length` that no pack can have."""
    if args.packing and args.packing_strategy not in PACKING_STRATEGIES:
        raise ValueError(f"packing_strategy={args.packing_strategy!r} is unknown, expected one of {PACKING_STRATEGIES}")
    if args.packing and args.max_length is None:
        raise ValueError("max_length=None: packing=True needs max_length, the number of tokens in a pack")
    if args.max_length is not None and args.max_length < 1:
        raise ValueError(f"max_length={args.max_length}: must be at least 1")
