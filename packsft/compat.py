"""The only place that reaches inside TRL, transformers and accelerate. Written against TRL 1.16, transformers 5.23.

Each reach names the version that would free us from it, and a test fails with a readable message when one of the
names below changes its place.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib import metadata, resources
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
import trl
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from packaging.version import Version
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerBase
from transformers.utils import is_peft_available
from trl.trainer import sft_trainer as trl_sft_trainer

TRL_RANGE = (Version("1.16"), Version("2"))
TRANSFORMERS_MIN = Version("5.17")
PEFT_MIN = Version("0.16")  # which keeps what is no plain LoRA in a dictionary of its own


def check_versions() -> None:
    """Raises ImportError, naming the range, for a TRL or transformers that this module was not written against."""
    if not TRL_RANGE[0] <= Version(trl.__version__) < TRL_RANGE[1]:
        raise ImportError(f"packsft works with trl >= {TRL_RANGE[0]}, < {TRL_RANGE[1]}; found trl {trl.__version__}")
    if Version(transformers.__version__) < TRANSFORMERS_MIN:
        raise ImportError(
            f"packsft works with transformers >= {TRANSFORMERS_MIN}; found transformers {transformers.__version__}"
        )


def knows_peft() -> bool:
    """Whether PEFT is installed, in a version whose layers `adapters.py` can tell apart."""
    return is_peft_available() and Version(metadata.version("peft")) >= PEFT_MIN


class _NoLayer:
    """In the place of PEFT's tuner layer: no head is an instance of it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward or backward failed for want of memory, on a GPU or the CPU (accelerate knows the messages)."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


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


def attention_registries() -> tuple[dict[str, Any], dict[str, Any]]:
    """transformers' attention functions and mask functions by name, to be changed for a while.

    Its registries (5.23) can add a name and not take one out, and masks are left away for a name that is not there
    (`transformers.masking_utils._preprocess_mask_arguments`).
    """
    return AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping


def share_stream(loader: Any, kind: Any, *, endless: bool) -> Any:
    """Have a stream of this kind share itself out over ranks (`kind.share`), in the place of accelerate's wrapper.

    That wrapper deals out items too, but fills the last batch by repeating examples. It stays, as one that passes all
    on; transformers neutralises the one around its `BatchRebalanceSampler` in the same way. accelerate (1.15) has no
    seam for a stream that knows its ranks.

    Returns what the loader reads: this rank's share, or on one rank the stream itself.
    """
    wrapper = loader.dataset
    if isinstance(wrapper, IterableDatasetShard) and isinstance(wrapper.dataset, kind):
        wrapper.dataset = wrapper.dataset.share(wrapper.process_index, wrapper.num_processes, endless=endless)
        wrapper.process_index, wrapper.num_processes, wrapper.batch_size, wrapper.split_batches = 0, 1, 1, False
        return wrapper.dataset
    return wrapper


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


@contextmanager
def gathered_parameters(*parameters: Tensor | None) -> Iterator[list[Any]]:
    """The whole head on every rank: DTensors of FSDP2 are gathered, ZeRO-3 partitions for the length of the context."""
    from torch.distributed.tensor import DTensor
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    with maybe_gather_lm_head_ctx(*whole):
        yield whole


def noise_by_document(trainer: Any, lengths: Callable[[], Tensor | None]) -> None:
    """NEFTune's noise by the length of each document: uniform within alpha / sqrt(length * M), as the paper has it.

    transformers' hook (5.23) takes the length of the row, so that packing would weaken the noise. Ours takes its place
    on the embeddings, and with it goes when training ends. `lengths` gives what `batch.document_lengths` does.
    Jain et al., NEFTune, arXiv 2310.05914.
    """
    handle = trainer.neftune_hook_handle
    hooks = handle.hooks_dict_ref()
    by_row = hooks[handle.id]

    def add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        lengths_1T = lengths()
        if not module.training or lengths_1T is None or lengths_1T.shape != output.shape[:2]:
            return by_row(module, inputs, output)
        alpha: Any = module.neftune_noise_alpha
        bound = alpha * (lengths_1T * float(output.shape[-1])).rsqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * bound[..., None].to(output.dtype)

    hooks[handle.id] = add_noise


_BATCH_FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def batch_fields(args: Any) -> dict[str, int]:
    """What `one_batch_per_step` changes."""
    return {name: getattr(args, name) for name in _BATCH_FIELDS}


@contextmanager
def one_batch_per_step(trainer: Any) -> Iterator[tuple[int, Any]]:
    """For the length of the training loop, a batch is a whole optimizer step: gives its size per device, and arguments.

    transformers' loop counts micro-batches to know when a step is due, so that their number cannot vary. Under
    exact-step packing the accumulation goes into the batch size, and the passes are walked in `training_step`. The
    change is made on a copy, which callbacks see, and is undone afterwards.
    """
    args, batch_size = trainer.args, trainer._train_batch_size
    trainer.args = copy.copy(args)
    trainer.args.per_device_train_batch_size *= args.gradient_accumulation_steps
    trainer.args.gradient_accumulation_steps = 1
    trainer._train_batch_size = batch_size * args.gradient_accumulation_steps
    try:
        yield trainer._train_batch_size, trainer.args
    finally:
        vars(args).update(vars(trainer.args) | batch_fields(args))  # what callbacks have changed stays changed
        trainer.args, trainer._train_batch_size = args, batch_size


@contextmanager
def saved_as_configured(trainer: Any, configured: dict[str, int]) -> Iterator[None]:
    """For the length of a save within `one_batch_per_step`, the arguments speak of batches as the user did."""
    now = batch_fields(trainer.args)
    vars(trainer.args).update(configured)
    try:
        yield
    finally:
        vars(trainer.args).update(now)


def whole_batches(loader: Any) -> Any:
    """The same loader, of which each rank is given every batch whole, and the last one as short as it is.

    accelerate deals batches to ranks, and repeats examples so that all have as many. transformers takes its wrapper out
    in the same way for `train_sampling_strategy="batch_rebalance"`.
    """
    if isinstance(loader.batch_sampler, BatchSamplerShard):
        loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        loader.batch_sampler.even_batches = loader.batch_sampler.split_batches = False
    return loader


def no_gradient_sync(trainer: Any, model: nn.Module) -> AbstractContextManager:
    """What transformers' loop puts around all but the last pass of a step (5.23)."""
    if trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return nullcontext()
    sharded_at_load = getattr(trainer, "is_distributed_loading_by_transformers", False)  # not yet in 5.17
    if sharded_at_load and hasattr(trainer.model, "set_requires_gradient_sync"):
        return trainer._defer_fsdp_gradient_reduction()
    return trainer.accelerator.no_sync(model)


def trainer_in_place(trainer_class: type) -> ExitStack:
    """From now until the stack is closed, every name by which TRL hands out its `SFTTrainer` is `trainer_class`.

    TRL has no registry of trainers. Its packages are lazy: they look a name up in a module when it is first used.
    """
    undo = ExitStack()
    for module in (trl, trl.trainer, trl_sft_trainer):
        undo.enter_context(mock.patch.object(module, "SFTTrainer", trainer_class))
    return undo


def trl_command(arguments: Sequence[str], *, through: tuple[str, str]) -> int:
    """Run the command `trl`, whose training scripts go through `python -m MODULE COMMAND script.py ...`.

    TRL launches `trl/scripts/sft.py` with accelerate, in processes of its own, and has no seam for another script.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli import accelerate_launcher, main

    module, command = through

    def launch(script_name: str, launch_args: list[str], training_script_args: list[str]) -> None:
        script = str(resources.files("trl.scripts").joinpath(script_name))
        launched = [*launch_args, "--module", module, command, script, *training_script_args]
        launch_command(launch_command_parser().parse_args(launched))

    with mock.patch.object(accelerate_launcher, "launch_training_script", launch):
        return main(list(arguments))
