"""The exponents of growing cost, and what is timed at each point."""

from __future__ import annotations

import time
from typing import Any

import bench_scaling
import pytest
from peers import BLOCK_MASK, OURS


@pytest.mark.parametrize(("power", "passed"), [(0.5, True), (1.0, True), (2.0, False)])
def test_the_exponent_is_that_of_the_cost(power: float, passed: bool) -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    row = bench_scaling._exponent("cost", sizes, [3 * size**power for size in sizes], bench_scaling.LINEAR)
    assert row["value"] == pytest.approx(power)
    assert row["passed"] is passed


def test_an_axis_is_a_point_for_each_size_and_an_exponent_for_all_but_the_limit() -> None:
    def candidates(size: float) -> dict[str, Any]:
        return {"limit": lambda: None, OURS: lambda: time.sleep(size), "peer": lambda: None}

    table = bench_scaling._axis("Naps", "seconds", [0.02, 0.04], candidates, 1, at_most=1.1)
    assert [(row["series"], row["x"]) for row in table[:6]] == [
        (name, size) for size in (0.02, 0.04) for name in ("limit", OURS, "peer")
    ]
    assert [bool(row.get("limit")) for row in table[:3]] == [True, False, False]
    assert [row["name"] for row in table[6:]] == ["Naps: packsft, exponent", "Naps: peer, exponent"]
    assert table[6]["value"] == pytest.approx(1.0, abs=0.3)
    assert table[6]["target"] == "<= 1.1"
    assert table[7]["target"] == ""


def test_every_axis_times_its_limit_and_ours() -> None:
    for candidates in (
        bench_scaling._cross_entropy(8, 100),
        bench_scaling._head(32, 16, 8, 100),
        bench_scaling._attention(256, 2),
    ):
        assert list(candidates)[1] == OURS
        for run in candidates.values():
            getattr(run, "prepare", lambda: None)()
            run()
    assert BLOCK_MASK in candidates
