"""What an attention call asks of a back end (`AttentionSpec`): enough to decide whether a back end can run it."""

from dataclasses import dataclass

import torch

HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionSpec:
    """The properties of a call that decide whether a backend can run it. It holds no data.

    `head_dim` is the larger of the head sizes of q and k and of v; `equal_head_dims` says whether they are equal.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    equal_head_dims: bool = True
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dropout: float = 0.0

    @property
    def window_pair(self) -> tuple[int, int]:
        """(left, right) neighbours of a token, -1: all. A window of W has the token itself: W - 1 are on its left."""
        left = -1 if self.window is None else self.window - 1
        return left, 0 if self.causal else left
