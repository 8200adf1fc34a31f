"""Shows the tests of the machine code of the cross-entropy kernel on six GPU generations; no GPU is needed."""

from collections.abc import Iterator

from harness.measure import Figure, Settings, asserted


def bench(settings: Settings) -> Iterator[Figure]:
    """Every launch on every architecture; with --quick the long rows on one."""
    chosen = ["-k", "not every"] if settings.quick else ["--all", "-k", "not main"]
    return asserted("tests/ops/test_machine_code.py", *chosen)
