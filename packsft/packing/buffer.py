"""Packs lengths that come one by one, through a buffer of bounded size: for streams, where no plan can be made.

Knows lengths and keys, not tokens or where the lengths come from. The state of the buffer is its content: the same
content and the same further lengths give the same packs.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from .strategies import strategy_named


class Segment(NamedTuple):
    """The tokens `start:stop` of the length pushed as `key`; one document of a pack."""

    key: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class PackingBuffer:
    """Takes lengths with `push`, gives packs of at most `max_length` tokens with `pop`; segments of a key in order.

    - `"bfd"` and `"bfd_split"`: segments wait until they exceed `buffer_tokens`. Then the segment that has waited
      longest begins a pack, so nothing waits for ever. The waiting segments that fill the rest best complete it (a
      subset sum that prefers long segments: short ones still fit later). A segment of `max_length` tokens is a pack at
      once.
    - `"wrapped"`: lengths end to end, cut every `max_length` tokens.
    - `"none"` and `"step"`: each length is a pack.

    After `pop` has returned None, the buffer holds at most `buffer_tokens` tokens. So push one length at a time and pop
    until None. A pack costs one shift of a `max_length`-bit integer per waiting segment.

    Args:
        max_length: tokens in a pack; None only with "none".
        buffer_tokens: how many tokens may wait; at least `max_length`.
        strategy: a name in `STRATEGIES`.
    """

    def __init__(self, max_length: int | None, buffer_tokens: int, strategy: str = "bfd") -> None:
        self.strategy = strategy_named(strategy)
        if strategy != "none" or max_length is not None:
            if not isinstance(max_length, int) or max_length < 1:
                raise ValueError(f"max_length={max_length!r}: packing needs an integer of at least 1 token")
            if buffer_tokens < max_length:
                raise ValueError(f"buffer_tokens={buffer_tokens} is less than a pack of max_length={max_length} tokens")
        self.max_length = max_length
        self.buffer_tokens = buffer_tokens
        self._complete: deque[list[Segment]] = deque()
        self._waiting: list[Segment] = []  # in the order of arrival; under "wrapped" the pack that is being filled
        self._waiting_tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens held, complete packs included."""
        return self._waiting_tokens + sum(segment.length for pack in self._complete for segment in pack)

    def push(self, key: int, length: int) -> int:
        """Add a length, at most `max_length` unless the strategy is "wrapped". Returns the number of its segments."""
        limit = length if self.max_length is None else self.max_length
        assert length <= limit or self.strategy.end_to_end
        start = num_segments = 0
        while start < length:
            room = limit - self._waiting_tokens if self.strategy.end_to_end else limit
            segment = Segment(key, start, min(start + room, length))
            start = segment.stop
            num_segments += 1
            if segment.length == limit or not (self.strategy.end_to_end or self.strategy.repacks):
                self._complete.append([segment])
                continue
            self._waiting.append(segment)
            self._waiting_tokens += segment.length
            if self.strategy.end_to_end and self._waiting_tokens == limit:
                self._complete.append(self._waiting)
                self._waiting, self._waiting_tokens = [], 0
        return num_segments

    def pop(self, *, at_end: bool = False) -> list[Segment] | None:
        """The next pack, its longest document first ("wrapped": in order), or None if it needs more lengths.

        `at_end` means that no more lengths follow: the rest is given, pack by pack.
        """
        if self._complete:
            pack = self._complete.popleft()
        elif not self._waiting or not (at_end or self._waiting_tokens > self.buffer_tokens):
            return None
        else:
            if self.strategy.end_to_end:
                pack, self._waiting = self._waiting, []
            else:
                pack = self._take_fitting(longest_first=at_end)
            self._waiting_tokens -= sum(segment.length for segment in pack)
        return pack

    def _take_fitting(self, longest_first: bool) -> list[Segment]:
        assert self.max_length is not None
        lengths = [segment.length for segment in self._waiting]
        first = lengths.index(max(lengths)) if longest_first else 0
        space = self.max_length - lengths[first]
        # by length; among equals the longest waiting one comes last, and is taken first below
        others = sorted((i for i in range(len(lengths)) if i != first and lengths[i] <= space),
                        key=lambda i: (lengths[i], -i))  # fmt: skip
        mask = (1 << (space + 1)) - 1
        reachable = [1]  # bit s of entry n: some of the n shortest others add up to s tokens
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
        self._waiting = [segment for i, segment in enumerate(self._waiting) if i not in taken]
        return pack

    def state_dict(self) -> dict[str, Any]:
        """The content, as lists of [key, start, stop]."""
        return {
            "complete": [[list(segment) for segment in pack] for pack in self._complete],
            "waiting": [list(segment) for segment in self._waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the content saved by `state_dict`."""
        self._complete = deque([Segment(*segment) for segment in pack] for pack in state["complete"])
        self._waiting = [Segment(*segment) for segment in state["waiting"]]
        self._waiting_tokens = sum(segment.length for segment in self._waiting)
