"""Draws a run's figures: bars with their limit, lines over an axis, loss curves.

A figure names the picture it belongs to (`measure.figure`). Hatches, dashes and markers tell competitors apart in black
and white.
"""

from __future__ import annotations

import math
import re
from itertools import cycle
from pathlib import Path
from typing import Any

from harness.report import Report, Row, quantity, rows_of

HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = "osD^vPX*"
GREYS = ("0.15", "0.4", "0.55", "0.7")


def plot(report: Report, folder: Path) -> list[Path]:
    """One PNG for each picture that the figures name; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, list[Row]] = {}
    for row in rows_of(report):
        if row.get("chart") and row.get("value") is not None and math.isfinite(row["value"]):
            pictures.setdefault(row["chart"], []).append(row)
    environment = report["environment"]
    source = f"{environment['device']}, {environment.get('dtype', '')}, {environment['date'][:10]}"
    return [_draw(title, rows, source, folder) for title, rows in pictures.items()]


def _draw(title: str, rows: list[Row], source: str, folder: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    if any(row.get("curve") for row in rows):
        _curves(axes, rows)
    elif any(row.get("x") is not None for row in rows):
        _lines(axes, rows)
    else:
        _bars(axes, rows)
    axes.set_title(title, loc="left")
    figure.supxlabel(source, x=0.99, ha="right", fontsize=7)
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _bars(axes: Any, rows: list[Row]) -> None:
    """Horizontal bars in the order of the report; the limit is a line across them all."""
    bars = [row for row in rows if not row.get("limit")]
    for place, (row, hatch) in enumerate(zip(bars, cycle(HATCHES), strict=False)):
        reach = row["value"] * (1 + (row.get("spread") or 0))
        axes.barh(place, row["value"], color="0.85", edgecolor="black", hatch=hatch)
        axes.errorbar(row["value"], place, xerr=reach - row["value"], color="black", capsize=3)
        axes.annotate(
            quantity(row["value"], row["unit"]),
            (reach, place),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    for row in rows:
        if row.get("limit"):
            label = f"{_series(row)}: {quantity(row['value'], row['unit'])}"
            axes.axvline(row["value"], color="black", linestyle="--", label=label)
            axes.legend(fontsize=8, loc="lower right")
    axes.set_yticks(range(len(bars)), [_series(row) for row in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(bars[0]["unit"] if bars else "")
    axes.set_xlim(0, 1.18 * max(row["value"] * (1 + (row.get("spread") or 0)) for row in rows))


def _lines(axes: Any, rows: list[Row]) -> None:
    """Both axes in powers of two, where a cost that is linear is a straight line of slope 1."""
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(_series(row), []).append(row)
    looks = zip(series.items(), cycle(MARKERS), cycle(DASHES), cycle(GREYS), strict=False)
    for (name, points), marker, dash, grey in looks:
        points.sort(key=lambda row: row["x"])
        values = [row["value"] for row in points]
        limit = {"linestyle": "--", "color": "black", "linewidth": 2.5} if points[0].get("limit") else {}
        style = {"linestyle": dash, "color": grey, "marker": marker, "markersize": 5} | limit
        axes.plot([row["x"] for row in points], values, label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["x"] for row in rows}))
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value == int(value) else f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_xlabel(rows[0].get("x_name", ""))
    axes.set_ylabel(rows[0]["unit"])
    axes.legend(fontsize=8, frameon=False)


def _curves(axes: Any, rows: list[Row]) -> None:
    for row, marker, dash, grey in zip(rows, cycle(MARKERS), cycle(DASHES), cycle(GREYS), strict=False):
        if row.get("curve"):
            xs, ys = zip(*row["curve"], strict=True)
            axes.plot(xs, ys, label=_series(row), linestyle=dash, color=grey, marker=marker, markersize=3)
    axes.set_xlabel(rows[0].get("x_name", ""))
    axes.set_ylabel("loss")
    axes.legend(fontsize=8, frameon=False)


def _series(row: Row) -> str:
    return row.get("series") or row["name"]
