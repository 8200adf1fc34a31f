"""`benchmarks/gpu.py`: limits, verdicts, the one report and its summary. The stages are stubs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import report

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "device": "a card", "cores": 2, "threads": 1, "load_average": [0], "versions": {"torch": "2.11"},
    "date": "2026-11-24T12:00", "command": "bash benchmarks/gpu.sh",
}  # fmt: skip


def figures(*rows, quick=False, **suites):
    return {"environment": ENVIRONMENT, "quick": quick, "suites": suites or {"head": {"seconds": 1, "figures": rows}}}


def row(name, passed=None, **more):
    return {"name": name, "value": 1.0, "unit": "s", "target": ">= 2", "passed": passed, **more}


def says(code, *, failures=(1,), name="kernels"):
    return gpu.Stage(name, [sys.executable, "-c", code], failures)


def run(monkeypatch, out, *stubs):
    """The exit code of a dry run whose stages are these, after one that finds a card."""

    def stages(arguments, work):
        written = f"open({str(work / 'environment.json')!r}, 'w').write({json.dumps(figures(row('first')))!r})"
        return [says(written, name="environment"), *stubs]

    monkeypatch.setattr(gpu, "stages", stages)
    return gpu.main(["--dry-run", "--device", "cpu", "--out", str(out)])


def test_a_dry_run_leaves_the_results_alone(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    assert gpu.folder(gpu.parse([]), ENVIRONMENT).parent == report.RESULTS
    dry = gpu.folder(gpu.parse(["--dry-run"]), ENVIRONMENT)
    assert report.RESULTS not in dry.parents
    dry.rmdir()


def test_the_limits_fit_into_the_budget_and_every_stage_has_one(tmp_path):
    assert sum(gpu.LIMITS.values()) + 15 <= gpu.BUDGET < 9 * 60
    names = [stage.name for stage in gpu.stages(gpu.parse([]), tmp_path)]
    assert names == [*gpu.LIMITS]


def test_a_stage_that_runs_over_is_killed_with_what_it_started_and_what_it_said_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"print('so far', flush=True); subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    stage = says(code)
    began = time.monotonic()
    stage.run(1.5, {**os.environ})
    assert time.monotonic() - began < 5
    assert (stage.verdict, stage.said) == (gpu.STOPPED, "so far\n")
    assert "ran over its 2 s" in stage.note
    for _ in range(50):  # until the orphan is reaped
        state = Path(f"/proc/{pid_file.read_text()}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("a process of the stage lives on")


def test_what_a_stage_leaves_over_is_for_those_after_it(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LIMITS", {"environment": 3, "kernels": 0.5})
    assert run(monkeypatch, tmp_path, says("import time; time.sleep(1)")) == 0


@pytest.mark.parametrize(
    ("code", "expected"),
    [("", 0), ("raise SystemExit(1)", 1), ("raise SystemExit(2)", 2), ("import os; os.kill(os.getpid(), 9)", 2)],
)
def test_the_exit_code_tells_wrong_from_not_run_to_its_end(monkeypatch, tmp_path, capsys, code, expected):
    assert run(monkeypatch, tmp_path, says("print('why'); " + code)) == expected
    printed = capsys.readouterr().out
    assert ("why" in printed) == (expected > 0)
    assert printed.startswith(report.environment_line(ENVIRONMENT)[:60])


def test_a_stage_that_is_wrong_outweighs_one_that_stopped_and_the_rest_still_runs(monkeypatch, tmp_path):
    stubs = [says("raise SystemExit(2)"), says("raise SystemExit(1)"), says("print('last')", name="train")]
    assert run(monkeypatch, tmp_path, *stubs) == 1
    assert "last" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_sanitizer_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "compute_sanitizer", lambda: None)
    stage = gpu.sanitized("racecheck", cpu=False)
    assert run(monkeypatch, tmp_path, stage) == 2
    assert "racecheck    not run      0 s  no compute-sanitizer" in (tmp_path / "summary.txt").read_text()


def test_without_a_card_it_stops_at_once_and_says_so():
    command = ["bash", "benchmarks/gpu.sh"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == (
        "An Ampere or newer GPU is needed: none is visible. Without one: --dry-run --device cpu, everything in small.\n"
    )


def test_suites_of_all_reports_become_one_that_can_be_shown(capsys):
    import run as benchmarks

    first = figures(head={"about": "the head", "seconds": 1, "figures": [row("ours", True)]})
    second = figures(reads={"about": "reads", "seconds": 2, "figures": [row("theirs", False)]}, quick=True)
    merged = gpu.merge([figures(row("none")) | {"suites": {}}, first, second])
    assert [*merged["suites"]] == ["head", "reads"]
    assert merged["suites"]["reads"]["about"] == "reads, quick"
    assert first["suites"].keys() == {"head"}
    report.print_all(benchmarks.console(), merged)
    assert "theirs" in capsys.readouterr().out


def test_a_summary_has_at_most_150_lines_and_says_how_many_it_left_out():
    rows = [row(f"row {i}", False, headline=f"headline {i}", note="cannot run: " + 500 * "x") for i in range(300)]
    found = figures(*rows) | {
        "stages": [{"name": name, "verdict": "passed", "seconds": 1, "note": ""} for name in gpu.LIMITS],
        "tests": {"passed": 1, "failed": 300, "skipped": 9, "skips": 50 * ["1x so"], "failures": 300 * ["that"]},
    }
    lines = gpu.summary(found)
    assert len(lines) < gpu.MOST_LINES
    assert max(map(len, lines)) <= gpu.LINE
    for start, left_out in (("  FAILED", 266), ("MISS", 271), ("headline", 276), ("row", 276)):
        more = lines.index(f"... and {left_out} more")
        assert lines[more - 1].startswith(start)
        lines = lines[more + 1 :]


def test_failed_tests_are_counted_and_named_those_of_a_run_within_a_test_too(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_run_within(): raise AssertionError('\\nFAILED tests/x.py::test_y - inner reason\\n1 failed')\n"
        "@pytest.mark.skip(reason='no card')\ndef test_left_out(): pass\n"
    )
    (tmp_path / "test_broken.py").write_text("import nothing_of_that_name\n")
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "--junitxml=junit.xml",
    ]
    subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True)
    found = gpu.outcomes(tmp_path / "junit.xml")
    assert [found[name] for name in ("passed", "failed", "skipped")] == [1, 3, 1]
    assert found["skips"] == ["1x no card"]
    said = "\n".join(found["failures"])
    assert "test_it::test_bad: assert 1 == 2" in said
    assert "    tests/x.py::test_y - inner reason" in said
    assert "test_broken" in said
    assert gpu.outcomes(tmp_path / "none.xml") == {}


def test_at_most_eight_files_are_left_with_all_pictures_on_four_sheets(monkeypatch, tmp_path):
    rows = [row(f"bar {i}", chart=f"picture {i}") for i in range(9)]
    work, out = tmp_path / "work", tmp_path / "out"
    out.mkdir()
    gpu.pictures(figures(*rows), work, out)
    assert len([*(work / "pictures").iterdir()]) == 9
    assert sorted(path.name for path in out.iterdir()) == ["figures-1.png", "figures-2.png", "figures-3.png"]
    for name in ("results.json", "summary.txt", "log.txt", "junit.xml"):
        (out / name).write_text("kept")
    gpu.keep_small(out)
    assert len([*out.iterdir()]) == 7 <= gpu.MOST_FILES
    monkeypatch.setattr(gpu, "MOST_BYTES", 100)
    gpu.keep_small(out)
    assert sorted(path.name for path in out.iterdir()) == ["junit.xml", "log.txt", "results.json", "summary.txt"]
