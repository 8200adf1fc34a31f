"""Does this very model keep packed documents apart? Two backwards answer, exactly, before the first step.

Three documents of unequal length lie in one row. The summed squared logits of the last document, and then those of
one of its middle rows, are backpropagated to the input embeddings. The gradient at every other document and at every
later position must be exactly 0.0, and at the source's own positions it must not be. There is no tolerance and no
reference run: what cannot be reached has a gradient of exactly zero in any dtype.

The source is the last document, since from the first one a causal leak would read 0.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from packsft.attention import packed_forward
from packsft.batch import model_inputs
from packsft.collator import PackingCollator
from packsft.head import count_embeddings

DOCUMENT_LENGTHS = (9, 14, 11)  # unequal, and none of them what another starts or ends at


@dataclass(frozen=True)
class IsolationVerdict:
    """`isolated`, or the reason why packed documents cannot be trusted to stay apart on this model."""

    isolated: bool
    reason: str | None = None


def check_isolation(model: PreTrainedModel, autocast: Callable[[], AbstractContextManager]) -> IsolationVerdict:
    """Run the check on a model as it will be trained. Parameters, gradients, modes and random state stay as they are.

    Args:
        model: the causal language model, before its forward is wrapped.
        autocast: the context that training runs its forward in.
    """
    vocab_size = count_embeddings(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (sum(DOCUMENT_LENGTHS),), generator=generator)
    batch = PackingCollator(pad_token_id=0)([{"input_ids": ids.tolist(), "seq_lengths": list(DOCUMENT_LENGTHS)}])
    inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in model_inputs(batch).items()}
    begin = sum(DOCUMENT_LENGTHS[:-1])
    middle = begin + DOCUMENT_LENGTHS[-1] // 2
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices),
            _eval_mode(model),
            _embedding_leaf(model) as leaf,
            _layers(model) as layers,
        ):
            with torch.enable_grad(), autocast(), packed_forward():
                logits = model(**inputs, use_cache=False).logits
            if not leaf:
                return IsolationVerdict(False, "inconclusive: the input embeddings were never called")
            for source, first, last in ((logits[0, begin:], begin, None), (logits[0, middle], begin, middle + 1)):
                gradient = _gradient(source, leaf[0])
                if not gradient[first:last].any():
                    return IsolationVerdict(False, "inconclusive: a document's gradient does not reach its own input")
                if gradient[:first].any():
                    return IsolationVerdict(False, f"documents see each other{_first_leak(layers, leaf[0], begin)}")
                if last is not None and gradient[last:].any():
                    return IsolationVerdict(False, "a position sees the ones after it")
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        # Whatever a model of somebody else raises at a packed row, it trains as padded passes: the reason is passed on.
        return IsolationVerdict(False, f"a packed forward raised {type(error).__name__}: {error}")
    return IsolationVerdict(True)


def _gradient(source: Tensor, leaf: Tensor) -> Tensor:
    """`[T]` largest absolute gradient of the summed squares at each input position; parameters get none."""
    (gradient,) = torch.autograd.grad(source.float().square().sum(), leaf, retain_graph=True)
    return gradient[0].abs().amax(-1)


def _first_leak(layers: list[tuple[str, Tensor]], leaf: Tensor, begin: int) -> str:
    """ " (first in ...)" with the name of the first layer whose last document depends on another one."""
    for name, hidden in layers:
        if (
            hidden.requires_grad
            and hidden.shape[:2] == leaf.shape[:2]
            and _gradient(hidden[0, begin:], leaf)[:begin].any()
        ):
            return f" (first in {name})"
    return ""


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _embedding_leaf(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Replaces the output of the input embeddings by a detached leaf, which the list then holds."""
    leaf: list[Tensor] = []

    def detach(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_())
        return leaf[-1]

    handle = model.get_input_embeddings().register_forward_hook(detach)
    try:
        yield leaf
    finally:
        handle.remove()


@contextmanager
def _layers(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """(name, hidden states) of each decoder layer, in the order in which they ran."""
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outputs: list[tuple[str, Tensor]] = []
    handles = []
    if stacks:
        stack_name, stack = max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))
        for index, layer in enumerate(stack):

            def keep(module: nn.Module, args: tuple, output: object, name: str = f"{stack_name}.{index}") -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if isinstance(hidden, Tensor):
                    outputs.append((name, hidden))

            handles.append(layer.register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
