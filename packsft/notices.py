"""What a user should know before training starts: the steps, the packing, and settings that never take effect."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from packsft.packing import PackingReport

logger = logging.getLogger("packsft")


def never_fires(args: TrainingArguments, max_steps: int, *, has_eval_dataset: bool) -> list[str]:
    """Settings that a run of `max_steps` optimizer steps never reaches, one sentence each."""
    notices = []
    evaluates, saves = str(args.eval_strategy.value), str(args.save_strategy.value)
    if has_eval_dataset and evaluates == "no":
        notices.append('an eval_dataset was given, but eval_strategy="no": it is never evaluated')
    if evaluates == "steps" and args.eval_steps is not None and _interval(args.eval_steps, max_steps) > max_steps:
        which = "only the last is evaluated" if args.eval_delay <= max_steps else "none is evaluated"
        notices.append(f"eval_steps={args.eval_steps} is more than the {max_steps} steps: {which}")
    if saves == "steps" and _interval(args.save_steps, max_steps) > max_steps:
        notices.append(
            f"save_steps={args.save_steps} is more than the {max_steps} steps: the only checkpoint is the last"
        )
    logs_by_step = str(args.logging_strategy.value) == "steps" and not args.logging_first_step
    if logs_by_step and _interval(args.logging_steps, max_steps) > max_steps:
        notices.append(f"logging_steps={args.logging_steps} is more than the {max_steps} steps: no loss is logged")
    if (warmup := args.get_warmup_steps(max_steps)) >= max_steps:
        notices.append(
            f"the warm-up of {warmup} steps is as long as the run: the learning rate never reaches its maximum"
        )
    return notices


def _interval(steps: float, max_steps: int) -> float:
    """transformers reads an interval below 1 as a share of the run."""
    return steps if steps >= 1 else max(1.0, steps * max_steps)


def cost_of_logits(logits: Any) -> str:
    """What `compute_metrics` and `predict` cost, shown on the logits `[D, longest, V]` of one batch."""
    tokens, entries = logits.shape[:-1].numel(), logits.shape[-1]
    return (
        "compute_metrics and predict need the full logits, which a second forward computes: for the first batch "
        f"{tokens:,} tokens, with padding, x {entries:,} entries, {logits.nbytes / 1e6:.3g} MB. All are kept until the "
        "evaluation ends, unless preprocess_logits_for_metrics reduces them. prediction_loss_only=True skips them"
    )


class PackingNotice(TrainerCallback):
    """Logs a notice when training begins.

    Args:
        report: returns the packing report, or None if there is no plan (streams, packs made by the user).
        model: returns how the model is trained, as texts by name.
        has_eval_dataset: whether an evaluation set was given.
    """

    def __init__(
        self,
        report: Callable[[], PackingReport | None],
        model: Callable[[], dict[str, str]],
        has_eval_dataset: bool,
    ) -> None:
        self._report = report
        self._model = model
        self._has_eval_dataset = has_eval_dataset

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        report = self._report()
        lines = [] if report is None else [f"{label}: {text}" for label, text in report.rows() if "steps" not in label]
        steps = f"optimizer steps: {state.max_steps:,}"
        if report is not None and args.max_steps <= 0 and report.steps_unpacked != state.max_steps:
            steps += (
                f" (unpacked it would be {report.steps_unpacked:,}: a step takes packs, not examples; "
                'packing_strategy="step" keeps the unpacked number)'
            )
        lines += [steps, *(f"{name}: {text}" for name, text in self._model().items())]
        if args.gradient_checkpointing:
            lines.append(
                "gradient_checkpointing=True (the default of SFTConfig): layers are computed again in the backward; "
                "False is faster where the memory allows it"
            )
        lines += never_fires(args, state.max_steps, has_eval_dataset=self._has_eval_dataset)
        logger.warning("packsft\n  " + "\n  ".join(lines))
