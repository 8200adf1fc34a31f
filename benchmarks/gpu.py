"""`bash benchmarks/gpu.sh`: everything that asks a GPU, in under nine minutes on one card and without a network.

Stages, each a process with a time limit: one that runs over is killed with all that it started, what it had said and
written is kept, and the next begins. The figures of all stages are one report (`run.py --show`), written anew after
each stage and, with a summary, the log and up to four pictures, left in one folder.

The exit code is 1 if a sanitizer, a test or an assertion of parity failed, 2 if a stage could not run to its end, and 0
otherwise. Knows commands and their exit codes; knows nothing of what they measure.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import report

# Seconds for each stage. What one leaves over is for those after it; all together they end in time.
LIMITS = {
    "environment": 20,
    "launches": 55,
    "racecheck": 40,
    "memcheck": 40,
    "tests": 120,
    "parity": 55,
    "kernels": 95,
    "train": 85,
}
BUDGET = 530  # of which the rest is for pictures and summary
GRACE = 5  # for a stage that was told to stop
MOST_LINES, LINE = 150, 160
MOST_FILES, MOST_BYTES, MOST_PICTURES, MOST_LOG = 8, 16 * 2**20, 4, 4 * 2**20

ROOT = Path(__file__).parents[1]
SANITIZED = "tests/ops/sanitize.py"
SANITIZER_TEST = "tests/ops/test_cross_entropy_triton.py::test_no_launch_races_in_shared_memory_or_leaves_its_tensors"
FAULT = 99  # compute-sanitizer's exit code where it found one; a program that failed by itself has another
# Every tensor is then an allocation of its own, whose end memcheck knows.
NO_CACHING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
PASSED, FAILED, STOPPED, NOT_RUN = "passed", "FAILED", "STOPPED", "not run"


@dataclass
class Stage:
    """A command, what its exit codes mean, and what came of it.

    Args:
        command: empty for one that cannot be run; `note` says why.
        failures: exit codes that mean that something is wrong with packsft, not with the run.
    """

    name: str
    command: Sequence[str]
    failures: tuple[int, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    note: str = ""
    verdict: str = NOT_RUN
    seconds: float = 0.0
    said: str = ""

    def run(self, limit: float, environment: dict[str, str]) -> None:
        """Run for at most `limit` seconds; sets `verdict`, `seconds`, `said` and `note`."""
        if not self.command:
            return
        start = time.monotonic()
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment | self.environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(max(limit, 1))
            except subprocess.TimeoutExpired:
                code = None
                end(process, signal.SIGINT)  # pytest then writes what it has
            end(process, signal.SIGKILL)  # and whatever the stage left running
            output.seek(0)
            self.said = output.read().decode(errors="replace")
        self.seconds = time.monotonic() - start
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        if code is None:
            self.verdict, self.note = STOPPED, f"ran over its {limit:.0f} s"
        elif code:
            self.verdict = FAILED if code in self.failures else STOPPED
            self.note = f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"
        else:
            self.verdict, self.note = PASSED, ""


def end(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process and all that it started, and wait a little."""
    try:
        os.killpg(process.pid, number)
        process.wait(GRACE)
    except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        pass


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        first, *others = stages(arguments, work)
        environment = child_environment(arguments)
        until = start
        out: Path | None = None
        done: list[Stage] = []
        for stage in (first, *others):
            until += LIMITS[stage.name]
            print(f"{stage.name} ...", file=sys.stderr, flush=True)
            stage.run(until - time.monotonic(), environment)
            done.append(stage)
            if stage is first:
                if stage.verdict != PASSED:
                    print(stage.said.strip() or stage.note)
                    return 2
                out = folder(arguments, report.read(work / "environment.json")["environment"])
            assert out is not None
            found = gather(done, work)
            publish(found, done, work, out)
        pictures(found, work, out)
        keep_small(out)
        lines = (out / "summary.txt").read_text(encoding="utf-8")
        print(lines + f"{time.monotonic() - start:.0f} s in all; everything is in {out}")
        return exit_code(done)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="every stage in small, to see that it runs")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="cpu, with --dry-run: without a GPU")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: $OUT, else benchmarks/results/<date>-<device>/"
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.dry_run:
        parser.error("--device cpu needs --dry-run")
    return arguments


def child_environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Of every stage: no network is asked, and no interpreter stands in for the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # SmolLM2, if its wheel was brought along, is found there; else its absence is told at once.
    environment |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(ROOT / "wheels")}
    environment |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    # tiny tensors: a second thread, on a busy machine, made the stage of parity nine times as long
    return environment | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if arguments.device == "cpu" else {})


def stages(arguments: argparse.Namespace, work: Path) -> list[Stage]:
    cpu = ["--device", "cpu"] if arguments.device == "cpu" else []
    dry = ["--dry-run", "--quick"] if arguments.dry_run else []
    python = [sys.executable]

    def suites(name: str, *names: str, options: Sequence[str] = dry) -> Stage:
        command = [*python, "benchmarks/run.py", *cpu, *options, "--suite", *names]
        return Stage(name, [*command, "--json", str(work / f"{name}.json")], failures=(1,))

    look = f"import gpu; gpu.look({str(work / 'environment.json')!r}, {arguments.dry_run})"
    pytest = ["-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["--continue-on-collection-errors", f"--deselect={SANITIZER_TEST}"]  # it is a stage of its own here
    return [
        Stage("environment", [*python, "-c", f"import sys; sys.path.insert(0, 'benchmarks'); {look}"]),
        # Without a sanitizer first: every kernel is compiled once, and found compiled by the two others.
        Stage("launches", [*python, SANITIZED, *cpu], failures=(1,)),
        *(sanitized(tool, bool(cpu)) for tool in ("racecheck", "memcheck")),
        Stage("tests", [*python, *pytest, f"--junitxml={work / 'junit.xml'}"], failures=(1,)),
        suites("parity", "parity", "reads", options=dry or ["--quick"]),
        suites("kernels", "head", "cross_entropy", "attention", "scaling"),
        suites("train", "train"),
    ]


def sanitized(tool: str, cpu: bool) -> Stage:
    """`sanitize.py` under one of compute-sanitizer's tools, or why it cannot be."""
    if cpu:
        return Stage(tool, (), note="it needs a GPU", verdict="left out")
    sanitizer = compute_sanitizer()
    if sanitizer is None:
        return Stage(tool, (), note="no compute-sanitizer on the PATH, in a CUDA toolkit or in a Python package")
    return Stage(tool, sanitizing(sanitizer, tool), (FAULT,), NO_CACHING)


def sanitizing(sanitizer: str, tool: str) -> list[str]:
    """Our kernels alone: all others would take minutes."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FAULT)]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []  # PyTorch's own questions to the driver
    for kernel in ("_cross_entropy_kernel", "_scale_kernel"):
        command += ["--kernel-name", f"kns={kernel}"]
    return [*command, sys.executable, SANITIZED]


def compute_sanitizer() -> str | None:
    """On the PATH, in a CUDA toolkit, or in a Python package."""
    packages = sysconfig.get_path("purelib")
    places = ["/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/*/compute-sanitizer"]
    places += [f"{packages}/nvidia/*/bin", f"{packages}/nvidia/*/compute-sanitizer", f"{packages}/triton/**/bin"]
    found = [path for place in places for path in glob(f"{place}/compute-sanitizer", recursive=True)]
    able = [path for path in found if os.access(path, os.X_OK) and Path(path).is_file()]
    return shutil.which("compute-sanitizer") or (able[-1] if able else None)


def look(path: str, dry_run: bool) -> None:
    """The first stage: what there is, as a report without figures. Exits where it is not enough."""
    import torch

    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if not able and not dry_run:
        have = torch.cuda.get_device_name() if torch.cuda.is_available() else "none is visible"
        sys.exit(f"An Ampere or newer GPU is needed: {have}. Without one: --dry-run --device cpu, everything in small.")
    try:
        from measure import environment
    except ImportError as error:
        sys.exit(f"{error}: the packages of docs/gpu.md are needed, installed or as wheels in {ROOT / 'wheels'}")
    if torch.cuda.is_available():
        subprocess.run(["nvidia-smi", "-L"], check=False)
        print(torch.cuda.get_device_properties(0), "CUDA", torch.version.cuda)
    found = {"environment": environment("bash benchmarks/gpu.sh"), "quick": dry_run, "suites": {}}
    report.write(found, Path(path))
    print(report.environment_line(found["environment"]))


def folder(arguments: argparse.Namespace, environment: report.Row) -> Path:
    """Where everything goes."""
    if arguments.out or os.environ.get("OUT"):
        return arguments.out or Path(os.environ["OUT"])
    if arguments.dry_run:  # nothing to keep beside what was measured
        return Path(tempfile.mkdtemp(prefix="packsft-dry-run-"))
    return report.results_file(environment).parent


# ----------------------------------------------------------------------------------------------------------- reporting


def gather(done: Sequence[Stage], work: Path) -> report.Report:
    """The report so far: environment, all suites, and what became of the stages."""
    reports = [report.read(path) for path in (work / f"{stage.name}.json" for stage in done) if path.exists()]
    found = merge(reports)
    found["tests"] = outcomes(work / "junit.xml")
    found["stages"] = [
        {"name": stage.name, "verdict": stage.verdict, "seconds": round(stage.seconds, 1), "note": stage.note}
        for stage in done
    ]
    return found


def merge(reports: Sequence[report.Report]) -> report.Report:
    """One report of several: the first one's environment and the suites of all, a quick one's named so."""
    first, *others = reports
    merged = first | {"suites": dict(first["suites"])}
    for other in others:
        mark = ", quick" if other["quick"] and not first["quick"] else ""
        for name, suite in other["suites"].items():
            merged["suites"][name] = suite | {"about": suite.get("about", "") + mark}
    return merged


def outcomes(junit: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, each failure with its reason; empty if nothing was written."""
    try:
        cases = [*ElementTree.parse(junit).iter("testcase")]
    except (OSError, ElementTree.ParseError):  # not begun, or killed while it was written
        return {}
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    failures: list[str] = []
    reasons: dict[str, int] = {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        wrong = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        skipped = case.find("skipped")
        counts["failed" if wrong is not None else "passed" if skipped is None else "skipped"] += 1
        if wrong is not None:
            failures.append(f"{name}: {((wrong.get('message') or '').strip() or 'no reason').splitlines()[0]}")
            # a test that is a run of pytest itself names the tests that failed there
            inner = dict.fromkeys(line for line in (wrong.text or "").splitlines() if "FAILED tests" in line)
            failures += [f"    {line[line.index('tests') :]}" for line in inner]
        elif skipped is not None:
            reason = skipped.get("message") or ""
            reasons[reason] = reasons.get(reason, 0) + 1
    return counts | {"failures": failures, "skips": [f"{count}x {reason}" for reason, count in reasons.items()]}


def publish(found: report.Report, done: Sequence[Stage], work: Path, out: Path) -> None:
    report.write(found, out / "results.json")
    (out / "summary.txt").write_text("\n".join(summary(found)) + "\n", encoding="utf-8")
    each = MOST_LOG // len(LIMITS)
    log = "".join(f"=== {stage.name}: {stage.verdict} {stage.note}\n{stage.said[-each:]}\n" for stage in done)
    (out / "log.txt").write_text(log, encoding="utf-8")
    if (work / "junit.xml").exists():
        shutil.copy(work / "junit.xml", out / "junit.xml")


def summary(found: report.Report) -> list[str]:
    """What a reader wants to know first, in at most `MOST_LINES` lines."""
    rows = report.rows_of(found)
    judged = [row for row in rows if row.get("passed") is not None]
    missed = [row for row in judged if not row["passed"]]
    absent = [row for row in rows if any(word in row.get("note", "") for word in ("cannot run", "WRONG", "FAILED"))]
    tests = found.get("tests") or {}
    lines = [*textwrap.wrap(report.environment_line(found["environment"]), LINE, break_on_hyphens=False), ""]
    lines += [
        f"{stage['name']:<12} {stage['verdict']:<8} {stage['seconds']:>5.0f} s  {stage['note']}"
        for stage in found["stages"]
    ]
    if tests:
        lines += ["", f"Tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"]
        lines += at_most(8, [f"  skipped {skip}" for skip in tests["skips"]])
        lines += at_most(35, [f"  FAILED {failure}" for failure in tests["failures"]])
    lines += ["", f"{len(judged) - len(missed)} of {len(judged)} targets met."]
    lines += at_most(30, [f"MISS: {row['name']}: {report.measured(row)}, target {row['target']}" for row in missed])
    headlines = [row for row in rows if row.get("headline")]
    lines += at_most(25, [f"{row['headline']}: {report.measured(row)} {row['target']}" for row in headlines])
    lines += at_most(25, [f"{row['name']}: {row['note']}" for row in absent])
    return at_most(MOST_LINES - 2, [line.replace("\n", " ")[:LINE].rstrip() for line in lines])


def at_most(most: int, lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    return [*lines] if len(lines) <= most else [*lines[: most - 1], f"... and {len(lines) - most + 1} more"]


def exit_code(done: Sequence[Stage]) -> int:
    verdicts = {stage.verdict for stage in done}
    return 1 if FAILED in verdicts else 2 if verdicts & {STOPPED, NOT_RUN} else 0


def pictures(found: report.Report, work: Path, out: Path) -> None:
    """All pictures of the report on up to four sheets; a picture that cannot be drawn stops nothing."""
    try:
        from plots import plot

        drawn = plot(found, work / "pictures")
        size = math.ceil(len(drawn) / MOST_PICTURES)
        for number, start in enumerate(range(0, len(drawn), max(1, size)), 1):
            sheet(drawn[start : start + size], out / f"figures-{number}.png")
    except Exception as error:
        print(f"no pictures: {type(error).__name__}: {error}")


def sheet(paths: Sequence[Path], to: Path) -> None:
    from matplotlib import pyplot

    columns = math.ceil(math.sqrt(len(paths)))
    rows = math.ceil(len(paths) / columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(8 * columns, 4.5 * rows), squeeze=False, layout="constrained"
    )
    for axes, path in zip(grid.flat, paths, strict=False):
        axes.imshow(pyplot.imread(path))
    for axes in grid.flat:
        axes.set_axis_off()
    figure.savefig(to, dpi=100)
    pyplot.close(figure)


def keep_small(out: Path) -> None:
    """Drop pictures, the last ones first, until the folder is within its limits."""
    ours = [out / name for name in ("summary.txt", "results.json", "log.txt", "junit.xml")]
    ours += sorted(out.glob("figures-*.png"))
    ours = [path for path in ours if path.exists()]
    while len(ours) > MOST_FILES or sum(path.stat().st_size for path in ours) > MOST_BYTES:
        ours.pop().unlink()


if __name__ == "__main__":
    sys.exit(main())
