"""Shows the tests that count reads of the device by the host in every micro-step of a real `train()`."""

from collections.abc import Iterator

from harness.measure import Figure, Settings, asserted


def bench(settings: Settings) -> Iterator[Figure]:
    """Packsft's and TRL's reads per micro-step; --quick changes nothing, it takes seconds."""
    return asserted("tests/training/test_reads.py")
