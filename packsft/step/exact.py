"""What changes in transformers' trainer when an item of its data loader is a whole optimizer step.

Its training loop counts micro-batches to know when a step is due, so their number cannot vary. Under exact-step
packing, the loop sees a gradient accumulation of 1, and `training_step` runs the passes of the step. Everything else
that reads a batch (token counts, evaluation) reads its passes.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from packsft import compat
from packsft.data.batch import has_documents
from packsft.data.document import IGNORE_INDEX
from packsft.data.ranks import Ranks
from packsft.data.steps import StepDataset, StepStream
from packsft.model.prepared import PreparedModel
from packsft.step.metrics import MetricSums
from packsft.step.passes import PassWalker


def check_no_hooks(model: nn.Module) -> None:
    """Raises ValueError if weights may change within a backward, of which a step has several."""
    for name, parameter in model.named_parameters():
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
        of_engine = hasattr(parameter, "ds_id") or hasattr(parameter, "_replicated_grad_hook_registered")
        if hooks and not of_engine:  # DeepSpeed, transformers
            raise ValueError(
                f"{name} has a hook that runs after each backward (register_post_accumulate_grad_hook), and a step of "
                "packing_strategy='step' has a backward for each pass: remove it, or set packing=False and "
                "gradient_accumulation_steps=1"
            )


def check_divides(loss_func: Callable[..., Tensor], loss: Tensor, outputs: Any, labels: Tensor, num_items: Any) -> None:
    """Raises ValueError if a user's loss function does not divide by `num_items_in_batch`: losses are added up."""
    with torch.no_grad():
        of_twice = loss_func(outputs, labels, num_items_in_batch=2 * num_items)
    given, other = float(loss.detach()), float(of_twice)
    if abs(2 * other - given) > 0.5 * abs(given):
        raise ValueError(
            f"compute_loss_func gives {given:.4g} for num_items_in_batch={float(num_items):g} and {other:.4g} for "
            "twice as many. With packing_strategy='step' a step has several passes, whose losses are added: return a "
            "sum divided by num_items_in_batch, such as F.cross_entropy(..., reduction='sum') / num_items_in_batch; or "
            "set packing=False"
        )


class LossOfRows(Tensor):
    """The mean loss of a batch. transformers repeats it `eval_batch_size` times; this is repeated for each row."""

    num_rows: int
    # what is computed from it is a plain tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def repeat(self, *_: Any) -> Tensor:
        return self.as_subclass(Tensor).repeat(self.num_rows)


class ExactSteps(Trainer):
    """Overrides for loaders whose items are optimizer steps or ordinary batches; mixed into a trainer before its class.

    The trainer sets, before training:
        _passes: the walker, made by `_make_walker`.
        _prepared: the model.
        _sums: metrics; `_sums["train"]` is restored when a step runs again.
        _configured: arguments as the user set them, where the loop sees others.
    """

    _passes: PassWalker
    _prepared: PreparedModel
    _sums: dict[str, MetricSums]
    _configured: dict[str, Any]
    _evaluated_steps: StepDataset | StepStream | None = None
    _tokens_in_evaluation: int = sys.maxsize  # per pass
    _evaluated_loss: Tensor | None = None  # what `compute_loss` of this library has returned for the batch
    _flops_per_token: int | None = None

    def _make_walker(self, tokens_per_pass: int | str, max_length: int) -> PassWalker:
        return PassWalker(
            tokens_per_pass,
            max_length,
            self.accelerator,
            run=self._run_pass,
            collate=lambda items: self._prepare_inputs(self.data_collator(items)),
            begin=self._begin_passes,
            undo=self._undo_passes,
        )

    @property
    def _takes_exact_steps(self) -> bool:
        strategy = getattr(self.train_dataset, "strategy", None)
        return getattr(strategy, "exact_steps", False)

    def _inner_training_loop(self, batch_size: int, args: Any, *positional: Any, **named: Any) -> TrainOutput:
        """Adds to the parent: its loop sees one batch per optimizer step."""
        self._flops_per_token = None
        if not self._takes_exact_steps:
            return super()._inner_training_loop(batch_size, args, *positional, **named)
        check_no_hooks(self.model)
        with compat.one_batch_per_step(self) as (step_size, step_args):
            self._configured |= compat.batch_fields(args)
            try:
                return super()._inner_training_loop(step_size, step_args, *positional, **named)
            finally:
                self._configured = {k: v for k, v in self._configured.items() if k not in compat.batch_fields(args)}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Adds to the parent: saves the user's arguments, not what the loop takes them for, and a whole model.

        Under FSDP with `state_dict_type="SHARDED_STATE_DICT"` the parent saves none. A checkpoint then holds shards.
        """
        args: Any = self.args
        of_the_loop = {name: getattr(args, name) for name in self._configured}
        vars(args).update(self._configured)
        try:
            with contextlib.nullcontext() if _internal_call else compat.whole_state_dict(self.accelerator):
                super().save_model(output_dir, _internal_call)
        finally:
            vars(args).update(of_the_loop)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Adds to the parent: the passes of an exact step."""
        if "passes" in inputs:
            return self._passes.walk(model, inputs, num_items_in_batch)
        return self._run_batch(model, inputs, num_items_in_batch)

    def _run_batch(self, model: nn.Module, batch: dict[str, Any], num_items: Any) -> Tensor:
        denominator = batch["num_items"] or 1
        if num_items is not None:
            ranks = Ranks.of(self.accelerator)
            averaged = ranks.size * ranks.parts if self.args.average_tokens_across_devices else 1
            denominator = num_items / averaged
        micro_batches = getattr(self, "current_gradient_accumulation_steps", 1)  # set when training begins
        with self._given(batch, denominator, micro_batches) as batch:
            return super().training_step(model, batch, num_items)

    @contextlib.contextmanager
    def _given(self, batch: dict[str, Any], denominator: Any, micro_batches: int) -> Iterator[dict[str, Any]]:
        """The batch for a `compute_loss` of a user's, while the model knows it. The router's loss counts once in a
        step, and not that of padding."""
        routed = self.aux_loss_enabled and has_documents(batch)
        share = self.router_aux_loss_coef / micro_batches if routed else 0.0
        with self._prepared.row_of(batch, share):
            yield batch | {"denominator": denominator}

    def _run_pass(self, model: nn.Module, batch: dict[str, Any], num_items: Any, last: bool) -> Tensor:
        with compat.gradient_sync(self, model, last=last):
            return self._run_batch(model, batch, num_items)

    def _begin_passes(self, num_passes: int) -> None:
        self.current_gradient_accumulation_steps = num_passes
        self._sums_before, self._passes_began = self._sums["train"].copy(), time.perf_counter()

    def _undo_passes(self) -> None:
        self._sums["train"] = self._sums_before
        self._sums["train"].skip(time.perf_counter() - self._passes_began)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Adds to the parent: the sum over the passes. Parameters are counted once in a run, not in every step."""
        name = getattr(self.model, "main_input_name", "input_ids")
        batches = [batch for batch in inputs.get("passes", [inputs]) if name in batch and batch[name].numel()]
        if self._flops_per_token is None and batches:
            self._flops_per_token = super().floating_point_ops(batches[0]) // batches[0][name].numel()
        return sum(batch[name].numel() for batch in batches) * (self._flops_per_token or 0)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Adds to the parent: the sum over the passes. "non_padding" is the host's count: a pad token may be text."""
        for batch in inputs.get("passes", [inputs]):
            super()._track_num_input_tokens(batch | {"attention_mask": torch.tensor(batch["num_tokens"])})

    def evaluation_loop(self, dataloader: Any, *positional: Any, **named: Any) -> EvalLoopOutput:
        """Adds to the parent: who plans the steps."""
        dataset = dataloader.dataset
        self._evaluated_steps = dataset if isinstance(dataset, (StepDataset, StepStream)) else None
        return super().evaluation_loop(dataloader, *positional, **named)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Adds to the parent: one row of outputs for each document of this rank's batch, in the order of the data set,
        whatever the passes. Smaller passes if memory is short, as in training.
        """

        def predict(passes: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
            def one(batch: dict[str, Any]) -> tuple[Any, ...]:
                self._evaluated_loss = None
                with self._given(batch, batch["num_items"] or 1, 1) as given:
                    loss, logits, labels = super(ExactSteps, self).prediction_step(
                        model, given, prediction_loss_only, ignore_keys
                    )
                if loss is not None:
                    self._sums["eval"].add_own_loss(loss, self._evaluated_loss, batch["num_items"])
                if isinstance(logits, Tensor):
                    logits = rows_of_documents(logits, batch, 0.0)
                    labels = None if labels is None else rows_of_documents(labels, batch, IGNORE_INDEX)
                return batch, loss, logits, labels

            return [one(batch) for batch in passes]

        def undo() -> None:
            self._sums["eval"] = before

        if "passes" not in inputs or self._evaluated_steps is None:
            outputs = predict(inputs.get("passes", [inputs]))
        else:
            before = self._sums["eval"].copy()
            outputs = self._passes.retry(inputs, self._evaluated_steps, predict, undo)
            self._tokens_in_evaluation = self._evaluated_steps.tokens_per_pass
        batches, losses, all_logits, all_labels = zip(*outputs, strict=True)
        loss, logits, labels = losses[0], all_logits[0], all_labels[0]
        if len(batches) > 1 and loss is not None:
            items = [batch["num_items"] for batch in batches]
            counted = [loss * count for loss, count in zip(losses, items, strict=True) if count]
            loss = sum(counted) / sum(items) if counted else loss
        if isinstance(logits, Tensor):
            order = torch.cat([torch.as_tensor(batch["rows"]) for batch in batches]).argsort(stable=True)

            def joined(parts: Sequence[Tensor], value: float) -> Tensor:  # ranks may have other numbers of rows
                rows = join_rows(parts, value)
                return self.accelerator.pad_across_processes(rows[order.to(rows.device)], dim=0, pad_index=value)

            logits = joined(all_logits, 0.0)
            if loss is not None:
                loss = loss.as_subclass(LossOfRows)
                loss.num_rows = len(logits)
            labels = None if labels is None else joined(all_labels, IGNORE_INDEX)
            if "inputs" in self.args.include_for_metrics:
                pad = self.data_collator.pad_token_id
                inputs["input_ids"] = joined([rows_of_documents(b["input_ids"], b, pad) for b in batches], pad)
        return loss, logits, labels


def rows_of_documents(x: Tensor, batch: dict[str, Any], value: float) -> Tensor:
    """One row for each document of a batch, `[D, longest, ...]`, filled up with `value`, of a packed row `[1, T, ...]`;
    without what is no document: padding, or a row with a picture that other ranks wait for."""
    if "cu_seq_lens_q" not in batch:
        return x[: batch["num_documents"]]
    lengths = batch["cu_seq_lens_q"].diff()[: batch["num_documents"]].tolist()
    if not lengths:
        return x.new_empty(0, 1, *x.shape[2:])
    documents = x[0, : sum(lengths)].split(lengths)
    return nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=value)


def join_rows(parts: Sequence[Tensor], value: float) -> Tensor:
    """Joins per-token tensors of several passes, one row below the other."""
    longest = max(part.shape[1] for part in parts)
    others = [0, 0] * (parts[0].dim() - 2)  # `pad` starts at the last dimension
    pad = nn.functional.pad
    return torch.cat([pad(part, [*others, 0, longest - part.shape[1]], value=value) for part in parts], dim=0)
