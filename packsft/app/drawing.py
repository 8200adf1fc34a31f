"""Pictures of a packing plan: the lengths and the cut, how full the packs are, and the content of some packs.

Knows lengths and matplotlib, not data sets, tokenizers or files.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from packsft.packing import STRATEGIES, MaxLength, PackPlan

DRAWN_PACKS = 24
# Of tab20, which alternates dark and light: neighbours differ in black and white too. Without grey, which is padding
COLOURS = (*range(14), *range(16, 20))


def check_matplotlib(what: str) -> None:
    """Raises ValueError with the install command if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f'{what} needs the package matplotlib: pip install "packsft[demo]"')


def block_colours() -> list[Any]:
    """Of documents next to each other."""
    from matplotlib import colormaps

    return [colormaps["tab20"](number) for number in COLOURS]


def hex_colours() -> list[str]:
    """The same for HTML."""
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in block_colours()]


def draw_packs(
    axes: Any, packs: Sequence[Sequence[int]], max_length: int, pictures: Sequence[Sequence[int]] | None = None
) -> None:
    """Draw one row per pack and one block per document (`packs`: lengths in tokens). Unused space is hatched.

    `pictures`: of the tokens of each document those of pictures: a black bar in its block.
    """
    colours = block_colours()
    for row, documents in enumerate(packs):
        axes.barh(row, max_length, color="white", edgecolor="grey", hatch="////", height=0.8, linewidth=0.4)
        starts = [0, *accumulate(documents)]
        axes.broken_barh(
            list(zip(starts, documents, strict=False)),
            (row - 0.4, 0.8),
            facecolors=[colours[number % len(colours)] for number in range(len(documents))],
            edgecolor="black",
            linewidth=0.4,
        )
        if pictures is not None:
            axes.broken_barh(list(zip(starts, pictures[row], strict=False)), (row, 0.3), facecolor="black")
    axes.set(xlabel="tokens", ylabel="pack", xlim=(0, max_length))
    axes.invert_yaxis()
    axes.yaxis.get_major_locator().set_params(integer=True)


def draw_lengths(axes: Any, lengths: np.ndarray, max_length: int) -> None:
    """The lengths of the examples (`[examples]`, in tokens), and what is cut at `max_length`."""
    positive = lengths[lengths > 0]
    edges = np.geomspace(int(positive.min()), max(int(positive.max()), max_length) + 1, 50).astype(int)
    edges = np.unique([*edges, max_length + 1])  # no bar crosses the cut
    for part, style in ((positive <= max_length, {"color": "steelblue"}), (positive > max_length, {"color": "white"})):
        axes.hist(positive[part], bins=edges, edgecolor="black", linewidth=0.4, **style)
    axes.axvline(max_length, color="black", linestyle="--")
    over = np.maximum(positive - max_length, 0)
    axes.set(xscale="log", xlabel="tokens in an example", ylabel="examples")
    axes.set_title(
        f"{len(positive):,} examples, {(over > 0).mean():.2%} (white) longer than {max_length:,}\n"
        f"{over.sum() / positive.sum():.2%} of the tokens are cut (right of the line)"
    )


def draw_unused(axes: Any, plan: PackPlan) -> None:
    """The unused part of the packs."""
    fill = np.quantile(plan.per_pack(plan.document_lengths) / plan.max_length, np.linspace(1, 0, 500))
    unused = 100 - 100 * fill  # of most plans the fill would be a full rectangle
    axes.fill_between(np.linspace(0, 100, 500), unused, color="steelblue")
    most = float(np.quantile(unused, 0.99))  # the last pack may be nearly empty
    axes.set(xlim=(0, 100), ylim=(0, max(1.0, 1.2 * most)))
    axes.set(xlabel=f"{kind_of(plan)}, fullest first (%)", ylabel="unused tokens (%)")
    axes.set_title(f"{len(plan):,} {kind_of(plan)}, {plan.fill:.2%} full")


def draw_max_lengths(axes: Any, compared: Sequence[MaxLength], max_length: int) -> None:
    """The tokens that each `max_length` loses; a line at the one that is used."""
    axes.plot([each.max_length for each in compared], [100 * each.share_lost for each in compared], "o-")
    axes.axvline(max_length, color="black", linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks([each.max_length for each in compared], [f"{each.max_length:,}" for each in compared], rotation=30)
    axes.minorticks_off()
    axes.set_ylim(0, max(1.0, 105 * max(each.share_lost for each in compared)))
    axes.set(xlabel="max_length", ylabel="tokens lost (%)", title="Tokens lost at each max_length")


def kind_of(plan: PackPlan) -> str:
    """What the packs of a plan are called."""
    return "passes" if STRATEGIES[plan.strategy].exact_steps else "packs"


def shown_packs(plan: PackPlan, count: int = DRAWN_PACKS) -> list[int]:
    """Packs from all of the plan."""
    return np.unique(np.linspace(0, len(plan) - 1, count).astype(int)).tolist()


def draw_plan(lengths: np.ndarray, max_length: int, plan: PackPlan, picture_tokens: np.ndarray | None = None) -> bytes:
    """A PNG with three panels: the lengths, the unused part of the packs, and some packs, with the tokens of pictures
    (`[examples]`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (cut, full, rows) = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    draw_lengths(cut, lengths, max_length)
    draw_unused(full, plan)
    shown = shown_packs(plan)
    pictures = None
    if picture_tokens is not None:
        pictures = [picture_tokens[plan.segments(pack)[:, 0]].tolist() for pack in shown]
    draw_packs(rows, [plan.seq_lengths(pack).tolist() for pack in shown], plan.max_length, pictures)
    rows.set_yticks(range(len(shown)), [f"{pack:,}" for pack in shown], fontsize=7)
    rows.set_ylabel(kind_of(plan))
    rows.set_title(
        f"{len(shown)} of the {kind_of(plan)}, one block per document\nhatched space is unused"
        + ("; black: pictures" if pictures else "")
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    return picture.getvalue()


def as_svg(draw: Callable[..., None], *arguments: Any) -> str:
    """One panel for an HTML page: `draw(axes, *arguments)`. Several may stand on one page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # texts stay texts; ids differ from panel to panel, and not from run to run
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": draw.__name__}):
        figure, axes = plt.subplots(figsize=(5.2, 3.9), layout="constrained")
        draw(axes, *arguments)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None}, transparent=True)
        plt.close(figure)
    text = picture.getvalue()
    return text[text.index("<svg") :]
