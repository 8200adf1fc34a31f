"""The command of the benchmark suite: what it lists, writes, prints, draws and returns. What it measures is stubbed."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import run
from harness import plots, report
from harness.measure import figure

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("KINETO_LOG_LEVEL", "99"), ("TQDM_DISABLE", "1")):
        monkeypatch.setenv(name, value)  # set by the command too, and undone here


def stub(monkeypatch: pytest.MonkeyPatch, **suites: Any) -> None:
    """Let each suite return these figures, call this, or raise this exception."""

    def bench(name: str, settings: Any) -> Any:
        result = suites[name]
        if isinstance(result, Exception):
            raise result
        return result() if callable(result) else result

    monkeypatch.setattr(run, "bench", bench)


def test_list_names_every_suite_and_imports_none() -> None:
    command = [sys.executable, "-X", "importtime", str(BENCHMARKS / "run.py"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [*run.SUITES, *run.GROUPS]
    assert "| torch" not in listed.stderr


def test_every_suite_is_a_file_of_its_name_with_one_function() -> None:
    assert {path.stem for path in (BENCHMARKS / "suites").glob("*.py")} == set(run.SUITES) == set(run.TELLING)
    for name in run.SUITES:
        source = (BENCHMARKS / "suites" / f"{name}.py").read_text(encoding="utf-8")
        assert re.search(r"\ndef bench\(settings: Settings\) -> (list|Iterator)\[Figure\]:", source)


def test_json_holds_figures_environment_and_verdicts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = figure("fast", 2.0, "s", rate=5.0, rate_unit="GB/s", ratio=1.25, ratio_of="time / limit", at_most=1.3)
    slow = figure("slow", 3.0, "s", ratio=1.35, ratio_of="time / limit", at_most=1.3)
    absent = figure("absent|here", note="cannot run: not installed")
    stub(monkeypatch, head=[fast, slow, absent])
    file, table = tmp_path / "results.json", tmp_path / "table.md"
    command = ["--quick", "--suite", "head", "--json", str(file), "--markdown", str(table)]
    assert run.main(command) == 0  # speed never fails the command
    found = report.read(file)
    assert [row["passed"] for row in found["suites"]["head"]["figures"]] == [True, False, None]
    assert found["environment"]["command"].endswith(f"--suite head --json {file} --markdown {table}")
    assert {"torch", "transformers", "trl", "triton"} <= found["environment"]["versions"].keys()
    printed = capsys.readouterr().out
    assert "1 of 2 targets met" in printed
    assert "MISS: slow: 1.35x time / limit, target <= 1.3" in printed
    assert "cannot run: not installed" in printed

    written = table.read_text(encoding="utf-8")
    assert "| fast | 2 s | 5 GB/s | 1.25x time / limit | <= 1.3 | pass |  |" in written
    assert "| absent\\|here |  |  |  |  |  | cannot run: not installed |" in written
    assert "1 of 2 targets met. Missed:\n\n- slow: 1.35x time / limit, target <= 1.3\n" in written

    assert run.main(["--show", str(file)]) == 0  # the same, without measuring
    assert "MISS: slow: 1.35x time / limit" in capsys.readouterr().out


def test_a_failed_parity_assertion_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, parity=[figure("loss", 2e-9, "relative", at_most=1e-9, parity=True)])
    assert run.main(["--suite", "parity"]) == 1


def test_a_suite_that_breaks_is_named_and_the_others_still_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(monkeypatch, head=RuntimeError("no wheel"), reads=[figure("reads", 0, "reads", at_most=0)])
    assert run.main(["--suite", "head", "reads"]) == 2
    printed = capsys.readouterr().out
    assert "FAILED: RuntimeError: no wheel" in printed
    assert "1 of 1 targets met" in printed
    stub(monkeypatch, parity=RuntimeError("no wheel"))
    assert run.main(["--suite", "parity"]) == 1  # parity that was not shown does not hold


def test_what_is_stopped_leaves_the_figures_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped() -> Any:
        yield figure("a read", 1.0, "reads")
        raise KeyboardInterrupt

    stub(monkeypatch, head=[figure("head", 1.0, "s")], reads=stopped())
    file = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        run.main(["--suite", "head", "reads", "--json", str(file)])
    found = report.read(file)
    assert [row["name"] for row in report.rows_of(found)] == ["head", "a read"]
    assert [name for name, suite in found["suites"].items() if suite.get("broken")] == ["reads"]


def test_what_is_no_number_is_shown_and_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = figure("broken loss", float("nan"), "nats", at_most=1.0, chart="Losses")
    suite = {"about": "", "seconds": 1.0, "figures": [row, figure("infinite", float("inf"), "nats", chart="Losses")]}
    report.print_suite(run.console(), "train", suite)
    assert "nan nats" in capsys.readouterr().out
    environment = {"device": "a card", "dtype": "bfloat16", "date": "2026-11-24T10:00"}
    assert plots.plot({"environment": environment, "suites": {"train": suite}}, tmp_path) == []
    assert row["passed"] is False


def test_minutes_take_the_most_telling_first_and_say_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow() -> Any:
        yield figure("a read", 0.0, "reads", at_most=0)
        try:
            time.sleep(60)
        except Exception:  # as a suite lists a competitor that raises
            pytest.fail("a suite must not take the end of its time for an error")

    stub(monkeypatch, head=[figure("head", 1.0, "s")], reads=slow, parity=[])
    file = tmp_path / "results.json"
    assert run.main(["--minutes", "0.03", "--suite", "parity", "reads", "head", "--json", str(file)]) == 0
    found = report.read(file)
    assert [row["name"] for row in report.rows_of(found)] == ["head", "a read"]
    assert found["left_out"] == ["reads", "parity"]
    printed = capsys.readouterr().out
    assert "a read" in printed
    assert "Left out for want of time: reads from there on, parity" in printed
    assert run.main(["--show", str(file)]) == 0


def test_minutes_that_end_before_the_first_suite_leave_out_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(monkeypatch, reads=lambda: time.sleep(60))
    assert run.main(["--quick", "--minutes", "0", "--suite", "reads"]) == 0
    assert "Left out for want of time: reads" in capsys.readouterr().out


def test_minutes_save_what_is_not_small() -> None:
    assert run.parse(["--minutes", "9"]).save
    assert not run.parse(["--minutes", "9", "--dry-run"]).save
    assert not run.parse(["--minutes", "9", "--json", "file"]).save


@pytest.mark.parametrize("small", ["--quick", "--dry-run"])
def test_a_small_run_is_not_saved_over_a_full_one(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main([small, "--save"])
    assert "--save keeps full runs" in capsys.readouterr().err


def test_device_cpu_hides_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    stub(monkeypatch, reads=[])
    assert run.main(["--suite", "reads", "--device", "cpu"]) == 0
    assert run.os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_pictures_are_bars_lines_and_curves(tmp_path: Path) -> None:
    rows = [
        figure("limit", 1.0, "s", chart="Bars", limit=True),
        figure("ours", 2.0, "s", spread=0.1, chart="Bars"),
        figure("absent", chart="Bars", note="cannot run"),
        *(figure(f"at {x}", 2.0 * x, "MiB", chart="Lines", series="ours", x=x, x_name="T") for x in (1.0, 2.0)),
        figure("losses", 1.5, curve=[(100, 2.0), (200, 1.5)], chart="Curves", x_name="tokens seen"),
        figure("in no picture", 1.0, "s"),
    ]
    environment = {"device": "a card", "dtype": "bfloat16", "date": "2026-11-24T10:00"}
    found = {"environment": environment, "suites": {"head": {"figures": rows}}}
    assert [path.name for path in plots.plot(found, tmp_path)] == ["bars.png", "lines.png", "curves.png"]
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def test_readme_and_docs_show_the_runs_that_they_name() -> None:
    """`python benchmarks/run.py --docs` would change nothing."""
    for path in report.DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert report.BLOCK.search(text), f"{path.name} shows no run"
        assert report.documented(text) == text, f"{path.name} is behind: python benchmarks/run.py --docs"


def test_the_readme_shows_what_a_user_would_pick_and_no_targets() -> None:
    """From the names of figures; what a run has not is empty, a row without packsft's figure left out."""
    names = {"TRL, padded, batch 8": 10, "TRL, packing=True": 20, "packsft": 50, "bare GEMMs": 70}
    rows = [figure(f"A model: {name}", value, "tokens/s") for name, value in names.items()]
    rows += [figure(f"A model: {name}, a third of the examples", 1.0, "tokens/s") for name in names]
    rows += [figure("Another: packsft", 60, "tokens/s")]
    rows += [figure("A model: peak memory, packsft", 9, "MiB", ratio=1.1, ratio_of="memory", at_most=1.0)]
    environment = {
        "device": "a card", "cores": 2, "versions": {"python": "3", "torch": "2", "transformers": "5", "trl": "1"},
        "date": "2026-11-28T06:00+00:00", "command": "run",
    }  # fmt: skip
    suites = {"train": {"figures": rows}, "reads": {"figures": [figure("TRL, packing=True, reads per micro-step", 8)]}}
    assert report.headline({"environment": environment, "quick": False, "suites": suites}).splitlines() == [
        "| | TRL padded | TRL packed | packsft | bare matrix products |",
        "|---|---|---|---|---|",
        "| `train()`, packs over the whole data set | 10 tokens/s | 20 tokens/s | **50 tokens/s** | 70 tokens/s |",
        "| peak memory of `train()` |  |  | **9 MiB** |  |",
        "",
        "Measured: a card, 2 cores, bfloat16; torch 2, transformers 5, trl 1; 2026-11-28; `run`.",
    ]


def test_a_block_of_a_run_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="headline of never"):
        report.documented("<!-- headline of never -->\n\n<!-- end -->")
    with pytest.raises(ValueError, match="footline of"):
        report.documented("<!-- footline of 2026-11-23-amd-epyc -->\n\n<!-- end -->")


def test_an_empty_block_is_filled_and_what_follows_stays() -> None:
    empty = f"<!-- headline of {min(report.RESULTS.iterdir()).name} -->\n<!-- end -->\n"
    written = report.documented(f"{empty}after\n{empty}")
    assert written.count("Measured: ") == 2
    assert "\n<!-- end -->\nafter\n<!-- headline" in written
    assert report.documented(written) == written
