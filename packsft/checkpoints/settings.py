"""What the result of a training depends on: recorded in every checkpoint, compared when a run resumes.

What a run may change freely is left out: `tokens_per_pass`, how the total batch is split into batches, accumulation and
ranks, the workers of a data set, logging, saving, evaluation, and the number of epochs.
"""

from __future__ import annotations

import enum
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import nn

from packsft.data.packs import PackedDataset, UserPacks
from packsft.data.pictures import PictureRows
from packsft.data.ranks import Ranks
from packsft.data.streams import PackedStream
from packsft.packing import resolve_overlong

# transformers restores these with the optimizer and the scheduler, whatever the arguments say.
OF_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_FIELDS = (
    "packing", "max_length", "truncation_mode", "shuffle_dataset", "train_sampling_strategy", "seed", "data_seed",
    "dataloader_drop_last", "loss_type", "label_smoothing_factor", "neftune_noise_alpha", "max_grad_norm", "optim",
    "optim_args", *OF_THE_OPTIMIZER, "lr_scheduler_type", "warmup_steps", "bf16", "fp16",
)  # fmt: skip
SAMPLED = 16  # values of a frozen weight
_OF_PEFT = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "rank_pattern")


def settings_of(
    args: Any, model: nn.Module, tokenizer: Any, dataset: Any, total_batch: int, ranks: Ranks
) -> dict[str, Any]:
    """By name, in JSON's types, without the rows (`digests_of_rows`); a digest is SHA-256 in hex.

    Args:
        args: an `SFTConfig`.
        model: before it is sharded.
        tokenizer: of the training set.
        dataset: the training set, prepared.
        total_batch: the examples, or packs, of an optimizer step on all ranks.
        ranks: the place of this rank.
    """
    parameters = list(model.parameters())
    sizes = [getattr(p, "ds_numel", p.numel()) for p in parameters]
    strategy = args.packing_strategy if args.packing else "none"
    settings = {name: getattr(args, name, None) for name in _FIELDS} | {
        "packing_strategy": strategy,
        "overlong": resolve_overlong(strategy, args.overlong),
        "loss_normalization": args.loss_normalization,
        "total batch": total_batch,
        "tokenizer": digest_of_tokenizer(tokenizer),
        "chat_template": _digest(json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True, default=str)),
        "use_seedable_sampler": args.accelerator_config.use_seedable_sampler,
        "lr_scheduler_kwargs": args.lr_scheduler_kwargs or None,
        "model": {
            "class": type(getattr(model, "get_base_model", lambda: model)()).__name__,
            "dtypes": sorted({str(p.dtype) for p in parameters}),
            "parameters": sum(sizes),
            "trainable parameters": sum(size for p, size in zip(parameters, sizes, strict=True) if p.requires_grad),
            "frozen weights": digest_of_frozen(model),
            "config": _of_training(getattr(model, "config", None)),
        },
        "peft_config": {
            name: {key: value for key, value in config.to_dict().items() if key not in _OF_PEFT}
            for name, config in getattr(model, "peft_config", {}).items()
        },
    }
    if args.world_size > 1:  # transformers sets it to False for one process
        settings["average_tokens_across_devices"] = args.average_tokens_across_devices
    if isinstance(dataset, PackedStream):
        settings["stream"] = dataset.reading(args.dataloader_num_workers, args.per_device_train_batch_size, ranks)
    return json.loads(json.dumps(settings, default=_as_json, sort_keys=True))


def _as_json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_tokenizer(tokenizer: Any) -> str | None:
    """Of its vocabulary and its special tokens; None if there is no vocabulary."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    return _digest(json.dumps([sorted(tokenizer.get_vocab().items()), str(tokenizer.special_tokens_map)]))


def _of_training(config: Any) -> dict[str, Any]:
    """The settings of a model that change its training: numbers, texts and rotary embeddings, not ids of tokens."""
    known = {} if config is None else config.get_text_config().to_dict()
    return {
        name: value
        for name, value in known.items()
        if (isinstance(value, (int, float, str)) or name == "rope_parameters")
        and not name.startswith(("_", "output_", "return_"))
        and not name.endswith("_token_id")
        and name not in ("transformers_version", "dtype", "use_cache")
    }


def digest_of_frozen(model: nn.Module) -> str | None:
    """Of the names of all frozen weights, and a few values of those that are plain tensors; None if there are none.

    A shard or a quantised tensor has no values of its own. Reads the device once.
    """
    frozen = {name: p.data for name, p in model.named_parameters() if not p.requires_grad}
    if not frozen:
        return None
    plain = [weight for weight in frozen.values() if type(weight) is torch.Tensor and weight.device.type != "meta"]
    values = [weight.flatten()[:: max(1, weight.numel() // SAMPLED)][:SAMPLED] for weight in plain]
    sample = torch.cat([value.to(values[0].device, torch.float64) for value in values]).tolist() if values else []
    return _digest(json.dumps([sorted(frozen), sample]))


def digests_of_rows(dataset: Any) -> dict[str, Any] | None:
    """The number of rows, and digests of what they hold, in order; None if they cannot be read ahead."""
    if isinstance(dataset, PackedDataset):
        of_pictures = {}
        if isinstance(dataset.rows, PictureRows):
            processor = dataset.rows.processor.image_processor.to_dict()
            of_pictures = {"image processor": _digest(json.dumps(processor, default=repr, sort_keys=True))}
        return {"rows": len(dataset.rows.lengths), "tokens and labels": dataset.rows.digest, **of_pictures}
    if isinstance(dataset, UserPacks):
        return {"rows": len(dataset), **dataset.digests}
    return None


def in_background(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """The result of a function that runs in a thread, which does not keep the process alive."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """By name of each setting that differs: "old -> new".

    A setting that only one side knows is of another version, and is not compared; an adapter or a column is.
    """
    return dict(_differing(saved, now))


def _differing(saved: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for name in {**now, **saved} if path in ("peft_config, ", "training set, ") else [n for n in now if n in saved]:
        old, new, label = saved.get(name), now.get(name), f"{path}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing(old, new, f"{label}, ")
        elif old != new:
            yield label, f"{_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)
