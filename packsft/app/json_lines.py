"""Checks JSON files before a parser sees them, and names the line of an error. Knows no columns."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from itertools import accumulate
from pathlib import Path
from typing import Any

MAX_NESTING = 32  # Arrow takes 64, datasets about 45
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def check_json(path: Path) -> None:
    """Raises ValueError for the first line that is not UTF-8, or on which Arrow (26) ends the process.

    Those are lists and objects nested 100,000 deep (we allow `MAX_NESTING`) and `null` instead of an object.
    """
    depth, array = 0, None  # the depth goes on over lines: a file may be one value
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from None
            if number == 1:
                line = line.removeprefix(BOM_UTF8)
            if array is None and line.strip():
                array = line.lstrip().startswith(b"[")
            if depth == 0 and any(part.lstrip().startswith(b"null") for part in line.split(b"\r")):
                raise ValueError(f"{where}: a JSON null, expected an object")
            if b"\\" in line:
                line = line.replace(b"\\\\", b"").replace(b'\\"', b"")
            outside = b"".join(line.split(b'"')[::2])  # of strings
            opens, closes = (outside.count(a) + outside.count(b) for a, b in ((b"[", b"{"), (b"]", b"}")))
            if depth + opens > MAX_NESTING:  # cheap and rarely true; only now each bracket
                deepest = max(accumulate((_STEPS.get(byte, 0) for byte in outside), initial=depth))
                if deepest > MAX_NESTING:
                    raise ValueError(f"{where}: nested {deepest} deep, at most {MAX_NESTING} is allowed")
            depth = max(0, depth + opens - closes)
    if array:
        rows = parse_json(path.read_text(encoding="utf-8-sig"), path, 1)
        if None in rows:
            raise ValueError(f"{path}, row {rows.index(None)}: a JSON null, expected an object")


def parse_json(text: str, path: Path, line: int) -> Any:
    """The value of a text that begins at a line of a file. Raises ValueError that names the line."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}"
        raise ValueError(f"{where}: not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise ValueError(f"{path}, line {line}: an escape such as \\ud800 is half a character") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{path}, line {line}: not JSON: {error}") from None
    return value
