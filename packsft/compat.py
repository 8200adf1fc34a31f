"""The only place that reaches inside TRL, transformers and accelerate. Written against TRL 1.16, transformers 5.23.

Each reach names the version that would free us from it, and a test fails with a readable message when one of the
names below changes its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_peft_available
from trl.trainer import sft_trainer as trl_sft_trainer

TRL_RANGE = (Version("1.16"), Version("2"))
TRANSFORMERS_MIN = Version("5.17")


def check_versions() -> None:
    """Raises ImportError, naming the range, for a TRL or transformers that this module was not written against."""
    if not TRL_RANGE[0] <= Version(trl.__version__) < TRL_RANGE[1]:
        raise ImportError(f"packsft works with trl >= {TRL_RANGE[0]}, < {TRL_RANGE[1]}; found trl {trl.__version__}")
    if Version(transformers.__version__) < TRANSFORMERS_MIN:
        raise ImportError(
            f"packsft works with transformers >= {TRANSFORMERS_MIN}; found transformers {transformers.__version__}"
        )


class _NoLayer:
    """In the place of PEFT's tuner layer: no head is an instance of it."""


@contextmanager
def own_head_during_init() -> Iterator[None]:
    """For the length of `SFTTrainer.__init__`, TRL neither patches the head nor refuses an adapter on it.

    TRL has no seam for either: it calls `add_fused_lm_head` and checks for `BaseTunerLayer` in its constructor, both
    by names of its module. Its warning that label smoothing costs a second forward is about its own head and is muted.
    """
    swapped: dict[str, Any] = {"add_fused_lm_head": lambda *args, **kwargs: None}
    if is_peft_available():
        swapped["BaseTunerLayer"] = _NoLayer
    originals = {name: getattr(trl_sft_trainer, name) for name in swapped}
    for name, value in swapped.items():
        setattr(trl_sft_trainer, name, value)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`label_smoothing_factor` is deprecated", category=FutureWarning)
            yield
    finally:
        for name, value in originals.items():
            setattr(trl_sft_trainer, name, value)


def prepare_rows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: trl.SFTConfig) -> Dataset:
    """`input_ids` and `labels` as `SFTTrainer` makes them of any of its forms, without a model and without cutting.

    TRL 1.16 has no function for it: its method `_prepare_dataset` reads three attributes, which the constructor derives
    from the first row as it is done here. A public function for the preparation of data would free us from this.

    Raises ValueError where the constructor does, and for messages without a chat template.
    """
    check_versions()
    sample = next(iter(dataset))
    conversational = trl_sft_trainer.is_conversational_from_value(sample) or trl_sft_trainer.is_conversational(sample)
    if conversational and tokenizer.chat_template is None:
        raise ValueError("the rows hold messages, but the tokenizer has no chat template")
    if args.assistant_only_loss and not conversational:
        raise ValueError("assistant_only_loss=True needs conversational rows")
    template = None
    if args.assistant_only_loss and not trl_sft_trainer.has_generation_markers(tokenizer.chat_template):
        template = trl_sft_trainer.get_training_chat_template(tokenizer)
    completion_only = args.completion_only_loss
    trainer: Any = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=template,
        completion_only_loss={"prompt", "completion"} <= sample.keys() if completion_only is None else completion_only,
    )
    return trl.SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, False, None, "train")


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether a PEFT adapter (or a trainable copy of PEFT's) wraps this module."""
    if not is_peft_available():
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


@contextmanager
def gathered_parameters(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The whole head on every rank: DTensors of FSDP2 are gathered, ZeRO-3 partitions for the length of the context."""
    from torch.distributed.tensor import DTensor
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    bias = bias.full_tensor() if isinstance(bias, DTensor) else bias
    with maybe_gather_lm_head_ctx(weight, bias):
        yield weight, bias
