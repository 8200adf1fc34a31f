"""Plans packs: which segment lies in which pack.

A plan is a few flat integer arrays, some bytes per example; it never holds or copies a token. The same lengths,
`max_length`, strategy and seed give the same plan in every process, and its `fingerprint` proves it. This file knows
lengths only. Examples are cut in `segments.py`.

Best fit decreasing puts the longest remaining segment into the fullest pack that still has room. It runs over
histograms (of lengths, and of the space left in packs), so its cost follows the number of distinct lengths and not the
number of examples. Sources: Krell et al., arXiv 2107.02027 (packing by histogram); Ding et al., arXiv 2404.10830
(best fit decreasing for training sequences).
"""

from __future__ import annotations

import hashlib
import io
import math
import operator
import os
import zipfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .account import Account
from .segments import IntArray, Segments, cut_examples, ranges, smallest
from .strategies import STRATEGIES, strategy_named

_ARRAYS = ("offsets", "examples", "starts", "stops")
_TEXTS = ("fingerprint", "strategy")
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class PackPlan:
    """P packs of S segments, as flat arrays. Pack `i` holds the segments `offsets[i]:offsets[i + 1]`, in this order.

    Segment `j` is the tokens `starts[j]:stops[j]` of example `examples[j]`; it becomes one document of the pack. The
    arrays are read-only and stored in the smallest unsigned dtype that holds them. The methods return int64, in which
    differences cannot wrap around. Compare plans by `fingerprint`.

    - `offsets` `[P + 1]`, `examples` `[S]`, `starts` `[S]`, `stops` `[S]`
    - `max_length`: the most tokens in a pack; `strategy`: a name in `STRATEGIES`
    - `account`: what went in, and what was lost and why
    """

    offsets: IntArray
    examples: IntArray
    starts: IntArray
    stops: IntArray
    max_length: int
    strategy: str
    account: Account

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            array = smallest(getattr(self, name))
            array.setflags(write=False)  # else the fingerprint could become wrong
            object.__setattr__(self, name, array)
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.examples) == len(self.starts) == len(self.stops)

    def __len__(self) -> int:
        """The number of packs."""
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        """The example indices of a pack, `[D]` int64, in the order of its documents."""
        return self.examples[self._slice(pack)].astype(np.int64)

    def segments(self, pack: int) -> NDArray[np.int64]:
        """A pack's segments, `[D, 3]` int64: one row (example, start, stop) per document."""
        where = self._slice(pack)
        return np.stack([a[where].astype(np.int64) for a in (self.examples, self.starts, self.stops)], axis=1)

    def seq_lengths(self, pack: int) -> NDArray[np.int64]:
        """The lengths of a pack's documents in tokens, `[D]` int64."""
        where = self._slice(pack)
        return self.stops[where].astype(np.int64) - self.starts[where].astype(np.int64)

    def _slice(self, pack: int) -> slice:
        index = operator.index(pack)
        if not -len(self) <= index < len(self):
            raise IndexError(f"pack {index} of a plan with {len(self)} packs")
        index %= len(self)
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """The lengths of all segments, `[S]` int64, pack by pack."""
        return self.stops.astype(np.int64) - self.starts.astype(np.int64)

    def per_pack(self, values: NDArray[Any]) -> NDArray[Any]:
        """The sum over each pack's segments, `[P]`, of values `[S]`."""
        return np.add.reduceat(values, self.offsets[:-1]) if len(self) else values[:0]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in all packs."""
        return int(self.stops.sum(dtype=np.int64) - self.starts.sum(dtype=np.int64))

    @property
    def lower_bound(self) -> int:
        """`ceil(num_tokens / max_length)`: no plan of these tokens has fewer packs."""
        return -(-self.num_tokens // self.max_length)

    @property
    def fill(self) -> float:
        """`num_tokens / (packs * max_length)`, between 0 and 1; 0 for a plan without packs."""
        return self.num_tokens / (len(self) * self.max_length) if len(self) else 0.0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the arrays, `max_length` and `strategy`; the same in every process."""
        digest = hashlib.sha256(f"packsft plan 1 {self.strategy} {self.max_length}".encode())
        for name in _ARRAYS:
            array = getattr(self, name)
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(f" {name} {array.dtype.str} {len(array)} ".encode())
            digest.update(array.data)
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to exactly `path`, as npz without pickle."""
        content = {name: getattr(self, name) for name in (*_ARRAYS, "max_length", "strategy")}
        with open(path, "wb") as file:  # numpy would append .npz to a name
            np.savez(file, fingerprint=self.fingerprint, **content, **asdict(self.account))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PackPlan:
        """Read what `save` wrote. The file may come from anybody: memory follows its size, whatever it says inside.

        Raises:
            ValueError: it is not a plan, or it is damaged.
            OSError: there is no such file.
        """
        counts = [field.name for field in fields(Account)]
        with open(path, "rb") as file:
            try:
                content = _read_members(file, ("fingerprint", *_ARRAYS, "max_length", "strategy", *counts))
                fingerprint = content.pop("fingerprint")
                account = Account(**{name: content.pop(name) for name in counts})
                _check_plan(**content, account=account)
            except Exception as error:  # a damaged archive may raise anything
                raise ValueError(f"{os.fspath(path)} is not a packing plan: {error}") from error
        plan = cls(**content, account=account)
        if plan.fingerprint != fingerprint:
            raise ValueError(
                f"{os.fspath(path)} is damaged: its plan has fingerprint {plan.fingerprint}, not {fingerprint}"
            )
        return plan


def _read_members(file: BinaryIO, names: Sequence[str]) -> dict[str, Any]:
    """The arrays, numbers and texts of an npz file as `PackPlan.save` writes it: not packed, without pickle.

    Not `np.load`, which makes an array as large as a header says.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError("it is no npz file")
    size = file.seek(0, os.SEEK_END)
    content: dict[str, Any] = {}
    with zipfile.ZipFile(file) as archive:
        infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if missing := [name for name in names if name not in infos]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        if sum(max(infos[name].file_size, infos[name].compress_size) for name in names) > size:
            raise ValueError("it says that it holds more bytes than it has")
        for name in names:
            if infos[name].compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            member = io.BytesIO(archive.read(infos[name]))
            if np.lib.format.read_magic(member) != (1, 0):
                raise ValueError(f"{name} is no npy file of version 1.0")
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            kind, expected = ("u", 1) if name in _ARRAYS else ("U" if name in _TEXTS else "i", 0)
            if (dtype.kind, len(shape)) != (kind, expected):
                raise ValueError(f"{name} has dtype {dtype} and shape {shape}")
            if math.prod(shape) * dtype.itemsize != len(member.getbuffer()) - member.tell():
                raise ValueError(f"{name} says that it has shape {shape}, but its bytes are more or fewer")
            member.seek(0)
            array = np.lib.format.read_array(member, allow_pickle=False)
            content[name] = array if name in _ARRAYS else array.item()
    return content


def _check_plan(
    *,
    offsets: IntArray,
    examples: IntArray,
    starts: IntArray,
    stops: IntArray,
    max_length: int,
    strategy: str,
    account: Account,
) -> None:
    """Raises ValueError unless this can be a plan."""
    strategy_named(strategy)
    if max_length < 1:
        raise ValueError(f"max_length={max_length}: must be at least 1")
    for name, count in asdict(account).items():
        if count < 0:
            raise ValueError(f"{name}={count}: must be at least 0")
    if not len(examples) == len(starts) == len(stops):
        raise ValueError(f"it has {len(examples)} examples, {len(starts)} starts and {len(stops)} stops")
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(examples) or (offsets[1:] <= offsets[:-1]).any():
        raise ValueError(f"offsets must rise from 0 to {len(examples)}, the number of segments, with no empty pack")
    if (examples >= account.examples_in).any():
        raise ValueError(f"it packs example {examples.max()} of {account.examples_in}")
    wrong = np.flatnonzero((stops <= starts) | (stops > account.tokens_in))
    if len(wrong):
        raise ValueError(
            f"segment {wrong[0]} is the tokens {starts[wrong[0]]} to {stops[wrong[0]]}: it must have at least 1 token, "
            f"among the {account.tokens_in} of the data set"
        )
    tokens = np.diff(np.append(0, np.cumsum(stops - starts, dtype=np.int64))[offsets])
    if (tokens > max_length).any():
        raise ValueError(f"pack {tokens.argmax()} has {tokens.max()} tokens, more than max_length={max_length}")


def plan_packs(
    lengths: Sequence[int] | IntArray,
    max_length: int,
    *,
    strategy: str = "bfd",
    overlong: str | None = None,
    seed: int | None = None,
) -> PackPlan:
    """Plan packs of at most `max_length` tokens for examples of the given lengths (`[examples]` integers, in tokens).

    Strategies:
    - `"bfd"`: best fit decreasing
    - `"bfd_split"`: the same, with `overlong="split"`
    - `"wrapped"`: examples end to end in order, cut every `max_length` tokens; each segment is a document
    - `"none"`: no packing, one example (or one segment of a split example) per pack
    - `"step"`: the same; `steps.py` packs the examples of an optimizer step once they are known

    `overlong` says what happens to an example longer than `max_length`: `"truncate"` (the default), `"split"` into
    segments of `max_length` tokens and a rest, `"drop"`, or `"error"`. Examples of length 0 are not packed. Everything
    that is lost is counted in the plan's `account`.

    The two best-fit strategies make at most as many packs as one-by-one best fit decreasing over the whole set. Where
    that is more than 0.1% above the lower bound, exact fill is tried and the better plan kept. Packs come in the order
    in which they were opened, the pack with the longest document first. Documents of a pack come in decreasing length,
    equal lengths in the order of their index.

    With a `seed`, packs come in random order, and the best-fit strategies mix lengths within packs: most packs begin
    with examples drawn at random and are then filled by best fit, which costs at most 0.3 points of fill (tokens over
    packs times `max_length`). Where this is impossible (sizes near a fraction of `max_length`, very few packs), only
    examples of equal length change places. A new seed for each epoch lets other examples meet.

    Raises ValueError that names the row or the argument, as `cut_examples` and `pack_segments` do.
    """
    return pack_segments(cut_examples(lengths, max_length, strategy=strategy, overlong=overlong), seed=seed)[0]


def pack_segments(
    segments: Segments, *, seed: int | None = None, num_packs: int | None = None
) -> tuple[PackPlan, NDArray[np.int64]]:
    """Plan packs of segments. Returns the plan, and `[S]`: which segment each segment of the plan is.

    With `num_packs`, the plan has exactly this many packs: the packs with the most documents are split in two. This
    keeps plans of other seeds as long as the first one.

    Raises ValueError for a seed that is not an integer of at least 0, or an impossible `num_packs`.
    """
    if seed is not None and (not isinstance(seed, (int, np.integer)) or seed < 0):
        raise ValueError(f"seed={seed!r}: give None or an integer of at least 0")
    rng = None if seed is None else np.random.default_rng(seed)
    if segments.packs is not None:  # "wrapped"
        begins = np.flatnonzero(np.diff(segments.packs.astype(np.int64), prepend=-1))
        offsets, order = np.append(begins, len(segments)), np.arange(len(segments))
    elif STRATEGIES[segments.strategy].repacks:
        offsets, order = _pack(segments.stops - segments.starts, segments.max_length, rng, num_packs)
    else:
        offsets, order = np.arange(len(segments) + 1), np.arange(len(segments))
    if num_packs is not None:
        offsets = _split_packs(offsets, num_packs)
    if rng is not None:
        shuffled = rng.permutation(len(offsets) - 1)
        counts = np.diff(offsets)[shuffled]
        order = order[ranges(offsets[shuffled], counts)]
        offsets = np.concatenate(([0], np.cumsum(counts)))
    plan = PackPlan(
        offsets=offsets,
        examples=segments.examples[order],
        starts=segments.starts[order],
        stops=segments.stops[order],
        max_length=segments.max_length,
        strategy=segments.strategy,
        account=segments.account,
    )
    return plan, order


def _split_packs(offsets: NDArray[np.int64], num_packs: int) -> NDArray[np.int64]:
    counts = np.diff(offsets)
    num_missing = num_packs - len(counts)
    largest = np.argsort(-counts, kind="stable")[: max(num_missing, 0)]
    if num_missing < 0 or len(largest) < num_missing or (counts[largest] < 2).any():
        raise ValueError(f"num_packs={num_packs}: the plan has {len(counts)} packs and cannot have this many")
    return np.sort(np.concatenate((offsets, offsets[largest] + counts[largest] // 2)))


def _pack(
    sizes: IntArray, max_length: int, rng: np.random.Generator | None, most_packs: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack segments of the given sizes (1 to `max_length`). Returns pack offsets `[P + 1]` and segments in order `[S]`.

    Uses best fit decreasing, or exact fill where it needs fewer packs. Exact fill is tried only where best fit is more
    than 0.1% above the lower bound, so the usual case pays nothing for it. With `rng`, mixes lengths if that costs
    little, or needs no more than `most_packs`.
    """
    if not len(sizes):
        return np.zeros(1, np.int64), np.zeros(0, np.int64)
    descending = smallest(sizes.max() - sizes)  # 16 bits or fewer, if they hold it: numpy then sorts by radix
    order = np.argsort(descending, kind="stable")
    in_order = descending[order]
    firsts = np.concatenate(([0], np.flatnonzero(in_order[1:] != in_order[:-1]) + 1))
    counts = np.diff(firsts, append=len(sizes))
    distinct = sizes[order[firsts]]
    if rng is not None:
        for equal in np.split(order, firsts[1:]):
            rng.shuffle(equal)  # a view: shuffles `order`, where the index says nothing but a tie

    offsets, dealt = best_fit_decreasing(distinct, counts, max_length)
    num_packs, lower_bound = len(offsets) - 1, -(-int(sizes.sum(dtype=np.int64)) // max_length)
    if num_packs - lower_bound > lower_bound // 1000:
        patterns = _exact_fill(distinct, counts, max_length)
        if sum(times for _, times in patterns) < num_packs:
            offsets, dealt = _deal(patterns, firsts)
            num_packs = len(offsets) - 1
    if rng is not None:
        if most_packs is None:
            tokens_per_pack = int(sizes.sum(dtype=np.int64)) / num_packs
            most_packs = int(num_packs * tokens_per_pack / max(tokens_per_pack - 0.003 * max_length, 1e-9))
        if mixed := _mixed(sizes, order, firsts, max_length, most_packs, lower_bound, rng):
            return mixed
    return offsets, order[dealt]


def _mixed(
    sizes: IntArray,
    order: IntArray,
    firsts: IntArray,
    max_length: int,
    most_packs: int,
    lower_bound: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Begin packs at random and fill them by best fit decreasing; None if that takes more than `most_packs`.

    Segments in random order are cut into runs of about 0.8 `max_length`. Each run begins a pack; a segment that would
    not fit is left for the filling. More packs begun this way mix more lengths, but what fills the rest must be small
    enough, so the number begun is as high as `most_packs` allows. `order` holds the segments by decreasing size; each
    size starts at its place in `firsts`.
    """
    shuffled = rng.permutation(smallest(np.arange(len(sizes))))
    ends = np.cumsum(sizes[shuffled], dtype=np.int64)
    befores = ends - sizes[shuffled]
    runs = befores // -(-4 * max_length // 5)
    begins = np.flatnonzero(np.diff(runs, prepend=-1))
    packs = np.repeat(np.arange(len(begins), dtype=np.int32), np.diff(begins, append=len(runs)))
    fits = ends - befores[begins][packs] <= max_length
    del ends, befores  # 160 MB for 10 million segments
    for share in (1.0, 0.9, 0.7, 0.5):
        begun = fits & (runs < int(share * lower_bound))
        rest = np.ones(len(sizes), bool)
        rest[shuffled[begun]] = False
        in_order = rest[order]
        counts = np.add.reduceat(in_order, firsts, dtype=np.int64)
        some = counts > 0
        held = np.bincount(packs[begun])
        spaces = max_length - np.bincount(packs[begun], sizes[shuffled[begun]]).astype(np.int64)
        offsets, dealt = best_fit_decreasing(sizes[order[firsts[some]]], counts[some], max_length, spaces, held)
        if len(offsets) - 1 <= most_packs:
            return offsets, np.concatenate((shuffled[begun], order[in_order])).astype(np.int64)[dealt]
    return None


def best_fit_decreasing(
    distinct: IntArray,
    counts: IntArray,
    max_length: int,
    begun_spaces: IntArray = _NONE,
    begun_segments: IntArray = _NONE,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns pack offsets, and the segments of the packs as places in the order of decreasing size.

    Packs may already be begun: each holds `begun_segments`, which come first in the order, and has `begun_spaces` left.

    All segments of one size meet all packs with one remaining space at once. This equals one-by-one best fit: if a pack
    took one of several equal segments and has room for another, it is the fullest pack with room, so it takes the next
    one too, until it has `space // size` of them. So every batch below fills whole packs, except for the last segments
    of a size.
    """
    by_space = np.argsort(begun_spaces, kind="stable").astype(np.int32)
    levels, begins = np.unique(begun_spaces[by_space], return_index=True)
    chunks_of = zip(levels.tolist(), np.split(by_space, begins[1:]), strict=False)
    open_packs = {space: [packs] for space, packs in chunks_of if space}  # space: the packs that have it left
    spaces = list(open_packs)  # ascending
    num_packs = len(begun_spaces)
    batches = [np.arange(num_packs, dtype=np.int32)]  # the packs that took `takes` segments each, dealt in order
    takes: list[int] = []
    for size, left in zip(distinct.tolist(), counts.tolist(), strict=True):
        while left:
            at = bisect_left(spaces, size)
            space = spaces[at] if at < len(spaces) else max_length
            take = min(space // size, left)
            if at < len(spaces):
                chunks = open_packs[space]
                packs = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
                batch = packs[: left // take]
                if len(batch) < len(packs):
                    open_packs[space] = [packs[len(batch) :]]
                else:
                    del spaces[at], open_packs[space]
            else:
                batch = np.arange(num_packs, num_packs + left // take, dtype=np.int32)
                num_packs += len(batch)
            left -= take * len(batch)
            batches.append(batch)
            takes.append(take)
            space -= take * size
            if space in open_packs:
                open_packs[space].append(batch)
            elif space:
                open_packs[space] = [batch]
                spaces.insert(bisect_left(spaces, space), space)

    # Each entry of `packs` took the next `num_taken` segments; sorting the entries by pack gives the plan.
    packs = np.concatenate(batches)
    newly_taken = np.repeat(takes, [len(batch) for batch in batches[1:]])
    num_taken = np.concatenate((begun_segments, newly_taken)).astype(np.int64)
    entries = np.argsort(packs, kind="stable")
    dealt = ranges((np.cumsum(num_taken) - num_taken)[entries], num_taken[entries])
    last_entries = np.cumsum(np.bincount(packs)) - 1
    return np.concatenate(([0], np.cumsum(num_taken[entries])[last_entries])), dealt


def _exact_fill(distinct: IntArray, counts: IntArray, max_length: int) -> list[tuple[list[int], int]]:
    """Returns patterns (indices into `distinct`, longest first), and how many packs follow each. They use all segments.

    A pack of sizes near max_length / k has no small segment to fill its rest, so best fit decreasing leaves it open.
    Here each pack takes the longest remaining segment, more of the longest that fit, and then the two segments that
    fill the rest best. A pattern repeats until one of its sizes is used up, so there are at most as many patterns as
    distinct sizes.
    """
    sizes, left = distinct[::-1].astype(np.int64), counts[::-1].copy()  # ascending, as searchsorted wants it
    alive = np.arange(len(sizes))  # the sizes with segments left
    patterns = []
    while len(alive):
        sizes_left = sizes[alive]
        candidates: list[tuple[int, list[int]]] = []
        pattern: list[int] = []
        used: Counter[int] = Counter()
        space, at = max_length, len(alive) - 1
        while at >= 0:
            pattern.append(int(alive[at]))
            used[pattern[-1]] += 1
            space -= int(sizes_left[at])
            if space <= 2 * sizes_left[-1]:  # otherwise a pair cannot fill it
                pair, filled = _best_pair(sizes_left, space)
                candidates.append((space - filled, [*pattern, *alive[pair].tolist()]))
            at = min(at, int(np.searchsorted(sizes_left, space, side="right")) - 1)
            while at >= 0 and used[int(alive[at])] == left[alive[at]]:
                at -= 1
        candidates.append((space, pattern))
        for _, pattern in sorted(candidates, key=lambda candidate: candidate[0]):
            used = Counter(pattern)
            times = min(int(left[index]) // count for index, count in used.items())
            if times:  # the pair may ask for more than is left; the last candidate never does
                break
        patterns.append(([len(sizes) - 1 - index for index in sorted(pattern, reverse=True)], times))
        for index, count in used.items():
            left[index] -= times * count
        alive = alive[left[alive] > 0]
    return patterns


def _best_pair(sizes: NDArray[np.int64], space: int) -> tuple[list[int], int]:
    """The indices of the one or two ascending sizes that fill a space best, and how much of it they fill."""
    fitting = int(np.searchsorted(sizes, space, side="right"))
    first = np.unique(np.linspace(0, fitting - 1, min(fitting, 256)).astype(np.int64))  # probes: a bound on the cost
    if not fitting:
        return [], 0
    second = np.searchsorted(sizes, space - sizes[first], side="right") - 1
    filled = sizes[first] + np.where(second >= 0, sizes[second], 0)
    best = int(filled.argmax())
    pair = [int(first[best]), int(second[best])]
    return pair if pair[1] >= 0 else pair[:1], int(filled[best])


def _deal(patterns: list[tuple[list[int], int]], firsts: IntArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets and segments as in `best_fit_decreasing`; segments of a size are dealt from its first place on."""
    place = firsts.tolist()
    dealt = []
    for pattern, times in patterns:
        columns = []
        for index in pattern:
            columns.append(np.arange(place[index], place[index] + times))
            place[index] += times
        dealt.append(np.stack(columns, axis=1).ravel())
    counts = np.repeat([len(pattern) for pattern, _ in patterns], [times for _, times in patterns])
    return np.concatenate(([0], np.cumsum(counts))), np.concatenate(dealt)
