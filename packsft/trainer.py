"""`PackedSFTTrainer`: TRL's `SFTTrainer` on packed sequences. The story of a run, in the order in which it happens.

Each override says what it adds to the parent and hands over: the call to `arguments.py`, rows to `dataset.py`, packs to
`collator.py`, the passes of a step to `passes.py`, the loss to `head.py`, its denominator to `loss.py`, numbers to
`metrics.py`, the proof to `isolation.py`. What has to reach inside the parent is in `compat.py`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import DynamoBackend, is_peft_model
from datasets import Dataset, IterableDataset
from packsft_kernels import LossOptions
from packsft_kernels.version import __version__
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from trl import SFTConfig, SFTTrainer

from packsft import compat
from packsft.arguments import (
    check_arguments,
    check_parallelism,
    check_tokenizer,
    own_arguments,
    skips_preparation,
)
from packsft.config import has_bf16
from packsft.data.batch import IGNORE_INDEX, document_lengths, loss_inputs, model_inputs
from packsft.data.collator import PackingCollator, join_passes, mark_sizes
from packsft.data.packs import PackedDataset, PackSampler, StepDataset, pack_dataset
from packsft.data.streams import PackedStream, StepStream
from packsft.model import attention
from packsft.model.head import HeadOutput, count_embeddings, install_head
from packsft.model.isolation import NOT_CHECKED, IsolationVerdict, check_isolation
from packsft.notices import PackingNotice, cost_of_logits
from packsft.packing import PackingReport, describe_losses, packing_report
from packsft.proof.claims import PackingCheck, Ways, check_claims, first_documents
from packsft.step.metrics import MetricSums
from packsft.step.normalization import items_in_step, ranks_per_batch
from packsft.step.passes import PassWalker

logger = logging.getLogger("packsft")


class PackedSFTTrainer(SFTTrainer):
    """`trl.SFTTrainer` that trains on packed sequences: no padding, no T x T mask, no T x V logits.

    The constructor is the parent's, argument for argument. `args` may be an `SFTConfig` or a [`PackedSFTConfig`], whose
    default is exact-step packing: every optimizer step takes the examples that an unpacked run would take, packed into
    as few passes as hold them. With `packing=False` the examples of a batch are laid end to end without padding. Every
    data set form of the parent works packed; so does a data set with `dataset_kwargs={"skip_prepare_dataset": True}`
    whose rows are packs the user made (`input_ids`, `labels`, `seq_lengths`).

    Attributes:
        isolation: the verdict of the check that packed documents cannot see each other on this model.
        why_compact: None where the language-model head is fused, else why it makes the scored logits instead.
        packing_report: what packing did to the training set and to the number of steps; None for a stream.

    Raises:
        ValueError: bad input, before anything is tokenised; the message names the field or the row.
    """

    _tag_names = ["trl", "sft", "packsft"]  # noqa: RUF012 (the parent's spelling)
    loss_is_scaled_for_ga = True  # the denominator is that of the whole optimizer step, see loss.py

    def __init__(self, *positional: Any, **named: Any) -> None:
        compat.check_versions()
        call = inspect.signature(SFTTrainer.__init__).bind(self, *positional, **named)
        call.arguments["args"] = args = own_arguments(call.arguments)
        check_arguments(args, call.arguments)
        if args.bf16 and not has_bf16():
            logger.warning("bf16=True, but this processor has no bfloat16 products: emulated, they are far slower")
        self._filter_nonfinite = args.logging_nan_inf_filter
        args.logging_nan_inf_filter = False  # it reads the device twice per micro-step; training_step does it there
        self._vocab_size: int | None = None
        self._document_lengths: Tensor | None = None  # of the pass, for NEFTune's noise
        self._said_logits = False
        self._batch_fields = compat.batch_fields(args)
        with compat.own_head_during_init():
            super().__init__(*call.args[1:], **call.kwargs)

        check_parallelism(self.accelerator)
        self._check: PackingCheck | None = None
        self._sums = {"train": MetricSums(), "eval": MetricSums(self._filter_nonfinite)}
        base_model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self._vocab_size = count_embeddings(base_model)
        for dataset in self._packed_datasets():
            dataset.check_ids(self._vocab_size)
        self.isolation = self._prepare_attention(base_model)
        self.data_collator = PackingCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            vocab_size=self._vocab_size,
            padded=not self.isolation.isolated,
            round_sizes=self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
            max_length=self.args.max_length,
            per_example=getattr(args, "loss_normalization", "token") == "example",
            masked=self.aux_loss_enabled,
        )
        self._passes = PassWalker(
            getattr(args, "tokens_per_pass", None) or args.max_length or sys.maxsize,
            args.max_length,
            self.accelerator,
            run=self._run_pass,
            collate=lambda rows: self._prepare_inputs(self.data_collator(rows)),
            begin=self._begin_passes,
            undo=self._undo_passes,
        )
        if self.data_collator.padded and self.compute_metrics is not None and self._packs_evaluation():
            raise ValueError(
                "compute_metrics with packed evaluation sets needs a model that can be packed "
                f"({self.isolation.reason}): set eval_packing=False"
            )
        self.why_compact = install_head(base_model, self._loss_options(), needs_aux_loss=self.aux_loss_enabled)
        if self.why_compact is not None:
            logger.warning(
                "the language-model head is not fused: %s; it computes the scored logits instead", self.why_compact
            )
        self.add_callback(
            PackingNotice(
                lambda: self.packing_report, self._describe_model, self._record, self.eval_dataset is not None
            )
        )

    # ---- data: rows to packs ----

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset | PackedDataset | PackedStream:
        """Adds to the parent's preparation: packs are planned over the whole data set and gathered when needed.

        Those of a stream are made as its rows come, through a buffer.
        """
        if isinstance(dataset, (PackedDataset, PackedStream)):
            return dataset
        check_tokenizer(processing_class, args)
        # The parent tokenises and labels. It neither cuts nor drops nor shuffles: the plan does, and counts.
        tokenise = copy.copy(args)
        tokenise.max_length, tokenise.shuffle_dataset = None, False
        rows = super()._prepare_dataset(dataset, processing_class, tokenise, False, formatting_func, dataset_name)
        strategy = args.packing_strategy if packing else "none"
        options: dict[str, Any] = {
            "strategy": strategy,
            "name": dataset_name,
            "overlong": getattr(args, "overlong", None),
            "max_lost_fraction": getattr(args, "max_lost_fraction", 1.0),
            "vocab_size": self._vocab_size,
            "keep_end": args.truncation_mode == "keep_end",
            "per_example": getattr(args, "loss_normalization", "token") == "example",
        }
        seed = args.seed if args.data_seed is None else args.data_seed
        if isinstance(rows, IterableDataset):
            return PackedStream(rows.shuffle(seed=seed) if args.shuffle_dataset else rows, args.max_length, **options)
        # a best-fit plan is made for each epoch, unless its order is asked for
        sampled = dataset_name == "train" and args.train_sampling_strategy == "random"
        repacks = strategy in ("bfd", "bfd_split") and sampled
        packed = pack_dataset(rows, args.max_length, seed=seed if args.shuffle_dataset or repacks else None, **options)
        for loss in describe_losses(vars(packed.plan), args.max_length):
            logger.warning("%s data set: %s", dataset_name, loss)
        return packed

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "loss_weights" not in self._signature_columns:
            self._signature_columns.append("loss_weights")

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Adds to the parent: every epoch its own packs, in an order that balances ranks."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, PackedDataset) and dataset.repacks and self.args.train_sampling_strategy == "random":
            ranks = self.accelerator.num_processes // ranks_per_batch(self.accelerator)
            return PackSampler(dataset, self._train_batch_size * ranks)
        return super()._get_train_sampler(train_dataset)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        """Adds to the parent: under exact-step packing, a batch is that of all ranks, and this rank packs its share."""
        num_ranks = self.accelerator.num_processes // ranks_per_batch(self.accelerator)
        step_size = batch_size * (1 if self.args.accelerator_config.split_batches else num_ranks)
        tokens_per_pass, padded = self._passes.tokens_per_pass, self.data_collator.padded
        if not _is_exact(dataset):
            source: Any = dataset
        elif isinstance(dataset, PackedStream):
            source, batch_size = StepStream(dataset, step_size, tokens_per_pass, padded=padded), 1
        else:
            rank = self.accelerator.process_index // ranks_per_batch(self.accelerator)
            source, batch_size = StepDataset(dataset, step_size, tokens_per_pass, rank, num_ranks, padded), step_size
        loader = super()._get_dataloader(source, description, batch_size, sampler_fn, is_training, dataloader_key)
        if isinstance(source, StepDataset):
            compat.whole_batches(loader)
        else:
            source = compat.share_stream(loader, (PackedStream, StepStream), endless=is_training)
        if is_training and _is_exact(dataset):
            self._passes.steps = source
        return loader

    def _packed_datasets(self) -> list[PackedDataset | PackedStream]:
        evals = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [
            dataset for dataset in (self.train_dataset, *evals) if isinstance(dataset, (PackedDataset, PackedStream))
        ]

    @property
    def packing_report(self) -> PackingReport | None:
        if not isinstance(self.train_dataset, PackedDataset):
            return None
        ranks = self.accelerator.num_processes // ranks_per_batch(self.accelerator)
        return packing_report(
            self.train_dataset.plan,
            effective_batch_size=self.get_total_train_batch_size(self.args),
            num_train_epochs=self.args.num_train_epochs,
            ranks=ranks,
            packs_at_once=self._train_batch_size * ranks if self.train_dataset.repacks else None,
            tokens_per_pass=self._passes.tokens_per_pass,
        )

    # ---- the model: attention and head ----

    def _prepare_attention(self, model: PreTrainedModel) -> IsolationVerdict:
        """Give the model per-document attention, and prove on it that documents stay apart; else train padded."""
        own_attention = model.config._attn_implementation
        attention.set_backend(backend := getattr(self.args, "attention_backend", "auto"))
        if backend != "auto":
            with self.accelerator.autocast():
                attention.backend_of(model)  # raises, with the reason
        if own_attention in (None, "eager", "sdpa"):  # flash and flex attention keep documents apart themselves
            model.set_attn_implementation(attention.ATTENTION_NAME)
        if getattr(self.args, "check_packing", "on") == "off":
            return IsolationVerdict(True, NOT_CHECKED)
        verdict = self._check_isolation(model)
        failed = torch.tensor(0 if verdict.isolated else 1, device=self.accelerator.device)
        anywhere = int(self.accelerator.reduce(failed, reduction="sum"))  # every rank waits for the others here
        if verdict.isolated and anywhere:
            verdict = IsolationVerdict(False, "it failed on another rank")
        if verdict.isolated:
            return verdict
        if getattr(self.args, "on_unpackable", "pad") == "error":
            raise ValueError(f"{type(model).__name__} cannot be trained on packed documents: {verdict.reason}")
        logger.warning(
            "%s is trained on padded rows instead of packed ones, with the same examples in each step: %s",
            type(model).__name__, verdict.reason,
        )  # fmt: skip
        if own_attention is not None and own_attention != model.config._attn_implementation:
            model.set_attn_implementation(own_attention)
        return verdict

    def _check_isolation(self, model: PreTrainedModel) -> IsolationVerdict:
        longest = None if skips_preparation(self.args) else self.args.max_length
        return check_isolation(model, self.accelerator.autocast, longest)

    def check_packing(self) -> PackingCheck:
        """Prove on this model and the first documents of its data that packed training is the same training.

        Every claim is measured beside what it may differ by, see `claims.py`. Parameters, gradients, modes and random
        state stay as they are. For a model as constructed, before FSDP or ZeRO cut its parameters.
        """
        documents = first_documents(self.train_dataset, self.args.max_length)
        model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        if not self.data_collator.padded:
            self.isolation = self._check_isolation(model)
        ways = Ways(
            self.model,
            documents,
            collator=self.data_collator,
            prepare=self._prepare_inputs,
            loss=lambda batch, num_items: self._forward_head(self.model, batch, num_items).loss,
            autocast=self.accelerator.autocast,
            packed_forward=self._packed_forward,
            options=self._loss_options(),
        )
        claims = check_claims(ways, self.isolation)
        tokens = sum(len(document["input_ids"]) for document in documents)
        self._check = PackingCheck(
            claims, self._describe_model() | {"checked on": f"{len(documents)} documents of {tokens} tokens"}
        )
        return self._check

    def _describe_model(self) -> dict[str, str]:
        """Which way the model is trained, and why."""
        if self.data_collator.padded:
            rows = f"padded: {self.isolation.reason}"
        elif self.isolation.reason == NOT_CHECKED:
            rows = "packed; whether documents see each other was not checked"
        elif self.isolation.isolated:
            rows = "packed, and none sees another: checked on this model"
        else:
            rows = f"packed, although {self.isolation.reason}"
        head = "fused" if self.why_compact is None else f"the logits of scored tokens: {self.why_compact}"
        return {"documents": rows, "attention": self._describe_attention(), "head": head}

    def _describe_attention(self) -> str:
        model = self.accelerator.unwrap_model(self.model)
        name = model.config._attn_implementation
        if name != attention.ATTENTION_NAME:
            return f"transformers' {name}" + (" on padded rows" if self.data_collator.padded else "")
        with self.accelerator.autocast():
            backend, spec = attention.backend_of(model)
        return f"{backend}, {str(spec.dtype).removeprefix('torch.')} on {spec.device}, head size {spec.head_dim}"

    def _packs_evaluation(self) -> bool:
        return self.args.packing if self.args.eval_packing is None else self.args.eval_packing

    def _loss_options(self) -> LossOptions:
        # as in the parent, DFT takes no label smoothing
        dft = self.args.loss_type == "dft"
        return LossOptions(dft=dft, label_smoothing=0.0 if dft else self.args.label_smoothing_factor)

    def _record(self) -> dict[str, Any]:
        plan = self.train_dataset.plan if isinstance(self.train_dataset, PackedDataset) else None
        return {
            "packsft_version": __version__,
            "plan_fingerprint": None if plan is None else plan.fingerprint,
            "isolation": asdict(self.isolation),
            "check_packing": None if self._check is None else self._check.as_dict(),
        }

    # ---- a step: batches to loss ----

    def _inner_training_loop(self, batch_size: int, args: SFTConfig, *positional: Any, **named: Any) -> TrainOutput:
        """Adds to the parent: under exact-step packing, its loop sees one batch per optimizer step."""
        if self.neftune_noise_alpha is not None:
            compat.noise_by_document(self, lambda: self._document_lengths)
        if not _is_exact(self.train_dataset):
            return super()._inner_training_loop(batch_size, args, *positional, **named)
        with compat.one_batch_per_step(self) as (step_size, step_args):
            return super()._inner_training_loop(step_size, step_args, *positional, **named)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Adds to the parent: within the loop of exact steps too, the arguments saved are the user's."""
        with compat.saved_as_configured(self, self._batch_fields):
            super()._save(output_dir, state_dict)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, float | Tensor]:
        """Adds to the parent: the denominator is a count the host already has."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        across_ranks = self.args.average_tokens_across_devices
        return batches, items_in_step(batches, self.accelerator, across_ranks=across_ranks)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Adds to the parent: the passes of an exact step, the clock, and `logging_nan_inf_filter` on the device."""
        self._sums["train"].start()
        if "passes" in inputs:
            loss = self._passes.walk(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._filter_nonfinite:
            return loss
        steps = 1 + self.state.global_step - self._globalstep_last_logged
        return torch.where(torch.isfinite(loss), loss, self._tr_loss.to(loss.device) / steps)

    def _begin_passes(self, num_passes: int) -> None:
        self.current_gradient_accumulation_steps = num_passes
        self._sums_before, self._passes_began = self._sums["train"].copy(), time.perf_counter()

    def _run_pass(self, model: nn.Module, batch: dict[str, Any], num_items: Any, last: bool) -> Tensor:
        with contextlib.nullcontext() if last else compat.no_gradient_sync(self, model):
            return super().training_step(model, batch, num_items)

    def _undo_passes(self) -> None:
        self._sums["train"] = self._sums_before
        self._sums["train"].skip(time.perf_counter() - self._passes_began)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The parent's loss, whole and ours: sum over scored tokens / `num_items_in_batch` (default: of this batch)."""
        mode = "train" if self.model.training else "eval"
        num_items = (inputs["num_items"] or 1) if num_items_in_batch is None else num_items_in_batch
        if self.neftune_noise_alpha is not None:
            self._document_lengths = document_lengths(inputs)
        if self.data_collator.round_sizes:
            mark_sizes(inputs)
            if not isinstance(num_items, Tensor):  # a number that varies would be compiled into the graph
                num_items = torch.full((), num_items, dtype=torch.float64, device=inputs["input_ids"].device)
        if callable(self.compute_loss_func):  # deprecated in TRL; it wants logits, which costs a second forward
            with self._packed_forward():
                outputs = model(**model_inputs(inputs), use_cache=False)
            loss = self.compute_loss_func(outputs, inputs["labels"], num_items_in_batch=num_items_in_batch)
            with torch.no_grad():
                output = self._forward_head(model, inputs, num_items)
        else:
            output = self._forward_head(model, inputs, num_items)
            loss = output.loss
        self._sums[mode].add(
            output,
            scored=inputs["num_scored"],
            tokens=inputs["num_tokens"],
            items=inputs["num_items"],
            mean_loss=loss.detach() if mode == "eval" else None,
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // ranks_per_batch(self.accelerator))  # DDP averages
        # Llama 4 and Doge have the coefficient, but no such loss; a loss function of the user's is whole, as in TRL
        if self.aux_loss_enabled and output.aux_loss is not None and not callable(self.compute_loss_func):
            passes = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            share = 1 / passes if inputs["num_tokens"] else 0.0  # a rank's empty pass routes a token that is none
            loss = loss + self.router_aux_loss_coef * output.aux_loss * share
        if not return_outputs:
            return loss
        with torch.no_grad(), self._packed_forward():
            return loss, model(**model_inputs(inputs), use_cache=False)

    def _forward_head(self, model: nn.Module, inputs: dict[str, Any], num_items: float | Tensor) -> HeadOutput:
        extra: dict[str, Any] = loss_inputs(inputs)
        if self.aux_loss_enabled:
            extra["output_router_logits"] = True
        with self._packed_forward():
            return model(**model_inputs(inputs), **extra, num_items=num_items)

    def _packed_forward(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.data_collator.padded else attention.packed_forward()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Adds to the parent: an exact step's are those of its passes."""
        return sum(super(PackedSFTTrainer, self).floating_point_ops(batch) for batch in inputs.get("passes", [inputs]))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Adds to the parent: "non_padding" is what the host counted: a pad token may be text (eos)."""
        for batch in inputs.get("passes", [inputs]):
            super()._track_num_input_tokens(batch | {"attention_mask": torch.tensor(batch["num_tokens"])})

    # ---- evaluation and logging ----

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Adds to the parent: what an exact step's passes give, laid end to end."""
        outputs = [
            super(PackedSFTTrainer, self).prediction_step(model, batch, prediction_loss_only, ignore_keys)
            for batch in inputs.get("passes", [inputs])
        ]
        loss, logits, labels = outputs[0]
        if len(outputs) > 1:
            losses, all_logits, all_labels = zip(*outputs, strict=True)
            items = [batch["num_items"] for batch in inputs["passes"]]
            loss = sum(loss * count for loss, count in zip(losses, items, strict=True)) / (sum(items) or 1)
            if not prediction_loss_only:
                padded = self.data_collator.padded
                logits, labels = join_passes(all_logits, 0.0, padded), join_passes(all_labels, IGNORE_INDEX, padded)
        if logits is not None and not self._said_logits:
            self._said_logits = True
            logger.warning(cost_of_logits(logits))
        return loss, logits, labels

    def evaluation_loop(
        self, dataloader: Any, description: str, *positional: Any, metric_key_prefix: str = "eval", **named: Any
    ) -> EvalLoopOutput:
        """Adds to the parent: the loss is averaged by scored token, so that it is the same number packed or not."""
        started = time.perf_counter()
        output = super().evaluation_loop(
            dataloader, description, *positional, metric_key_prefix=metric_key_prefix, **named
        )
        self._sums["train"].skip(time.perf_counter() - started)
        totals = self._sums["eval"].drain(self.accelerator)
        if totals:
            aux_loss = self.router_aux_loss_coef * totals.get("aux_loss", 0.0) if self.aux_loss_enabled else 0.0
            output.metrics[f"{metric_key_prefix}_loss"] = totals["loss"] + aux_loss
            # TRL's keys start with "eval_" whichever of several evaluation sets they are of
            prefix = "eval" if metric_key_prefix.startswith("eval") else metric_key_prefix
            for name in ("entropy", "mean_token_accuracy", "aux_loss"):
                if name in totals:
                    output.metrics[f"{prefix}_{name}"] = totals[name]
            pending = self._sums["train"].pending_tokens(self.accelerator) // ranks_per_batch(self.accelerator)
            output.metrics[f"{prefix}_num_tokens"] = self._total_train_tokens + pending
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the parent: TRL's training metrics, read from the device here and nowhere else.

        Only to the loop's own logs, on which all ranks come together: a callback may log on one rank.
        """
        own = "loss" in logs or "train_loss" in logs
        totals = self._sums["train"].drain(self.accelerator) if own else {}
        if totals:
            tokens = totals.pop("tokens") / ranks_per_batch(self.accelerator)
            self._total_train_tokens += int(tokens)
            logs["num_tokens"] = self._total_train_tokens
            if (seconds := totals.pop("seconds")) > 0:
                logs["tokens_per_second"] = round(tokens / seconds, 1)
            logs.update(totals)
        super().log(logs, start_time)


functools.update_wrapper(PackedSFTTrainer.__init__, SFTTrainer.__init__)  # the parent's signature and documentation


def _is_exact(dataset: Any) -> bool:
    """Whether an item of its data loader is an optimizer step."""
    return isinstance(dataset, (PackedDataset, PackedStream)) and dataset.strategy == "step"
