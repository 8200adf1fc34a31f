"""The only file that uses internals of TRL, transformers and accelerate. Written against TRL 1.16, transformers 5.24.

Each function says why it must, and what would make it unnecessary. `PRIVATE` lists the private names that the trainer
itself overrides or uses; a test checks the list, and names whatever a new release has moved.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib import metadata, resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
import trl
from accelerate import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, StateDictType
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoProcessor, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_peft_available, output_capturing
from trl.models import selective_activation_checkpointing as trl_selective
from trl.trainer import sft_trainer as trl_sft_trainer

TRL_RANGE = (Version("1.16"), Version("2"))
TRANSFORMERS_MIN = Version("5.17")
PEFT_MIN = Version("0.16")  # the first that keeps LoRA variants in a dictionary of their own

# Private names of the parents that `trainer.py` and its mixins (`data/loaders.py`, `step/exact.py`, `step/metrics.py`,
# `step/boundary.py`, `checkpoints/resuming.py`) override or use: what for, and what would free us (no release up to TRL
# 1.16 and transformers 5.24 has it).
PRIVATE = {
    "_prepare_dataset": "packs what the parent tokenises; a public function that tokenises and labels",
    "_set_signature_columns_if_needed": "keeps the column `loss_weights`; an argument that names columns to keep",
    "_signature_columns": "the same",
    "_inner_training_loop": "one batch per optimizer step, NEFTune by document; a hook after the search's setup",
    "_init_training_state": "intervals, a place in a stream, a finished run; a hook after a state is read",
    "_load_optimizer_and_scheduler": "`resume_only_model`; an argument of `train`",
    "_load_scaler": "the same",
    "_load_rng_state": "the same",
    "_load_from_checkpoint": "weights that PEFT does not save whole; an AdaLoRA that can be resumed",
    "_load_best_model": "weights that transformers saves under other names; a loader that converts them back",
    "_issue_warnings_after_load": "weights that a checkpoint lacks; an error instead of a warning",
    "_save_checkpoint": "whole checkpoints; a method that saves into a given folder",
    "_get_output_dir": "the same",
    "_push_from_checkpoint": "pushes what is whole; the same",
    "_prepare_inputs": "moves a batch to the device; a public method",
    "_track_num_input_tokens": "counts tokens of passes, without padding; a public method",
    "_train_batch_size": "the batch size per device that `auto_find_batch_size` may change; a public attribute",
    "_formatting_func": "rows given to `predict`; a public attribute",
    "_tokenizer": "the pad token; a public attribute",
    "_total_train_tokens": "`num_tokens` of the logs; a public attribute",
}


def check_versions() -> None:
    """Raises ImportError, with the supported range, for an unsupported TRL or transformers."""
    if not TRL_RANGE[0] <= Version(trl.__version__) < TRL_RANGE[1]:
        raise ImportError(f"packsft works with trl >= {TRL_RANGE[0]}, < {TRL_RANGE[1]}; found trl {trl.__version__}")
    if Version(transformers.__version__) < TRANSFORMERS_MIN:
        raise ImportError(
            f"packsft works with transformers >= {TRANSFORMERS_MIN}; found transformers {transformers.__version__}"
        )


def knows_peft() -> bool:
    """Whether PEFT is installed, in a version whose layers `adapters.py` knows."""
    return is_peft_available() and Version(metadata.version("peft")) >= PEFT_MIN


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward or backward failed for lack of memory, on a GPU or the CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)  # accelerate knows the CPU's message


@contextmanager
def own_head_during_init() -> Iterator[None]:
    """During `SFTTrainer.__init__`, TRL neither patches the head nor refuses an adapter on it.

    TRL offers no way to avoid either: its constructor calls `add_fused_lm_head` and checks for `BaseTunerLayer`, both
    by names of its module. Its warning that label smoothing costs a second forward concerns its own head and is muted.
    """
    swapped: dict[str, Any] = {"add_fused_lm_head": lambda *args, **kwargs: None}
    if is_peft_available():
        swapped["BaseTunerLayer"] = type("NoLayer", (), {})
    with mock.patch.multiple(trl_sft_trainer, **swapped), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`label_smoothing_factor` is deprecated", category=FutureWarning)
        yield


def saved_by_selective_checkpointing(operators: Iterable[Any]) -> AbstractContextManager:
    """Selective checkpoints set up in it (`gradient_checkpointing_kwargs={"selective": True}`) save their outputs, too.

    TRL saves those of SDPA and of the package flash-attn, by name, and computes the rest again. A list of names that
    one can add to would free us.
    """
    known = trl_selective._aten_attention_ops()
    return mock.patch.object(trl_selective, "_aten_attention_ops", return_value=known | set(operators))


@contextmanager
def naming_missing_tokenizer() -> Iterator[None]:
    """During `SFTTrainer.__init__`, a tokenizer that cannot be loaded is one error that says what to pass.

    TRL loads the one of the model's name, and its error names a repository that the user never asked for. An error of
    TRL's that names `processing_class` would free us.
    """

    class Named:
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> Any:
            try:
                return AutoProcessor.from_pretrained(name, **options)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"processing_class=None, and no tokenizer can be loaded from {name!r}, where the model is from: "
                    f"pass the model's tokenizer as processing_class ({error})"
                ) from error

    with mock.patch.object(trl_sft_trainer, "AutoProcessor", Named):
        yield


def attention_registries() -> tuple[dict[str, Any], dict[str, Any]]:
    """transformers' attention functions and mask functions by name, to be changed temporarily.

    Its registries (5.24) can add a name but not remove one, and transformers builds no mask for a name that is missing
    (`transformers.masking_utils._preprocess_mask_arguments`).
    """
    return AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping


def prepare_rows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: trl.SFTConfig) -> Dataset:
    """`input_ids` and `labels` as `SFTTrainer` makes them from any of its forms, without a model and without cutting.

    TRL 1.16 has no function for this: its method `_prepare_dataset` reads three attributes that its constructor derives
    from the first row. This function derives them too. A public function that prepares data would replace it.

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
    """The whole head on every rank: gathers DTensors (tensor parallelism), and ZeRO-3 partitions within the context."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    with _gathered(p for p in whole if p is not None):
        yield whole


def whole_model(model: nn.Module) -> AbstractContextManager:
    """Within the context, every rank holds all weights of a model that ZeRO-3 partitioned when it was made."""
    return _gathered(model.parameters())


def _gathered(parameters: Iterable[Any]) -> AbstractContextManager:
    partitioned = [p for p in parameters if hasattr(p, "ds_id") and p.ds_status.name != "AVAILABLE"]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


def as_before_accelerate(model: nn.Module) -> None:
    """Undo what an earlier trainer of the same model had accelerate do to it: mixed precision in its forward.

    accelerate (1.15) marks the model, and does not prepare it a second time: the next trainer would train in the
    precision of the first. It has no way back that leaves other wrappers of the forward in place.
    """
    original_forward = vars(model).pop("_original_forward", None)
    if original_forward is not None:
        model.forward = original_forward
    vars(model).pop("_is_accelerate_prepared", None)


def noise_by_document(trainer: Any, lengths: Callable[[], Tensor | None]) -> None:
    """NEFTune's noise by the length of each document: uniform within alpha / sqrt(length * M), as in the paper.

    transformers' hook (5.24) takes the length of the row, so packing would weaken the noise. Our hook replaces it on
    the embeddings, and is removed with it when training ends. `lengths` gives what `batch.document_lengths` gives.
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
    """The fields that `one_batch_per_step` changes."""
    return {name: getattr(args, name) for name in _BATCH_FIELDS}


@contextmanager
def one_batch_per_step(trainer: Any) -> Iterator[tuple[int, Any]]:
    """During the training loop, a batch is a whole optimizer step. Yields its size per device, and the arguments.

    transformers' loop counts micro-batches to know when a step is due, so their number cannot vary. Under exact-step
    packing, the accumulation becomes part of the batch size, and `training_step` runs the passes. Callbacks see a
    changed copy of the arguments; the change is undone afterwards.
    """
    args, batch_size = trainer.args, trainer._train_batch_size
    trainer.args = copy.copy(args)
    trainer.args.per_device_train_batch_size *= args.gradient_accumulation_steps
    trainer.args.gradient_accumulation_steps = 1
    trainer._train_batch_size = batch_size * args.gradient_accumulation_steps
    try:
        yield trainer._train_batch_size, trainer.args
    finally:
        vars(args).update(vars(trainer.args) | batch_fields(args))  # keeps the changes of callbacks
        trainer.args, trainer._train_batch_size = args, batch_size


def reduce_gradients_in_every_pass(trainer: Any) -> None:
    """Under FSDP2, unless the user has set `sync_each_batch`: between passes it would keep whole gradients on a rank.

    1.2B parameters in bfloat16 on 8 ranks: 0.4 GiB instead of 2.3 (`--suite memory`). Replicas that a model was loaded
    with (HSDP) keep shards, and wait with the sum over replicas.
    """
    at_load = _sharded_at_load(trainer.model)
    replicated = at_load and (trainer.model.config.distributed_config.dp_replicate_size or 1) > 1
    asked = "sync_each_batch" in (trainer.args.accelerator_config.gradient_accumulation_kwargs or {})
    if (trainer.is_fsdp_enabled or at_load) and not replicated and not asked:
        trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def _sharded_at_load(model: Any) -> bool:
    of_load = getattr(model.config, "distributed_config", None)
    return (getattr(of_load, "fsdp_size", None) or 1) > 1  # not yet in 5.17


def check_tied_at_load(model: Any) -> None:
    """Raises ValueError if a tied head of a model that transformers (5.24) sharded when it loaded it would come apart.

    Where its plan does not name the head (Gemma 3, InternVL), embedding and head are gathered apart. Their shards are
    one tensor only if all ranks have equally many rows; otherwise PyTorch pads each apart, and one is never updated.
    """
    if not _sharded_at_load(model):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    weight, shards = embedding.weight, model.config.distributed_config.fsdp_size
    if len(weight) % shards == 0 or not weight.requires_grad:
        return
    owners = [m for m in model.modules() if any(p is weight for p in m.parameters()) and isinstance(m, FSDPModule)]
    for owner in owners:
        owner.unshard()
    gathered = [module.weight for module in (embedding, head)]
    for owner in owners:
        owner.reshard()
    if gathered[0] is not gathered[1] and not isinstance(gathered[1], DTensor):
        raise ValueError(
            f"the head of {type(model).__name__} is tied to its embedding, and transformers shards the {len(weight)} "
            f"rows of both apart, over {shards} ranks that do not divide them: one of the two would not be trained. "
            "Load it without distributed_config, and set fsdp=True; or save it with a multiple of that many rows first"
        )


def every_rank_runs_every_module(trainer: Any) -> bool:
    """Whether ranks wait for each other if one leaves out a part of the model in a pass, such as the tower of pictures.

    FSDP gathers the weights of a module when it runs; DeepSpeed, too (ZeRO-3), or it sums gradients in buckets. DDP
    waits only where it does not look for unused parameters: the user says so, or TRL (1.16) for reentrant checkpoints.
    """
    args = trainer.args
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or _sharded_at_load(trainer.model)
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    looks = args.ddp_find_unused_parameters
    looks = not reentrant if looks is None else looks
    return args.world_size > 1 and (sharded or not looks or bool(args.ddp_static_graph))


def is_wrapped(trainer: Any) -> bool:
    """Whether accelerate has sharded the model: it can no longer be run outside of its wrapper."""
    by_fsdp = trainer.is_fsdp_enabled and any(isinstance(module, FSDPModule) for module in trainer.model.modules())
    return by_fsdp or (trainer.is_deepspeed_enabled and trainer.model_wrapped is not trainer.model)


def gathers_each_module(trainer: Any) -> bool:
    """Whether ranks wait for each other in every module with weights (ZeRO-3). FSDP2 gathers whole layers."""
    return trainer.is_deepspeed_enabled and is_deepspeed_zero3_enabled()


def gradient_sync(trainer: Any, model: nn.Module, *, last: bool) -> AbstractContextManager:
    """What transformers' loop (5.24) puts around a micro-batch, the `last` of a step or another.

    DeepSpeed takes its step within a backward: accelerate (1.15) tells it by this state which one is the last.
    """
    if trainer.is_deepspeed_enabled:
        trainer.accelerator.gradient_state._set_sync_gradients(last)
    if last or trainer.is_deepspeed_enabled:
        return nullcontext()
    if trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return nullcontext()
    sharded_at_load = getattr(trainer, "is_distributed_loading_by_transformers", False)  # not yet in 5.17
    if sharded_at_load and hasattr(trainer.model, "set_requires_gradient_sync"):
        return trainer._defer_fsdp_gradient_reduction()
    return trainer.accelerator.no_sync(model)


@contextmanager
def recording(key: str) -> Iterator[None]:
    """While open, transformers' hooks record outputs under `key` in a way that a compiled layer can trace.

    They find the list of a forward through a `ContextVar`, which `torch.compile` cannot read; transformers has a global
    variable for models that are compiled whole. Unnecessary once Dynamo reads a `ContextVar`. Each layer starts with an
    empty list, so that all have one graph, and a layer that is recomputed has the graph of its forward.
    """
    active = output_capturing._active_collector
    outer, recorded, before = active.get(), list[Tensor](), (active.global_var, active.compiling)
    active.global_var, active.compiling = {key: recorded}, True
    try:
        yield
    finally:
        active.global_var, active.compiling = before
    if outer is not None and key in outer:
        outer[key].extend(recorded)


def trainer_in_place(trainer_class: type) -> ExitStack:
    """Until the stack is closed, TRL's `SFTTrainer` is `trainer_class`, in every module of TRL that exports it.

    TRL has no registry of trainers. Its packages are lazy: they look a name up in a module when it is first used.
    """
    undo = ExitStack()
    for module in (trl, trl.trainer, trl_sft_trainer):
        undo.enter_context(mock.patch.object(module, "SFTTrainer", trainer_class))
    return undo


def is_script_of_trl(path: str) -> bool:
    """Whether this is a file of `trl/scripts`, which asks `trl` for the class of its configuration."""
    return Path(path).resolve().parent == Path(str(resources.files("trl.scripts"))).resolve()


def config_in_place(config_class: type) -> AbstractContextManager:
    """Within the context, the command line of TRL's own script reads `config_class` in the place of `SFTConfig`."""
    return mock.patch.object(trl, "SFTConfig", config_class)


def trl_command(arguments: Sequence[str], *, through: tuple[str, str]) -> int:
    """Run the command `trl`, with its training scripts started by `python -m MODULE COMMAND script.py ...`.

    TRL launches `trl/scripts/sft.py` with accelerate, in processes of its own, and offers no way to run another script.
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


@contextmanager
def saving_under(trainer: Any, folder: Path) -> Iterator[None]:
    """`_save_checkpoint` writes below this folder, and pushes nothing.

    transformers (5.24) writes a checkpoint straight into its place, and pushes it before it is whole.
    """
    with (
        mock.patch.object(trainer, "_get_output_dir", return_value=str(folder)),
        mock.patch.object(trainer, "_push_from_checkpoint"),
    ):
        yield


def whole_state_dict(accelerator: Any) -> AbstractContextManager:
    """transformers (5.24) saves a model under FSDP only with the `state_dict_type` FULL_STATE_DICT, else nothing."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return nullcontext()
    return mock.patch.object(plugin, "state_dict_type", StateDictType.FULL_STATE_DICT)


def no_comparison_of_arguments() -> AbstractContextManager:
    """transformers (5.24) warns of other batch sizes and intervals than in a checkpoint, which change no training.

    It has no switch for this.
    """
    return mock.patch.object(transformers.trainer, "compare_trainer_and_checkpoint_args")


def engine_on_cpu(engine: str, args: Any) -> None:
    """accelerate (1.15) shards a model over accelerators only: let it do so over processes on the CPU.

    `args` are of the engine. For DeepSpeed the environment has DS_ACCELERATOR=cpu, ACCELERATE_TORCH_DEVICE=cpu.
    """
    assert args.device.type == "cpu"  # makes the process group
    if engine == "fsdp2":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    elif engine.startswith("zero"):
        os.environ |= {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true"}


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies, by name, of a model that may be sharded. All ranks call it."""
    with whole_model(model):
        return {
            name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
            for name, parameter in model.named_parameters()
        }


def store_of_ranks() -> Any:
    """The key-value store of the process group. PyTorch (2.14) has no public name for it."""
    return torch.distributed.distributed_c10d._get_default_store()
