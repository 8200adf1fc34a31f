"""Replaces TRL's `SFTTrainer` by `PackedSFTTrainer`, for scripts and commands that stay unedited."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from packsft import compat


def patch_trl() -> ExitStack:
    """From now on, `from trl import SFTTrainer` gives `PackedSFTTrainer`. Earlier imports do not change.

    As a context manager, it is undone at the end of the block:

        with patch_trl():
            import a_script_that_imports_SFTTrainer
    """
    from packsft.trainer import PackedSFTTrainer

    return compat.trainer_in_place(PackedSFTTrainer)


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a Python file like `python path arguments...`, under `patch_trl`.

    Raises:
        ValueError: there is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    with patch_trl():
        sys.argv = [path, *arguments]
        sys.path.insert(0, str(Path(path).resolve().parent))
        runpy.run_path(path, run_name="__main__")


def run_trl(arguments: Sequence[str]) -> int:
    """Run the command `trl` with these arguments. Each process that it launches runs under `patch_trl`."""
    return compat.trl_command(arguments, through=("packsft", "run"))
