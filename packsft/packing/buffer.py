"""From lengths that come one by one to packs, through a buffer of bounded size: packing where no plan can be made.

Knows lengths and keys, not tokens, tensors or where the lengths come from. The same lengths give the same packs, and
what comes next depends on what the buffer holds and on nothing else: its state is its content.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from .segments import STRATEGIES


class Piece(NamedTuple):
    """The tokens `start:stop` of example `key`; one document of a pack."""

    key: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class PackingBuffer:
    """Takes examples with `push`, gives packs of at most `max_length` tokens with `pop`; `plan_packs`' strategies.

    - `"bfd"`: an example longer than `max_length` is truncated; `"bfd_split"`: it is split into pieces of `max_length`
      tokens and a rest. Pieces wait until they exceed `buffer_tokens`. The longest-waiting one then begins a pack, so
      that nothing waits for ever, and those of the others that fill its rest best complete it (a subset sum, long
      pieces preferred: short ones fit later as well). A piece of `max_length` tokens is a pack at once.
    - `"wrapped"`: the examples end to end, cut every `max_length` tokens; `"none"` and `"step"`: each one a pack,
      truncated. None of them waits for more than a pack.

    Once `pop` has given None, no more than `buffer_tokens` tokens are held; push one example at a time and pop until it
    does. A pack costs as many shifts of a `max_length`-bit integer as pieces wait.

    Args:
        max_length: tokens in a pack; None only with `"none"`, for no truncation.
        buffer_tokens: how many tokens may wait, at least `max_length`.
        strategy: as above.
    """

    def __init__(self, max_length: int | None, buffer_tokens: int, strategy: str = "bfd") -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r}: choose one of {', '.join(STRATEGIES)}")
        strategy = "none" if strategy == "step" else strategy
        if strategy != "none" or max_length is not None:
            if not isinstance(max_length, int) or max_length < 1:
                raise ValueError(f"max_length={max_length!r}: packing needs an integer of at least 1 token")
            if buffer_tokens < max_length:
                raise ValueError(f"buffer_tokens={buffer_tokens} is less than a pack of max_length={max_length} tokens")
        self.max_length = max_length
        self.buffer_tokens = buffer_tokens
        self.strategy = strategy
        self._complete: deque[list[Piece]] = deque()
        self._waiting: list[Piece] = []  # in the order of their arrival; "wrapped": the pack that is being filled
        self._waiting_tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens held, those of complete packs included."""
        return self._waiting_tokens + sum(piece.length for pack in self._complete for piece in pack)

    @property
    def keys(self) -> set[int]:
        """The examples of which something is held."""
        return {piece.key for pieces in (self._waiting, *self._complete) for piece in pieces}

    def push(self, key: int, length: int) -> None:
        """Add an example of `length` tokens, 0 included (which leaves no trace)."""
        start = 0
        limit = length if self.max_length is None else self.max_length
        while start < length:
            room = limit - self._waiting_tokens if self.strategy == "wrapped" else limit
            piece = Piece(key, start, min(start + room, length))
            start = piece.stop
            if self.strategy == "none" or piece.length == limit:
                self._complete.append([piece])
            else:
                self._waiting.append(piece)
                self._waiting_tokens += piece.length
                if self.strategy == "wrapped" and self._waiting_tokens == limit:
                    self._complete.append(self._waiting)
                    self._waiting, self._waiting_tokens = [], 0
            if self.strategy in ("bfd", "none"):
                return  # the rest is truncated

    def pop(self, *, at_end: bool = False) -> list[Piece] | None:
        """The next pack, its longest document first ("wrapped": in order), or None where it takes more examples.

        `at_end` says that there are none, and so gives what is left, pack by pack.
        """
        if self._complete:
            return self._complete.popleft()
        if not self._waiting or not (at_end or self._waiting_tokens > self.buffer_tokens):
            return None
        if self.strategy == "wrapped":
            pack, self._waiting = self._waiting, []
        else:
            pack = self._take_fitting(longest_first=at_end)
        self._waiting_tokens -= sum(piece.length for piece in pack)
        return pack

    def _take_fitting(self, longest_first: bool) -> list[Piece]:
        assert self.max_length is not None
        lengths = [piece.length for piece in self._waiting]
        first = lengths.index(max(lengths)) if longest_first else 0
        space = self.max_length - lengths[first]
        # by length, and of equal ones the longest-waiting last, which is the first to be taken below
        others = sorted((i for i in range(len(lengths)) if i != first and lengths[i] <= space),
                        key=lambda i: (lengths[i], -i))  # fmt: skip
        mask = (1 << (space + 1)) - 1
        reachable = [1]  # bit s of the n-th: some of the n shortest others are s tokens together
        for i in others:
            reachable.append(reachable[-1] | (reachable[-1] << lengths[i] & mask))
        left = reachable[-1].bit_length() - 1
        taken = {first}
        for n in range(len(others) - 1, -1, -1):
            rest = left - lengths[others[n]]
            if rest >= 0 and reachable[n] >> rest & 1:
                taken.add(others[n])
                left = rest
        pack = [self._waiting[i] for i in sorted(taken, key=lambda i: (-lengths[i], i))]
        self._waiting = [piece for i, piece in enumerate(self._waiting) if i not in taken]
        return pack

    def state_dict(self) -> dict[str, Any]:
        """What is held, as lists of [key, start, stop]."""
        return {
            "complete": [[list(piece) for piece in pack] for pack in self._complete],
            "waiting": [list(piece) for piece in self._waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what the buffer that gave this state held."""
        self._complete = deque([Piece(*piece) for piece in pack] for pack in state["complete"])
        self._waiting = [Piece(*piece) for piece in state["waiting"]]
        self._waiting_tokens = sum(piece.length for piece in self._waiting)
