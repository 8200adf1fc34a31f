"""What changes in transformers' trainer when it saves and resumes: whole checkpoints, and the same run.

`folders.py` knows what a whole checkpoint is, `settings.py` what a run depends on, `state.py` what weights do not hold,
`stream_place.py` where a run is in a stream.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import shutil
import time
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from packsft import compat
from packsft.checkpoints.folders import (
    INCOMPLETE,
    STATE,
    checkpoints,
    find_whole,
    finish_interrupted,
    missing_state,
    publish,
    read_record,
    rotate,
    sync_folder,
    why_not_whole,
)
from packsft.checkpoints.settings import OF_THE_OPTIMIZER, differences, digests_of_rows, in_background, settings_of
from packsft.checkpoints.state import FILE, load_model_state, model_state
from packsft.checkpoints.stream_place import StreamPlace
from packsft.data.ranks import Ranks
from packsft.data.streams import PackedStream
from packsft.step.metrics import MetricSums

logger = logging.getLogger("packsft")

_OF_ALL_RANKS = ("max_steps", "num_train_epochs", "tokens_per_pass", "sequence_parallel_size")


class WholeCheckpoints(Trainer):
    """Saves and resumes; mixed into a trainer before its class.

    The trainer sets `_sums`, adds the callback `CountsEpochs`, tells `_place` what it reads, and gives what else a
    checkpoint records (`_record`). Its other mixins give `_check_finite`, `_packs_of` and `_takes_exact_steps`.
    """

    _sums: dict[str, MetricSums]
    _order: dict[str, Any]
    _takes_exact_steps: bool
    _resumed: Path | None = None
    _place = StreamPlace()
    _is_first_step = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **named: Any) -> TrainOutput:
        """Adds to the parent: resumes from whole checkpoints of the same run.

        Raises:
            ValueError: there is no whole checkpoint, it lacks state, or it is of a run with other settings; or a rank
                has other settings than rank 0.
        """
        output_dir = Path(self.args.output_dir or ".")
        if self.args.should_save:  # one rank, or one of each node with `save_on_each_node`
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
        self._check_ranks_agree()
        self._is_first_step = self.accelerator.num_processes > 1
        saves = str(self.args.save_strategy.value) != "no"
        self._rows: Future[Any] | None = None  # hashed while training begins, on one rank
        if (saves or resume_from_checkpoint) and self.is_world_process_zero():
            self._rows = in_background(digests_of_rows, self._packs_of(self.train_dataset))
        self._resumed, self._resumed_state, self._order = None, {}, {}
        if saves and not resume_from_checkpoint and (found := checkpoints(output_dir)):
            logger.warning(
                "%s holds checkpoints of an earlier run: resume_from_checkpoint=True takes the one with the highest "
                "step, now %s", output_dir, found[0].name,
            )  # fmt: skip
        if resume_from_checkpoint:
            self._resumed = self._chosen(resume_from_checkpoint, output_dir)
            self._check_same_run(self._resumed)
            if (self._resumed / FILE).exists():
                self._resumed_state = torch.load(self._resumed / FILE, weights_only=True)
            self._order = self._resumed_state.pop("order", {})
            if "random_state" in self._order:
                self._order["resumed_state"] = self._order.pop("random_state")
        return super().train(None if self._resumed is None else str(self._resumed), *positional, **named)

    def _check_ranks_agree(self) -> None:
        """Raises ValueError, on all ranks: they would wait for each other, or train on other examples."""
        own = {name: getattr(self.args, name, None) for name in _OF_ALL_RANKS}
        model = {name: value for name, value in self._settings["model"].items() if name != "frozen weights"}
        plan = getattr(self.train_dataset, "plan", None)
        packs = {} if plan is None else {"plan of the packs": plan.fingerprint}
        self._compare_ranks(self._settings | {"model": model} | own | packs, "give all ranks the same arguments")

    def _check_first_step(self, batches: list[dict[str, Any]]) -> None:
        """Raises ValueError, on all ranks, before the first step of a run, if one takes other examples or passes.

        Every rank plans a step for itself, and reads what a checkpoint says from its own disk.
        """
        if self._is_first_step:
            self._is_first_step = False
            steps = [batch for batch in batches if "passes" in batch]
            examples = [batch.get("stream_digests") or batch["examples"].tolist() for batch in steps]
            self._compare_ranks(
                {
                    "step": self.state.global_step,
                    "micro-batches": len(batches),
                    "passes": [len(step["passes"]) for step in steps],
                    "examples": hashlib.sha256(repr(examples).encode()).hexdigest(),
                },
                "give all ranks the same data and checkpoint",
            )
            ranks = Ranks.of(self.accelerator)
            rows = [batch["rows"].tolist() for batch in batches if "rows" in batch]
            every = gather_object([hashlib.sha256(repr(rows).encode()).hexdigest()])
            sharing = ranks.sharing * ranks.parts  # what they share, whatever the strategy
            if differs := [rank for rank, found in enumerate(every) if found != every[rank - rank % sharing]]:
                raise ValueError(f"rank {differs[0]} would take other rows than the ranks that it shares them with")

    def _compare_ranks(self, own: dict[str, Any], advice: str) -> None:
        every = gather_object([own])
        for rank, settings in enumerate(every):
            if differ := differences(every[0], settings):
                what = "; ".join(f"{name}: {change}" for name, change in differ.items())
                raise ValueError(f"rank {rank} would train otherwise than rank 0 ({what}): {advice}")

    # ---- resuming ----

    def _chosen(self, asked: str | bool, output_dir: Path) -> Path:
        """The checkpoint to resume from: whole on every node. All ranks raise if there is none."""
        if asked is not True:
            checkpoint = Path(str(asked))
            if any(gather_object([not checkpoint.is_dir()])):
                raise ValueError(f"resume_from_checkpoint={asked!r}: there is no such folder")
            reason = why_not_whole(checkpoint, self.args.resume_only_model)
            if reason := next(filter(None, gather_object([reason])), None):
                whole, _ = find_whole(checkpoint.parent)
                instead = f"; the newest whole one beside it is {whole[0]}" if whole else ""
                raise ValueError(f"resume_from_checkpoint={asked!r} is not a whole checkpoint: {reason}{instead}")
            return checkpoint
        whole, reasons = find_whole(output_dir, self.args.resume_only_model)
        on_nodes = gather_object([[path.name for path in whole]])
        common = [path for path in whole if all(path.name in names for names in on_nodes)]
        because = "".join(f"; {reason}" for reason in reasons)
        if not common:
            raise ValueError(f"resume_from_checkpoint=True: {output_dir} holds no whole checkpoint{because}")
        logger.warning("resuming from %s, the newest whole checkpoint%s", common[0], because)
        return common[0]

    def _check_same_run(self, checkpoint: Path) -> None:
        missing = missing_state(checkpoint)
        if missing and not self.args.resume_only_model:
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
        if changed := differences(saved, self._settings_and_rows()):
            self._say_changed(checkpoint, changed)

    def _settings_and_rows(self) -> dict[str, Any]:
        """On all ranks what the first one knows."""
        known = [self._settings | {"training set": self._rows.result()} if self._rows is not None else None]
        return broadcast_object_list(known)[0]

    def _say_changed(self, checkpoint: Path, changed: dict[str, str]) -> None:
        lines = [f"{name}: {change}" for name, change in changed.items()]
        if kept := [name for name in OF_THE_OPTIMIZER if name in changed and not self.args.resume_only_model]:
            lines.append(f"({', '.join(kept)}: the optimizer's state keeps the value of the checkpoint)")
        message = f"{checkpoint} is of a run with other settings:\n  " + "\n  ".join(lines)
        if self.args.on_changed == "error":
            raise ValueError(f'{message}\nRestore them, or set on_changed="warn" to go on with the new ones')
        logger.warning("%s\nTraining goes on with the new ones", message)

    def _inner_training_loop(self, *positional: Any, **named: Any) -> TrainOutput:
        """Adds to the parent: with `auto_find_batch_size`, each try orders the training set anew."""
        if self._resumed is None:
            self._order = {}
        return super()._inner_training_loop(*positional, **named)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *positional: Any, **named: Any
    ) -> tuple[int, int]:
        """Adds to the parent: the arguments' intervals, the place in a stream, and that a finished run is finished."""
        with compat.no_comparison_of_arguments():
            epochs, steps = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, *positional, **named
            )
        self.state.compute_steps(self.args, max_steps)  # not those of the checkpoint
        accumulation, digests = self.args.gradient_accumulation_steps, {}
        if self._resumed is not None:
            record = read_record(self._resumed)
            self._total_train_tokens = record.get("num_tokens", 0)
            stream = record.get("stream")
            if isinstance(self.train_dataset, PackedStream) and stream and not self.args.ignore_data_skip:
                ranks = Ranks.of(self.accelerator)
                digests = StreamPlace.digests_of_rank(stream, ranks.rank, ranks.size, self._takes_exact_steps)
                epochs, steps = stream["epoch"], stream["steps"] * accumulation
            load_model_state(self.model, self._resumed_state)
            self._resume_callbacks()
            step = self.state.global_step
            if step >= max_steps:
                logger.warning("%s is at step %d of %d: the run is finished", self._resumed, step, max_steps)
                epochs, steps = num_train_epochs, 0
        if steps == 0:
            self._order.pop("resumed_state", None)  # of the epoch before
        self._place = StreamPlace(epochs, self.state.global_step - steps // accumulation, digests)
        return epochs, steps

    def _resume_callbacks(self) -> None:
        """What callbacks have counted (the patience of early stopping) goes on; their arguments are the new ones."""
        exportable = [one for one in self.callback_handler.callbacks if isinstance(one, ExportableState)]
        for name, saved in self.state.stateful_callbacks.items():
            callbacks = [one for one in exportable if type(one).__name__ == name]
            states = saved if isinstance(saved, list) else [saved]  # of several: transformers adds to the list
            for callback, state in zip(callbacks, states[-len(callbacks) :], strict=False):
                vars(callback).update(copy.deepcopy(state["attributes"]))

    def _note_stream(self, batches: list[dict[str, Any]]) -> None:
        """Whether a resumed stream gives what it gave; says so before a step."""
        differs = self._place.read(batches)
        if differs is not None and self._resumed is not None:
            saved, read = differs
            self._say_changed(self._resumed, {"rows read so far": f"{saved[:12]}... -> {read[:12]}..."})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Adds to the parent: not the weights of AdaLoRA and of a prompt, see `state.py`."""
        self._loaded_from = resume_from_checkpoint
        if not {"adalora", "prompt"} & self._resumed_state.keys():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Adds to the parent: the folder, for `_issue_warnings_after_load`, and the encoder of a prompt."""
        self._loaded_from = str(self.state.best_model_checkpoint)
        file = Path(self._loaded_from) / FILE
        state = torch.load(file, weights_only=True) if file.exists() else {}
        if "prompt" in state:
            return load_model_state(self.model, {"prompt": state["prompt"]})
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Adds to the parent: with `resume_only_model`, the schedule goes on and the optimizer begins anew."""
        if not self.args.resume_only_model or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            for _ in range(self.state.global_step):
                self.lr_scheduler.step()

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Adds to the parent: not with `resume_only_model`."""
        super()._load_scaler(None if self.args.resume_only_model else checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Adds to the parent: not with `resume_only_model`."""
        super()._load_rng_state(None if self.args.resume_only_model else checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Replaces the parent's warnings: weights that are tied to others are not missing, and others are an error."""

        def storage(name: str) -> int:
            weight = state[name]
            return (weight.to_local() if hasattr(weight, "to_local") else weight).untyped_storage().data_ptr()

        state, not_saved = self.model.state_dict(), set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        loaded = {storage(name) for name in state.keys() - set(load_result.missing_keys)}
        missing = [n for n in load_result.missing_keys if n not in not_saved and storage(n) not in loaded]
        if not_saved.intersection(load_result.missing_keys):
            self.model.tie_weights()
        if (missing or load_result.unexpected_keys) and self._loads_converted():
            return
        model = type(self.model).__name__
        for names, what in (
            (missing, f"lacks weights of {model}"),
            (load_result.unexpected_keys, f"holds weights that {model} does not have"),
        ):
            if names:
                few = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                raise ValueError(f"the checkpoint {what}: {few}")

    def _loads_converted(self) -> bool:
        """Load weights that transformers saves under other names, as the experts of a Mixtral; False if that fails.

        Its trainer (5.24) loads the file without the conversion of `from_pretrained`.
        """
        if not isinstance(self.model, PreTrainedModel):
            return False
        widest = functools.reduce(torch.promote_types, {p.dtype for p in self.model.parameters()})
        converted, info = type(self.model).from_pretrained(self._loaded_from, dtype=widest, output_loading_info=True)
        if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
            return False
        self.model.load_state_dict(converted.state_dict())
        return True

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Adds to the parent: the checkpoint is whole, or it is not there."""
        started = time.perf_counter()
        self._check_finite(self.model)
        run_dir = Path(self._get_output_dir(trial))
        staged = run_dir / INCOMPLETE / f"checkpoint-{self.state.global_step}"
        place = run_dir / staged.name
        if self.args.local_process_index == 0:
            shutil.rmtree(staged, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with compat.saving_under(self, staged.parent):
            super()._save_checkpoint(model, trial)
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(place)
        if self.args.should_save:
            self.state.save_to_json(str(staged / STATE))
            torch.save({**model_state(self.model), "order": self._order}, staged / FILE)
        pending = self._sums["train"].pending_tokens(self.accelerator) // Ranks.of(self.accelerator).sharing
        record = {
            **self._record(),
            "settings": self._settings_and_rows(),
            "num_tokens": self._total_train_tokens + pending,
            "stream": self._place.state(self.state.global_step, Ranks.of(self.accelerator)),
        }
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0:
            sync_folder(staged)  # what this node has written
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(staged, record)
            best = self.state.best_model_checkpoint
            rotate(run_dir, self.args.save_total_limit, {place, *([Path(best)] if best else [])})
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        self._sums["train"].skip(time.perf_counter() - started)
