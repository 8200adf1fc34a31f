"""The command of the benchmark suite: what it lists, writes, prints and returns. What it measures is stubbed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module behind `python benchmarks/run.py`, found as that command finds it and its siblings."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name, value in (("KINETO_LOG_LEVEL", "99"), ("TQDM_DISABLE", "1")):
        monkeypatch.setenv(name, value)  # set by the command too, and undone here
    for name in ("run", "measure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run

    return run


def stub(run: Any, monkeypatch: pytest.MonkeyPatch, **suites: Any) -> None:
    """Let each suite return these figures, or raise this exception."""

    def measured(suite: Any, quick: bool, data: str | None) -> Any:
        result = suites[suite.function.removeprefix("bench_")]
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(run.Suite, "run", measured)


def test_list_names_every_suite_and_imports_none() -> None:
    command = [sys.executable, "-X", "importtime", str(BENCHMARKS / "run.py"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names == [
        "head", "memory", "cross_entropy", "attention", "packing", "step", "train", "parity", "static", "reads",
        "kernels",
    ]  # fmt: skip
    assert "| torch" not in listed.stderr


def test_every_suite_is_a_function_that_exists(run: Any) -> None:
    for suite in run.SUITES.values():
        source = (BENCHMARKS / f"{suite.module}.py").read_text(encoding="utf-8")
        assert f"\ndef {suite.function}(" in source


def test_json_holds_figures_environment_and_verdicts(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from measure import figure

    fast = figure("fast", 2.0, "s", ratio=1.25, ratio_of="time / limit", at_most=1.3)
    slow = figure("slow", 3.0, "s", ratio=1.35, ratio_of="time / limit", at_most=1.3)
    absent = figure("absent", note="cannot run: not installed")
    stub(run, monkeypatch, head=[fast, slow, absent])
    file = tmp_path / "results.json"
    assert run.main(["--quick", "--suite", "head", "--json", str(file)]) == 0  # speed never fails the command
    report = json.loads(file.read_text(encoding="utf-8"))
    assert [row["passed"] for row in report["suites"]["head"]["figures"]] == [True, False, None]
    assert report["environment"]["command"].endswith(f"--suite head --json {file}")
    assert {"torch", "transformers", "trl", "triton"} <= report["environment"]["versions"].keys()
    printed = capsys.readouterr().out
    assert "1 of 2 targets met" in printed
    assert "MISS: slow: 1.35x time / limit" in printed
    assert "cannot run: not installed" in printed

    assert run.main(["--markdown", str(file)]) == 0
    table = capsys.readouterr().out
    assert "| fast | 1.25x time / limit | <= 1.3 | pass |" in table
    assert "| slow | 1.35x time / limit | <= 1.3 | MISS |" in table
    assert "absent" not in table  # it has no target
    assert "--suite head" in table


def test_a_failed_parity_assertion_is_exit_code_1(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from measure import figure

    stub(run, monkeypatch, parity=[figure("loss", 2e-9, "relative", at_most=1e-9, parity=True)])
    assert run.main(["--suite", "parity"]) == 1


def test_a_suite_that_breaks_is_named_and_the_others_still_run(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from measure import figure

    stub(run, monkeypatch, head=RuntimeError("no wheel"), reads=[figure("reads", 0, "reads", at_most=0)])
    assert run.main(["--suite", "head", "reads"]) == 2
    printed = capsys.readouterr().out
    assert "FAILED: RuntimeError: no wheel" in printed
    assert "1 of 1 targets met" in printed
    stub(run, monkeypatch, parity=RuntimeError("no wheel"))
    assert run.main(["--suite", "parity"]) == 1  # parity that was not shown does not hold


def test_timings_are_interleaved_and_the_warm_up_is_not_counted(run: Any) -> None:
    from measure import interleave

    order: list[str] = []
    times = interleave({name: lambda name=name: order.append(name) for name in "ab"}, 2, warmup=1)
    assert "".join(order) == "ababab"
    assert [len(times[name].seconds) for name in "ab"] == [2, 2]


def test_extra_memory_is_the_peak_and_not_the_sum(run: Any) -> None:
    """Two tensors of 4 MiB one after the other are 4 MiB, side by side 8."""
    import torch
    from measure import device, extra_memory

    def one_after_the_other() -> None:
        for _ in range(2):
            torch.empty(2**20, device=device()).fill_(1.0)

    def side_by_side() -> None:
        pair = [torch.empty(2**20, device=device()).fill_(1.0) for _ in range(2)]
        assert len(pair) == 2

    assert extra_memory(one_after_the_other) == pytest.approx(4, abs=0.5)
    assert extra_memory(side_by_side) == pytest.approx(8, abs=0.5)


def test_the_memory_suite_needs_no_gpu_and_meets_its_targets(run: Any) -> None:
    figures = run.SUITES["memory"].run(quick=True, data=None)
    judged = {figure["name"]: figure["passed"] for figure in figures if figure["passed"] is not None}
    assert len(judged) == 4  # the head's budget and TRL's memory, for all tokens scored and for some
    assert all(judged.values())
    assert not [figure["name"] for figure in figures if figure["value"] is None and "packsft" in figure["name"]]
