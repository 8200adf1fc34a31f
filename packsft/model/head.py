"""The LM head inside the model's forward: loss and per-token metrics from hidden states, never the whole logits.

`install_head` teaches a model's forward the keyword arguments in `batch.LOSS_KEYS`. With them, the forward runs the
backbone and scores only the listed positions, in one of two ways:

- fused: `linear_cross_entropy` on the head's weight and the low-rank products that a LoRA adds to it. A probe first
  shows that it reproduces the model's own log-probabilities. It comes behind the backbone. Or it takes the place of the
  head within the model's own forward, which alone computes the router's loss of a mixture of experts, and whatever a
  model has between backbone and head.
- compact logits: the model's own head on the scored positions, then `cross_entropy`. This works with any head: other
  adapters, quantised weights. On padded rows, and in a model without `logits_to_keep`, it makes all logits first.

It runs inside the forward so that the hooks of DDP, FSDP and ZeRO fire around it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from packsft_kernels import LossOptions, LossOutput, cross_entropy, linear_cross_entropy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from packsft.compat import gathered_parameters, is_out_of_memory
from packsft.data.batch import LOSS_KEYS
from packsft.model.adapters import Addition, exercised, low_rank_of, split_head
from packsft.model.given_batch import GivenBatch, for_logits, for_loss
from packsft.model.parts import backbone_of, check_has_head, device_of, probing
from packsft.model.sequence_parallel import gather_router_logits

logger = logging.getLogger("packsft")


@dataclass
class HeadOutput(ModelOutput):
    """The output of a forward with `loss_rows`: 0-d tensors on the device, over N scored rows.

    Attributes:
        loss: sum of the rows' losses / `num_items`; the only differentiable field.
        entropy_sum: sum of the entropies of the predicted distributions, in nats.
        num_correct: rows whose target is the first argmax.
        aux_loss: the router's load-balancing loss of a mixture of experts, unweighted, if the model returns one.
        added_loss: see `install_head`.
    """

    loss: Tensor
    entropy_sum: Tensor | None = None
    num_correct: Tensor | None = None
    aux_loss: Tensor | None = None
    added_loss: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this forward gives a loss, and no {name!r}: leave `labels` out of the inputs for what the model itself "
            "gives, logits included"
        )


def install_head(
    model: PreTrainedModel, options: LossOptions, *, needs_aux_loss: bool = False, traced: bool = False
) -> str | None:
    """Teach `model.forward` the keyword arguments `loss_rows`, `loss_targets`, `loss_weights` and `num_items`.

    Without them the forward does not change. A whole batch of the collator may be given, too: with its `labels` for the
    loss, without them for the model's own output. An adapter may add to `loss` (AdaLoRA: how far its matrices are from
    orthogonal). With `loss_apart=True` it adds to 0, and the loss of the rows is `added_loss`.

    Call this before the model is wrapped (DDP, FSDP); for a PEFT model, pass its base model.

    Args:
        model: a causal language model with output embeddings.
        options: the loss; softcap and logit scale are taken from the model.
        needs_aux_loss: whether the router loss of a mixture of experts is needed.
        traced: whether the whole model is going to be compiled. Then nothing takes the place of its head.

    Returns:
        None if the head is fused, otherwise the reason for compact logits.

    Raises:
        ValueError: the model has no language-model head.
    """
    check_has_head(model)
    options = replace(options, entropy=True, correct=True)
    vars(model).pop("packsft_needs_logits", None)  # of an earlier trainer
    # a function of `self`: a deep copy of the model then runs on its own weights
    own_forward = _own_forward(model)
    why_compact, fused_options, run = _way_to_fuse(model, options, own_forward, needs_aux_loss, traced)
    if needs_aux_loss:
        gather_router_logits(backbone_of(model))

    def with_loss(self: PreTrainedModel, *args: Any, **kwargs: Any) -> HeadOutput:
        device = kwargs["loss_rows"].device
        rows, targets, weights = (kwargs.pop(key, None) for key in LOSS_KEYS)
        num_items, apart = kwargs.pop("num_items", None), kwargs.pop("loss_apart", False)
        # looked up on each call: wrappers replace the head, and another adapter may be active now
        head = split_head(self.get_output_embeddings())
        if why_compact is None and not isinstance(head, str) and not hasattr(self, "packsft_needs_logits"):
            given: dict[str, Any] = {"rows": rows, "targets": targets, "weights": weights, "num_items": num_items}
            losses = functools.partial(_fused_losses, self, options=fused_options, **given)
            try:
                sums, aux_loss = run(own_forward, self, losses, *args, use_cache=False, **kwargs)
            except (NeedsLogits, LookupError, TypeError, AttributeError) as error:
                if run is _behind_backbone:
                    raise
                if not torch.compiler.is_compiling():
                    logger.warning("from now on the head makes logits of the scored tokens: %s", error)
                    self.packsft_needs_logits = str(error)
            else:
                if aux_loss is not None:
                    self.packsft_values[-1] = aux_loss.detach()
                return _head_output(sums, device, apart, aux_loss)
        outputs, logits = _compact_logits(self, own_forward, rows, *args, use_cache=False, **kwargs)
        targets, weights, num_items = _to(logits.device, targets, weights, num_items)
        # Only this function uses the logits, so their gradient may overwrite them; unless what made them keeps them.
        loss = cross_entropy(
            logits,
            shift=False,
            targets=targets,
            weights=weights,
            options=options,
            num_items=num_items,
            inplace=logits.requires_grad and not _saved(logits),
        )
        aux_loss = getattr(outputs, "aux_loss", None)
        return _head_output(_sums(self, loss, aux_loss), device, apart, aux_loss)

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if "passes" in kwargs:
            raise ValueError(f"the forward got an optimizer step of {len(kwargs['passes'])} passes: call it for each")
        if "loss_rows" in kwargs and "num_tokens" not in kwargs:
            return with_loss(self, *args, **kwargs)
        given: GivenBatch | None = vars(self).get("packsft_given")
        if "loss_rows" not in kwargs:
            if given is not None:
                given.check(args, kwargs)
            return own_forward(self, *args, **kwargs)
        # a whole batch of the collator: from a user's own `compute_loss`
        with nullcontext() if given is None else given.forward_on():
            if kwargs.get("labels") is None:
                output = own_forward(self, *args, **for_logits(kwargs))
                if given is not None and given.virtual_tokens:
                    output.logits = output.logits[:, given.virtual_tokens :]
                return output
            share = 0.0 if given is None else given.router_share
            routed = {"output_router_logits": True} if share else {}
            output = with_loss(self, *args, **for_loss(kwargs), **routed)
            if share and output.aux_loss is not None:
                output.loss = output.loss + share * output.aux_loss
            return output

    functools.update_wrapper(forward, type(model).forward)
    # `generate` validates its arguments against the signature. accelerate's `unwrap_model` goes as far as `__wrapped__`
    # leads, and would leave the head out.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.own_forward = own_forward  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    return why_compact


def _own_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """The forward, as a function of the model, without the head of an earlier trainer."""
    bound: Any = model.forward
    if hasattr(bound, "own_forward"):
        return bound.own_forward
    return getattr(bound, "__func__", None) or (lambda self, *args, **kwargs: bound(*args, **kwargs))


def _way_to_fuse(
    model: PreTrainedModel, options: LossOptions, own_forward: Callable[..., Any], needs_aux_loss: bool, traced: bool
) -> tuple[str | None, LossOptions, Callable[..., tuple[Any, Any]]]:
    """(None, or why no way is right; the loss with the model's transform of its logits; where the head is)."""
    configured = replace(options, **_logit_transform(model.config.get_text_config()))
    if needs_aux_loss and traced:
        return "torch_compile traces the forward that alone has the router's loss", configured, _in_own_forward
    places = [*([] if needs_aux_loss else [_behind_backbone]), *([] if traced else [_in_own_forward])]
    own_outputs = functools.cache(functools.partial(_own_outputs, model))
    # Aya Vision has the scale of its language model in the configuration, and does not scale its logits
    transforms = [configured, *([options] if configured != options else [])]
    reasons = []
    for place, transform in itertools.product(places, transforms):
        reasons.append(_why_not_fused(model, transform, functools.partial(place, own_forward), own_outputs))
        if reasons[-1] is None:
            return None, transform, place
    return reasons[0], configured, places[0]


def _behind_backbone(
    own_forward: Callable[..., Any], model: Any, score: Callable[[Tensor], Any], *args: Any, **kwargs: Any
) -> tuple[Any, None]:
    """(`score` of the last hidden states, no router's loss). The model's own forward does not run."""
    hidden = backbone_of(model)(*args, **kwargs).last_hidden_state
    return _called_through(_sharded(model.get_output_embeddings()), score, hidden), None


def _in_own_forward(
    own_forward: Callable[..., Any], model: Any, score: Callable[[Tensor], Any], *args: Any, **kwargs: Any
) -> tuple[Any, Tensor | None]:
    """(`score` of the hidden states that the head is given, the router's loss) of the model's own forward, in which
    `score` takes the place of the head. The model gets logits without a column.

    Raises:
        NeedsLogits: the forward does not call its head once, on all tokens; or a hook has to see logits.
    """
    if (reason := _why_logits(model)) is not None:
        raise NeedsLogits(reason)
    head: Any = model.get_output_embeddings()
    within = [module for module in _sharded(head) if module is not head]
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    tokens: Any = next(tensor for tensor in given if tensor is not None)
    num_tokens, scores, calls = tokens.shape[:2].numel(), list[Any](), itertools.count(1)

    def in_place_of_head(hidden: Tensor) -> Any:
        if (call := next(calls)) > 1:
            raise NeedsLogits(f"the forward of {type(model).__name__} calls its head {call} times")
        if hidden.shape[:-1].numel() != num_tokens:  # on a GPU, a row that is not there ends the process
            raise NeedsLogits(f"the head is given {tuple(hidden.shape)} for {num_tokens} tokens")
        return _called_through(within, score, hidden)

    def keep(head: nn.Module, inputs: tuple[Tensor], scored: Any) -> Tensor:  # after the hooks of FSDP2 and ZeRO-3
        scores.append(scored)
        return inputs[0].new_empty(*inputs[0].shape[:-1], 0)

    with head.register_forward_hook(keep), _as_forward(head, in_place_of_head):
        outputs = own_forward(model, *args, **kwargs)
    if not scores:
        raise NeedsLogits(f"the forward of {type(model).__name__} does not call its head")
    return scores[0], getattr(outputs, "aux_loss", None)


class NeedsLogits(ValueError):
    """Something has to see the logits of the model's own head."""


# Hooks that look at no logits. TRL's begins to offload activations again.
BLIND_HOOKS = ("torch.distributed.fsdp.", "deepspeed.", "trl.models.activation_offloading.")


def _why_logits(model: Any) -> str | None:
    """Why the head cannot be replaced within a forward: it is traced, or has hooks that may look at what it computes (a
    user's, tensor parallelism's)."""
    if torch.compiler.is_compiling():
        return "the model is compiled"
    head: Any = model.get_output_embeddings()
    hooks = [
        hook
        for module in head.modules()
        for kind in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_pre_hooks")
        if not (module is head and kind == "_forward_pre_hooks")  # they run
        for hook in getattr(module, kind).values()
    ]
    seeing = [hook for hook in hooks if not f"{getattr(hook, '__module__', '')}.".startswith(BLIND_HOOKS)]
    if seeing or torch.nn.modules.module._global_forward_hooks:
        return "a hook may look at what the head computes"
    return None


def _fused_loss(
    head: tuple[nn.Linear, list[Addition]],
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    options: LossOptions,
    num_items: Tensor | float | None,
) -> LossOutput:
    linear, additions = head
    hidden_TM = hidden.flatten(0, 1).to(linear.weight.device)
    rows, targets, weights, num_items = _to(hidden_TM.device, rows, targets, weights, num_items)
    added = [parameter for addition in additions for parameter in addition.parameters]
    with gathered_parameters(linear.weight, linear.bias, *added) as (weight, bias, *added):
        return linear_cross_entropy(
            hidden_TM,
            weight,
            targets,
            rows=rows,
            bias=bias,
            weights=weights,
            low_rank=low_rank_of(additions, added, hidden_TM, weight),
            options=options,
            num_items=num_items,
        )


def _to(device: torch.device, *values: Any) -> list[Any]:
    """The layers of a model may lie on several devices, the head on another than the batch."""
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


def _compact_logits(model: Any, own_forward: Any, rows: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
    """The model's outputs, and its logits `[N, V]` at `rows` (positions in the flattened batch)."""
    packed = kwargs["input_ids"].shape[0] == 1 if "input_ids" in kwargs else False
    forward = functools.partial(own_forward, model)
    if packed and "logits_to_keep" in inspect.signature(forward).parameters:
        if getattr(model, "hf_device_map", None):  # the last hidden states are where the last weights are
            *_, last = backbone_of(model).parameters()
            rows = rows.to("cpu" if last.is_meta else last.device)
        outputs = forward(*args, logits_to_keep=rows.long(), **kwargs)
        return outputs, outputs.logits[0]
    outputs = forward(*args, **kwargs)
    logits = outputs.logits.flatten(0, 1)
    return outputs, logits.index_select(0, rows.to(logits.device))


def _saved(x: Tensor) -> bool:
    """Whether the operation that made it keeps it for its backward, as tanh does."""
    node: Any = x.grad_fn
    while node is not None and node.name().startswith(("Select", "View", "UnsafeView", "Slice", "Alias")):
        node = node.next_functions[0][0]
    return hasattr(node, "_saved_result")


def _fused_losses(model: Any, hidden: Tensor, **given: Any) -> tuple[Tensor, ...]:
    head: Any = split_head(model.get_output_embeddings())  # within the calls of its modules: whole weights, no shards
    return _sums(model, _fused_loss(head, hidden, **given))


def _sums(model: Any, output: LossOutput, aux_loss: Tensor | None = None) -> tuple[Tensor, ...]:
    """(loss, entropy of all rows, rows that are correct). The model keeps their values for `with_own_values`."""
    assert output.entropy is not None
    assert output.correct is not None
    sums = output.loss, output.entropy.sum(), output.correct.sum()
    if not torch.compiler.is_compiling():
        model.packsft_values = [None if value is None else value.detach() for value in (*sums, aux_loss)]
    return sums


def with_own_values(model: Any, output: HeadOutput) -> HeadOutput:
    """The output of a wrapped model, `loss_apart`, with the values that its head computed.

    A wrapper may have rounded them: under FSDP2 with a policy for bfloat16, outputs are bfloat16.
    """
    own, loss = vars(model).pop("packsft_values", None), output.added_loss
    if own is None or loss is None or loss.dtype == own[0].dtype:
        return output
    for name, value in zip(("added_loss", "entropy_sum", "num_correct", "aux_loss"), own, strict=True):
        if value is not None:
            rounded = output[name]
            output[name] = value.to(rounded.device) + (rounded - rounded.detach())  # the gradient is that of `rounded`
    return output


def _head_output(
    sums: tuple[Tensor, ...], device: torch.device, apart: bool, aux_loss: Tensor | None = None
) -> HeadOutput:
    loss, entropy_sum, num_correct = sums
    loss, added = (torch.zeros_like(loss), loss) if apart else (loss, None)
    return HeadOutput(*_to(device, loss, entropy_sum, num_correct, aux_loss, added))


# ---- shards ----


def _sharded(head: nn.Module) -> list[nn.Module]:
    """The modules of the head that FSDP2 or ZeRO-3 shards, from the outermost: their hooks gather the weights."""
    return [
        module
        for module in head.modules()
        if isinstance(module, FSDPModule) or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False))
    ]


def _called_through(modules: Sequence[Any], function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """`function(hidden)` as the forward of all these modules, one within the other, so that their hooks run.

    The result is a tuple of tensors: FSDP2 looks into it for what the backward begins with.
    """
    if not modules:
        return function(hidden)
    outer, *inner = modules
    with _as_forward(outer, lambda hidden: _called_through(inner, function, hidden)):
        return outer(hidden)


@contextmanager
def _as_forward(module: Any, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """While open, `function` is the forward of the module."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _logit_transform(config: Any) -> dict[str, Any]:
    """How the model turns its head's output into logits, as `LossOptions` fields; names differ between models."""

    def first_of(*names: str) -> float | None:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    scale = first_of("logit_scale", "output_multiplier", "lm_head_multiplier")
    if scale is None and (divisor := first_of("logits_scaling", "logits_mup_width_multiplier")) is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    softcap = first_of("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return {"softcap": softcap, "logit_scale": 1.0 if scale is None else float(scale)}


def _own_outputs(model: PreTrainedModel, tokens: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Logits `[T, V]` and the router's loss. Says so if the model's own loss is not the cross-entropy of the next
    tokens: nothing here uses it."""
    ids = torch.tensor([tokens], device=device_of(model))
    try:
        outputs = model(input_ids=ids, labels=ids, use_cache=False)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        outputs = model(input_ids=ids, use_cache=False)  # not a model that computes a loss
    logits, own, aux_loss = outputs.logits[0], getattr(outputs, "loss", None), getattr(outputs, "aux_loss", None)
    if own is not None and aux_loss is None:
        expected = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:].to(logits.device))
        if (own.to(logits.device) - expected).abs() > 1e-3 * expected:
            logger.warning(
                "the forward of %s computes a loss other than the cross-entropy of the next tokens (%.4g, not %.4g "
                "on random ones): it is not trained on, as in TRL", type(model).__name__, own, expected,
            )  # fmt: skip
    return logits, aux_loss


@torch.no_grad()
def _why_not_fused(
    model: PreTrainedModel,
    options: LossOptions,
    run: Callable[..., tuple[Any, Any]],
    own_outputs: Callable[[tuple[int, ...]], tuple[Tensor, Tensor | None]],
) -> str | None:
    """None if the fused head gives the model's own log-probabilities on a few tokens, otherwise the reason.

    `run` is `_behind_backbone` or `_in_own_forward`, with the model's own forward; `own_outputs` is `_own_outputs`.
    """
    head = split_head(model.get_output_embeddings())
    if isinstance(head, str):
        return head
    linear, additions = head
    try:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(linear.weight.shape[0], (1, 8), generator=generator).to(device_of(model))
        changed = [token for addition in additions for token in addition.tokens[:4]]  # only they show it
        targets = torch.cat([ids.new_tensor(changed, dtype=ids.dtype), ids[0]])[:7]
        rows = torch.arange(7, dtype=torch.int32, device=ids.device)
        plain = replace(options, label_smoothing=0.0, z_loss=0.0, dft=False)
        with probing(model), exercised(additions):
            logits, own_aux_loss = own_outputs(tuple(ids[0].tolist()))

            def log_prob(hidden: Tensor) -> tuple[Tensor, Tensor]:
                unsharded: Any = split_head(model.get_output_embeddings())
                return _fused_loss(unsharded, hidden, rows, targets, None, plain, None).log_prob, hidden

            # through its modules, as in training: FSDP2 may shard it in one group with a layer that has just run
            (ours, hidden), aux_loss = run(model, log_prob, input_ids=ids, use_cache=False)
        with gathered_parameters(linear.weight) as (weight,):
            terms = float(weight.norm(dim=1).max()) * float(hidden.norm(dim=-1).max())
        ours, targets = _to(logits.device, ours, targets)
        theirs = logits[:7].double().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    except NeedsLogits as error:
        return str(error)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        return f"the probe of the head failed: {error}"
    # Both round logits to their dtype (PEFT rounds its addition to the adapter's dtype), and ours rounds each
    # log-probability. They may differ by a few units in the last place of the largest logit, of the largest
    # log-probability, and of the terms that a logit sums, in the dtype of the sums.
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (logits, *(addition.idle for addition in additions)))
    # Some models mask tokens that they never generate: what is 1,000 nats below the largest logit allows nothing.
    seen = logits[~(logits < logits.max(-1, keepdim=True).values - 1e3)]
    allowed = 4 * eps * float(seen.abs().max().clamp(min=1))
    largest = float(theirs.abs().max().clamp(max=1e3))
    allowed += 4 * torch.finfo(ours.dtype).eps * (largest + options.logit_scale * terms)
    routed = [loss.float() for loss in (aux_loss, own_aux_loss) if loss is not None]
    if routed and not torch.allclose(routed[0], routed[-1], rtol=1e-3, equal_nan=True):
        return "the router's loss depends on the logits"
    difference = float((ours.double() - theirs).abs().max())
    if not difference <= allowed:
        return f"its log-probabilities would be off by {difference:.2g} nats (allowed {allowed:.2g})"
    return None
