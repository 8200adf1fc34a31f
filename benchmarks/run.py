"""`python benchmarks/run.py`: is it faster, smaller, and the same? Every figure is a ratio inside this one run.

Prints each suite as a table: what was measured, beside its limit or its competitor, the target, and whether it was
met; a miss is printed as a miss, and a competitor that cannot run with the reason. The exit code is 1 if an assertion
of parity fails, 2 if a suite could not run to its end, and 0 otherwise, whatever the speed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from harness import report

SUITES = {  # each a file of `suites/`, whose `bench` makes figures, one by one or all at once
    "train": "train(): tokens/s, memory and losses, against TRL",
    "step": "one training step against the model's bare GEMMs",
    "head": "the language-model head against its GEMMs and peers",
    "cross_entropy": "loss and gradient of logits against a copy",
    "attention": "packed attention against its GEMMs and peers",
    "scaling": "cost against T, documents, N, V, H: linear where it should be",
    "memory": "peak memory of the head on a GPU, and of shared rows, on fake tensors of any size",
    "packing": "planning packs and making batches, against TRL and others",
    "vision": "rows with pictures: planning, loading and train() against TRL",
    "reads": "reads of the device by the host in every micro-step",
    "parity": "packed training equals the documents alone",
    "static": "the kernel compiled for six GPU generations, without one",
}
GROUPS = {"kernels": ("head", "cross_entropy", "attention", "scaling")}
# On a GPU, and where time is short, the most telling first: what only this machine can tell, then what any can.
TELLING = ("cross_entropy", "head", "attention", "step", "train", "reads", "parity", "scaling", "packing", "vision",
           "memory", "static")  # fmt: skip


class OutOfTime(BaseException):
    """Raised by the clock of `--minutes`, past every `except Exception` of a suite."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.list:
        for name, about in (SUITES | {name: ", ".join(suites) for name, suites in GROUPS.items()}).items():
            print(f"{name:<14} {about}")
        return 0
    if arguments.docs:
        for path in report.write_docs():
            print(f"wrote {path}")
        return 0
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported; child processes inherit it
    if arguments.show:
        found = report.read(arguments.show)
        report.print_all(console(), found)
    else:
        found = run(arguments, shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)]))
    if arguments.markdown:
        arguments.markdown.write_text(report.markdown(found), encoding="utf-8")
        print(f"wrote {arguments.markdown}")
    if arguments.plots:
        from harness.plots import plot

        for path in plot(found, arguments.plots):
            print(f"wrote {path}")
    return report.verdict(console(), found)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/run.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few examples, one repeat: some minutes")
    parser.add_argument(
        "--suite", nargs="+", action="extend", choices=[*SUITES, *GROUPS], metavar="NAME", help="default: all"
    )
    parser.add_argument("--list", action="store_true", help="list the suites and stop")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="stop after N; the most telling suites first, and without competitors that compile. Saves as --save does",
    )
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="cpu: leave a GPU alone")
    parser.add_argument("--dry-run", action="store_true", help="a GPU's work on tiny shapes, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, as they come")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results/<date>-<device>/")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the figures there")
    parser.add_argument("--show", type=Path, metavar="FILE.json", help="measure nothing: show the figures of that run")
    parser.add_argument(
        "--docs", action="store_true", help="write the tables of the README and docs/benchmarks.md anew, and stop"
    )
    arguments = parser.parse_args(argv)
    small = arguments.quick or arguments.dry_run
    if arguments.save and small:
        parser.error("--save keeps full runs: with --quick or --dry-run it would write over the day's (--json FILE)")
    if arguments.minutes is not None and not small and not arguments.json:
        arguments.save = True
    return arguments


def console() -> Any:
    from rich.console import Console

    # Wide enough for a table also where there is no terminal to ask
    return Console(width=None if sys.stdout.isatty() else 160)


def run(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """Run and print the suites; the report is written after every figure: what ends early leaves what it found."""
    begin = time.monotonic()
    quiet()
    from harness.measure import Settings, device, environment

    quick = arguments.quick or arguments.dry_run
    settings = Settings(quick, arguments.dry_run, quick or arguments.minutes is not None)
    found: dict[str, Any] = {"environment": environment(command), "quick": arguments.quick, "suites": {}}
    screen = console()
    report.print_environment(screen, found["environment"])
    files = [arguments.json] if arguments.json else []
    if arguments.save:
        files.append(report.results_file(found["environment"]))
    names = list(dict.fromkeys(chain.from_iterable(GROUPS.get(name, (name,)) for name in arguments.suite or SUITES)))
    seconds_left = None
    if arguments.minutes is not None:
        seconds_left = 60 * arguments.minutes - (time.monotonic() - begin)
    if seconds_left is not None or device().type == "cuda":
        names.sort(key=TELLING.index)
    with stopped_after(seconds_left):
        try:
            for name in names:
                print(f"{name} ...", file=sys.stderr, flush=True)
                run_suite(name, settings, found, files)
                report.print_suite(screen, name, found["suites"][name])
        except OutOfTime:
            found["left_out"] = [name for name in names if found["suites"].get(name, {"broken": True}).get("broken")]
            if names[0] in found["suites"]:
                stopped = list(found["suites"])[-1]
                report.print_suite(screen, stopped, found["suites"][stopped])
            for path in files:
                report.write(found, path)
    for path in files:
        print(f"wrote {path}")
    return found


def run_suite(name: str, settings: Any, found: dict[str, Any], files: Sequence[Path]) -> None:
    start = time.perf_counter()
    # broken until it has come to its end, for whoever reads what a killed run left
    suite: dict[str, Any] = {"about": SUITES[name], "broken": True, "figures": [], "seconds": 0.0}
    found["suites"][name] = suite

    def save() -> None:
        suite["seconds"] = round(time.perf_counter() - start, 1)
        for path in files:
            report.write(found, path)

    said = io.StringIO()  # every trainer announces its plan; it matters only where a suite fails
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            for row in bench(name, settings):
                suite["figures"].append(row)
                save()
        del suite["broken"]
    except Exception as error:  # one suite that cannot run must not take the others' figures with it
        print(said.getvalue())
        traceback.print_exc()
        suite["figures"].append(report.broken(name, error))
    save()


def bench(name: str, settings: Any) -> Iterable[dict[str, Any]]:
    return importlib.import_module(f"suites.{name}").bench(settings)


@contextlib.contextmanager
def stopped_after(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTime` in the block after so many seconds; None: never."""
    if seconds is None:
        yield
        return

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


if __name__ == "__main__":
    try:
        code = main()
    except Exception:  # Python's own exit code would be 1, which says that parity fails
        traceback.print_exc()
        code = 2
    sys.exit(code)
