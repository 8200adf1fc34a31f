"""Checks the trainer's arguments before anything is tokenised: what is wrong, and what has no effect.

Knows the configuration and the constructor's arguments. Each error names the field, its value and what is allowed.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import logging
import numbers
import os
import re
import typing
from collections.abc import Callable
from typing import Any

import transformers
from accelerate.utils import DistributedType, DynamoBackend, is_peft_model
from datasets import Dataset, IterableDataset
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import is_kernels_available
from trl import SFTConfig

from packsft.config import PackedSFTConfig, check_choice, check_packs, with_own_fields
from packsft.data.document import check_row
from packsft.data.loaders import Packs
from packsft.data.messages import BESIDE
from packsft.data.pictures import picture_column
from packsft.model.parts import check_has_head
from packsft.packing import STRATEGIES
from packsft.step.memory import can_measure

logger = logging.getLogger("packsft")


def own_arguments(arguments: dict[str, Any]) -> PackedSFTConfig:
    """A copy of the configuration: the trainer adjusts it, and the caller may use the original again.

    Raises ValueError for a value of another type.
    """
    model = arguments.get("model")
    if not isinstance(model, (str, nn.Module)):
        raise ValueError(f"model is a {type(model).__name__}, expected a model, or the name or folder of one")
    args = arguments.get("args")
    if args is not None and not isinstance(args, TrainingArguments):
        raise ValueError(f"args is a {type(args).__name__}, expected a PackedSFTConfig or an SFTConfig")
    if args is None:
        name = model if isinstance(model, str) else (getattr(model.config, "_name_or_path", "") or "model")
        args = PackedSFTConfig(f"{name.split('/')[-1]}-SFT")
    if not isinstance(args, SFTConfig):
        args = SFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})  # `to_dict` hides the token
    args = with_own_fields(args)
    _check_values(args)
    args.padding_free = args.padding_free and args.packing  # we do it without packing, within max_length
    if _takes_exact_steps(args) and args.auto_find_batch_size:  # it would change the training
        args.auto_find_batch_size = False
        logger.warning(
            "auto_find_batch_size=True: no effect on packing_strategy='step', where a step that runs out of memory "
            "runs again with the same examples in smaller passes (tokens_per_pass)"
        )
    args.gradient_checkpointing_kwargs = copy.copy(args.gradient_checkpointing_kwargs)  # the parent changes it
    args.accelerator_config = copy.copy(args.accelerator_config)
    args.accelerator_config.non_blocking = args.dataloader_pin_memory and args.device.type == "cuda"
    return args


def check_arguments(args: PackedSFTConfig, arguments: dict[str, Any]) -> None:
    """Raises ValueError for anything wrong with the call that can be known before a row is tokenised."""
    check_packs(args)
    if _takes_exact_steps(args):
        _check_exact_steps(args)
    _warn_of_idle_settings(args)
    plans_packs = args.packing and not STRATEGIES[args.packing_strategy].exact_steps
    if plans_packs and args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "train_sampling_strategy='group_by_length' groups examples of similar length, but under "
            f"packing_strategy={args.packing_strategy!r} it would see packs, which all have about the same length: "
            "leave it unset, or set packing_strategy='step' or packing=False"
        )
    if args.compile_layers:
        _check_compiled_layers(args)
    if (parts := args.sequence_parallel_size) > 1:
        _check_sequence_parallel(parts, args, arguments)
    if args.deepspeed_plugin is not None:
        for name, value in (("on_nonfinite", "skip"), ("resume_only_model", True)):
            if getattr(args, name, None) == value:
                raise ValueError(f"{name}={value!r} does not work under DeepSpeed, which keeps the optimizer to itself")
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError(
            "activation_offloading=True moves activations from an accelerator to the CPU, but this model trains on the "
            "CPU already: leave it False"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process mean DataParallel, which splits a batch by rows, but a packed batch has "
            "one row: start one process per GPU (accelerate launch, torchrun), or set CUDA_VISIBLE_DEVICES=0"
        )
    if args.truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode={args.truncation_mode!r} is unknown, expected 'keep_start' or 'keep_end'")
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config.dispatch_batches=True is not supported: it splits a batch by rows, which loses the "
            "boundaries of packed documents; leave it unset"
        )
    args.accelerator_config.dispatch_batches = False  # None would mean True for a stream
    if arguments.get("data_collator") is not None:
        raise ValueError(
            f"data_collator={type(arguments['data_collator']).__name__} is not supported: packsft builds the batch "
            "itself. Prepare rows instead: `input_ids`, `labels` (-100 = not scored) and, for packs of your own, "
            "`seq_lengths`"
        )
    function = arguments.get("formatting_func")
    if function is not None and not callable(function):
        raise ValueError(f"formatting_func is a {type(function).__name__}, expected a function of a row")
    train, evals = (arguments.get(name) for name in ("train_dataset", "eval_dataset"))
    datasets = {} if train is None else {"train_dataset": train}
    if isinstance(evals, dict):
        if unnamed := [name for name in evals if not isinstance(name, str)]:
            raise ValueError(f"eval_dataset has the key {unnamed[0]!r}, expected a text: the name of the data set")
        datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in evals.items()}
    elif evals is not None:
        datasets["eval_dataset"] = evals
    for name, dataset in datasets.items():
        if not skips_preparation(args) or isinstance(dataset, (Dataset, IterableDataset)):
            check_dataset(name, dataset, args, function is not None)
    if arguments.get("processing_class") is not None:
        check_tokenizer(arguments["processing_class"], args)
    model = arguments["model"]
    _check_adapter(arguments.get("peft_config"), args)
    if isinstance(model, str):
        check_model_name(model)
        requested = (args.model_init_kwargs or {}).get("attn_implementation")
        if requested == "flash_attention_2" and not (
            importlib.util.find_spec("flash_attn") is not None or is_kernels_available()
        ):
            raise ValueError(
                "attn_implementation='flash_attention_2' needs the package flash-attn, which is not installed: install "
                "it, or leave attn_implementation unset to use PyTorch's varlen attention"
            )
    elif is_peft_model(model):
        _check_adapter(model.active_peft_config, args)
    elif isinstance(model, PreTrainedModel):
        check_has_head(model)


def _check_sequence_parallel(parts: int, args: PackedSFTConfig, arguments: dict[str, Any]) -> None:
    where = f"sequence_parallel_size={parts}"
    if args.world_size % parts:
        raise ValueError(
            f"{where} needs a number of processes that it divides, and there are {args.world_size}: start them with "
            f"accelerate launch --num_processes={parts} or torchrun"
        )
    if args.deepspeed_plugin is not None:
        raise ValueError(f"{where} has not been tried under DeepSpeed: use FSDP2 (`fsdp`), or set it to 1")
    if args.tokens_per_pass == "auto":
        raise ValueError(f"{where}: tokens_per_pass='auto' would measure on each rank for itself: set a number")
    for name in ("compute_metrics", "compute_loss_func"):
        if arguments.get(name) is not None:
            raise ValueError(f"{where}: {name} needs the logits of a whole row, and a rank has a part of it")
    if not args.average_tokens_across_devices:
        raise ValueError(
            f"{where}: average_tokens_across_devices=False would count the tokens of a part of a row alone"
        )
    for name in ("compile_layers", "torch_compile"):
        if getattr(args, name, False):
            raise ValueError(f"{where}: {name}=True does not compile the exchange between the ranks of a row")


def _check_values(args: PackedSFTConfig) -> None:
    """Raises ValueError for a field of numbers or of given choices that holds anything else: a text would be true."""
    hints = typing.get_type_hints(type(args))
    for field in dataclasses.fields(args):
        value, hint = getattr(args, field.name), hints[field.name]
        allowed = set(typing.get_args(hint) or (hint,)) - {type(None)}
        if value is None or not allowed:
            continue
        if allowed <= _NUMBERS.keys() and not any(_NUMBERS[kind](value) for kind in allowed):
            kinds = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{field.name}={value!r} is a {type(value).__name__}, expected {kinds}")
        check_choice(field.name, value)  # of `PackedSFTConfig`: an SFTConfig may have packing_strategy="step"
    positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for name in (*positive, "pad_to_multiple_of", "dataset_num_proc", "sequence_parallel_size"):
        size: Any = getattr(args, name, None)
        if size is not None and (not _NUMBERS[int](size) or size < 1):
            raise ValueError(f"{name}={size!r}: expected an integer of at least 1")
    if not isinstance(args.dataset_kwargs, dict | None):
        raise ValueError(f"dataset_kwargs={args.dataset_kwargs!r}: expected a dict")
    if not isinstance(skips := (args.dataset_kwargs or {}).get("skip_prepare_dataset", False), bool):
        raise ValueError(f"dataset_kwargs={{'skip_prepare_dataset': {skips!r}}}: expected True or False")
    if unread := (args.dataset_kwargs or {}).keys() - {"skip_prepare_dataset"}:
        logger.warning("dataset_kwargs: %s: not read, only skip_prepare_dataset is", ", ".join(map(repr, unread)))


_NUMBERS: dict[type, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, bool),
    int: lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool),
    float: lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool),
}


def check_model_name(name: str) -> None:
    """Raises ValueError for a folder that is not there, unless the name may be one of the hub."""
    if not os.path.exists(name) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"model {name!r}: there is no such folder, and no model of the hub has such a name")


def skips_preparation(args: PackedSFTConfig) -> bool:
    return bool((args.dataset_kwargs or {}).get("skip_prepare_dataset"))


def _takes_exact_steps(args: PackedSFTConfig) -> bool:
    strategy = STRATEGIES.get(args.packing_strategy if args.packing else "none")
    return strategy is not None and strategy.exact_steps and not skips_preparation(args)


def _warn_of_idle_settings(args: PackedSFTConfig) -> None:
    idle: dict[str, Any] = {} if _takes_exact_steps(args) else {"tokens_per_pass": None}
    if skips_preparation(args):  # packs that the user made are not changed
        idle |= {"overlong": None, "max_lost_fraction": 1.0}
    given = [f"{name}={getattr(args, name)!r}" for name, unset in idle.items() if getattr(args, name, unset) != unset]
    if given:
        why = "packs of your own" if skips_preparation(args) else "a packing_strategy other than 'step'"
        logger.warning("%s: no effect on %s", " and ".join(given), why)


def _check_exact_steps(args: PackedSFTConfig) -> None:
    other = "set packing_strategy='bfd'"
    if args.dataloader_drop_last:
        raise ValueError(
            "dataloader_drop_last=True drops a micro-batch that is not full, but packing_strategy='step' has none: "
            f"leave it False, or {other}"
        )
    if args.tokens_per_pass == "auto" and not can_measure(args.device):
        raise ValueError(
            f"tokens_per_pass='auto' can measure memory on CUDA devices and on the CPU under Linux, not on "
            f"{args.device.type}: set a number"
        )
    if args.deepspeed_plugin is not None and args.tokens_per_pass == "auto":
        raise ValueError(
            "tokens_per_pass='auto' does not work under DeepSpeed, which keeps the gradients of the measurement: set a "
            "number"
        )
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optimizer or "layerwise" in optimizer:
        raise ValueError(
            f"optim={optimizer!r} updates weights within a backward, but a step of packing_strategy='step' runs one "
            f"backward per pass: choose another optim, or {other} and gradient_accumulation_steps=1"
        )
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy='batch_rebalance' deals examples to ranks, but packing_strategy='step' already "
            f"does so, balanced by tokens and attention: leave it unset, or {other}"
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices=False divides by each rank's own tokens, but packing_strategy='step' "
            f"chooses the examples of each rank: leave it True, or {other}"
        )


def _check_compiled_layers(args: PackedSFTConfig) -> None:
    if args.torch_compile:
        raise ValueError("compile_layers=True compiles each layer, torch_compile=True the whole model: choose one")
    if args.use_liger_kernel:
        raise ValueError(
            "compile_layers=True and use_liger_kernel=True both replace the same operations of a layer: choose one"
        )
    if args.deepspeed_plugin is not None:
        raise ValueError("compile_layers=True does not work under DeepSpeed, whose hooks run within the layers")


def check_dataset(name: str, dataset: Any, args: PackedSFTConfig, formats: bool = False) -> None:
    """Raises ValueError for data that cannot be trained or evaluated on, as the first row shows.

    `formats`: whether there is a `formatting_func`.
    """
    if isinstance(dataset, Packs):
        return
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(f"{name} is a {type(dataset).__name__}, expected a datasets.Dataset or IterableDataset")
    first = next(iter(dataset), _NO_ROW)
    if first is _NO_ROW:
        raise ValueError(f"{name} is empty: it has 0 rows")
    check_row(first, f"row 0 of {name}")
    if not first:
        raise ValueError(f"row 0 of {name} has no columns")
    own = skips_preparation(args)
    columns = set(first) | set(getattr(dataset, "column_names", None) or ())
    if (pictures := picture_column(columns)) is not None:
        _check_pictures(f"{name} has the column {pictures!r}", columns, dataset, args, formats)
    if {"seq_lengths", "input_ids"} <= first.keys() and not own:
        raise ValueError(
            f"{name} has the column seq_lengths, so its rows are packs of your own: set "
            "dataset_kwargs={'skip_prepare_dataset': True}, or remove the column to take each row as one document"
        )
    if isinstance(dataset, IterableDataset):
        _warn_of_idle_settings_of_streams(name, args)
    goes_by = {"labels", "completion_mask"} if "input_ids" in first else {"prompt"}
    if args.completion_only_loss and not goes_by & first.keys():
        logger.warning(
            "completion_only_loss=True: no effect on %s, which has no %s", name, " or ".join(sorted(goes_by))
        )
    if "input_ids" not in first:
        return
    read = {"input_ids", "labels", "attention_mask", "position_ids", "seq_lengths"}
    if own and args.loss_normalization == "example":
        read.add("loss_weights")
    if not own and "labels" not in first:
        read |= {"assistant_masks"} | ({"completion_mask"} if args.completion_only_loss else set())
    lists = {column for column, value in first.items() if not isinstance(value, str) and hasattr(value, "__len__")}
    if unread := sorted(lists - read):
        logger.warning("%s: %s beside input_ids: not read", name, " and ".join(unread))


def _check_pictures(said: str, columns: set[str], dataset: Any, args: PackedSFTConfig, formats: bool) -> None:
    """Raises ValueError for what cannot be done with pictures."""
    if {"image", "images"} <= columns:
        raise ValueError(f"{said}, and 'image', too: leave one of them out")
    if formats:
        raise ValueError(f"{said}, and formatting_func gives texts alone: make the texts before, with dataset.map")
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(f"{said}, and a transform, which would run while a plan is made: apply it before, with map")
    if skips_preparation(args):
        raise ValueError(f"{said}, which packs of your own cannot hold: leave skip_prepare_dataset unset")
    if beside := [name for name in BESIDE if name in columns]:
        logger.warning("%s: %s not read beside it, as in TRL", said, " and ".join(beside))
    strategy = STRATEGIES[args.packing_strategy if args.packing else "none"]
    if strategy.splits or args.overlong == "split":
        raise ValueError(
            f"{said}, and no picture may be cut, but {strategy.name!r} or overlong='split' cuts rows anywhere: choose "
            "packing_strategy='step' or 'bfd', and overlong='truncate', 'drop' or 'error'"
        )
    if args.truncation_mode == "keep_end":
        raise ValueError(f"{said}, which truncation_mode='keep_end' would cut off: choose 'keep_start'")
    if args.assistant_only_loss and Version(transformers.__version__) < Version("5.18"):
        raise ValueError(f"{said}, and assistant_only_loss=True needs transformers 5.18 or newer for them")
    if (parts := args.sequence_parallel_size) > 1:
        raise ValueError(f"{said}, which sequence_parallel_size={parts} cannot cut: leave it at 1")


_NO_ROW: Any = object()  # a row may be anything, None as well


def _warn_of_idle_settings_of_streams(name: str, args: PackedSFTConfig) -> None:
    idle = {"dataset_num_proc": args.dataset_num_proc is not None}
    idle["train_sampling_strategy"] = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    if given := [f"{field}={getattr(args, field)!r}" for field, is_set in idle.items() if is_set]:
        logger.warning("%s: no effect on %s, which is a stream", " and ".join(given), name)


def _check_adapter(config: Any, args: PackedSFTConfig) -> None:
    """`config`: a PEFT configuration, or None."""
    if getattr(config, "target_r", None) is not None and args.on_nonfinite == "skip":
        raise ValueError("on_nonfinite='skip' leaves no gradients, but AdaLoRA measures them in every step")
    if getattr(config, "is_prompt_learning", False):
        _check_prompt(config, args)
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"alora_invocation_tokens={config.alora_invocation_tokens} starts an adapter after the last such tokens of "
            "a row, but a packed row holds many documents: activated LoRA is not supported"
        )
    if getattr(config, "auxiliary_loss_weight", None) is not None:
        raise ValueError(
            f"{type(config).__name__} runs a second model over each row, in which packed documents see each other, and "
            "adds its loss: it is not supported"
        )
    for name in ("kasa_config", "monteclora_config"):
        if getattr(config, name, None) is not None:
            logger.warning(
                "%s: PEFT leaves the loss of this adapter to a compute_loss of your own, and neither this trainer nor "
                "TRL's adds it. Divide it by current_gradient_accumulation_steps, so that it counts once in a step",
                name,
            )


def _check_prompt(config: Any, args: PackedSFTConfig) -> None:
    name, kind = type(config).__name__, config.peft_type  # a text as well
    if kind not in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(
            f"{name} is not supported: it needs more than the tokens and labels of a row. Of prompt learning, "
            "PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig and CartridgeConfig are"
        )
    if config.task_type != "CAUSAL_LM":
        raise ValueError(f"{name} has task_type={config.task_type!r}, expected 'CAUSAL_LM'")
    if kind in ("PREFIX_TUNING", "CARTRIDGE") and args.gradient_checkpointing:
        raise ValueError(
            f"gradient_checkpointing=True drops the cache that {name} fills: set gradient_checkpointing=False"
        )


def check_accelerator(accelerator: Any, args: PackedSFTConfig, model: nn.Module) -> None:
    """Raises ValueError for what `accelerate launch` or its configuration file asks for and cannot have."""
    if args.compile_layers and accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError("compile_layers=True compiles each layer, accelerate's dynamo_backend the model: choose one")
    if args.fsdp and accelerator.distributed_type != DistributedType.FSDP:
        logger.warning(
            "fsdp=%r: not in force: accelerate shards a model over several accelerators, and this run is %s on %s",
            args.fsdp, accelerator.distributed_type.value, accelerator.device.type,
        )  # fmt: skip
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.tp_enabled and is_peft_model(model):
        raise ValueError(
            f"tp_size={parallelism.tp_size} with a PEFT adapter: PEFT does not shard its matrices with the layers that "
            "tensor parallelism shards, so the adapter adds to the wrong outputs: train all weights, or leave tp_size "
            "at 1 and use FSDP2"
        )
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "cp_size or sp_size above 1: accelerate's context and sequence parallelism shard a row by position, across "
            "the boundaries of packed documents: leave both at 1, and set sequence_parallel_size of PackedSFTConfig"
        )
    parts = args.sequence_parallel_size
    if parallelism is not None and parallelism.tp_enabled and parts > 1:
        raise ValueError(
            f"tp_size={parallelism.tp_size} and sequence_parallel_size={parts} both divide the heads: choose one"
        )


def check_tokenizer(processing_class: Any, args: Any) -> None:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.eos_token is None and not args.eos_token:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no eos_token to end an example with: set "
            "tokenizer.eos_token, or eos_token in the configuration"
        )
