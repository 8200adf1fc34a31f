"""Sequence parallelism of packed rows: the P ranks of a group share each row.

Outside of attention, a rank holds T / P tokens of the row. In attention it holds all T tokens of H / P heads, so the
document boundaries stay those of the whole row. One all-to-all before the attention of a layer and one after it
exchange tokens for heads (Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509).

The collator cuts the row (`PackingCollator.part`). It pads T to a multiple of P with a document of its own. The next
token of a rank's last position lies on the next rank; the targets are made before the row is cut.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from packsft.data.batch import part_of


class SequenceGroup:
    """The ranks that share each row; neighbours make a group.

    Attributes:
        size: how many ranks share a row, P.
        rank: which part of the row this rank holds; `part` is (rank, size), as the collator takes it.
        num_tokens: tokens of the documents in the whole row that runs, without padding; for a router's loss.
    """

    def __init__(self, size: int) -> None:
        self.size, self._process_group = size, _process_group(size, distributed.group.WORLD)
        self.rank = distributed.get_rank(self._process_group)
        self.part = (self.rank, size)
        self.num_tokens: int | None = None

    def __deepcopy__(self, memo: Any) -> SequenceGroup:
        return self

    def __reduce__(self) -> Any:  # another process is in no group
        return type(None), ()

    def exchange(self, x: Tensor) -> Tensor:
        """`[P, ...]`: part p goes to rank p of the group; part p of the result comes from it. Differentiable."""
        return _AllToAll.apply(x, self._process_group)

    def gather(self, x: Tensor) -> Tensor:
        """The parts of all ranks, one after the other along the first dimension; without a gradient."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        distributed.all_gather(parts, x.detach().contiguous(), group=self._process_group)
        return torch.cat(parts)

    def sum(self, x: Tensor) -> Tensor:
        """Summed over the ranks of the group; without a gradient."""
        total = x.detach().clone()
        distributed.all_reduce(total, group=self._process_group)
        return total

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From `[T / P, heads, K]`, this rank's tokens, to `[T, heads / P, K]`, its heads. One exchange for all three.

        Fewer key heads than ranks, or a number that P does not divide: each is sent to every rank that reads it.

        Raises:
            ValueError: P does not divide the number of query heads.
        """
        P, H, G = self.size, q.shape[1], k.shape[1]
        if H % P:
            raise ValueError(f"sequence_parallel_size={P} must divide the {H} attention heads of the model")
        copies = math.lcm(P, G) // G
        if copies > 1:
            k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        by_rank = [x.reshape(x.shape[0], P, -1) for x in (q, k, v)]  # [T / P, P, heads / P * K]
        exchanged = self.exchange(torch.cat(by_rank, dim=2).transpose(0, 1)).flatten(0, 1)
        parts = exchanged.split([x.shape[2] for x in by_rank], dim=1)
        q, k, v = (part.unflatten(1, (-1, x.shape[2])) for part, x in zip(parts, (q, k, v), strict=True))
        return q, k, v

    def to_tokens(self, out_ThK: Tensor) -> Tensor:
        """From `[T, H / P, K]`, this rank's heads, to `[T / P, H, K]`, its tokens."""
        return self.exchange(out_ThK.unflatten(0, (self.size, -1))).transpose(0, 1).flatten(1, 2)

    def own_heads(self, per_head: Tensor | None) -> Tensor | None:
        """Of `[H]`, one value per query head, this rank's `[H / P]`."""
        return None if per_head is None else per_head.chunk(self.size)[self.rank]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, process_group: Any) -> Tensor:
        ctx.process_group = process_group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        distributed.all_to_all_single(out, x.contiguous(), group=process_group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.process_group), None


class _Gather(torch.autograd.Function):
    """Every rank computes the same from the whole, and takes its own gradient P times: a mean over ranks is right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return group.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.size * grad[part_of(grad.shape[0], *ctx.group.part)], None


@functools.cache
def _process_group(size: int, world: Any) -> Any:
    return distributed.new_subgroups(size)[0]


def set_group(model: nn.Module, group: SequenceGroup | None) -> None:
    """Let packed rows of this model be shared by the ranks of `group`.

    Each module stores it, because the attention function sees only its layer.
    """
    for module in model.modules():
        module.packsft_sequence = group  # type: ignore[assignment]


def group_of(module: nn.Module) -> SequenceGroup | None:
    return getattr(module, "packsft_sequence", None)


@contextmanager
def shared_by(model: nn.Module, group: SequenceGroup | None) -> Iterator[None]:
    """Within the context, rows are shared by the ranks of `group`; with None, every rank runs whole rows."""
    own = group_of(model)
    set_group(model, group)
    try:
        yield
    finally:
        set_group(model, own)


def gather_router_logits(backbone: nn.Module) -> None:
    """Let the router's loss see the tokens of the whole row, without its padding, as it does on one rank."""

    def gather(module: nn.Module, args: Any, output: Any) -> None:
        group, logits = group_of(module), getattr(output, "router_logits", None)
        if group is not None and group.num_tokens is not None and logits is not None:
            whole = (_Gather.apply(of_layer, group) for of_layer in logits)  # of each layer [T / P, experts]
            # a row of padding alone has a loss too, which does not count
            output.router_logits = tuple(of_layer[: group.num_tokens or None] for of_layer in whole)

    if not hasattr(backbone, "packsft_router_logits"):
        backbone.packsft_router_logits = backbone.register_forward_hook(gather)  # type: ignore[assignment]
