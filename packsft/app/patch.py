"""Puts `PackedSFTTrainer` in the place of TRL's `SFTTrainer`, for scripts and commands that nobody wants to edit."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from packsft import compat


def patch_trl() -> ExitStack:
    """From here on `from trl import SFTTrainer` gives `PackedSFTTrainer`; what was imported before stays as it is.

    As a context manager it is undone at the end of the block:

        with patch_trl():
            import a_script_that_imports_SFTTrainer
    """
    from packsft.trainer import PackedSFTTrainer

    return compat.trainer_in_place(PackedSFTTrainer)


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a Python file as `python path arguments...` would, under `patch_trl`.

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
    """The command `trl` with these arguments, each process that it launches under `patch_trl`."""
    return compat.trl_command(arguments, through=("packsft", "run"))
