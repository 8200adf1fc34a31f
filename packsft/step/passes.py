"""The passes of an exact step: how many tokens go through the model at once, and what to do when memory runs out.

The number of tokens affects only speed and memory, so it may change during a run. Knows steps and memory; the trainer
runs the forward and backward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, release_memory
from torch import Tensor, nn

from packsft.compat import is_out_of_memory
from packsft.data.batch import StepRows
from packsft.data.ranks import Ranks
from packsft.step.memory import fit_tokens

logger = logging.getLogger("packsft")


MEASURED_TOKENS = 1024  # in the smaller pass: below, the head's chunks and the kernels' workspaces bend the line


class Steps(Protocol):
    """Plans steps: `StepDataset` or `StepStream`."""

    tokens_per_pass: int

    def step(self, examples: Any) -> StepRows: ...

    def longest(self) -> int: ...

    def most_tokens_per_rank(self) -> int: ...


class PassWalker:
    """Runs the passes of optimizer steps, of at most `tokens_per_pass` tokens each.

    Args:
        tokens_per_pass: an integer, or "auto" for the most that fit, measured before the first pass.
        max_length: used in place of "auto" until then.
        accelerator: accelerate's.
        run: `run(model, batch, num_items, last)` runs forward and backward on a batch and returns the loss. In the
            last pass of a step, gradients are summed over ranks.
        collate: turns rows, or the rows of a step, into what `run` and `walk` take, on the device.
        begin: called with the number of passes before the first pass of a step.
        undo: restores the metrics to their state at `begin`.

    Attributes:
        steps: the training set whose loader plans the steps, with `tokens_per_pass`.
    """

    def __init__(
        self,
        tokens_per_pass: int | str,
        max_length: int,
        accelerator: Accelerator,
        *,
        run: Callable[[nn.Module, dict[str, Any], Any, bool], Tensor],
        collate: Callable[[list[Any]], dict[str, Any]],
        begin: Callable[[int], None],
        undo: Callable[[], None],
    ) -> None:
        self._fits = tokens_per_pass == "auto"
        self._tokens_per_pass = max_length if isinstance(tokens_per_pass, str) else tokens_per_pass
        self._accelerator = accelerator
        self._run, self._collate, self._begin, self._undo = run, collate, begin, undo
        self.steps: Steps | None = None
        self._unchecked: list[nn.Module] = []  # layers whose gradient checkpointing was turned off

    @property
    def tokens_per_pass(self) -> int:
        return self._tokens_per_pass

    @tokens_per_pass.setter
    def tokens_per_pass(self, tokens: int) -> None:
        self._tokens_per_pass = tokens
        if self.steps is not None:
            self.steps.tokens_per_pass = tokens

    def walk(self, model: nn.Module, step: dict[str, Any], num_items: Any) -> Tensor:
        """Run a step. Returns its loss and leaves its gradients in the parameters.

        If memory runs out, the same step runs again with half as many tokens per pass.

        Raises:
            torch.OutOfMemoryError: each pass holds a single document already, there are several ranks, which cannot
                wait for each other, DeepSpeed keeps the gradients, or others came before this step.
        """
        assert self.steps is not None
        for layer in self._unchecked:  # another run turns it on again
            layer.gradient_checkpointing = False  # type: ignore[assignment]
        if self._fits:
            self._fits = False
            self.tokens_per_pass = self._measured(model, self.steps)

        def run(passes: list[dict[str, Any]]) -> Tensor:
            self._begin(len(passes))
            losses = [self._run(model, batch, num_items, batch is passes[-1]) for batch in passes]
            return torch.stack(losses).sum()

        earlier = any(parameter.grad is not None for parameter in model.parameters())

        def save_memory(error: RuntimeError) -> bool:
            if earlier:
                raise torch.OutOfMemoryError(
                    "a pass is too much for the memory, and to run its step again would lose the gradients of the one "
                    f"before: set a smaller tokens_per_pass, and no accumulation of steps in a callback ({error})"
                ) from None
            if not self._unchecked or self._accelerator.num_processes > 1:
                return False
            logger.warning("out of memory: gradient checkpointing is turned on again, and the step runs again")
            self._checkpoint(self._unchecked)
            return True

        def undo() -> None:
            self._undo()
            model.zero_grad()

        loss = self.retry(step, self.steps, run, undo, save_memory)
        self._tokens_per_pass = self.steps.tokens_per_pass
        return loss

    def retry(
        self,
        step: dict[str, Any],
        steps: Steps,
        run: Callable[[list[dict[str, Any]]], Any],
        undo: Callable[[], None],
        save_memory: Callable[[RuntimeError], bool] = lambda error: False,
    ) -> Any:
        """`run` on the passes of a step that `steps` planned; if memory runs out, `undo`, and again in smaller passes.

        The limit of `steps` becomes smaller, unless `save_memory` has done something else. Raises as `walk` does.
        """
        while True:
            if step["tokens_per_pass"] != steps.tokens_per_pass:  # planned ahead, with another limit
                step = self._collate([steps.step(step["examples"])])
            passes = step["passes"]
            try:
                return run(passes)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                same = steps.tokens_per_pass
                smaller = same if save_memory(error) else self._smaller(passes, same, error)
            # here, outside the except block, the exception no longer keeps the activations alive
            undo()
            release_memory()
            steps.tokens_per_pass = smaller

    def _checkpoint(self, layers: list[nn.Module]) -> None:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]
        self._unchecked = []

    def _smaller(self, passes: list[dict[str, Any]], tokens_per_pass: int, error: RuntimeError) -> int:
        """Half the tokens of the fullest pass that holds more than one document."""
        off = "; tokens_per_pass='auto' has turned gradient checkpointing off" if self._unchecked else ""
        parts = Ranks.of(self._accelerator).parts
        divisible = [parts * batch["input_ids"].numel() for batch in passes if batch["num_documents"] > 1]
        most = max(divisible, default=0)
        smaller = max(1, most // 2)
        if not divisible or smaller >= tokens_per_pass:  # one document and its padding
            most = parts * max(batch["input_ids"].numel() for batch in passes)
            raise torch.OutOfMemoryError(
                f"a document of {most:,} tokens is too much for the device's memory, even alone: set "
                "gradient_checkpointing=True if it is off, a smaller max_length, or a larger sequence_parallel_size"
                f"{off} ({error})"
            ) from None
        if self._accelerator.num_processes > 1:
            raise torch.OutOfMemoryError(
                f"a pass of {most:,} tokens is too much for the memory of rank {self._accelerator.process_index}, and "
                f"the other ranks cannot wait for it: set tokens_per_pass={smaller}{off} ({error})"
            ) from None
        if self._accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise torch.OutOfMemoryError(
                f"a pass of {most:,} tokens is too much for the memory, and DeepSpeed keeps the gradients of those "
                f"before it: set tokens_per_pass={smaller} ({error})"
            ) from None
        logger.warning(
            "out of memory in a pass of %d tokens: the step runs again, and the run continues, with at most %d tokens "
            "per pass", most, smaller,
        )  # fmt: skip
        return smaller

    def _measured(self, model: nn.Module, steps: Steps) -> int:
        """The most tokens that fit on every rank, measured at two sizes; at most the tokens of a step.

        Gradient checkpointing is turned off if the largest step fits without it: no memory is left to save.
        """
        longest, largest_step = steps.longest(), steps.most_tokens_per_rank()
        small = max(longest, min(MEASURED_TOKENS, largest_step // 2))
        if largest_step <= small:
            return small

        def run(num_tokens: int) -> None:
            lengths = [longest] * (num_tokens // longest)
            row = {"input_ids": [0] * num_tokens, "seq_lengths": [*lengths, num_tokens - sum(lengths)]}
            self._run(model, self._collate([row]), num_tokens, False)

        device = self._accelerator.device
        moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]

        def measured() -> int:
            self._begin(1)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                tokens = fit_tokens(run, small, min(2 * small, largest_step), device, to_come=moments)  # of AdamW
            self._undo()
            model.zero_grad()
            return int(self._accelerator.gather(torch.tensor([min(tokens, largest_step)], device=device)).min())

        for layer in layers:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
        self._unchecked, tokens = layers, measured()
        if layers and tokens < largest_step:
            self._checkpoint(layers)
            tokens = measured()
        turned_off = " without gradient checkpointing, which is turned off" if self._unchecked else ""
        whole = f"the largest step fits in one pass of {tokens} tokens{turned_off}"
        said = whole if tokens == largest_step else f"passes of {tokens} tokens fit"
        logger.warning("tokens_per_pass='auto': %s on %s", said, device)
        return tokens
