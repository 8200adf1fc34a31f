"""One self-contained HTML page about a plan: tables, charts, and packs block by block with their texts.

Draws what `inspect.py` found. The page needs no network and no JavaScript.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from packsft_kernels.version import __version__

from packsft.app import drawing
from packsft.app.inspect import Inspection
from packsft.data.document import IGNORE_INDEX
from packsft.data.pictures import PictureRows
from packsft.packing.report import SIMULATED_STEPS

SHOWN_PACKS = 60
SHOWN_CHARACTERS, SHOWN_PARTS = 400, 16  # of each part of a document, and of its parts
SHOWN_BLOCKS = 100  # of each pack
BETWEEN_PARTS = 4  # tokens; a picture may be cut into parts, with marks between them

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens of a document that are scored, or are not."""

    scored: bool
    text: str


@dataclass(frozen=True)
class Block:
    """A document in a pack. `width` is in percent of the pack, `pictures` in percent of the block."""

    width: float
    pictures: float
    colour: str
    title: str
    parts: list[Part]
    parts_left_out: int = 0


@dataclass(frozen=True)
class Row:
    """A pack."""

    title: str
    blocks: list[Block]


def check_page(what: str) -> None:
    """Raises ValueError with the install command if a package is missing."""
    drawing.check_matplotlib(what)
    if importlib.util.find_spec("jinja2") is None:
        raise ValueError(f'{what} needs the package jinja2: pip install "packsft[demo]"')


def html_page(inspection: Inspection, decode: Decode | None, command: str) -> bytes:
    """The page, in UTF-8.

    Args:
        decode: token ids to their text; None shows the ids.
        command: the one that made it.
    """
    import jinja2

    plan, max_length = inspection.plan, inspection.report.max_length
    colours = drawing.hex_colours()
    charts = [
        drawing.as_svg(drawing.draw_lengths, inspection.lengths, max_length),
        drawing.as_svg(drawing.draw_unused, plan),
        drawing.as_svg(drawing.draw_max_lengths, inspection.max_lengths, max_length),
    ]
    # what comes from the data is escaped
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    text = template.from_string(source).render(
        data=inspection.data,
        tables=inspection.tables(),
        recommendation=inspection.recommendation,
        charts=charts,
        packs=[_row(inspection, pack, decode, colours) for pack in drawing.shown_packs(plan, SHOWN_PACKS)],
        count=len(plan),
        kind=drawing.kind_of(plan),
        most_steps=SIMULATED_STEPS,
        with_pictures=inspection.picture_tokens is not None,
        with_texts=decode is not None,
        command=command,
        version=__version__,
    )
    return text.encode(errors="backslashreplace")  # a path may hold bytes that are no text


def _row(inspection: Inspection, pack: int, decode: Decode | None, colours: Sequence[str]) -> Row:
    plan = inspection.plan
    segments, lengths = plan.segments(pack), plan.seq_lengths(pack)
    blocks = [
        _block(inspection, colour, decode, *segment)
        for colour, segment in zip(itertools.cycle(colours), segments[:SHOWN_BLOCKS].tolist(), strict=False)
    ]
    if left_out := len(segments) - len(blocks):
        width = 100 * int(lengths[SHOWN_BLOCKS:].sum()) / plan.max_length
        blocks.append(Block(width, 0.0, "#888888", f"{left_out:,} more documents", []))
    documents = f"{len(segments):,} document{'s' * (len(segments) != 1)}"
    return Row(f"{pack:,}: {documents}, {int(lengths.sum()):,} of {plan.max_length:,} tokens", blocks)


def _block(inspection: Inspection, colour: str, decode: Decode | None, example: int, start: int, stop: int) -> Block:
    rows, length = inspection.rows, int(inspection.lengths[example])
    ids, labels = rows.tokens(example, start, stop)
    scored = labels != IGNORE_INDEX
    scored[:1] = False  # nothing predicts the first token
    pictures = _closed(ids == rows.picture_token) if isinstance(rows, PictureRows) else np.zeros(len(ids), bool)
    cuts = np.flatnonzero(np.diff(scored) | np.diff(pictures)) + 1
    bounds = list(itertools.pairwise([0, *cuts.tolist(), len(ids)]))
    parts = []
    for first, last in bounds[:SHOWN_PARTS]:
        part = ids[first:last].tolist()
        if pictures[first]:
            text = f"[{len(part):,} tokens of pictures]"
        else:
            text = _text(part, ids[max(0, first - 1) : first].tolist(), decode)
        parts.append(Part(bool(scored[first]), text))
    cut = "" if stop - start == length else f" of {length:,} (from token {start:,})"
    return Block(
        width=100 * len(ids) / inspection.plan.max_length,
        pictures=100 * float(pictures.mean()),
        colour=colour,
        title=f"{inspection.name_of(example)}: {stop - start:,}{cut} tokens, {int(scored.sum()):,} scored",
        parts=parts,
        parts_left_out=max(0, len(bounds) - SHOWN_PARTS),
    )


def _closed(pictures: np.ndarray) -> np.ndarray:
    """`[T]` bool, with the few tokens between parts of a picture, or between two pictures."""
    closed, places = pictures.copy(), np.flatnonzero(pictures)
    for first, last in itertools.pairwise(places.tolist()):
        if last - first <= BETWEEN_PARTS + 1:
            closed[first:last] = True
    return closed


def _text(ids: Sequence[int], before: Sequence[int], decode: Decode | None) -> str:
    """The text of some tokens behind the token `before`, whose beginning and end are shown if it is long."""
    half = SHOWN_CHARACTERS // 2
    if long := len(ids) > 4 * half:  # most tokens have more than a character
        ids, end = ids[: 2 * half], ids[-2 * half :]
    if decode is None:
        texts = [" ".join(map(str, part)) for part in ([ids, end] if long else [ids])]
    else:
        texts = [_behind(before, ids, decode), *([decode(end)] if long else [])]
    if not long and len(texts[0]) <= SHOWN_CHARACTERS:
        return texts[0]
    return f"{texts[0][:half]} […] {texts[-1][-half:]}"


def _behind(before: Sequence[int], ids: Sequence[int], decode: Decode) -> str:
    """The text of `ids` behind others: some tokenizers leave out the space before the first token they are given."""
    both, first = decode([*before, *ids]), decode(before)
    return both.removeprefix(first) if both.startswith(first) else decode(ids)  # `before` ends within a character


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_bytes(content)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
