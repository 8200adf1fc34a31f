"""No tensor's value is read back by the host in a training micro-step: counted over a real run, TRL's beside ours."""

import pytest
from bench_reads import CPU_ATTENTION, count_reads
from trainers import EXACT, OURS, TRL_PACKED


@pytest.mark.parametrize("trainer", [OURS, EXACT])
def test_a_micro_step_reads_nothing_back(trainer):
    counter = count_reads(trainer)
    assert counter.operators.total() == 0, counter.operators
    # per-document SDPA cuts the row on the host, which no GPU back end does
    assert set(counter.methods) <= {CPU_ATTENTION}


def test_the_counter_sees_the_reads_of_trl():
    counter = count_reads(TRL_PACKED)
    assert counter.operators["aten::_local_scalar_dense"] > 0
