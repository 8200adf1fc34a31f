"""Replaces TRL's `SFTTrainer` by `PackedSFTTrainer`, for scripts and commands that stay unedited."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

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

    TRL's own script reads the fields of `PackedSFTConfig`, with its defaults, and its data set may be a file.

    Returns the exit code: 0, or 1 after an error. A `SystemExit` and a `KeyboardInterrupt` of the script pass.

    Raises:
        ValueError: there is no such file.
        OSError: the file cannot be read.
        ValueError, OSError, ImportError: what TRL's own script raises before it trains: bad input, for one line.
    """
    from packsft.config import PackedSFTConfig

    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    source = Path(path).read_bytes()
    # Not `runpy.run_path`: it takes `__main__` away at the end, which threads and exit handlers may still need, and it
    # makes `__file__` and `sys.argv[0]` equal, of which Python makes only the first absolute.
    script = ModuleType("__main__")
    script.__file__ = os.path.abspath(path)
    is_of_trl = compat.is_script_of_trl(path)
    with patch_trl() as patches:
        if is_of_trl:
            patches.enter_context(compat.config_in_place(PackedSFTConfig))
            patches.enter_context(mock.patch("datasets.load_dataset", _load_splits))
        sys.modules["__main__"] = script
        sys.argv = [path, *arguments]
        if not getattr(sys.flags, "safe_path", False):  # python -P, since Python 3.11
            sys.path[0] = str(Path(path).resolve().parent)  # instead of our own folder
        try:
            exec(compile(source, script.__file__, "exec", dont_inherit=True), vars(script))
        except Exception as error:
            if is_of_trl and isinstance(error, (ValueError, OSError, ImportError)) and not _trains(error):
                raise
            error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without this function
            sys.excepthook(type(error), error, error.__traceback__)
            return 1
    return 0


def _trains(error: Exception) -> bool:
    """Whether training had begun: then the traceback may be needed."""
    return any(frame.f_code.co_name == "_inner_training_loop" for frame, _ in traceback.walk_tb(error.__traceback__))


def _load_splits(path: str, name: str | None = None, *, streaming: bool = False, **options: Any) -> Any:
    """`datasets.load_dataset` for TRL's script, of all splits. It also takes a file and a folder of `save_to_disk`.

    Raises:
        ValueError, OSError: the data set cannot be read, or later, a split is asked for that it does not have.
    """
    import datasets
    from datasets.load import load_dataset  # not the name that this function replaces

    from packsft.app.rows import FILE_KINDS, is_saved, load_rows

    where = Path(path)
    if where.is_file() or where.suffix.lower() in FILE_KINDS:
        if name is not None:
            raise ValueError(f"dataset_config={name!r} has no meaning for the file {path}")
        loaded: Any = datasets.DatasetDict(train=load_rows(path))
    elif is_saved(where):
        loaded = datasets.load_from_disk(path)
        loaded = loaded if isinstance(loaded, dict) else datasets.DatasetDict(train=loaded)
    else:
        try:
            loaded = load_dataset(path, name=name, streaming=streaming, **options)
        except ValueError:
            raise
        except OSError as error:
            missing = "" if where.exists() else "there is no such file or folder, and from the hub: "
            raise OSError(f"{path}: {missing}{error}") from error
        except Exception as error:  # datasets raises anything about a damaged file
            raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error
    if streaming and isinstance(loaded, datasets.DatasetDict):
        loaded = datasets.IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in loaded.items()})

    def refuse(splits: Any, split: str) -> None:
        raise ValueError(
            f"{path} has no split {split!r}, only {', '.join(splits)}: choose it with dataset_train_split, or for "
            "eval_strategy with dataset_test_split"
        )

    return type("Splits", (type(loaded),), {"__missing__": refuse})(loaded)


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
