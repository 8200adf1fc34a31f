"""`PackedSFTTrainer`: TRL's `SFTTrainer` on packed sequences, in the order of a run.

Each override says what it adds to the parent, and delegates: arguments to `arguments.py`, rows and packs to `data/`,
the model to `model/prepared.py`, optimizer steps to `step/exact.py`, the loss's denominator to `step/normalization.py`,
metrics to `step/metrics.py`, the proof to `model/claims.py`. `compat.py` lists everything that uses a parent's private
names. The mixins add to the same methods. Who calls whom in a run, from the outermost:

    train                  trainer > WholeCheckpoints > StepBoundary > transformers
    _inner_training_loop   trainer > PackedLoaders > WholeCheckpoints > StepBoundary > ExactSteps > transformers
    training_step          StepBoundary > ExactSteps > TRL, for each pass (calls compute_loss)
    evaluation_loop        ExactSteps > DeviceMetrics > transformers
    prediction_step        trainer > ExactSteps > TRL, for each pass (calls compute_loss)
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DynamoBackend
from datasets import Dataset, IterableDataset
from packsft_kernels import LossOptions
from packsft_kernels.varlen_attention import OPERATORS
from packsft_kernels.version import __version__
from torch import Tensor, nn
from transformers import ProcessorMixin
from transformers.trainer_utils import PredictionOutput, TrainOutput
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from packsft import compat
from packsft.arguments import (
    check_accelerator,
    check_arguments,
    check_dataset,
    check_tokenizer,
    own_arguments,
    skips_preparation,
)
from packsft.checkpoints.resuming import WholeCheckpoints
from packsft.checkpoints.stream_place import CountsEpochs
from packsft.config import PackedSFTConfig, has_bf16
from packsft.data.batch import document_lengths, has_documents
from packsft.data.collator import PackingCollator
from packsft.data.divided import divisible
from packsft.data.exchange import Exchange
from packsft.data.joined_pictures import JoinedPictures, RotaryPositions
from packsft.data.loaders import PackedLoaders, Packs
from packsft.data.messages import tokenizer_without_nulls, warn_of_unseen_roles
from packsft.data.packs import USER_COLUMNS, PackedDataset, UserPacks, pack_dataset
from packsft.data.picture_stream import PictureStream, rows_with_pictures
from packsft.data.pictures import PictureRows, holds_pictures, with_hidden_pictures
from packsft.data.ranks import Ranks, check_same_on_all_ranks, on_a_disk_of_the_node
from packsft.data.raw import checked_rows, formatted_rows, in_one_form, once_of
from packsft.data.streams import PackedStream
from packsft.model.claims import PackingCheck, check_packing, first_documents
from packsft.model.compilation import mark_all_sizes
from packsft.model.gradient_checkpointing import install_checkpoint
from packsft.model.isolation import IsolationVerdict
from packsft.model.parts import base_model_of, count_embeddings
from packsft.model.pictures import prepare_for_pictures
from packsft.model.positions import check_document_lengths, has_position_table, max_positions, most_tokens_of
from packsft.model.prepared import PreparedModel, any_rank_of
from packsft.model.sequence_parallel import SequenceGroup
from packsft.notices import PackingNotice, cost_of_logits
from packsft.packing import STRATEGIES, PackingReport, packing_report
from packsft.step.boundary import StepBoundary, StepCallback
from packsft.step.exact import ExactSteps, check_divides
from packsft.step.failure import naming_failed_rank
from packsft.step.metrics import DeviceMetrics, MetricSums
from packsft.step.normalization import items_in_step

logger = logging.getLogger("packsft")


class PackedSFTTrainer(PackedLoaders, WholeCheckpoints, StepBoundary, ExactSteps, DeviceMetrics, SFTTrainer):
    """`trl.SFTTrainer` that trains on packed sequences: no padding, no T x T mask, no T x V logits.

    The constructor is the parent's, argument for argument. `args` may be an `SFTConfig` or a [`PackedSFTConfig`], whose
    default is exact-step packing: every optimizer step takes the examples of an unpacked run, packed into as few
    passes as hold them. With `packing=False` the examples of a batch are laid end to end without padding. Every
    data set form of the parent can be packed. With `dataset_kwargs={"skip_prepare_dataset": True}` the rows are packs
    that the user made (`input_ids`, `labels`, `seq_lengths`).

    Attributes:
        isolation: the verdict of the check that packed documents do not see each other on this model.
        why_compact: None if the language-model head is fused, otherwise the reason why it computes the scored logits.
        packing_report: what packing does to the training set and to the number of steps; None for a stream, and for
            packs that the user made.

    Raises:
        ValueError: bad input; the message names the field or the row.
    """

    _tag_names = ["trl", "sft", "packsft"]  # noqa: RUF012 (the parent's spelling)
    loss_is_scaled_for_ga = True  # by the whole optimizer step, see normalization.py

    def __init__(self, *positional: Any, **named: Any) -> None:
        compat.check_versions()
        if "tokenizer" in named:
            raise ValueError("tokenizer=...: TRL has renamed this argument, pass it as processing_class")
        call = inspect.signature(SFTTrainer.__init__).bind(self, *positional, **named)
        call.arguments["args"] = args = own_arguments(call.arguments)
        check_arguments(args, call.arguments)
        if args.bf16 and not has_bf16():
            logger.warning("bf16=True, but this device only emulates bfloat16, which is far slower than float32")
        filters_log = args.logging_nan_inf_filter
        args.logging_nan_inf_filter = False  # reads the device per micro-batch; see `StepBoundary`
        saves_on_sigterm, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False  # the parent's, see `Sigterm`
        self._per_example = args.loss_normalization == "example"
        self._vocab_size: int | None = None  # until the constructor knows the model
        if not skips_preparation(args) and call.arguments.get("formatting_func") is None:
            for name in ("train", "eval"):  # the parent looks at the first row
                if (rows := call.arguments.get(f"{name}_dataset")) is not None:
                    rows = with_hidden_pictures(rows)
                    call.arguments[f"{name}_dataset"] = in_one_form(rows, args.dataset_text_field, name)
        saved = compat.saved_by_selective_checkpointing(OPERATORS)
        with compat.own_head_during_init(), compat.naming_missing_tokenizer(), saved:
            super().__init__(*call.args[1:], **call.kwargs)
        self.args.enable_jit_checkpoint = saves_on_sigterm
        if (own_loss := call.arguments.get("compute_loss_func")) is not None:
            self.compute_loss_func = own_loss  # TRL puts a string there with transformers < 5.19

        check_accelerator(self.accelerator, self.args, self.model)
        compat.reduce_gradients_in_every_pass(self)
        parts = self.args.sequence_parallel_size
        self.accelerator.packsft_sequence_parts = parts  # for `Ranks`
        self._sequence = SequenceGroup(parts) if parts > 1 else None
        self._check: PackingCheck | None = None
        self._checked_pictures = False
        self._sums = {"train": MetricSums(), "eval": MetricSums(filters_log)}
        self._filters_log = filters_log
        self._start_watching()
        self._configured = {"logging_nan_inf_filter": filters_log}
        self._order: dict[str, Any] = {}
        self._document_lengths: Tensor | None = None  # of the micro-batch, for NEFTune's noise
        self._said_logits = self._checked_own_loss = False
        self._vocab_size = count_embeddings(base_model_of(self.model))
        self._configured_vocab_size = self.model.config.get_text_config().vocab_size
        with compat.whole_model(self.model):
            self._prepared = self._prepare_model()
        self.data_collator = self._make_collator()
        self._check_data(self._vocab_size)
        max_length = self.args.max_length or sys.maxsize
        self._passes = self._make_walker(self.args.tokens_per_pass or max_length, max_length)
        notice = PackingNotice(lambda: self.packing_report, self._prepared.describe, self.eval_dataset is not None)
        self.callback_handler.callbacks.insert(0, notice)  # before the one that begins a progress bar
        self.add_callback(StepCallback(self))
        self.add_callback(CountsEpochs(self))

    def _prepare_model(self) -> PreparedModel:
        dft = self.args.loss_type == "dft"
        return PreparedModel(
            self.model,
            # as in the parent, DFT takes no label smoothing
            LossOptions(dft=dft, label_smoothing=0.0 if dft else self.args.label_smoothing_factor),
            attention_backend=self.args.attention_backend,
            check=self.args.check_packing == "on",
            on_unpackable=self.args.on_unpackable,
            max_length=None if skips_preparation(self.args) else self.args.max_length,
            autocast=self.accelerator.autocast,
            any_rank=any_rank_of(self.accelerator),
            needs_aux_loss=self.aux_loss_enabled,
            compiles_layers=self.args.compile_layers,
            traced=self.args.torch_compile,
            sequence=self._sequence,
        )

    def _make_collator(self) -> PackingCollator:
        return PackingCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            vocab_size=self._vocab_size,
            padded=self._prepared.padded,
            round_sizes=self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
            max_length=self.args.max_length,
            per_example=self._per_example,
            masked=self.aux_loss_enabled,
            virtual_tokens=self._prepared.virtual_tokens,
            table_of_positions=most_tokens_of(base_model_of(self.model), None),
            part=(0, 1) if self._sequence is None else self._sequence.part,
        )

    @property
    def isolation(self) -> IsolationVerdict:
        return self._prepared.isolation

    @property
    def why_compact(self) -> str | None:
        return self._prepared.why_compact

    # ---- data: rows to packs ----

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: PackedSFTConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset | PackedDataset | PackedStream:
        """Adds to the parent: packs, planned over the whole data set, or for a stream as rows arrive."""
        if isinstance(dataset, (PackedDataset, PackedStream)):
            return dataset
        if self._vocab_size is not None:  # after the constructor, which has checked its own
            self._follow_resize()
            check_dataset(f"{dataset_name} data set", dataset, args)
        check_tokenizer(processing_class, args)
        if holds_pictures(dataset := with_hidden_pictures(dataset)):
            collator = self._picture_collator(processing_class, args, dataset_name)
            return self._plan(dataset, packing, args, dataset_name, of_pictures=collator)
        # The parent only tokenises and labels. The plan cuts, drops and shuffles, and counts what is lost.
        tokenise = copy.copy(args)
        tokenise.max_length, tokenise.shuffle_dataset = None, False
        sample: dict[str, Any] = next(iter(dataset.with_format(None)), {})
        tokenised, scores_completions = "input_ids" in sample, {"prompt", "completion"} <= sample.keys()
        decided_elsewhere = args.completion_only_loss is None and scores_completions != self.completion_only_loss
        if decided_elsewhere and "labels" not in sample and formatting_func is None:
            logger.warning(
                "%s data set: %s, as the first row of the training set decides (completion_only_loss=None)",
                dataset_name, "only completions are scored" if self.completion_only_loss else "prompts are scored too",
            )  # fmt: skip
        if not tokenised:
            dataset = on_a_disk_of_the_node(dataset, f"{dataset_name} data set")
        if formatting_func is not None and tokenised:
            logger.warning("%s data set: formatting_func is not called, since rows have input_ids", dataset_name)
        elif formatting_func is not None:
            dataset = formatted_rows(dataset, formatting_func, args.dataset_num_proc, dataset_name)
        rows = checked_rows(
            dataset,
            text_field=args.dataset_text_field if formatting_func is None and self._vocab_size is not None else "text",
            completion_only=self.completion_only_loss,
            eos_token=self._tokenizer.eos_token,
            name=dataset_name,
        )
        once = once_of(rows, self._tokenizer)
        strategy = args.packing_strategy if packing else "none"
        several = PartialState().num_processes > 1 and STRATEGIES[strategy].exact_steps
        if divides := several and isinstance(rows, IterableDataset) and not tokenised:
            seed = args.seed if args.data_seed is None else args.data_seed
            rows = divisible(rows, seed if args.shuffle_dataset else None)
        if not (tokenised and isinstance(rows, Dataset)):
            tokenise.dataset_text_field = "text"
            warn_of_unseen_roles(rows, processing_class, dataset_name, self.chat_template)
            without_nulls = tokenizer_without_nulls(processing_class, rows, dataset_name)
            rows = super()._prepare_dataset(rows, without_nulls, tokenise, False, None, dataset_name)
        return self._plan(rows, packing, args, dataset_name, once=once, divides=divides)

    def _packs_of(self, dataset: Any) -> Packs | None:
        """Adds to the parent: ids of tokens that were added after construction."""
        self._follow_resize()
        return super()._packs_of(dataset)

    def _follow_resize(self) -> None:
        """`resize_token_embeddings` may have been called. Shards do not tell how many embeddings there are."""
        now = self.model.config.get_text_config().vocab_size
        if now != self._configured_vocab_size:
            self._configured_vocab_size = self._vocab_size = self.data_collator.vocab_size = now

    def _picture_collator(
        self, processor: Any, args: PackedSFTConfig, name: str
    ) -> DataCollatorForVisionLanguageModeling:
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(
                f"the {name} data set has pictures, but processing_class is a {type(processor).__name__}: pass the "
                "processor of a vision-language model"
            )
        return DataCollatorForVisionLanguageModeling(
            processor=processor,
            completion_only_loss=self.completion_only_loss,
            dataset_text_field=args.dataset_text_field,
            assistant_only_loss=args.assistant_only_loss,
            chat_template=self.chat_template,
        )

    def _plan(
        self,
        rows: Any,
        packing: bool,
        args: PackedSFTConfig,
        name: str,
        *,
        once: Any = (None, None),
        divides: bool = False,
        of_pictures: DataCollatorForVisionLanguageModeling | None = None,
    ) -> PackedDataset | PackedStream:
        """The packs of tokenised rows, or of rows with pictures."""
        strategy = args.packing_strategy if packing else "none"
        packs: PackedDataset | PackedStream
        options: dict[str, Any] = {
            "strategy": strategy,
            "name": name,
            "overlong": args.overlong,
            "max_lost_fraction": args.max_lost_fraction,
            "vocab_size": self._vocab_size,
            "keep_end": args.truncation_mode == "keep_end",
            "per_example": self._per_example,
            "once": once,
        }
        seed = args.seed if args.data_seed is None else args.data_seed
        if isinstance(rows, IterableDataset):
            rows = rows.shuffle(seed=seed) if args.shuffle_dataset and not divides else rows
            if of_pictures is None:
                packs = PackedStream(rows, args.max_length, divisible=divides, **options)
            else:
                packs = PictureStream(rows, args.max_length, collator=of_pictures, **options)
        else:  # a seeded plan mixes examples: not if the user asks for an order
            sampled = name == "train" and args.train_sampling_strategy == "random"
            seeded = args.shuffle_dataset or (sampled and STRATEGIES[strategy].repacks)
            if of_pictures is not None:
                rows = PictureRows(rows, of_pictures, args.max_length, args.dataset_num_proc, name)
            packs = pack_dataset(rows, args.max_length, seed=seed if seeded else None, **options)
            for loss in packs.plan.account.describe_losses(args.max_length):
                logger.warning("%s data set: %s", name, loss)
        if self._vocab_size is not None:  # after the constructor, which checks its own
            self._check_packs(packs, args.eval_batch_size, name)
        return packs

    def _set_signature_columns_if_needed(self) -> None:
        """Adds to the parent: the columns of packs that the user made."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in USER_COLUMNS if name not in self._signature_columns]

    def _prepare_pictures(self, packs: Any) -> None:
        """Raises ValueError if pictures cannot be trained on here. Without effect on rows of text, or a second time."""
        rows = None if self._checked_pictures else rows_with_pictures(packs)
        if rows is None:
            return
        collator = self.data_collator
        collator.pictures = JoinedPictures(self.processing_class, RotaryPositions.of(base_model_of(self.model)))
        documents = rows.shortest_documents()
        if not documents:
            return  # no row has a picture
        if compat.is_wrapped(self):
            raise ValueError(
                "the first rows with pictures come after the model was sharded, and are tried on the whole model: "
                "pass them to the constructor, as train_dataset or eval_dataset"
            )
        self._checked_pictures = True
        with compat.whole_model(self.model):
            each_waits = compat.gathers_each_module(self)
            prepare_for_pictures(self._prepared, documents, collator, self._prepare_inputs, each_waits)
        if compat.every_rank_runs_every_module(self):
            collator.filler = rows.filler()

    def _check_data(self, vocab_size: int) -> None:
        """Raises ValueError for rows that this model or these ranks cannot train on."""
        evals = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, rows in [("train", self.train_dataset), *evals.items()]:
            if (packs := self._packs_of(rows)) is not None:
                if not isinstance(packs, UserPacks):
                    packs.check_ids(vocab_size)
                elif packs.tokens_padding:
                    logger.warning("%s data set: %d tokens of padding are left out", name, packs.tokens_padding)
                batch_size = self._train_batch_size if rows is self.train_dataset else self.args.eval_batch_size
                self._check_packs(packs, batch_size, name)

    def _check_packs(self, packs: Packs, batch_size: int, name: str) -> None:
        self._prepare_pictures(packs)
        model = base_model_of(self.model)
        if isinstance(packs, PackedStream):
            packs.check_positions(max_positions(model), has_position_table(model))
            if packs.divisible:
                Exchange.of_run()  # all ranks are here
        else:
            check_document_lengths(model, packs.document_lengths, f"{name} data set")
        check_same_on_all_ranks(self.accelerator, packs.sample(), f"{name} data set")
        self._check_last_batch(packs, batch_size, f"{name} data set")

    # ---- reports ----

    def get_total_train_batch_size(self, args: Any) -> int:
        """Adds to the parent: the ranks that share a row take one batch."""
        return super().get_total_train_batch_size(args) // Ranks.of(self.accelerator).parts

    @property
    def packing_report(self) -> PackingReport | None:
        if not isinstance(self.train_dataset, PackedDataset):
            return None
        num_ranks = Ranks.of(self.accelerator).size
        return packing_report(
            self.train_dataset.plan,
            effective_batch_size=self.get_total_train_batch_size(self.args),
            num_train_epochs=epochs if 0 < (epochs := self.args.num_train_epochs) < math.inf else 1,  # unless max_steps
            ranks=num_ranks,
            packs_at_once=self._train_batch_size * num_ranks if self.train_dataset.repacks else None,
            tokens_per_pass=self._passes.tokens_per_pass,
        )

    def check_packing(self) -> PackingCheck:
        """Prove on this model and the first documents of its data that packed training is the same training.

        Each claim is compared with its allowed difference, see `claims.py`. Parameters, gradients, modes and random
        state do not change. Call it before FSDP or ZeRO shards the parameters.
        """
        packs = self.train_dataset.packs() if isinstance(self.train_dataset, PackedDataset) else self.train_dataset
        rows = rows_with_pictures(self.train_dataset)
        documents = [] if rows is None else rows.shortest_documents()
        if not documents:
            documents = first_documents(packs, most_tokens_of(base_model_of(self.model), self.args.max_length))
        self._check = check_packing(self.model, self._prepared, documents, self.data_collator, self._prepare_inputs)
        return self._check

    def _record(self) -> dict[str, Any]:
        plan = self.train_dataset.plan if isinstance(self.train_dataset, PackedDataset) else None
        return {
            "packsft_version": __version__,
            "plan_fingerprint": None if plan is None else plan.fingerprint,
            "isolation": asdict(self.isolation),
            "check_packing": None if self._check is None else self._check.as_dict(),
        }

    # ---- a step: batches to loss ----

    def train(self, *positional: Any, **named: Any) -> TrainOutput:
        """Adds to the parent: a failing rank is named on all; NEFTune's noise ends with a run that fails, too."""
        if self.args.max_steps <= 0 and not 0 < self.args.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs={self.args.num_train_epochs}: must be above 0, unless max_steps is set")
        try:
            with naming_failed_rank(self.accelerator):
                return super().train(*positional, **named)
        finally:
            if (hook := getattr(self, "neftune_hook_handle", None)) is not None:
                hook.remove()

    def _inner_training_loop(self, *positional: Any, **named: Any) -> TrainOutput:
        """Adds to the parent: NEFTune's noise by document, dropout by part of a row, our gradient checkpointing."""
        if self._sequence is not None:
            torch.manual_seed(torch.initial_seed() + (self._sequence.rank << 32))
        if self.neftune_noise_alpha is not None:
            compat.noise_by_document(self, lambda: self._document_lengths)
        install_checkpoint(self.model)
        self._restart_metrics()
        output = super()._inner_training_loop(*positional, **named)
        return output._replace(training_loss=output.metrics["train_loss"])

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, float | Tensor]:
        """Adds to the parent: a denominator that the host already has; whether a resumed stream is the same."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self._check_first_step(batches)
        self._note_stream(batches)
        across_ranks = self.args.average_tokens_across_devices
        return batches, items_in_step(batches, self.accelerator, across_ranks=across_ranks)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Replaces the parent's loss: sum over scored tokens / `num_items_in_batch` (default: this batch's items)."""
        if "passes" in inputs:
            raise ValueError(
                f"compute_loss got a whole optimizer step of {len(inputs['passes'])} passes: call it for each batch in "
                'inputs["passes"], with num_items_in_batch=inputs["num_items"], and add up'
            )
        self._prepared.check_same(self.model)
        mode = "train" if self.model.training else "eval"
        num_items = (inputs["num_items"] or 1) if num_items_in_batch is None else num_items_in_batch
        if self.neftune_noise_alpha is not None:
            self._document_lengths = document_lengths(inputs)
        if self.data_collator.round_sizes:
            mark_all_sizes(inputs)
            if not isinstance(num_items, Tensor):  # a varying number would be compiled into the graph
                num_items = torch.full((), num_items, dtype=torch.float64, device=inputs["input_ids"].device)
        own_loss = callable(self.compute_loss_func)  # deprecated in TRL; needs logits: a second forward
        if own_loss:
            outputs = self._prepared.logits(model, inputs)
            version = outputs.logits._version
            loss = self.compute_loss_func(outputs, inputs["labels"], num_items_in_batch=num_items_in_batch)
            in_step = mode == "train" and self._takes_exact_steps and num_items_in_batch is not None
            if in_step and not self._checked_own_loss and outputs.logits._version == version:  # not overwritten
                check_divides(self.compute_loss_func, loss, outputs, inputs["labels"], num_items_in_batch)
                self._checked_own_loss = bool(loss)  # 0 tells nothing
        with torch.set_grad_enabled(torch.is_grad_enabled() and not own_loss):
            output = self._prepared.loss(model, inputs, num_items)
        loss = loss if own_loss else output.loss
        self._sums[mode].add(
            output,
            scored=inputs["num_scored"],
            tokens=inputs["num_tokens"],
            items=inputs["num_items"],
            mean_loss=loss.detach() if mode == "eval" else None,
            has_documents=has_documents(inputs),
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            ranks = Ranks.of(self.accelerator)
            loss = loss * (ranks.size * ranks.parts)  # DDP averages
        # what counts once in a step, whatever its documents; as in TRL, a user's loss function is complete
        once = [] if own_loss or output.added_loss is None else [output.added_loss]
        # Llama 4 and Doge have the coefficient but return no such loss; an empty pass routes only a padding token
        if self.aux_loss_enabled and output.aux_loss is not None and not own_loss:
            once.append(self.router_aux_loss_coef * output.aux_loss * has_documents(inputs))
        if once:
            micro_batches = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + sum(once) / micro_batches
        if mode == "eval":
            self._evaluated_loss = loss.detach()
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, self._prepared.logits(model, inputs)

    def predict(self, test_dataset: Any, *positional: Any, **named: Any) -> PredictionOutput:
        """Adds to the parent: rows are prepared as in `evaluate`.

        Raises ValueError with `sequence_parallel_size` above 1: no rank has the logits of a whole row.
        """
        if self._sequence is not None:
            raise ValueError(
                f"predict() needs the logits of whole rows, and sequence_parallel_size={self._sequence.size} cuts "
                "them: call evaluate() for the metrics"
            )
        if not skips_preparation(self.args):
            packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
            test_dataset = self._prepare_dataset(
                test_dataset, self.processing_class, self.args, packing, self._formatting_func, "test"
            )
        return super().predict(test_dataset, *positional, **named)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Adds to the parent: logs once what full logits cost."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if logits is not None and not self._said_logits:
            self._said_logits = True
            logger.warning(cost_of_logits(logits))
        return loss, logits, labels


functools.update_wrapper(PackedSFTTrainer.__init__, SFTTrainer.__init__)  # signature and docstring
