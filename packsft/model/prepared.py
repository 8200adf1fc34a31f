"""A model prepared for packed training: per-document attention, the isolation check, the head, compiled layers.

Needs a model and a loss, but no trainer. `PreparedModel.describe` says what it found and decided.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from packsft_kernels import LossOptions
from packsft_kernels.varlen_attention import FLOAT_DTYPES
from torch import Tensor, nn

from packsft.compat import as_before_accelerate, check_tied_at_load
from packsft.data.batch import document_lengths, longest_document, loss_inputs, model_inputs
from packsft.model import attention
from packsft.model.compilation import compile_layers, restore_layers
from packsft.model.given_batch import GivenBatch
from packsft.model.head import HeadOutput, install_head, with_own_values
from packsft.model.isolation import NOT_CHECKED, IsolationVerdict, check_cut_rows, check_isolation
from packsft.model.parts import base_model_of
from packsft.model.rotary import by_document, install_rotary
from packsft.model.sequence_parallel import SequenceGroup, set_group

logger = logging.getLogger("packsft")


class PreparedModel:
    """Prepares a causal language model in place.

    Args:
        model: the model, or a PEFT model around it; before it is wrapped (DDP, FSDP).
        options: the loss.
        attention_backend: "auto" or a name in `varlen_attention.BACKENDS`.
        check: whether to run the isolation check; without it, documents count as isolated.
        on_unpackable: what to do with a model that fails the check: "pad" or "error".
        max_length: the most tokens of a document; None for any length.
        autocast: returns the context in which training runs its forward.
        any_rank: returns whether its argument is true on any rank; every rank calls it once.
        needs_aux_loss: whether the router loss of a mixture of experts is needed.
        compiles_layers: whether to compile the decoder layers for training; not on padded rows.
        traced: whether the whole model is going to be compiled.
        sequence: the ranks that share each row, or None.

    Attributes:
        base_model: the model without its PEFT wrapper.
        isolation: the verdict of the isolation check.
        prompt: PEFT's configuration of a prompt or prefix, or None.
        virtual_tokens: how many a PEFT prompt puts before the tokens of each row. Prefix tuning puts none there.
        padded: whether documents are trained as padded rows, because they see each other in a packed row.

    Raises:
        ValueError: trained weights are offloaded, prefix tuning meets the router's loss, the model has no
            language-model head or no layers to compile, the attention back end was chosen by name and cannot run, or
            documents see each other and `on_unpackable="error"`; rows cannot be cut over the ranks of `sequence`.
        FloatingPointError: weights are not finite, which the check shows.
    """

    def __init__(
        self,
        model: nn.Module,
        options: LossOptions,
        *,
        attention_backend: str = "auto",
        check: bool = True,
        on_unpackable: str = "pad",
        max_length: int | None = None,
        autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
        any_rank: Callable[[bool], bool] = bool,
        needs_aux_loss: bool = False,
        compiles_layers: bool = False,
        traced: bool = False,
        sequence: SequenceGroup | None = None,
    ) -> None:
        self.base_model: Any = base_model_of(model)
        self.options, self.autocast, self.sequence = options, autocast, sequence
        self._max_length, self._needs_aux_loss = max_length, needs_aux_loss
        prompt = getattr(model, "active_peft_config", None)
        self.prompt = prompt if getattr(prompt, "is_prompt_learning", False) else None
        fills_cache = self.prompt is not None and self.prompt.peft_type in ("PREFIX_TUNING", "CARTRIDGE")
        self.virtual_tokens = 0 if self.prompt is None or fills_cache else self.prompt.num_virtual_tokens
        if fills_cache and needs_aux_loss:
            raise ValueError(
                f"{type(self.prompt).__name__} puts keys before each row that no router sees, and the router's loss "
                "fails on such rows: set router_aux_loss_coef=0.0"
            )
        _refuse_offloaded(model)
        check_tied_at_load(self.base_model)
        as_before_accelerate(model)
        restore_layers(self.base_model)
        self._rotary_limit = install_rotary(self.base_model)
        self._on_unpackable = on_unpackable
        self._prepare_attention(attention_backend, check, any_rank)
        self._why_compact = install_head(self.base_model, options, needs_aux_loss=needs_aux_loss, traced=traced)
        tuner: Any = getattr(model, "base_model", None)
        if is_peft_model(model) and "forward" in vars(tuner):  # of LLaMA-Adapter: the forward as it was
            tuner.forward = self.base_model.forward
        if self.why_compact is not None:
            logger.warning(
                "the language-model head is not fused: %s; it computes the scored logits instead", self.why_compact
            )
        if compiles_layers and self.padded:
            logger.warning("compile_layers=True: no effect on a model that is trained on padded rows")
        elif compiles_layers:
            with autocast():
                compile_layers(self.base_model)

    @property
    def why_compact(self) -> str | None:
        """None if the head is fused, otherwise the reason for compact logits. It may turn up in training (a hook)."""
        return self._why_compact or getattr(self.base_model, "packsft_needs_logits", None)

    def _prepare_attention(self, backend: str, check: bool, any_rank: Callable[[bool], bool]) -> None:
        model = self.base_model
        self._own_attention = own_attention = attention.attention_of(model)
        attention.set_backend(model, backend)
        attention.keep_boundaries_from_towers(model)
        if backend != "auto":
            with self.autocast():
                attention.backend_of(model)  # raises, with the reason
        if own_attention in (None, "eager", "sdpa"):  # flash and flex attention isolate documents themselves
            attention.set_attention(model, attention.ATTENTION_NAME)
        elif self.sequence is not None and own_attention != attention.ATTENTION_NAME:
            raise ValueError(
                f"sequence_parallel_size={self.sequence.size}: the attention of this model, {own_attention!r}, sees "
                "only the tokens of one rank: leave attn_implementation unset"
            )
        if self.sequence is not None and getattr(model.config.get_text_config(), "layerdrop", None):
            raise ValueError(
                f"sequence_parallel_size={self.sequence.size}: each rank would drop other layers, set layerdrop=0"
            )
        set_group(model, self.sequence)
        self.padded = False
        if not check and self.prompt is None and self.sequence is None:
            self.isolation = IsolationVerdict(True, NOT_CHECKED)
            return
        self.check_isolation()
        failed_anywhere = any_rank(not self.isolation.isolated)
        if self.isolation.isolated and failed_anywhere:
            self.isolation = IsolationVerdict(False, "it failed on another rank")
        if not self.isolation.isolated:
            self.pad(self.isolation)

    def pad(self, verdict: IsolationVerdict) -> None:
        """From now on, train on padded rows, because documents see each other. Raises as the constructor does."""
        self.padded, self.isolation = True, verdict
        model, own_attention = self.base_model, self._own_attention
        _refuse_nonfinite(model)
        if self.sequence is not None:
            raise ValueError(
                f"sequence_parallel_size={self.sequence.size}: the rows of {type(model).__name__} cannot be cut: "
                f"{self.isolation.reason}"
            )
        if self._on_unpackable == "error":
            raise ValueError(f"{type(model).__name__} cannot be trained on packed documents: {self.isolation.reason}")
        logger.warning(
            "%s is trained on padded rows instead of packed ones, with the same examples in each step: %s",
            type(model).__name__, self.isolation.reason,
        )  # fmt: skip
        if self.virtual_tokens:
            logger.warning(
                "the first token of an example is not scored, although the last virtual token predicts it: TRL adds "
                "its loss without counting it"
            )
        if own_attention is not None and own_attention != attention.attention_of(model):
            attention.set_attention(model, own_attention)

    def check_isolation(self) -> IsolationVerdict:
        """Run the isolation check and store its verdict. `padded` does not change."""
        if self.prompt is not None:
            name = type(self.prompt).__name__
            self.isolation = IsolationVerdict(False, f"{name} puts virtual tokens before a row, not before a document")
            return self.isolation
        self.isolation = check_isolation(self.base_model, self.autocast, self._max_length)
        if self.isolation.isolated and self.sequence is not None:
            self.isolation = check_cut_rows(self.base_model)
        return self.isolation

    @contextlib.contextmanager
    def forward_on(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """The context for a forward on a batch of the collator."""
        if self.sequence is not None:
            self.sequence.num_tokens = batch.get("row_tokens")
        turns = longest_document(batch) >= self._rotary_limit
        apart = contextlib.nullcontext() if self.padded else attention.packed_forward()
        try:
            with by_document(document_lengths(batch) if turns else None), apart:
                yield
        finally:
            if self.sequence is not None:
                self.sequence.num_tokens = None

    @contextlib.contextmanager
    def row_of(self, batch: Mapping[str, Any], router_share: float) -> Iterator[None]:
        """While open, a forward that the user calls on this batch is as ours, or is refused."""
        packed = not self.padded and batch.get("num_documents", 1) > 1
        forward_on = functools.partial(self.forward_on, batch)
        self.base_model.packsft_given = GivenBatch(batch, forward_on, packed, self.virtual_tokens, router_share)
        refusing: AbstractContextManager = contextlib.nullcontext()
        if packed:
            refusing = attention.refusing_mixed(batch["input_ids"].shape[1], batch["cu_seq_lens_q"])
        try:
            with refusing:
                yield
        finally:
            del self.base_model.packsft_given

    @staticmethod
    def check_same(model: nn.Module) -> None:
        """Raises ValueError for a model that is neither the prepared one nor a copy of it."""
        if not any("packsft_backend" in vars(module) for module in model.modules()):
            raise ValueError(
                f"this {type(model).__name__} is not the model that the trainer was made with (model_init, "
                "hyperparameter_search, trainer.model = ...): make a new trainer for it"
            )

    def loss(self, model: nn.Module, batch: Mapping[str, Any], num_items: float | Tensor) -> HeadOutput:
        """Forward of a batch through the head; `model` is this model, possibly wrapped (PEFT, DDP, FSDP).

        `added_loss` is what the adapter adds, of the model and not of the batch; None if it adds nothing to learn from.
        """
        extra = loss_inputs(batch) | ({"output_router_logits": True} if self._needs_aux_loss else {})
        with self.forward_on(batch):
            output = model(**model_inputs(batch), **extra, num_items=num_items, loss_apart=True)
        output = with_own_values(self.base_model, output)
        added = output.loss if output.loss.requires_grad else None
        assert output.added_loss is not None
        output.loss, output.added_loss = output.added_loss, added
        return output

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """The model's own output for a batch, with full logits: those of the tokens, not of virtual ones."""
        with self.forward_on(batch):
            outputs = model(**model_inputs(batch), use_cache=False)
        if self.virtual_tokens:
            outputs.logits = outputs.logits[:, self.virtual_tokens :]
        return outputs

    def describe(self) -> dict[str, str]:
        """How the model is trained, and why: rows, attention, head."""
        if self.padded:
            rows = f"padded: {self.isolation.reason}"
        elif self.isolation.reason == NOT_CHECKED:
            rows = "in one row; whether they see each other was not checked"
        elif self.isolation.isolated:
            rows = "in one row, and none sees another: checked on this model"
        else:
            rows = f"in one row, although {self.isolation.reason}"
        if self.sequence is not None:
            rows += f"; each row is cut over {self.sequence.size} ranks"
        head = "fused" if self.why_compact is None else f"the logits of scored tokens: {self.why_compact}"
        return {"documents": rows, "attention": self._describe_attention(), "head": head}

    def _describe_attention(self) -> str:
        name = attention.attention_of(self.base_model)
        if name != attention.ATTENTION_NAME:
            return f"transformers' {name}" + (" on padded rows" if self.padded else "")
        with self.autocast():
            backend, spec = attention.backend_of(self.base_model)
        return f"{backend}, {str(spec.dtype).removeprefix('torch.')} on {spec.device}, head size {spec.head_dim}"


def _refuse_offloaded(model: nn.Module) -> None:
    if not getattr(base_model_of(model), "hf_device_map", None):  # FSDP has such weights, too, until it shards
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_meta:
            raise ValueError(
                f"device_map: the weights {name} are offloaded (to the disk or the CPU), where they cannot be trained: "
                "keep on a device what is trained"
            )


def _refuse_nonfinite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype in FLOAT_DTYPES and not parameter.is_meta and not torch.isfinite(parameter).all():
            raise FloatingPointError(f"the weights {name} of {type(model).__name__} are not finite: load others")


def any_rank_of(accelerator: Any) -> Callable[[bool], bool]:
    """Whether a condition holds on any rank of an `accelerate.Accelerator`; all ranks wait for each other."""

    def any_rank(here: bool) -> bool:
        count = torch.tensor(int(here), device=accelerator.device)
        return bool(accelerator.reduce(count, reduction="sum"))

    return any_rank
