"""Replaces TRL's `SFTTrainer` by `PackedSFTTrainer`, for scripts and commands that stay unedited."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

from packsft import compat


def patch_trl() -> ExitStack:
    """From now on, `from trl import SFTTrainer` gives `PackedSFTTrainer`. Earlier imports do not change.

    As a context manager, it is undone at the end of the block:

        with patch_trl():
            import a_script_that_imports_SFTTrainer
    """
    from packsft.trainer import PackedSFTTrainer

    return compat.trainer_in_place(PackedSFTTrainer)


def run_script(path: str, arguments: Sequence[str]) -> int:
    """Run a Python file like `python path arguments...`, under `patch_trl`. An error is shown as Python shows it.

    TRL's own script reads the fields of `PackedSFTConfig`, with its defaults.

    Returns the exit code: 0, or 1 after an error. A `SystemExit` and a `KeyboardInterrupt` of the script pass.

    Raises:
        ValueError: there is no such file.
        OSError: the file cannot be read.
    """
    from packsft.config import PackedSFTConfig

    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    source = Path(path).read_bytes()
    # Not `runpy.run_path`: it takes `__main__` away at the end, which threads and exit handlers may still need, and it
    # makes `__file__` and `sys.argv[0]` equal, of which Python makes only the first absolute.
    script = ModuleType("__main__")
    script.__file__ = os.path.abspath(path)
    with patch_trl() as patches:
        if compat.is_script_of_trl(path):
            patches.enter_context(compat.config_in_place(PackedSFTConfig))
        sys.modules["__main__"] = script
        sys.argv = [path, *arguments]
        if not getattr(sys.flags, "safe_path", False):  # python -P, since Python 3.11
            sys.path[0] = str(Path(path).resolve().parent)  # instead of our own folder
        try:
            exec(compile(source, script.__file__, "exec", dont_inherit=True), vars(script))
        except Exception as error:
            error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without this function
            sys.excepthook(type(error), error, error.__traceback__)
            return 1
    return 0


def run_trl(arguments: Sequence[str]) -> int:
    """Run the command `trl` with these arguments. Each process that it launches runs under `patch_trl`.

    Returns the exit code of `trl`, or of the script that it launched: its traceback is printed already.
    """
    from packsft.config import PackedSFTConfig

    try:
        with compat.config_in_place(PackedSFTConfig):
            return compat.trl_command(arguments, through=("packsft", "run"))
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode  # killed by a signal
