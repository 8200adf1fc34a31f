"""Real instruction data on every machine: the functions of Python's standard library and their docstrings.

Reads and parses source files at run time. Downloads, imports and writes nothing. Knows no tokenizer.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

# Tests, and folders that are not part of the standard library everywhere.
EXCLUDED_FOLDERS = frozenset(
    ["test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip"]
)
MIN_DOCSTRING_CHARACTERS = 20
# Ends with a line break, a token boundary in all known tokenizers: prompt and completion tokenise as their sum does.
PROMPT = "{source}\n\nDocstring of {name}:\n"


def stdlib_docstrings(folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Columns `prompt` (a function's source without its docstring) and `completion` (the docstring).

    Takes every function and method below `folder` (default: the running Python's standard library) whose docstring has
    at least 20 characters, sorted by path and line. Of identical pairs only the first is kept: none is both trained on
    and held out. On Python 3.11 these are 5,853 pairs (5,890 functions).

    Raises:
        ValueError: there is no such function, for instance in a Python without the sources of its standard library.
    """
    from datasets import Dataset

    root = Path(folder or sysconfig.get_path("stdlib"))
    # a dict keeps the first of equal pairs, and the order
    pairs = list(dict.fromkeys(pair for path in _source_files(root) for pair in _pairs(path)))
    if not pairs:
        raise ValueError(f"{root} holds no Python source with a docstring of {MIN_DOCSTRING_CHARACTERS} characters")
    prompts, completions = zip(*pairs, strict=True)
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def _source_files(root: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - EXCLUDED_FOLDERS)
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(".py"))


def _pairs(path: Path) -> list[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in old files
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            return []  # a template, or source for another Python version
    documented = []
    for function in _functions(tree):
        docstring = ast.get_docstring(function)
        if docstring and len(docstring) >= MIN_DOCSTRING_CHARACTERS:
            function.body = function.body[1:] or [ast.Pass()]
            documented.append((function, docstring))
    # Only now: the docstrings of inner functions are removed too.
    return [
        (PROMPT.format(source=ast.unparse(function), name=function.name), docstring)
        for function, docstring in documented
    ]


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions in source order. Descends only into statements: a third of the time of `ast.walk`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield child
            yield from _functions(child)
