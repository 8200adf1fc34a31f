"""The rows of the commands: from files, as the trainer makes them.

Reads tokenised data without a tokenizer, TRL or transformers. Tokenises text with TRL's own code, through `compat.py`.
Knows a model's tokenizer but no model.
"""

from __future__ import annotations

import glob
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.data_files import DataFilesDict, DataFilesList

from packsft.app.json_lines import check_json, parse_json
from packsft.data.messages import tokenizer_without_nulls, warn_of_unseen_roles
from packsft.data.pictures import PictureRows, picture_column, with_hidden_pictures
from packsft.data.raw import checked_rows, label_rows, once_of, one_form

FILE_KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}
ROWS_PER_PROCESS = 2_000  # starting a process takes as long as tokenising about this many short examples


def prepared_rows(
    data: str,
    model: str | None,
    split: str = "train",
    assistant_only_loss: bool = False,
    completion_only_loss: bool | None = None,
    max_length: int | None = None,
) -> tuple[Dataset | PictureRows, tuple[int | None, int | None]]:
    """Rows as the trainer makes them, and the tokens that it takes once: both are what `pack_dataset` takes.

    Args:
        data: see `load_rows`.
        model: for text: its tokenizer is used; for pictures: its processor.
        max_length: where rows with pictures may be cut.

    Raises:
        ValueError, OSError: anything that the user can fix; the message names it.
    """
    rows = load_rows(data, split)
    if picture_column(rows.column_names):
        with_pictures = _with_pictures(rows, data, model, max_length, assistant_only_loss, completion_only_loss)
        return with_pictures, (None, None)
    if "seq_lengths" in rows.column_names:
        raise ValueError(f"{data} has the column seq_lengths: its rows are packed already")
    if "input_ids" not in rows.column_names:
        return _tokenise(one_form(rows, "text", data), data, model, assistant_only_loss, completion_only_loss)
    if assistant_only_loss and not {"labels", "assistant_masks"} & set(rows.column_names):
        raise ValueError(f"{data} has no column assistant_masks, which --assistant-only-loss needs")
    return label_rows(rows, completion_only_loss), (None, None)


def load_rows(data: str, split: str = "train") -> Dataset:
    """Load a JSONL, JSON, Parquet, CSV or Arrow file, a folder of `save_to_disk` or of such files, or a hub name.

    A path is never a pattern.

    Raises:
        ValueError: there are no examples or no such split, or a file cannot be parsed; for JSON the message names the
            line.
        OSError: there is no such file, folder or data set.
    """
    path = Path(data)
    kind = FILE_KINDS.get(path.suffix.lower())
    # `load_dataset` reads all files of the working folder for "" and for the name of a file type
    if not data or (not path.exists() and (kind or data in FILE_KINDS.values() or data.startswith(("/", ".")))):
        raise FileNotFoundError(f"no such file or folder: {data or repr(data)}")
    if path.is_file() and kind is None:
        raise ValueError(f"{data} has an unknown file type, expected {', '.join(FILE_KINDS)}")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{data} is empty")
    saved = is_saved(path)
    whole = str(path.absolute())
    if path.exists() and ("::" in whole or os.path.expandvars(whole) != whole):
        raise ValueError(f"{data}: datasets takes the `::` or the `$` in this path for its own: rename it")
    if path.is_dir() and not saved:
        if glob.escape(str(path.resolve())) != str(path.resolve()):
            raise ValueError(f"{data}: datasets takes the name of this folder for a pattern: rename it, or name a file")
        for file in path.rglob("*.json*"):
            if FILE_KINDS.get(file.suffix.lower()) == "json" and file.is_file():
                check_json(file)
    elif kind == "json" and path.is_file():
        check_json(path)
    try:
        if saved:
            rows = load_from_disk(whole)
        elif path.is_file():
            rows = Dataset.from_file(data) if kind == "arrow" else _read_file(path, str(kind), split)
        else:
            rows = load_dataset(data, split=split)
    except OSError as error:
        raise OSError(f"{data} is neither a local file or folder nor a data set that can be loaded: {error}") from error
    except Exception as error:  # datasets raises anything about a damaged file
        if kind == "json" and path.is_file():
            _check_objects(path)
        raise ValueError(f"{data} cannot be read: {error.__cause__ or error or 'it holds no examples'}") from error
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ValueError(f"{data} has no split {split!r}, only {', '.join(rows)}: choose one with --split")
        rows = rows[split]
    elif split != "train" and (saved or kind == "arrow"):
        raise ValueError(f"{data} has no split {split!r}: it is a data set without splits, leave --split out")
    if len(rows) == 0:
        raise ValueError(f"{data} holds no examples")
    return rows


def is_saved(path: Path) -> bool:
    """Whether it is a folder of `save_to_disk`."""
    return path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json"))


def _read_file(path: Path, kind: str, split: str) -> Dataset:
    """One file as the split "train", as `load_dataset` reads it, which would take its name for a pattern."""
    stat = path.stat()  # the cache knows a file by its name and this
    files = DataFilesList([str(path.absolute())], [(f"{stat.st_mtime_ns}", f"{stat.st_size}")])
    read: Any = {"json": Dataset.from_json, "parquet": Dataset.from_parquet, "csv": Dataset.from_csv}[kind]
    return read(DataFilesDict(train=files), split=split)


def _check_objects(path: Path) -> None:
    """Raises ValueError for the first line that is not a JSON object, or is not JSON in a file that is one array."""
    text = path.read_text(encoding="utf-8-sig")  # without a byte order mark
    if not text.strip():
        raise ValueError(f"{path} holds no examples")
    lines = [text] if text.lstrip().startswith("[") and path.suffix == ".json" else text.split("\n")
    for number, line in enumerate(lines):
        if line.strip():
            row = parse_json(line, path, number + 1)
            if len(lines) > 1 and not isinstance(row, dict):
                raise ValueError(f"{path}, line {number + 1}: a JSON {type(row).__name__}, expected an object")


# ---- texts and pictures to input ids and labels ----


def _tokenise(
    rows: Dataset, data: str, model: str | None, assistant_only_loss: bool, completion_only_loss: bool | None
) -> tuple[Dataset, tuple[int | None, int | None]]:
    completion_only = completion_only_loss is not False
    if model is None:
        checked_rows(rows, text_field="text", completion_only=completion_only, eos_token=None, name=data)
        raise ValueError(f"{data} holds text, which needs a tokenizer: name its model with --model")
    from trl import SFTConfig

    from packsft.compat import prepare_rows

    tokenizer = load_tokenizer(model)
    if (eos_token := tokenizer.eos_token) is None:
        raise ValueError(f"the tokenizer of {model} has no EOS token to end an example with")
    rows = checked_rows(rows, text_field="text", completion_only=completion_only, eos_token=eos_token, name=data)
    num_processes = min((os.cpu_count() or 1), len(rows) // ROWS_PER_PROCESS)
    with warnings.catch_warnings():
        # transformers 5.23 deprecates `gradient_checkpointing`, but 5.17 does not know the new name.
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        args = SFTConfig(
            output_dir="unused",
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=None,  # the plan cuts and counts
            dataset_num_proc=num_processes if num_processes > 1 else None,
            assistant_only_loss=assistant_only_loss,
            completion_only_loss=completion_only_loss,
        )
    try:
        warn_of_unseen_roles(rows, tokenizer, data)
        return prepare_rows(rows, tokenizer_without_nulls(tokenizer, rows, data), args), once_of(rows, tokenizer)
    except Exception as error:  # a tokenizer may raise anything
        raise ValueError(f"{data} cannot be tokenised: {error}") from error


def _with_pictures(
    rows: Dataset,
    data: str,
    model: str | None,
    max_length: int | None,
    assistant_only_loss: bool,
    completion_only_loss: bool | None,
) -> PictureRows:
    if model is None:
        raise ValueError(f"{data} holds pictures, which need a processor: name its model with --model")
    from transformers import AutoProcessor, ProcessorMixin
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = loaded(AutoProcessor, model, "the processor of ")
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"{data} holds pictures, but {model} has no processor, only a {type(processor).__name__}")
    of_completions = {"prompt", "completion"} <= set(rows.column_names)
    collator = DataCollatorForVisionLanguageModeling(
        processor,
        completion_only_loss=of_completions if completion_only_loss is None else completion_only_loss,
        assistant_only_loss=assistant_only_loss,
    )
    return PictureRows(with_hidden_pictures(rows), collator, max_length, None, data)


def loaded(kind: Any, model: str, what: str = "", **options: Any) -> Any:
    """`kind.from_pretrained(model)` of transformers, by folder or hub name. Raises ValueError if that fails."""
    from packsft.arguments import check_model_name

    check_model_name(model)
    try:
        return kind.from_pretrained(model, **options)
    except Exception as error:  # transformers raises anything about a damaged folder
        where = "" if os.path.exists(model) else "there is no such folder, and from the hub: "
        raise ValueError(f"could not load {what}{model}: {where}{error}") from error


def decoder_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids to text; an id that the tokenizer does not know is shown as a number."""

    def decode(ids: Sequence[int]) -> str:
        runs = itertools.groupby(ids, lambda token: 0 <= token < len(tokenizer))
        return "".join(tokenizer.decode(list(run)) if known else "".join(f"[{i}]" for i in run) for known, run in runs)

    return decode


def load_tokenizer(model: str) -> Any:
    """Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    from packsft.app.smollm2 import load_smollm2_tokenizer

    return load_smollm2_tokenizer() if model == "smollm2" else loaded(AutoTokenizer, model, "the tokenizer of ")
