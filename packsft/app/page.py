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

SHOWN_PACKS = 60
SHOWN_CHARACTERS, SHOWN_PARTS = 400, 16  # of each part of a document, and of its parts
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
    parts_left_out: int


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


def html_page(inspection: Inspection, decode: Decode | None, command: str) -> str:
    """The page.

    Args:
        decode: token ids to their text; None shows the ids.
        command: the one that made it.
    """
    import jinja2

    plan, max_length = inspection.plan, inspection.report.max_length
    charts = [
        drawing.as_svg(drawing.draw_lengths, inspection.lengths, max_length),
        drawing.as_svg(drawing.draw_unused, plan) if len(plan) else "",
        drawing.as_svg(drawing.draw_max_lengths, inspection.max_lengths, max_length),
    ]
    # what comes from the data is escaped
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.from_string(source).render(
        data=inspection.data,
        tables=inspection.tables(),
        recommendation=inspection.recommendation,
        charts=charts,
        packs=[_row(inspection, pack, decode) for pack in drawing.shown_packs(plan, SHOWN_PACKS)],
        count=len(plan),
        kind=drawing.kind_of(plan),
        with_pictures=inspection.picture_tokens is not None,
        with_texts=decode is not None,
        command=command,
        version=__version__,
    )


def _row(inspection: Inspection, pack: int, decode: Decode | None) -> Row:
    plan = inspection.plan
    segments, tokens = plan.segments(pack), int(plan.seq_lengths(pack).sum())
    colours = itertools.cycle(drawing.hex_colours())
    blocks = [
        _block(inspection, colour, decode, *segment)
        for colour, segment in zip(colours, segments.tolist(), strict=False)
    ]
    documents = f"{len(blocks)} document{'s' * (len(blocks) != 1)}"
    return Row(f"{pack:,}: {documents}, {tokens:,} of {plan.max_length:,} tokens", blocks)


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
            text = " ".join(map(str, part)) if decode is None else decode(part)
        parts.append(Part(bool(scored[first]), _shortened(text)))
    cut = "" if stop - start == length else f", tokens {start:,} to {stop:,} of {length:,}"
    return Block(
        width=100 * len(ids) / inspection.plan.max_length,
        pictures=100 * float(pictures.mean()),
        colour=colour,
        title=f"{inspection.name_of(example)}: {stop - start:,} tokens{cut}, {int(scored.sum()):,} scored",
        parts=parts,
        parts_left_out=max(0, len(bounds) - SHOWN_PARTS),
    )


def _closed(pictures: np.ndarray) -> np.ndarray:
    """`[T]` bool, with the few tokens between parts of a picture."""
    closed, places = pictures.copy(), np.flatnonzero(pictures)
    for first, last in itertools.pairwise(places.tolist()):
        closed[first:last] = last - first <= BETWEEN_PARTS + 1 or closed[first:last]
    return closed


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} […] {text[-half:]}"
