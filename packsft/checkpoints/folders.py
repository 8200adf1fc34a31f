"""Checkpoint folders on disk: published whole, found whole, deleted whole. Knows files, not trainers.

A checkpoint is written in `_incomplete/`, beside its place. When it holds the files of all ranks, its record is added,
which lists every file with its size, and one rename puts it in its place. So a folder `checkpoint-N` is whole. Where a
rename is not atomic (network and object stores), and after anything else that damages a folder, the sizes tell.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

RECORD = "packsft.json"
INCOMPLETE = "_incomplete"  # transformers uploads no name that begins with "_"
STATE = "trainer_state.json"
_TRAINING_STATE = ("optimizer", "scheduler", "scaler", "rng_state", "global_step", "packsft_state")
_EDITED = (".md", ".json", ".jinja", ".txt")  # may change after the save: a model card, a tokenizer
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, the newest (by its step) first."""
    found = [path for path in run_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def publish(staged: Path, record: Mapping[str, Any]) -> Path:
    """Add the record to a folder of `_incomplete/`, put the folder in its place, and return the place.

    The other files are on the disk already (`sync_folder`). A folder that is already there is replaced.
    """
    paths = sorted(path for path in staged.rglob("*") if path.is_file() and path != staged / RECORD)
    files = {path.relative_to(staged).as_posix(): path.stat().st_size for path in paths}
    (staged / RECORD).write_text(json.dumps({**record, "files": files}, indent=2), encoding="utf-8")
    _sync(staged / RECORD)
    _sync(staged)
    return _put_in_place(staged)


def sync_folder(folder: Path) -> None:
    """Wait until all files of a folder that this machine wrote are on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _put_in_place(staged: Path) -> Path:
    place, replaced = staged.parents[1] / staged.name, staged.with_name(f"replaced-{staged.name}")
    if place.exists():  # killed between the two renames, `finish_interrupted` does the second
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(place, replaced)
    os.rename(staged, place)
    _sync(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return place


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # Windows opens no folder; another machine may have moved it
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def finish_interrupted(run_dir: Path) -> None:
    """After a crash: publish what was whole but not yet in its place, and delete what was not. One process per disk."""
    for staged in checkpoints(run_dir / INCOMPLETE):
        if "files" in read_record(staged) and why_not_whole(staged) is None:
            _put_in_place(staged)
    shutil.rmtree(run_dir / INCOMPLETE, ignore_errors=True)


def rotate(run_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest checkpoints beyond `limit`, those that are not whole first, and none of `keep`."""
    found, keep = checkpoints(run_dir), {path.resolve() for path in keep}
    others = [path for path in found if path.resolve() not in keep]
    others.sort(key=lambda path: (why_not_whole(path) is None, path.stat().st_mtime, _step(path)))
    for path in others[: max(0, len(found) - limit) if limit else 0]:
        # Out of sight first: a kill within `rmtree` leaves no half of a checkpoint.
        trash = run_dir / INCOMPLETE / f"deleted-{path.name}"
        trash.parent.mkdir(exist_ok=True)
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)
    with contextlib.suppress(OSError):
        (run_dir / INCOMPLETE).rmdir()


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What `packsft.json` holds; empty if there is none, or it is damaged."""
    try:
        record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def why_not_whole(checkpoint: Path, only_model: bool = False) -> str | None:
    """None for a whole checkpoint, otherwise what is wrong with it; with `only_model`, apart from the training state.

    Compares files with the record. Without a list of files (a checkpoint of another library), reads the state of the
    trainer, which transformers writes last, and the sizes that the formats themselves state.
    """
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{STATE} is missing"
    except (OSError, ValueError):
        return f"{STATE} is damaged"
    files = read_record(checkpoint).get("files")
    if not isinstance(files, dict):
        return next(_damages(checkpoint), None)
    if only_model:
        files = {name: size for name, size in files.items() if not name.startswith(_TRAINING_STATE)}
    return next(_differences(checkpoint, files), None)


def _differences(checkpoint: Path, files: Mapping[str, int]) -> Iterator[str]:
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.suffix in _EDITED and name != STATE:
            if path.suffix == ".json" and not _is_json(path):
                yield f"{name} is damaged"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size:,} of {size:,} bytes"


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _damages(checkpoint: Path) -> Iterator[str]:
    for index in checkpoint.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield f"{index.name} is damaged"
            return
        yield from (f"{name} is missing" for name in sorted(shards) if not (checkpoint / name).is_file())
    for path in sorted(checkpoint.glob("*.safetensors")):
        if not _safetensors_is_whole(path):
            yield f"{path.name} is cut short"
    for pattern in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth"):
        yield from (f"{path.name} is cut short" for path in checkpoint.glob(pattern) if not zipfile.is_zipfile(path))


def _safetensors_is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):  # compares the length of the file with its header
            return True
    except (OSError, SafetensorError):
        return False


def missing_state(checkpoint: Path) -> list[str]:
    """What a checkpoint lacks of the state of optimizer, scheduler and random generators, in words."""
    names = {path.name for path in checkpoint.iterdir()}
    missing = []
    if "latest" not in names:  # DeepSpeed names its own folder there, with both
        if not any(name.startswith("optimizer") for name in names):
            missing.append("optimizer")
        if "scheduler.pt" not in names:
            missing.append("scheduler")
    if not any(name.startswith("rng_state") for name in names):
        missing.append("random")
    return missing


def find_whole(run_dir: Path, only_model: bool = False) -> tuple[list[Path], list[str]]:
    """The whole checkpoints, the newest first; and of each one newer than these, why it is not whole."""
    whole: list[Path] = []
    reasons: list[str] = []
    for checkpoint in checkpoints(run_dir):
        if (reason := why_not_whole(checkpoint, only_model)) is None:
            whole.append(checkpoint)
        elif not whole:
            reasons.append(f"{checkpoint.name} is not whole: {reason}")
    return whole, reasons
