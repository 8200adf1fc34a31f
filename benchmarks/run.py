"""`python benchmarks/run.py`: is it faster, smaller, and the same? Every figure is a ratio inside this one run.

Prints each suite as a table: what was measured, beside its limit or its competitor, the target, and whether it was
met; a miss is printed as a miss. The exit code is 1 if an assertion of parity fails, 2 if a suite could not run to
its end, and 0 otherwise, whatever the speed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Suite:
    """Where a suite lives. `takes_data`: it measures on real text and accepts `--data`."""

    module: str
    function: str
    about: str
    takes_data: bool = False

    def run(self, quick: bool, data: str | None) -> list[dict[str, Any]]:
        function = getattr(importlib.import_module(self.module), self.function)
        rows = function(quick, data) if self.takes_data else function(quick)
        return packing_figures(rows) if self.function == "bench_packing" else rows


SUITES = {
    "head": Suite("bench_linear_cross_entropy", "bench_head", "the language-model head against its GEMMs and peers"),
    "memory": Suite("bench_memory", "bench_memory", "peak memory of the head on a GPU, on fake tensors of any size"),
    "cross_entropy": Suite("bench_cross_entropy", "bench_cross_entropy", "loss and gradient of logits against a copy"),
    "attention": Suite("bench_varlen_attention", "bench_attention", "packed attention against masked and padded"),
    "packing": Suite("bench_packing", "bench_packing", "planning packs against TRL's pack_dataset"),
    "step": Suite("bench_training_step", "bench_step", "one training step against the model's bare GEMMs", True),
    "train": Suite("bench_training_step", "bench_train", "train(), tokens/s and memory, against TRL", True),
    "parity": Suite("bench_parity", "bench_parity", "packed training equals the documents alone"),
    "static": Suite("bench_static", "bench_static", "the kernel compiled for six GPU generations, without one"),
    "reads": Suite("bench_reads", "bench_reads", "reads of the device by the host in every micro-step"),
}
GROUPS = {"kernels": ("head", "cross_entropy", "attention")}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.list:
        for name, suite in SUITES.items():
            print(f"{name:<14} {suite.about}")
        for name, suites in GROUPS.items():
            print(f"{name:<14} {', '.join(suites)}")
        return 0
    if arguments.markdown:
        print(markdown(json.loads(arguments.markdown.read_text(encoding="utf-8"))))
        return 0
    return run(arguments, shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/run.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 training examples, one repeat: about 3 minutes")
    parser.add_argument(
        "--suite", nargs="+", action="extend", choices=[*SUITES, *GROUPS], metavar="NAME", help="default: all"
    )
    parser.add_argument("--list", action="store_true", help="list the suites and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results/<date>-<device>/")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print the table of such a file, and stop")
    parser.add_argument("--data", metavar="FILE.jsonl", help="train on prompt/completion or question/answer lines")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, command: str) -> int:
    """Run, print and write; the exit code."""
    quiet()
    from measure import environment
    from rich.console import Console

    # Wide enough for a table also where there is no terminal to ask
    console = Console(width=None if sys.stdout.isatty() else 160)
    report: dict[str, Any] = {"environment": environment(command), "quick": arguments.quick, "suites": {}}
    print_environment(console, report["environment"])
    broken = []
    for name in chain.from_iterable(GROUPS.get(name, (name,)) for name in arguments.suite or SUITES):
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        said = io.StringIO()  # every trainer announces its plan; it matters only where a suite fails
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                figures = SUITES[name].run(arguments.quick, arguments.data)
        except Exception as error:  # one suite that cannot run must not take the others' figures with it
            print(said.getvalue())
            traceback.print_exc()
            broken.append(name)
            figures = [{"name": name, "note": f"FAILED: {type(error).__name__}: {error}"}]
        seconds = time.perf_counter() - start
        report["suites"][name] = {"seconds": round(seconds, 1), "figures": figures}
        print_suite(console, name, figures, seconds)
    if arguments.json:
        write(report, arguments.json)
    if arguments.save:
        device = re.sub(r"[^a-z0-9]+", "-", report["environment"]["device"].lower()).strip("-")
        folder = RESULTS / f"{report['environment']['date'][:10]}-{device}"
        folder.mkdir(parents=True, exist_ok=True)
        write(report, folder / "results.json")
    return verdict(console, report, broken)


def quiet() -> None:
    """Leave the screen to the tables: no progress bars, no line per profiler session, no deprecation notices."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported
    os.environ.setdefault("TQDM_DISABLE", "1")  # reading the model's file has a bar of its own
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def packing_figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The planner's own rows (name, num_lengths, max_length, seconds, packs, density) as figures."""
    from measure import figure

    reference = {row["name"]: row for row in rows if row["num_lengths"] == 200_000}
    ours, whole = reference["packsft"], reference["TRL, whole set"]
    table = []
    for row in rows:
        targets: dict[str, Any] = {}
        if row is ours:
            targets = {"at_most": 0.2}
        elif row["num_lengths"] == 200_000 and row["max_length"] == ours["max_length"]:
            targets = {"ratio": row["seconds"] / ours["seconds"], "ratio_of": "time / packsft"}
        name = f"{row['name']}, {row['num_lengths']:,} lengths at {row['max_length']:,}"
        note = f"{round(row['packs']):,} packs, {100 * row['density']:.2f}% full"
        table.append(figure(name, row["seconds"], "s", note=note, **targets))
    for row in rows:
        if "cost_imbalance" in row:
            whole_set = "examples_cv" in row  # a step of few examples can be no more even than its longest one
            spread = f"; examples per pack vary by {100 * row['examples_cv']:.0f}%" if whole_set else ""
            note = f"{row['cost_imbalance']:.2f} in a random order{spread}"
            what = row["name"] if whole_set else f"{row['name']} of {row['num_lengths']} examples"
            name = f"attention cost, highest of 8 ranks / mean, {what}"
            targets = {"at_most": 1.1} if whole_set else {}
            table.append(figure(name, row["cost_imbalance_balanced"], "", note=note, **targets))
    fewer = {"ratio": ours["packs"] / whole["packs"], "ratio_of": "packs / TRL over the whole set", "at_most": 1.0}
    return [*table, figure("packs of packsft", ours["packs"], "packs", **fewer)]


def print_environment(console: Any, environment: dict[str, Any]) -> None:
    console.print(environment_line(environment))
    if environment["load_average"][0] > environment["cores"] / 2:
        console.print(
            f"Other work is running (load average {environment['load_average'][0]}): times are a rough guide."
        )


def environment_line(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"{environment['device']}, {environment['cores']} cores, {environment['threads']} threads, "
        f"{environment.get('dtype', 'bfloat16')}; {versions}; "
        f"{environment['date']}; `{environment['command']}`"
    )


def print_suite(console: Any, name: str, figures: list[dict[str, Any]], seconds: float) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{name}: {SUITES[name].about} ({seconds:.0f} s)", title_justify="left")
    for column in ("measured", "value", "spread", "ratio", "target", "", "note"):
        table.add_column(column, justify="right" if column in ("value", "spread") else "left", overflow="fold")
    for row in figures:
        table.add_row(*(escape(cell) for cell in cells(row)))
    console.print(table)


def cells(row: dict[str, Any]) -> list[str]:
    """The columns of a figure as text; anything a figure does not have is empty."""
    spread = row.get("spread")
    return [
        row["name"],
        quantity(row.get("value"), row.get("unit", "")),
        "" if spread is None else f"±{100 * spread:.0f}%",
        ratio(row),
        row.get("target", ""),
        {True: "pass", False: "MISS", None: ""}[row.get("passed")],
        row.get("note", ""),
    ]


def ratio(row: dict[str, Any]) -> str:
    return "" if row.get("ratio") is None else f"{row['ratio']:.3g}x {row['ratio_of']}"


def quantity(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g} {unit}"


def write(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def verdict(console: Any, report: dict[str, Any], broken: list[str]) -> int:
    """One line of summary, and the exit code."""
    judged = [row for suite in report["suites"].values() for row in suite["figures"] if row.get("passed") is not None]
    missed = [row for row in judged if not row["passed"]]
    wrong = [row["name"] for row in missed if row.get("parity")]
    console.print(f"{len(judged) - len(missed)} of {len(judged)} targets met.", highlight=False)
    for row in missed:
        console.print(
            f"MISS: {row['name']}: {ratio(row) or quantity(row.get('value'), row.get('unit', ''))}", markup=False
        )
    if broken:
        console.print(f"Could not run to the end: {', '.join(broken)}")
    if wrong or "parity" in broken:
        console.print(f"Parity fails: {', '.join(wrong) or 'the suite could not run'}", markup=False)
        return 1
    return 2 if broken else 0


def markdown(report: dict[str, Any]) -> str:
    """The README's table: every figure that has a target, and the run it came from."""
    lines = ["| | measured | target | |", "|---|---|---|---|"]
    for suite in report["suites"].values():
        for row in suite["figures"]:
            if row.get("passed") is not None:
                name, value, _, times, target, passed, _ = (cell.replace("|", "\\|") for cell in cells(row))
                lines.append(f"| {name} | {times or value} | {target} | {passed} |")
    kind = "Quick run" if report["quick"] else "Measured"
    return "\n".join([*lines, "", f"{kind}: {environment_line(report['environment'])}."])


if __name__ == "__main__":
    sys.exit(main())
