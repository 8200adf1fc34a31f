"""What the tests of both tables of models compare."""

from typing import Any

import transformers
import trl

KEPT = ("way", "why_padded", "head", "why_compact", "attention", "attention_calls")


def is_of_this_version(report: dict[str, Any]) -> bool:
    return report["versions"]["transformers"] == transformers.__version__


def check_is_recorded(found: dict[str, Any], family: str, report: dict[str, Any], *more: str) -> None:
    """Another release of transformers, or of TRL, may take another way."""
    recorded = report["families"][family]
    if is_of_this_version(report):
        kept = (*KEPT, *more)
        assert {key: found["packsft"][key] for key in kept} == {key: recorded["packsft"][key] for key in kept}
        if trl.__version__ == report["versions"]["trl"]:
            assert found["trl"]["verdict"] == recorded["trl"]["verdict"]


def check_is_whole(report: dict[str, Any], families: list[str]) -> None:
    assert list(report["families"]) == families
    assert all(result.get("error") != "" for result in report["families"].values())  # left out only with a reason
