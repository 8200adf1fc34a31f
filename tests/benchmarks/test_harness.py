"""How things are measured: in turns, at their peak, against float64 first; and the limits they stand beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.contest import Limit, contest
from harness.floors import attention_gemms
from harness.measure import asserted, device, extra_memory, interleave
from harness.peers import OURS, Peer

LIMIT = Limit("limit", lambda: None, 2e9, "FLOP")
TRUTH = {"value": torch.tensor([1.0, 2.0], dtype=torch.float64)}


def test_timings_are_interleaved_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []
    times = interleave({name: lambda name=name: order.append(name) for name in "ab"}, 2, warmup=1)
    assert "".join(order) == "ababab"
    assert [len(times[name].seconds) for name in "ab"] == [2, 2]


def test_extra_memory_is_the_peak_and_not_the_sum() -> None:
    """Two tensors of 4 MiB one after the other are 4 MiB, side by side 8."""

    def one_after_the_other() -> None:
        for _ in range(2):
            torch.empty(2**20, device=device()).fill_(1.0)

    def side_by_side() -> None:
        pair = [torch.empty(2**20, device=device()).fill_(1.0) for _ in range(2)]
        assert len(pair) == 2

    assert extra_memory(one_after_the_other) == pytest.approx(4, abs=0.5)
    assert extra_memory(side_by_side) == pytest.approx(8, abs=0.5)


def held(*peers: Peer, at_most: float | None = None) -> list[dict[str, Any]]:
    timed = lambda run: run  # noqa: E731
    return list(
        contest(
            peers, lambda run: {"value": run()}, TRUTH, "plain", LIMIT, timed, repeats=1, chart="", prefix="a shape: ",
            at_most=at_most,
        )
    )  # fmt: skip


def value(factor: float = 1.0) -> Any:
    return lambda: factor * TRUTH["value"].float()


def test_a_wrong_answer_is_shown_as_wrong_and_not_as_fast() -> None:
    table = held(
        Peer(OURS, value()), Peer("plain", value()), Peer("fast", value(1.01)), Peer("nan", value(float("nan")))
    )
    rows = {row["name"].removeprefix("a shape: "): row for row in table}
    for name in ("fast", "nan"):
        assert rows[name]["note"].startswith("WRONG: errors value")
        assert rows[name]["value"] is rows[name]["ratio"] is None
    assert rows["plain"]["ratio_of"] == "time / packsft"
    assert rows[OURS]["rate_unit"] == "GFLOP/s"
    assert rows["packsft, error against float64"]["passed"]


def test_our_own_wrong_answer_fails_parity() -> None:
    row = held(Peer(OURS, value(1.01)), Peer("plain", value()))[-1]
    assert row["name"] == "a shape: packsft, error against float64"
    assert row["parity"]
    assert row["passed"] is False


def test_what_cannot_run_is_listed_with_the_reason() -> None:
    def refuses() -> None:
        raise RuntimeError("no driver\nand a long story")

    table = held(
        Peer(OURS, value()), Peer("plain", value()), Peer("absent", None, "not installed"), Peer("refuses", refuses)
    )
    rows = {row["name"].removeprefix("a shape: "): row for row in table}
    assert rows["absent"]["note"] == "cannot run: not installed"
    assert rows["refuses"]["note"] == "cannot run: RuntimeError: no driver"
    with pytest.raises(RuntimeError, match="no driver"):  # ours has to run
        held(Peer(OURS, refuses), Peer("plain", value()))


def test_what_runs_on_few_inputs_and_not_on_many_is_listed_too() -> None:
    """Out of memory at the size that is timed: no time, and the others keep theirs."""
    runs = []

    def once() -> torch.Tensor:
        runs.append(None)
        if len(runs) > 1:
            raise MemoryError("8 GiB")
        return TRUTH["value"].float()

    rows = {row["name"]: row for row in held(Peer(OURS, value()), Peer("plain", value()), Peer("large", once))}
    assert rows["a shape: large"]["note"] == "cannot run: MemoryError: 8 GiB"
    assert rows["a shape: plain"]["value"] is not None


def test_a_yardstick_that_is_no_number_is_none() -> None:
    with pytest.raises(AssertionError, match="plain PyTorch gave no numbers"):
        held(Peer(OURS, value()), Peer("plain", value(float("nan"))))


def test_the_limit_of_attention_does_as_many_operations() -> None:
    """One document of 64: seven products over half of the 64 x 64 scores, of 2 heads of size 8."""
    _, flops = attention_gemms((64,), 2, 8, torch.float32, device())
    assert flops == 7 * 2 * 2 * 64 * 8 * 32


def test_a_test_is_a_figure_of_what_it_recorded_or_of_its_failures(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import json, pytest\n"
        "@pytest.mark.parametrize('n', [1, 2])\ndef test_some_pass(n): assert n == 1, 'two'\n"
        "def test_recorded(record_property):\n"
        "    record_property('figure', json.dumps({'name': 'reads', 'value': 0, 'at_most': 0}))\n"
        "@pytest.mark.skip(reason='no card')\ndef test_left_out(): pass\n"
    )
    some, recorded, skipped = asserted(str(tmp_path))
    assert (some["name"], some["value"], some["unit"]) == ("some pass", 1, "failures of 2")
    assert some["parity"]
    assert some["passed"] is False
    assert some["note"].startswith("test_some_pass[2] failure: AssertionError: two")
    assert (recorded["name"], recorded["passed"]) == ("reads", True)
    assert "no card" in skipped["note"]
    with pytest.raises(RuntimeError, match="ran no test"):
        list(asserted(str(tmp_path), "-k", "nothing"))
