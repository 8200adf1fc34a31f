"""How things are measured: in turns, at their peak, against float64 first; and the limits they stand beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contest import Limit, check, compete
from floors import attention_gemms
from measure import Settings, device, extra_memory, interleave
from peers import OURS, Peer

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


def contest(*peers: Peer, at_most: float | None = None) -> list[dict[str, Any]]:
    verdicts, absent = check(peers, lambda run: {"value": run()}, TRUTH, "plain")
    timed = lambda run: run  # noqa: E731
    return compete(peers, verdicts, absent, LIMIT, timed, repeats=1, chart="", prefix="a shape: ", at_most=at_most)


def value(factor: float = 1.0) -> Any:
    return lambda: factor * TRUTH["value"].float()


def test_a_wrong_answer_is_shown_as_wrong_and_not_as_fast() -> None:
    table = contest(
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
    row = contest(Peer(OURS, value(1.01)), Peer("plain", value()))[-1]
    assert row["name"] == "a shape: packsft, error against float64"
    assert row["parity"]
    assert row["passed"] is False


def test_what_cannot_run_is_listed_with_the_reason() -> None:
    def refuses() -> None:
        raise RuntimeError("no driver\nand a long story")

    table = contest(
        Peer(OURS, value()), Peer("plain", value()), Peer("absent", None, "not installed"), Peer("refuses", refuses)
    )
    rows = {row["name"].removeprefix("a shape: "): row for row in table}
    assert rows["absent"]["note"] == "cannot run: not installed"
    assert rows["refuses"]["note"] == "cannot run: RuntimeError: no driver"
    with pytest.raises(RuntimeError, match="no driver"):  # ours has to run
        contest(Peer(OURS, refuses), Peer("plain", value()))


def test_what_runs_on_few_inputs_and_not_on_many_is_listed_too() -> None:
    """Out of memory at the size that is timed: no time, and the others keep theirs."""
    runs = []

    def once() -> torch.Tensor:
        runs.append(None)
        if len(runs) > 1:
            raise MemoryError("8 GiB")
        return TRUTH["value"].float()

    rows = {row["name"]: row for row in contest(Peer(OURS, value()), Peer("plain", value()), Peer("large", once))}
    assert rows["a shape: large"]["note"] == "cannot run: MemoryError: 8 GiB"
    assert rows["a shape: plain"]["value"] is not None


def test_a_yardstick_that_is_no_number_is_none() -> None:
    with pytest.raises(AssertionError, match="plain PyTorch gave no numbers"):
        contest(Peer(OURS, value()), Peer("plain", value(float("nan"))))


def test_the_limit_of_attention_does_as_many_operations() -> None:
    """One document of 64: seven products over half of the 64 x 64 scores, of 2 heads of size 8."""
    _, flops = attention_gemms((64,), 2, 8, torch.float32, device())
    assert flops == 7 * 2 * 2 * 64 * 8 * 32


def test_the_memory_suite_needs_no_gpu_and_meets_its_targets() -> None:
    from bench_memory import bench_memory

    figures = bench_memory(Settings(quick=True))
    judged = {figure["name"]: figure["passed"] for figure in figures if figure["passed"] is not None}
    assert len(judged) == 4  # the head's budget and TRL's memory, for all tokens scored and for some
    assert all(judged.values())
    assert not [figure["name"] for figure in figures if figure["value"] is None and "packsft" in figure["name"]]
    assert next(figure["note"] for figure in figures if "QuACK" in figure["name"]).startswith("cannot run: ")


def test_every_kernel_holds_its_parity_in_every_dtype() -> None:
    from bench_parity import components

    figures = components()
    assert len(figures) == 12
    assert all(figure["passed"] for figure in figures)
    # a bound that holds everything would be none: the yardstick is rounding, not a broken comparison
    for row in figures:
        dtype = getattr(torch, row["name"].rpartition(" ")[2])
        assert row["value"] < 100 * torch.finfo(dtype).eps
        assert row["ratio"] > 0 or row["value"] == 0
