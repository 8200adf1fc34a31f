"""What is decided at the end of a step: go on, leave the step out, or stop.

A step is bad if its loss is not a number (`on_nonfinite`), and the last one if a rank has received SIGTERM. Both flags
are summed over ranks and copied to the host. On a GPU they are read two steps later, when they have arrived, so no step
waits for the device, and all ranks read them after the same step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from packsft.step.metrics import MetricSums
from packsft.step.sigterm import Sigterm

logger = logging.getLogger("packsft")

GPU_LAG = 2  # steps
IN_A_ROW = 2  # one step whose loss is not finite may pass: a scaled loss overflows now and then
NAMED_ROWS = 20


@dataclass
class _Flags:
    """Of one step: on the host when `arrived` says so."""

    step: int
    rows: np.ndarray
    on_device: Tensor
    values: Tensor
    arrived: Any  # torch.cuda.Event or None

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class StepBoundary(Trainer):
    """Watches every step; mixed into a trainer before its class.

    The trainer sets `_sums` and `_filters_log`, calls `_start_watching` before a step outside of a run and
    `_check_finite` before it saves, and adds the callback `StepCallback`.

    Attributes:
        skipped_steps: steps that `on_nonfinite="skip"` left out.
    """

    _sums: dict[str, MetricSums]
    _sigterm: Sigterm | None = None

    def _start_watching(self) -> None:
        self._step_loss: Tensor | None = None
        self._step_rows: list[np.ndarray] = []
        self._flags: deque[_Flags] = deque()
        self._nonfinite: list[_Flags] = []  # the last ones in a row
        self.skipped_steps = 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Adds to the parent: the clock, and the flag of a step.

        With `_filters_log`, the log takes a step's loss only if it is finite: the last micro-batch then returns the
        loss of the whole step, or 0; `DeviceMetrics.log` knows how many counted.
        """
        self._sums["train"].start()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        self._step_rows += [batch["rows"] for batch in inputs.get("passes", [inputs]) if "rows" in batch]
        if self.accelerator.sync_gradients:  # the last micro-batch of the step
            step_loss, self._step_loss = self._step_loss, None
            flags = torch.stack(
                [(~torch.isfinite(step_loss)).float(), torch.full_like(step_loss, self._has_sigterm).float()]
            )
            if self.accelerator.num_processes > 1:
                flags = self.accelerator.reduce(flags, reduction="sum")
            self._keep(flags)
            finite = flags[0] == 0
            self._sums["train"].count_step(finite)
            if self._filters_log:
                return torch.where(finite, step_loss, 0.0)
        return torch.zeros_like(loss) if self._filters_log else loss

    @property
    def _has_sigterm(self) -> bool:
        return self._sigterm is not None and self._sigterm.received

    def train(self, *positional: Any, **named: Any) -> TrainOutput:
        """Adds to the parent: on SIGTERM, saves a checkpoint after the step, and ends the process."""
        saves = str(self.args.save_strategy.value) != "no"
        with Sigterm(self.args.enable_jit_checkpoint and saves) as self._sigterm:
            return super().train(*positional, **named)

    def _inner_training_loop(self, *positional: Any, **named: Any) -> TrainOutput:
        """Adds to the parent: what the last steps left."""
        self._start_watching()
        output = super()._inner_training_loop(*positional, **named)
        if self._read_flags(lag=0) and self._sigterm is not None:
            self._sigterm.receive()
        self._check_finite(self.model)
        return output

    def _keep(self, flags: Tensor) -> None:
        rows, self._step_rows = np.concatenate(self._step_rows or [np.zeros(0, np.int64)]), []
        arrived = None
        on_gpu = flags.device.type == "cuda"
        host = flags.to("cpu", non_blocking=on_gpu)
        if on_gpu:
            arrived = torch.cuda.Event()
            arrived.record()
        self._flags.append(_Flags(self.state.global_step + 1, rows, flags, host, arrived))

    def _leave_out_nonfinite(self, model: nn.Module) -> None:
        """With "skip": without gradients, the optimizer changes nothing."""
        if self.args.on_nonfinite != "skip" or self.accelerator.scaler is not None:  # the scaler leaves such steps out
            return
        flags = self._flags[-1]
        loss = torch.where(flags.on_device[0] == 0, 0.0, torch.nan)  # with the gradients, to read the device once
        if not self._all_finite([loss, *(p.grad for p in model.parameters() if p.grad is not None)]):
            model.zero_grad()
            self.skipped_steps += 1
            rows = self._names_of(flags.rows)
            logger.warning("step %d is left out: its loss or a gradient is not finite (%s)", flags.step, rows)

    def _read_flags(self, lag: int) -> bool:
        """Reads the flags of all steps but the last `lag`. Returns whether a rank wants to stop.

        Raises:
            FloatingPointError: with "error", if the losses of two steps in a row are not finite.
        """
        stops = self.accelerator.num_processes == 1 and self._has_sigterm
        while len(self._flags) > lag:
            flags = self._flags.popleft()
            nonfinite, wants_to_stop = flags.read()
            stops |= bool(wants_to_stop)
            self._nonfinite = [*self._nonfinite, flags] if nonfinite else []
            if len(self._nonfinite) >= IN_A_ROW and self.args.on_nonfinite == "error":
                first = self._nonfinite[0]
                steps = " and ".join(str(flags.step) for flags in self._nonfinite)
                raise FloatingPointError(
                    f"the loss of steps {steps} is not finite. Step {first.step} took {self._names_of(first.rows)}. No "
                    "checkpoint was saved since; lower learning_rate or look at these rows. "
                    'on_nonfinite="skip" leaves such steps out, "ignore" goes on'
                )
        return stops

    def _check_finite(self, model: nn.Module) -> None:
        """Before a save, and at the end: raises FloatingPointError for losses as above, or weights, unless "ignore"."""
        self._read_flags(lag=0)
        if self.args.on_nonfinite == "ignore":
            return
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._all_finite(weights.values()):
            names = (name for name, p in weights.items() if not torch.isfinite(local_shard(p)).all())
            name = next(names, "of another rank")
            rows = ""
            if self._nonfinite:
                rows = f", whose loss is not finite; it took {self._names_of(self._nonfinite[0].rows)}"
            raise FloatingPointError(
                f"after step {self.state.global_step}{rows}, the weights {name} are not finite: nothing is saved. "
                'on_nonfinite="ignore" saves them'
            )

    def _all_finite(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all are, on all ranks. Reads the device once."""
        # to one device: a model may lie on several, or be offloaded
        found = [torch.isfinite(local_shard(tensor)).all().to(self.args.device) for tensor in tensors]
        bad = (~torch.stack(found)).any().float() if found else torch.zeros((), device=self.args.device)
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, reduction="sum")
        return not bad.item()

    def _names_of(self, rows: np.ndarray) -> str:
        """The rows of a step on all ranks, which all call it, in words."""
        rows = np.unique(np.array(gather_object(rows.tolist()), np.int64))
        rows = rows[rows >= 0]
        if not len(rows):
            return "rows without numbers"
        more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
        return f"rows {', '.join(map(str, rows[:NAMED_ROWS]))}{more} of the training set"


class StepCallback(TrainerCallback):
    """Calls a `StepBoundary` between the backward and the optimizer, and after each step."""

    def __init__(self, trainer: StepBoundary) -> None:
        self._trainer, self._stops, self._saved_step = trainer, False, -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stops, self._saved_step = False, -1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._trainer._leave_out_nonfinite(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._read_flags(lag_on(args.device)):
            logger.warning("SIGTERM: saving a checkpoint at step %d, then this process ends", state.global_step)
            assert self._trainer._sigterm is not None
            self._trainer._sigterm.receive()  # on all ranks
            self._stops = control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved_step = state.global_step
        if self._stops:  # the end of training would load the best weights, and could delete this checkpoint
            state.best_model_checkpoint = None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stops:  # the epoch is not over; `save_strategy="best"` may have dropped the save
            control.should_evaluate = False
            control.should_save = self._saved_step != state.global_step


def lag_on(device: torch.device) -> int:
    """Steps after which the flags of a step are read."""
    return GPU_LAG if device.type == "cuda" else 0


def local_shard(tensor: Any) -> Tensor:
    """What this rank holds of a tensor: under FSDP2 and tensor parallelism, ZeRO-3 (without the padding), or all."""
    if hasattr(tensor, "ds_tensor"):
        shard = tensor.ds_tensor
        start = shard.numel() * torch.distributed.get_rank(tensor.ds_process_group)
        return shard[: max(0, tensor.ds_numel - start)]
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
