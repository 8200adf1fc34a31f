"""Shows a run's figures as tables: on the screen, in Markdown, and in the README and docs/benchmarks.md.

The README and docs/benchmarks.md hold blocks between two comments, which name a run in `results/` and what of it is
shown; `write_docs` writes every block anew and leaves the text around them alone. Knows figures; knows nothing of how
they were measured, and needs no torch.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
DOCUMENTS = tuple(Path(__file__).parents[2] / name for name in ("README.md", "docs/benchmarks.md"))
BLOCK = re.compile(r"(<!-- (\w+) of ([\w-]+) -->\n)(?:.*?\n)??(<!-- end -->)", re.DOTALL)
COLUMNS = ("measured", "value", "spread", "achieved", "ratio", "target", "", "note")

PICKED = ("TRL padded", "TRL packed", "packsft", "bare matrix products")
PADDED, PACKED, EXACT = "TRL, padded, batch 8", "TRL, packing=True", "packsft, exact steps"
# What the README shows: in words, the suite, and the name of the figure for each of `PICKED`
HEADLINES: tuple[tuple[str, str, tuple[str | None, ...]], ...] = (
    ("`train()`, packs over the whole data set", "train", (PADDED, PACKED, "packsft", "bare GEMMs")),
    ("`train()`, the optimizer steps of padded batches", "train", (PADDED, None, EXACT, "bare GEMMs")),
    ("peak memory of `train()`", "train", (*(f"peak memory, {name}" for name in (PADDED, PACKED, "packsft")), None)),
    ("the LM head, forward and backward", "head",
     (None, "TRL ChunkedLogProbFunction", "packsft", "three bare GEMMs")),
    ("planning 200,000 examples", "packing",
     (None, "TRL, whole set, * lengths at 2,048", "packsft, 200,000 lengths at 2,048", None)),
)  # fmt: skip

Report = dict[str, Any]
Row = dict[str, Any]


def read(path: Path) -> Report:
    return json.loads(path.read_text(encoding="utf-8"))


def write(report: Report, path: Path) -> None:
    """Whole or not at all, whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def results_file(environment: Row) -> Path:
    """Where `--save` keeps a run: one a day and device, the last one."""
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    return RESULTS / f"{environment['date'][:10]}-{device}" / "results.json"


def broken(name: str, error: Exception) -> Row:
    return {"name": name, "note": f"FAILED: {type(error).__name__}: {error}".splitlines()[0]}


def print_all(screen: Any, report: Report) -> None:
    print_environment(screen, report["environment"])
    for name, suite in report["suites"].items():
        print_suite(screen, name, suite)


def print_environment(screen: Any, environment: Row) -> None:
    screen.print(environment_line(environment), highlight=False)
    if environment["load_average"][0] > environment["cores"] / 2:
        screen.print(f"Other work is running (load average {environment['load_average'][0]}): times are a rough guide.")


def environment_line(environment: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"{environment['device']}, {environment['cores']} cores, {environment['threads']} threads, "
        f"{environment.get('clocks', 'clocks unknown')}, {environment.get('dtype', 'bfloat16')}; {versions}; "
        f"{environment['date']}; `{environment['command']}`"
    )


def print_suite(screen: Any, name: str, suite: Row) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{name}: {suite.get('about', '')} ({suite['seconds']:.0f} s)", title_justify="left")
    shown = [cells(row) for row in suite["figures"]]
    used = [i for i, column in enumerate(COLUMNS) if i == 0 or any(row[i] for row in shown)]
    for i in used:
        table.add_column(COLUMNS[i], justify="right" if COLUMNS[i] in ("value", "spread") else "left", overflow="fold")
    for row in shown:
        table.add_row(*(escape(row[i]) for i in used))
    screen.print(table)


def cells(row: Row) -> list[str]:
    """The columns of a figure as text; anything a figure does not have is empty."""
    spread = row.get("spread")
    return [
        row["name"],
        quantity(row.get("value"), row.get("unit", "")),
        "" if spread is None else f"±{100 * spread:.0f}%",
        quantity(row.get("rate"), row.get("rate_unit", "")),
        ratio(row),
        row.get("target", ""),
        {True: "pass", False: "MISS", None: ""}[row.get("passed")],
        row.get("note", ""),
    ]


def ratio(row: Row) -> str:
    return "" if row.get("ratio") is None else f"{row['ratio']:.3g}x {row['ratio_of']}"


def quantity(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    whole = math.isfinite(value) and (abs(value) >= 1000 or value == int(value))
    number = f"{value:,.0f}" if whole else f"{value:.3g}"
    return f"{number} {unit}".strip()


def measured(row: Row) -> str:
    """What is compared with the target, in words."""
    return ratio(row) or quantity(row.get("value"), row.get("unit", ""))


def rows_of(report: Report) -> list[Row]:
    return [row for suite in report["suites"].values() for row in suite["figures"]]


def verdict(screen: Any, report: Report) -> int:
    """One line of summary and one for each miss; the exit code."""
    met, missed = judged(report)
    wrong = [row["name"] for row in missed if row.get("parity")]
    left_out = report.get("left_out", [])
    stopped = [name for name, suite in report["suites"].items() if suite.get("broken") and name not in left_out]
    screen.print(met, highlight=False)
    for row in missed:
        screen.print(f"MISS: {row['name']}: {measured(row)}, target {row['target']}", markup=False, highlight=False)
    if left_out:
        begun = [f"{name}{' from there on' if name in report['suites'] else ''}" for name in left_out]
        screen.print(f"Left out for want of time: {', '.join(begun)}")
    if stopped:
        screen.print(f"Could not run to the end: {', '.join(stopped)}")
    if wrong or "parity" in stopped:
        screen.print(f"Parity fails: {', '.join(wrong) or 'the suite could not run'}", markup=False)
        return 1
    return 2 if stopped else 0


def judged(report: Report) -> tuple[str, list[Row]]:
    """How many targets are met, in words, and the figures that miss theirs."""
    rows = [row for row in rows_of(report) if row.get("passed") is not None]
    missed = [row for row in rows if not row["passed"]]
    return f"{len(rows) - len(missed)} of {len(rows)} targets met.", missed


def markdown(report: Report, *, points: bool = True) -> str:
    """Every suite as a table of its figures, under the machine they were measured on.

    Args:
        points: also the points of lines over an axis that have no target; pictures show them better.
    """
    met, missed = judged(report)
    parts = [measured_on(report), met + (" Missed:" if missed else "")]
    if missed:
        parts.append("\n".join(f"- {row['name']}: {measured(row)}, target {row['target']}" for row in missed))
    for name, suite in report["suites"].items():
        rows = [row for row in suite["figures"] if points or row.get("x") is None or row["passed"] is not None]
        shown = [cells(row) for row in rows]
        used = [i for i, column in enumerate(COLUMNS) if i == 0 or any(row[i] for row in shown)]
        table = [[COLUMNS[i] for i in used], ["---"] * len(used), *([row[i] for i in used] for row in shown)]
        lines = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table)
        about = f": {suite['about']}" if "about" in suite else ""
        hidden = len(suite["figures"]) - len(rows)
        left_out = f"\n\nAnd {hidden} points of lines, in the file." if hidden else ""
        parts.append(f"### {name}{about}\n\n{lines}{left_out}")
    return "\n\n".join(parts) + "\n"


def headline(report: Report) -> str:
    """The table of the README: what a user would pick, each with the same figure, beside what the hardware gives."""
    lines = [f"| | {' | '.join(PICKED)} |", "|---" * (1 + len(PICKED)) + "|"]
    for what, suite, names in HEADLINES:
        rows = report["suites"].get(suite, {"figures": []})["figures"]
        found = [next((row for row in rows if is_called(row["name"], name)), {}) for name in names]
        shown = [quantity(row.get("value"), row.get("unit", "").replace("relative", "")) for row in found]
        if shown[PICKED.index("packsft")]:
            shown[PICKED.index("packsft")] = f"**{shown[PICKED.index('packsft')]}**"
            lines.append(f"| {what} | {' | '.join(shown)} |")
    environment = report["environment"]
    versions = ", ".join(f"{name} {environment['versions'].get(name)}" for name in ("torch", "transformers", "trl"))
    device = f"{environment['device']}, {environment['cores']} cores, {environment.get('dtype', 'bfloat16')}"
    said = f"Measured: {device}; {versions}; {environment['date'][:10]}; `{environment['command']}`."
    return "\n".join([*lines, "", *textwrap.wrap(said, 120, break_on_hyphens=False)])


def is_called(name: str, wanted: str | None) -> bool:
    """Whether a figure has that name, or one of which it is the end after the model's; `*` stands for a number."""
    return wanted is not None and bool(re.fullmatch(r"(.*: )?" + re.escape(wanted).replace(r"\*", r"[\d,]+"), name))


def measured_on(report: Report) -> str:
    return f"{'Quick run' if report['quick'] else 'Measured'}: {environment_line(report['environment'])}."


SHOWN = {"headline": headline, "figures": partial(markdown, points=False)}


def documented(text: str) -> str:
    """The text with every block of figures written anew from the run that it names.

    Raises:
        ValueError: a block names something else than a part of `SHOWN` of a run in `results/`.
    """

    def block(match: re.Match[str]) -> str:
        begin, part, run, end = match.groups()
        path = RESULTS / run / "results.json"
        if part not in SHOWN or not path.exists():
            raise ValueError(f"{begin.strip()}: has to be one of {', '.join(SHOWN)}, of a run in {RESULTS}")
        return f"{begin}{SHOWN[part](read(path)).strip()}\n{end}"

    return BLOCK.sub(block, text)


def write_docs() -> list[Path]:
    """Write the blocks of `DOCUMENTS` anew; the files that were changed."""
    changed = []
    for path in DOCUMENTS:
        old = path.read_text(encoding="utf-8")
        if (new := documented(old)) != old:
            path.write_text(new, encoding="utf-8")
            changed.append(path)
    return changed
