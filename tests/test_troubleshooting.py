"""Every message that the page explains is one that the code says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)


def texts(path: Path) -> Iterator[str]:
    """The strings of a file, with … for what is put into them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[sdr]|%\.\d[gf]", "…", node.value)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return [text for folder in ("packsft", "kernels") for path in (ROOT / folder).rglob("*.py") for text in texts(path)]


def test_the_page_has_messages():
    assert len(MESSAGES) > 10


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_that_the_code_says(message, said):
    assert any(message in text for text in said)
