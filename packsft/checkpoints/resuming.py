"""What changes in transformers' trainer when it saves and resumes: whole checkpoints, and the same run.

`folders.py` knows what a whole checkpoint is, `settings.py` what a run depends on, `state.py` what weights do not hold.
"""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from packsft import compat
from packsft.checkpoints.folders import (
    INCOMPLETE,
    STATE,
    finish_interrupted,
    missing_state,
    newest_whole,
    publish,
    read_record,
    rotate,
    why_not_whole,
)
from packsft.checkpoints.settings import OF_THE_OPTIMIZER, differences, rows_of, settings_of
from packsft.checkpoints.state import FILE, load_model_state, model_state
from packsft.data.ranks import Ranks
from packsft.data.streams import PackedStream
from packsft.step.metrics import MetricSums
from packsft.step.sigterm import Sigterm

logger = logging.getLogger("packsft")


class WholeCheckpoints(Trainer):
    """Saves and resumes; mixed into a trainer before its class.

    The trainer sets `_sums`, and gives what else a checkpoint records (`_record`).
    """

    _sums: dict[str, MetricSums]
    _order: dict[str, Any]
    _given: dict[int, str] = {}  # noqa: RUF012 (replaced when training begins)
    _given_before: dict[int, str] = {}  # noqa: RUF012
    _takes_exact_steps: bool
    _sigterm: Sigterm | None = None
    _resumed: Path | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **named: Any) -> TrainOutput:
        """Adds to the parent: resumes from whole checkpoints of the same run; saves one on SIGTERM.

        Raises:
            ValueError: there is no whole checkpoint, it lacks state, or it is of a run with other settings.
        """
        output_dir = Path(self.args.output_dir or ".")
        if self.is_world_process_zero():
            finish_interrupted(output_dir)
        self.accelerator.wait_for_everyone()
        self._settings = settings_of(
            self.args,
            self.model,
            self.processing_class,
            self.train_dataset,
            self.get_total_train_batch_size(self.args),
            Ranks.of(self.accelerator),
        )
        self._resumed, self._resumed_state, self._order = None, {}, {}
        if resume_from_checkpoint:
            self._resumed = _chosen(resume_from_checkpoint, output_dir)
            self._check_same_run(self._resumed)
            if (self._resumed / FILE).exists():
                self._resumed_state = torch.load(self._resumed / FILE, weights_only=True)
            self._resume_order(self._resumed_state.get("order", {}))
        with Sigterm(self.args.enable_jit_checkpoint and str(self.args.save_strategy.value) != "no") as self._sigterm:
            return super().train(None if self._resumed is None else str(self._resumed), *positional, **named)

    # ---- resuming ----

    def _check_same_run(self, checkpoint: Path) -> None:
        missing = missing_state(checkpoint)
        if missing and not self._resumes_only_model:
            raise ValueError(
                f"{checkpoint} lacks the state of {', '.join(missing)} (saved with save_only_model=True?): going on "
                "would be another training. Set resume_only_model=True to take only its weights and its step"
            )
        saved = read_record(checkpoint).get("settings")
        if saved is None:
            logger.warning(
                "%s does not record its data and settings: whether this is the same run is not checked", checkpoint
            )
            return
        if changed := differences(saved, self._settings | {"training set": rows_of(self.train_dataset)}):
            self._say_changed(checkpoint, changed)

    def _say_changed(self, checkpoint: Path, changed: dict[str, str]) -> None:
        lines = [f"{name}: {change}" for name, change in changed.items()]
        if kept := [name for name in OF_THE_OPTIMIZER if name in changed and not self._resumes_only_model]:
            lines.append(f"({', '.join(kept)}: the optimizer's state keeps the value of the checkpoint)")
        message = f"{checkpoint} is of a run with other settings:\n  " + "\n  ".join(lines)
        if self._on_changed == "error":
            raise ValueError(f'{message}\nRestore them, or set on_changed="warn" to go on with the new ones')
        logger.warning("%s\nTraining goes on with the new ones", message)

    def _inner_training_loop(self, *positional: Any, **named: Any) -> TrainOutput:
        """Adds to the parent: with `auto_find_batch_size`, each try orders the training set anew."""
        if self._resumed is None:
            self._order = {}
        return super()._inner_training_loop(*positional, **named)

    def _resume_order(self, order: dict[str, Any]) -> None:
        random_state = order.pop("random_state", None)
        self._order = order if random_state is None else {**order, "resumed_state": random_state}

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *positional: Any, **named: Any
    ) -> tuple[int, int]:
        """Adds to the parent: the arguments' intervals, the place in a stream, and that a finished run is finished."""
        with compat.no_comparison_of_arguments():
            epochs, steps = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, *positional, **named
            )
        self._given_before = {}
        self.state.compute_steps(self.args, max_steps)  # not those of the checkpoint
        if self._resumed is not None:
            record = read_record(self._resumed)
            self._total_train_tokens = record.get("num_tokens", 0)
            if isinstance(self.train_dataset, PackedStream) and "stream" in record and not self.args.ignore_data_skip:
                self._given_before = self._given_to_this_rank(record["stream"]["given"])
                epochs = record["stream"]["epoch"]
                steps = record["stream"]["steps"] * self.args.gradient_accumulation_steps
            load_model_state(self.model, self._resumed_state)
            self._resume_callbacks()
            if self.state.global_step >= max_steps:
                logger.warning(
                    "%s is at step %d of %d: the run is finished", self._resumed, self.state.global_step, max_steps
                )
                epochs, steps = num_train_epochs, 0
        self._given = dict(self._given_before)
        self._epoch, self._epoch_began = (
            epochs - 1,
            self.state.global_step - steps // self.args.gradient_accumulation_steps,
        )
        return epochs, steps

    def _resume_callbacks(self) -> None:
        """What callbacks have counted (the patience of early stopping) goes on; their arguments are the new ones."""
        saved = {
            name: state if isinstance(state, list) else [state] for name, state in self.state.stateful_callbacks.items()
        }
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState) and saved.get(type(callback).__name__):
                vars(callback).update(saved[type(callback).__name__].pop(0)["attributes"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Adds to the parent: not AdaLoRA's weights, see `state.py`."""
        if "adalora" not in self._resumed_state:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _given_to_this_rank(self, given: list[dict[str, str]]) -> dict[int, str]:
        """Of what a stream gave each rank; empty if it now gives other shares."""
        of_rank = 0 if self._takes_exact_steps else self.accelerator.process_index  # exact steps: the same to all ranks
        if len(given) != self.accelerator.num_processes and not self._takes_exact_steps:
            return {}
        return {int(worker): digest for worker, digest in given[of_rank].items()}

    def _note_given(self, batches: list[dict[str, Any]]) -> None:
        """What a stream has given so far, by worker; of the first batch after a resume, whether it is what it gave."""
        for batch in batches:
            if "given" not in batch:
                continue
            worker, before, after = batch["given"]
            saved = self._given_before.pop(worker, None)
            if saved and before and before != saved and self._resumed is not None:
                self._say_changed(self._resumed, {"rows read so far": f"{saved[:12]}... -> {before[:12]}..."})
            self._given[worker] = after

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Adds to the parent: with `resume_only_model`, the schedule goes on and the optimizer begins anew."""
        if not self._resumes_only_model or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            for _ in range(self.state.global_step):
                self.lr_scheduler.step()

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Adds to the parent: not with `resume_only_model`."""
        super()._load_scaler(None if self._resumes_only_model else checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Adds to the parent: not with `resume_only_model`."""
        super()._load_rng_state(None if self._resumes_only_model else checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Replaces the parent's warnings: weights that are tied to others are not missing, and others are an error."""
        state = self.model.state_dict()
        loaded = {state[name].data_ptr() for name in state.keys() - set(load_result.missing_keys)}
        missing = [name for name in load_result.missing_keys if state[name].data_ptr() not in loaded]
        model = type(self.model).__name__
        for names, what in (
            (missing, f"lacks weights of {model}"),
            (load_result.unexpected_keys, f"holds weights that {model} does not have"),
        ):
            if names:
                few = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                raise ValueError(f"the checkpoint {what}: {few}")

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Adds to the parent: the checkpoint is whole, or it is not there."""
        started = time.perf_counter()
        self._check_finite(self.model)
        run_dir = Path(self._get_output_dir(trial))
        staged = run_dir / INCOMPLETE / f"checkpoint-{self.state.global_step}"
        if self.args.local_process_index == 0:
            shutil.rmtree(staged, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with compat.saving_under(self, staged.parent):
            super()._save_checkpoint(model, trial)
        place = run_dir / staged.name
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(place)
        if self.args.should_save:
            self.state.save_to_json(str(staged / STATE))
            torch.save({**model_state(self.model), "order": self._order}, staged / FILE)
        pending = self._sums["train"].pending_tokens(self.accelerator) // Ranks.of(self.accelerator).sharing
        self.accelerator.wait_for_everyone()
        record = {
            **self._record(),
            "settings": self._settings | {"training set": rows_of(self.train_dataset)},
            "num_tokens": self._total_train_tokens + pending,
            "stream": {
                "epoch": self._epoch,
                "steps": self.state.global_step - self._epoch_began,
                "given": gather_object([self._given]),
            },
        }
        if self.is_world_process_zero():
            publish(staged, record)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and staged.exists():  # the folder of another node
            publish(staged, record)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run_dir, self.args.save_total_limit, {place, *([Path(best)] if best else [])})
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        self._sums["train"].skip(time.perf_counter() - started)


class CountsEpochs(TrainerCallback):
    """Tells a `WholeCheckpoints` where an epoch begins: a stream does not know how many steps it has."""

    def __init__(self, trainer: WholeCheckpoints) -> None:
        self._trainer, self._first = trainer, True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._epoch += 1
        if not self._first:
            self._trainer._epoch_began = state.global_step
        self._first = False


def _chosen(asked: Any, output_dir: Path) -> Path:
    """The checkpoint to resume from. Raises ValueError if there is none, or the one asked for is not whole."""
    if asked is not True:
        checkpoint = Path(asked)
        if not checkpoint.is_dir():
            raise ValueError(f"resume_from_checkpoint={str(asked)!r}: there is no such folder")
        if (reason := why_not_whole(checkpoint)) is not None:
            whole, _ = newest_whole(checkpoint.parent)
            instead = "" if whole is None else f"; the newest whole one beside it is {whole}"
            raise ValueError(f"resume_from_checkpoint={str(asked)!r} is not a whole checkpoint: {reason}{instead}")
        return checkpoint
    whole, reasons = newest_whole(output_dir)
    because = "".join(f"; {reason}" for reason in reasons)
    if whole is None:
        raise ValueError(f"resume_from_checkpoint=True: {output_dir} holds no whole checkpoint{because}")
    logger.warning("resuming from %s, the newest whole checkpoint%s", whole, because)
    return whole
