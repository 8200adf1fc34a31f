"""The only place that reaches inside TRL, transformers and accelerate. Written against TRL 1.16, transformers 5.23.

Each reach names the version that would free us from it, and a test fails with a readable message when one of the
names below changes its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
import trl
from accelerate.data_loader import IterableDatasetShard
from packaging.version import Version
from torch import Tensor, nn
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


def share_stream(loader: Any, kind: Any, *, endless: bool) -> None:
    """Have a stream of this kind share itself out over ranks (`kind.share`), in the place of accelerate's wrapper.

    That wrapper deals out items too, but fills the last batch by repeating examples. It stays, as one that passes all
    on; transformers neutralises the one around its `BatchRebalanceSampler` in the same way. accelerate (1.15) has no
    seam for a stream that knows its ranks.
    """
    wrapper = loader.dataset
    if isinstance(wrapper, IterableDatasetShard) and isinstance(wrapper.dataset, kind):
        wrapper.dataset = wrapper.dataset.share(wrapper.process_index, wrapper.num_processes, endless=endless)
        wrapper.process_index, wrapper.num_processes, wrapper.batch_size, wrapper.split_batches = 0, 1, 1, False


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
