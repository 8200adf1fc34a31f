"""Training metrics that stay on the device between two logs: sums of 0-d tensors, read once per log.

The keys are TRL's (`mean_token_accuracy`, `entropy`, `num_tokens`, `aux_loss`). Means are weighted by scored tokens.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from packsft.data.ranks import Ranks
from packsft.model.head import HeadOutput


class MetricSums:
    """Sums over the micro-batches and steps since the last log, on one rank.

    Args:
        filter_nonfinite: leave micro-batches whose mean loss is not finite out of `loss` (`logging_nan_inf_filter`).
    """

    def __init__(self, filter_nonfinite: bool = False) -> None:
        self._filter_nonfinite = filter_nonfinite
        self._reset()

    def _reset(self) -> None:
        self._device_sums: dict[str, Tensor] = {}
        self._scored = self._tokens = self._micro_batches = self._routed = self._steps = 0
        self._started: float | None = None

    def start(self) -> None:
        """A micro-batch begins; the first since the last log starts the clock."""
        if self._started is None:
            self._started = time.perf_counter()

    def skip(self, seconds: float) -> None:
        """Exclude this time from the clock."""
        if self._started is not None:
            self._started += seconds

    def pending_tokens(self, accelerator: Any) -> int:
        """Tokens counted since the last log, over all ranks."""
        tokens = torch.tensor(self._tokens, device=accelerator.device)
        return int(accelerator.reduce(tokens, reduction="sum"))

    def copy(self) -> MetricSums:
        """The current sums, to restore when a step runs again."""
        kept = copy.copy(self)
        kept._device_sums = dict(self._device_sums)
        return kept

    def add(
        self,
        output: HeadOutput,
        *,
        scored: int,
        tokens: int,
        items: float = 0.0,
        mean_loss: Tensor | None = None,
        has_documents: bool = True,
    ) -> None:
        """Count one micro-batch.

        Args:
            output: what the head returned.
            scored: N, its scored tokens, known on the host.
            tokens: its tokens, known on the host.
            items: the denominator of `mean_loss`: N, or the sum of the weights.
            mean_loss: its mean loss, if losses are averaged (evaluation).
            has_documents: whether its row has any; the router's loss of padding does not count.
        """
        self._micro_batches += 1
        self._routed += has_documents
        self._scored += scored
        self._tokens += tokens
        aux_loss = None if output.aux_loss is None else output.aux_loss * has_documents
        sums = {"entropy": output.entropy_sum, "num_correct": output.num_correct, "aux_loss": aux_loss}
        if mean_loss is not None:
            counted = torch.isfinite(mean_loss) | (not self._filter_nonfinite)
            sums["loss"] = torch.where(counted, mean_loss.double() * items, 0.0)
            sums["loss_items"] = counted.double() * items
        self._add({name: value.detach().double() for name, value in sums.items() if value is not None})

    def _add(self, sums: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            self._device_sums[name] = self._device_sums[name] + value if name in self._device_sums else value

    def add_own_loss(self, mean_loss: Tensor, known: Tensor | None, items: float) -> None:
        """Count the evaluation loss of a user's `compute_loss`: what it adds to the one that was counted (`known`, as
        this library returned it), or all of it if none was."""
        if known is None:
            self._micro_batches += 1
            sums = {"loss": mean_loss.double(), "loss_items": torch.ones_like(mean_loss, dtype=torch.float64)}
        else:
            sums = {"loss": mean_loss.double() - known.double()}
        counted = torch.isfinite(sums["loss"]) | (not self._filter_nonfinite)
        if items:
            self._add({name: torch.where(counted, value * items, 0.0) for name, value in sums.items()})

    def count_step(self, finite: Tensor) -> None:
        """Count an optimizer step, and whether its loss is finite (on all ranks, as a 0-d bool)."""
        self._steps += 1
        self._add({"finite_steps": finite.double()})

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Sum over ranks, read the device once, and start anew. Empty if nothing was counted.

        Returns:
            `entropy` and `mean_token_accuracy`; `loss` per scored token (or example) and `aux_loss` per micro-batch
            that has documents, if they were counted; `tokens` and `seconds` since the clock was started; `steps`, and
            `finite_steps` of them, if they were counted.
        """
        if not self._micro_batches:
            return {}
        names = sorted(self._device_sums)
        counts = [float(self._scored), float(self._tokens), float(self._routed)]
        values = torch.stack([self._device_sums[name] for name in names])
        values = torch.cat([values, torch.tensor(counts, dtype=values.dtype, device=values.device)])
        steps = self._steps
        *sums, scored, tokens, routed = accelerator.reduce(values, reduction="sum").tolist()
        total = dict(zip(names, sums, strict=True))
        seconds = 0.0 if self._started is None else time.perf_counter() - self._started
        self._reset()
        metrics = {"tokens": tokens, "seconds": seconds}
        if "entropy" in total:
            metrics |= {
                "entropy": total["entropy"] / max(scored, 1),
                "mean_token_accuracy": total["num_correct"] / max(scored, 1),
            }
        if "loss" in total:
            metrics["loss"] = total["loss"] / total["loss_items"] if total["loss_items"] else math.nan
        if "aux_loss" in total:
            metrics["aux_loss"] = total["aux_loss"] / max(routed, 1)
        if "finite_steps" in total:
            metrics |= {"steps": steps, "finite_steps": total["finite_steps"] / accelerator.num_processes}
        return metrics


class DeviceMetrics(Trainer):
    """Logging and evaluation from sums on the device; mixed into a trainer before its class.

    The trainer sets `_sums`, by "train" and "eval", and adds each micro-batch to them, and `_filters_log`: whether a
    step whose loss is not finite adds nothing to the logged loss (`logging_nan_inf_filter`). `skipped_steps` is that of
    `StepBoundary`.
    """

    _sums: dict[str, MetricSums]
    _filters_log: bool
    skipped_steps: int

    def _restart_metrics(self) -> None:
        """A run begins: what an interrupted one has counted does not belong to it."""
        self._sums["train"] = MetricSums()
        self._steps_of_run = self._finite_steps_of_run = 0.0

    def evaluation_loop(
        self, dataloader: Any, description: str, *positional: Any, metric_key_prefix: str = "eval", **named: Any
    ) -> EvalLoopOutput:
        """Adds to the parent: the loss is the mean over scored tokens, and so the same packed or not."""
        started, before = time.perf_counter(), self._sums["eval"]
        # What an evaluation that failed has counted, or one that this one interrupts, does not belong to it.
        self._sums["eval"] = MetricSums(self._filters_log)
        try:
            output = super().evaluation_loop(
                dataloader, description, *positional, metric_key_prefix=metric_key_prefix, **named
            )
            totals = self._sums["eval"].drain(self.accelerator)
        finally:
            self._sums["eval"] = before
            self._sums["train"].skip(time.perf_counter() - started)
        if totals:
            aux_loss = self.router_aux_loss_coef * totals.get("aux_loss", 0.0) if self.aux_loss_enabled else 0.0
            output.metrics[f"{metric_key_prefix}_loss"] = totals.get("loss", math.nan) + aux_loss
            for name in ("entropy", "mean_token_accuracy", "aux_loss"):
                if name in totals:
                    output.metrics[f"{metric_key_prefix}_{name}"] = totals[name]
            pending = self._sums["train"].pending_tokens(self.accelerator) // Ranks.of(self.accelerator).sharing
            output.metrics[f"{metric_key_prefix}_num_tokens"] = self._total_train_tokens + pending
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the parent: TRL's training metrics, read from the device here and nowhere else.

        Only in the loop's own logs, which all ranks reach: a callback may log on a single rank.
        """
        if "loss" in logs or "train_loss" in logs:
            totals = self._sums["train"].drain(self.accelerator)
            steps, finite_steps = totals.pop("steps", 0), totals.pop("finite_steps", 0.0)
            self._steps_of_run += steps
            self._finite_steps_of_run += finite_steps
            if self.skipped_steps:
                logs["skipped_steps"] = self.skipped_steps
            if self._filters_log and "loss" in logs:
                logs["loss"] = _mean_of_finite(logs["loss"], steps, finite_steps)
            if self._filters_log and "train_loss" in logs:
                counted = self._steps_of_run, self._finite_steps_of_run
                logs["train_loss"] = _mean_of_finite(logs["train_loss"], *counted)
            if totals:
                tokens = totals.pop("tokens") / Ranks.of(self.accelerator).sharing
                self._total_train_tokens += int(tokens)
                logs["num_tokens"] = self._total_train_tokens
                if (seconds := totals.pop("seconds")) > 0:
                    logs["tokens_per_second"] = round(tokens / seconds, 1)
                logs.update(totals)
        super().log(logs, start_time)


def _mean_of_finite(mean: float, steps: float, finite_steps: float) -> float:
    """The mean over finite losses, from one over all steps that took the others as 0. NaN if none is finite."""
    if steps == finite_steps:
        return mean
    return mean * steps / finite_steps if finite_steps else math.nan
