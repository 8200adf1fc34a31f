"""Measures time and memory in turns, and makes the flat dictionaries (`figure`) that a report consists of.

Knows clocks, allocators and the machine; knows nothing of what it measures.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from harness.allocations import Recorded
from packsft_kernels.version import __version__

from packsft.config import has_bf16

ROOT = Path(__file__).parents[2]
Figure = dict[str, Any]
PEER_PACKAGES = ("flash-attn", "liger-kernel", "cut-cross-entropy", "peft")


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        quick: one repeat of the least that says something.
        dry_run: the work planned for a GPU on tiny shapes, wherever it runs, to see that it runs.
        short: no competitor that is compiled, which takes many seconds before its first figure.
    """

    quick: bool = False
    dry_run: bool = False
    short: bool = False


def figure(
    name: str,
    value: float | None = None,
    unit: str = "",
    *,
    rate: float | None = None,
    rate_unit: str = "",
    ratio: float | None = None,
    ratio_of: str = "",
    at_most: float | None = None,
    at_least: float | None = None,
    spread: float | None = None,
    parity: bool = False,
    note: str = "",
    chart: str = "",
    series: str = "",
    x: float | None = None,
    x_name: str = "",
    limit: bool = False,
    curve: Sequence[tuple[float, float]] | None = None,
) -> Figure:
    """One line of a report.

    Args:
        name: what was measured.
        value: the median, in `unit`; None where it could not be measured, `note` saying why.
        rate, rate_unit: what was achieved in that time, for instance 163 "GFLOP/s".
        ratio: what is compared with the target; without it `value` itself is.
        ratio_of: the two sides of `ratio`, for instance "time / bare GEMMs".
        at_most, at_least: the target, if there is one.
        spread: half the distance from the fastest to the slowest repeat, as a share of the median.
        parity: an assertion about correctness; a miss fails the whole run.
        chart: the title of the picture it is drawn in (`plots.py`), with all others of that title.
        series: its name there, if not `name`.
        x, x_name: its place on a horizontal axis, and what that axis is; without x it is a bar.
        limit: drawn as the limit of the picture.
        curve: a line of its own, such as (tokens seen, loss).
    """
    assert at_most is None or at_least is None, "a figure has one target"
    row: Figure = {"name": name, "value": value, "unit": unit, "ratio": ratio, "ratio_of": ratio_of, "spread": spread}
    row |= {"target": "", "passed": None, "parity": parity, "note": note}
    compared = value if ratio is None else ratio
    if at_most is not None:
        row |= {"target": f"<= {at_most:.4g}", "passed": compared is not None and compared <= at_most}
    if at_least is not None:
        row |= {"target": f">= {at_least:.4g}", "passed": compared is not None and compared >= at_least}
    seldom = {"rate": rate, "rate_unit": rate_unit, "chart": chart, "series": series, "x": x, "x_name": x_name,
              "limit": limit, "curve": curve}  # fmt: skip
    return row | {key: value for key, value in seldom.items() if value not in (None, False, "")}


def asserted(*arguments: str) -> Iterator[Figure]:
    """Run pytest: the figures that tests recorded by `record_property("figure", ...)`, the arguments of `figure` as
    JSON, and how many of each test's cases failed where none is recorded. A failure is one of parity."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "junit.xml"
        options = ["-q", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={results}"]
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    if not cases:
        raise RuntimeError(f"pytest {' '.join(arguments)} ran no test: {(done.stdout + done.stderr).strip()[-500:]}")
    for test, group in itertools.groupby(cases, lambda case: case.get("name", "").split("[")[0]):
        number = recorded = failed = 0
        reasons: list[str] = []
        for case in group:
            number += 1
            for each in case.iter("property"):
                recorded += 1
                yield figure(**json.loads(each.get("value", "")))
            for found in (*case.iter("failure"), *case.iter("error"), *case.iter("skipped")):
                failed += found.tag != "skipped"
                reasons.append(
                    f"{case.get('name')} {found.tag}: {(found.get('message') or '').strip().split(chr(10))[0]}"
                )
        if failed or not recorded:
            name = test.removeprefix("test_").replace("_", " ")
            yield figure(name, failed, f"failures of {number}", at_most=0, parity=True, note="; ".join(reasons))


@dataclass(frozen=True)
class Timing:
    seconds: tuple[float, ...]  # of each repeat

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance from the fastest to the slowest repeat, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_dtype() -> torch.dtype:
    """What models are trained in here: bfloat16, or float32 where bfloat16 would be emulated (many times slower)."""
    return torch.bfloat16 if has_bf16() else torch.float32


def synchronize() -> None:
    """Wait for the device, so that a clock read next is about finished work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(
    candidates: Mapping[str, Callable[[], object]], repeats: int, *, warmup: int = 1, launches: bool = False
) -> dict[str, Timing]:
    """Time every candidate `repeats` times in the order A B C A B C, so that a slow minute of the machine hits all.

    On a GPU between two CUDA events, with nothing of the candidate's in the L2 cache (as Triton's `do_bench` does).

    Args:
        candidates: what to run, by name; what they return is thrown away. One with an attribute `prepare` has that
            called before each run, outside of the clock.
        repeats: timed runs of each.
        warmup: untimed runs of each before the first timed one; 0 where the caller has run them already.
        launches: on a GPU, too, from the call to the end of all work by the host's clock, which counts the launches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.freeze()  # what is there stays, so that collecting before each run takes no time
    for repeat in range(-warmup, repeats):
        for name, run in candidates.items():
            getattr(run, "prepare", lambda: None)()
            gc.collect()
            taken = _seconds(run) if launches or not torch.cuda.is_available() else _seconds_on_gpu(run)
            if repeat >= 0:
                seconds[name].append(taken)
    gc.unfreeze()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _seconds(run: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


_SLEEP_CYCLES = 4_000_000  # 2 ms


def _seconds_on_gpu(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize()
    torch.empty(256 * 2**20, dtype=torch.int8, device="cuda").zero_()  # more than any L2 cache holds
    # The device sleeps while Python launches the first kernels, so that no gap between launches is measured
    torch.cuda._sleep(_SLEEP_CYCLES)
    start.record()
    run()
    end.record()
    synchronize()
    return start.elapsed_time(end) / 1e3


def extra_memory(run: Callable[[], object]) -> float:
    """MiB that `run` allocates through PyTorch at its peak, above what was there before.

    On the CPU the profiler sees every allocation and release of tensor storage (also inside custom operators), but
    not the scratch space of BLAS libraries.
    """
    gc.collect()
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return Recorded(run).peak / 2**20


def reset_peak_rss() -> bool:
    """Start the process's peak resident memory afresh (Linux); False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> float:
    """Peak resident memory of this process in MiB, since the last `reset_peak_rss` where that worked."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def device_name() -> str:
    """The GPU, or the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def clocks() -> str:
    """What the processors run at, as far as the system says so."""
    try:
        if torch.cuda.is_available():
            query = "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,power.limit"
            asked = ["nvidia-smi", query, "--format=csv,noheader"]
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.splitlines()[0]
            return f"SM, its maximum, memory, power limit: {answer}"
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = [float(line.split(":", 1)[1]) for line in lines if line.startswith("cpu MHz")]
        return f"{min(found):.0f} to {max(found):.0f} MHz"
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return "clocks unknown"


def environment(command: str) -> dict[str, Any]:
    """The machine, the versions, the date and the command of a run."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "trl", "triton", "datasets", *PEER_PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package not in PEER_PACKAGES:
                versions[package] = "not installed"
    versions["packsft"] = __version__
    load = [round(value, 2) for value in os.getloadavg()]
    return {
        "device": device_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(training_dtype()).removeprefix("torch."),
        "clocks": clocks(),
        "load_average": load,  # of other work, at the start: a busy machine makes every time a guess
        "versions": versions,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "command": command,
    }
